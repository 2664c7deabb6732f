"""The configs for `serve deploy`: all keys are known and all deployments exist."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from vidgen_ray.errors import ProfileError, UsageError
from vidgen_ray.graph import STAGES
from vidgen_ray.online.application import API, build
from vidgen_ray.online.deployments import DIRECTOR, ENCODER, groups_of
from vidgen_ray.online.serve_config import check_config
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.planner import parse_gpus, plan, this_machine
from vidgen_ray.profile import load_profile

CONFIGS = Path(__file__).parents[2] / "serve_configs"
CLUSTERS = {"laptop": this_machine(), "gpu-80gb": parse_gpus("1x80GB"), "cluster": parse_gpus("8x80GB")}


def deployments(name, settings):
    """Return the names of the deployments on the cluster that the config is for, with all weights present."""
    profile = load_profile(settings.profile)
    if settings.layout:
        profile = profile.model_copy(update={"layout": settings.layout})
    serving_profile = ServingProfile(profile, dict.fromkeys(stage.name for stage in STAGES), {})
    groups = groups_of(plan(profile, serving_profile.demand(), CLUSTERS[name]).layout, profile, CLUSTERS[name])
    return {API, DIRECTOR, ENCODER, *(group.name for group in groups)}


def test_configs_for_laptop_gpu_and_cluster_exist():
    assert {file.stem for file in CONFIGS.iterdir()} == set(CLUSTERS)


@pytest.mark.parametrize("name", CLUSTERS)
def test_shipped_config_is_valid(name):
    config, settings = check_config(CONFIGS / f"{name}.yaml")
    (app,) = config.applications
    assert {deployment.name for deployment in app.deployments} <= deployments(name, settings)
    assert settings.keys_file or settings.host == "127.0.0.1"
    if settings.gpus:
        assert parse_gpus(settings.gpus) == CLUSTERS[name]


@pytest.mark.parametrize(
    ("valid", "invalid", "message"),
    [
        ("  port: 8000", "  prt: 8000", "http_options.prt: unknown key, must be one of host"),
        ("proxy_location", "proxy_locations", "proxy_locations: unknown key"),
        ("route_prefix", "route_prefx", "applications.0.route_prefx: unknown key"),
        ("max_queued", "max_queue", "applications.0.args.max_queue: unknown key"),
        ("name: svd", "nam: svd", "applications.0.deployments.3.nam: unknown key"),
        ("min_replicas: 2", "min_replica: 2", "applications.0.deployments.0.autoscaling_config.min_replica: unknown key"),
        ("log_level", "level", "logging_config.level: unknown key"),
        ("max_queued: 2000", "max_queued: none", "max_queued: Input should be a valid integer"),
        ("      layout: staged", "      layout: stagd", "layout: Input should be"),
        ("      port: 8000", "      port: 8001", "http_options has 0.0.0.0:8000 but args have 0.0.0.0:8001"),
        ("application:build", "application:built", "must have exactly one application, with import_path"),
        ("proxy_location:", "proxy_location: x\nproxy_location:", "not YAML"),
    ],
)
def test_invalid_config_is_rejected(tmp_path, valid, invalid, message):
    text = (CONFIGS / "cluster.yaml").read_text()
    assert valid in text
    (tmp_path / "c.yaml").write_text(text.replace(valid, invalid, 1))
    with pytest.raises(UsageError) as error:
        check_config(tmp_path / "c.yaml")
    assert message in str(error.value)


def test_serve_validates_the_args():
    call = call_user_app_builder_with_args_if_necessary
    with pytest.raises(ValidationError, match="max_queue"):
        call(build, {"profile": "tiny", "max_queue": 7})
    with pytest.raises(ProfileError, match="must be one of demo"):
        call(build, {"profile": "nope", "gpus": "1x80GB"})


def test_missing_config_file_is_reported(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        check_config(tmp_path / "c.yaml")
