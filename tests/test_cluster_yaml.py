"""Check `cluster.yaml` against Ray's schema and the requirements of this project."""

import copy
import re
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config

from vidgen_ray.batch.run_options import GRACE_S
from vidgen_ray.cli.app import app
from vidgen_ray.planner.cluster import parse_gpus

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "cluster.yaml").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HOME = "/home/ray"


@pytest.fixture
def config():
    return yaml.safe_load(TEXT)


def test_ray_accepts_cluster_yaml(config):
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    assert set(prepared["available_node_types"]) == {"head", "gpu"}, "Ray merged in defaults of its own"


def test_token_authentication_is_enabled_everywhere(config):
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    starts = [c for c in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    for command in starts:
        assert command.index("export RAY_AUTH_MODE=token;") < command.index("ray start")
    assert config["file_mounts"][f"{HOME}/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN" not in TEXT, "the file must not contain the token"


def test_dashboard_listens_on_localhost_only(config):
    [start] = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in TEXT


def test_job_stop_timeout_is_longer_than_the_grace_period(config):
    [seconds] = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", " ".join(config["docker"]["run_options"]))
    assert int(seconds) > GRACE_S, "shots in progress need the whole grace period"


def test_cluster_yaml_contains_no_secrets_or_account_ids():
    """Only two placeholders are left to fill in. `ray up` fails immediately if they are not replaced."""
    patterns = {
        "access key": r"A(KI|SI)A[0-9A-Z]{16}",
        "account, or resource of one": r"\b\d{12}\b|arn:aws|\b(ami|fs|sg|subnet|vpc|i)-[0-9a-f]{8,}",
        "private key": r"PRIVATE KEY|\.pem\b",
        "address": r"(?!127\.0\.0\.1)\b\d{1,3}(\.\d{1,3}){3}\b",
        "token": r"\b[0-9a-f]{32,}\b",
    }
    for name, pattern in patterns.items():
        assert not re.search(pattern, TEXT), name
    values = re.sub(r"(?m)#.*$", "", TEXT)
    assert set(re.findall(r"\b(?:AMI|FILE_SYSTEM)_ID\b", values)) == {"AMI_ID", "FILE_SYSTEM_ID"}


def test_docs_use_existing_options_of_jobs():
    page = (ROOT / "docs" / "cluster.md").read_text()
    render = typer.main.get_command(app).commands["render"]
    accepted = {option for parameter in render.params for option in parameter.opts}
    jobs = re.findall(r"python -m vidgen_ray.jobs.render([^#`\n]*)", page)
    assert jobs
    for options in jobs:
        assert set(re.findall(r"(?<=\s)--?[a-z-]+", options)) <= accepted, options
    assert f"at most {GRACE_S:g} s (`--grace`)" in " ".join(page.split())
    for gpus in re.findall(r"--gpus (\d\S*?)[`\s]", page):
        parse_gpus(gpus)


def test_ray_version_is_pinned_consistently_and_allowed_by_the_project(config):
    allowed = next(r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == "ray")
    [installed] = re.findall(r'"ray\[([a-z,]+)\]==([0-9.]+)"', " ".join(config["setup_commands"]))
    extras, version = installed
    assert set(extras.split(",")) == allowed.extras
    assert version in allowed.specifier
    for image in (config["docker"]["head_image"], config["docker"]["worker_image"]):
        tag = re.fullmatch(r"rayproject/ray:(?P<ray>\d+\.\d+\.\d+)-py3(?P<minor>\d+)-(cpu|gpu)", image)
        assert tag["ray"] == version
        assert f"3.{tag['minor']}" in SpecifierSet(PROJECT["project"]["requires-python"])
