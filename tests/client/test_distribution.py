"""`clients/python` is a distribution of its own: what it shares with vidgen-ray, and what it installs."""

import asyncio
import json
import os
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vidgen_client.models import Consent as ClientConsent
from vidgen_ray.safety import Consent
from vidgen_ray.version import __version__

CLIENT = Path(__file__).parents[2] / "clients" / "python"


def test_version_and_consent_are_those_of_vidgen_ray():
    assert tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]["version"] == __version__
    client, server = ClientConsent.model_json_schema(), Consent.model_json_schema()
    assert (client["properties"], client["required"]) == (server["properties"], server["required"])


def test_client_imports_only_what_is_installed_with_it():
    installed, waiting = set(), ["vidgen-client"]
    while waiting:
        installed.add(name := waiting.pop())
        for requirement in map(Requirement, requires(name) or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting += {canonicalize_name(requirement.name)} - installed
    program = "import sys; before = {*sys.modules}; import vidgen_client; print(*({*sys.modules} - before))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    owners = packages_distributions()
    imported = {canonicalize_name(owner) for name in run.stdout.split() for owner in owners.get(name.partition(".")[0], ())}
    assert imported - installed == set()
    assert {"vidgen-ray", "torch", "ray", "numpy"} & installed == set()


def test_mcp_server_without_its_extra_says_what_to_install():
    program = "import sys; sys.modules['typer'] = None; from vidgen_client.__main__ import main; main()"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.returncode, "pip install 'vidgen-client[mcp]'" in run.stderr) == (1, True)


@pytest.mark.slow
def test_client_and_mcp_server_in_an_empty_environment(tmp_path):
    """Install with pip. Needs a package index."""
    from mcp import Client, StdioServerParameters

    venv.create(tmp_path / "venv")
    bin = tmp_path / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", tmp_path / "venv"]

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command, check=True):
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=check)

    try:
        run(*pip, "install", "--quiet", "--no-compile", f"{CLIENT}[mcp]")
    except subprocess.CalledProcessError as error:
        if "No matching distribution found for hatchling" in error.stderr:
            pytest.skip("needs a package index")
        raise
    program = "from vidgen_client import Client; Client('http://127.0.0.1:9', retries=0).list_models()"
    answered = run(bin / "python", "-c", program, check=False)
    assert "vidgen_client.errors.ConnectionFailed: http://127.0.0.1:9/v1/models" in answered.stderr

    async def tools():
        async with Client(StdioServerParameters(command=str(bin / "vidgen-mcp"))) as client:
            return {tool.name for tool in (await client.list_tools()).tools}

    assert {"create_video", "wait", "download"} <= asyncio.run(tools())
    installed = {each["name"] for each in json.loads(run(*pip, "list", "--format", "json").stdout)}
    assert "vidgen-client" in installed
    assert {"vidgen-ray", "torch", "ray", "numpy"} & installed == set()
