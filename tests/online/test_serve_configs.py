"""The configs for `serve deploy`: all keys are known and all deployments exist."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

from vidgen_ray.errors import ProfileError, UsageError
from vidgen_ray.online.application import API, build
from vidgen_ray.online.server import check_config
from vidgen_ray.planner import parse_gpus

CONFIGS = Path(__file__).parents[2] / "serve_configs"
GPUS = {"laptop": None, "gpu-80gb": None, "cluster": "8x80GB"}
"""Config -> GPUs that it names."""


def test_configs_for_laptop_gpu_and_cluster_exist():
    assert {file.stem for file in CONFIGS.iterdir()} == set(GPUS)


@pytest.mark.parametrize("name", GPUS)
def test_shipped_config_is_valid(name):
    config, settings = check_config(CONFIGS / f"{name}.yaml")
    (app,) = config.applications
    assert [deployment.name for deployment in app.deployments] in ([], [API])
    assert settings.host == config.http_options.host == "127.0.0.1"
    assert settings.gpus == GPUS[name]
    if settings.gpus:
        assert parse_gpus(settings.gpus)


INVALID = [
    ("  port: 8000", "  prt: 8000", "http_options.prt: Extra inputs are not permitted"),
    ("proxy_location", "proxy_locations", "proxy_locations: Extra inputs are not permitted"),
    ("route_prefix", "route_prefx", "applications.0.route_prefx: Extra inputs are not permitted"),
    ("max_queued", "max_queue", "max_queue: Extra inputs are not permitted"),
    ("name: Api", "nam: Api", "applications.0.deployments.0.nam: Extra inputs are not permitted"),
    ("min_replicas: 2", "min_replica: 2", "min_replica: Extra inputs are not permitted"),
    ("log_level", "level", "logging_config.level: Extra inputs are not permitted"),
    ("max_queued: 2000", "max_queued: none", "max_queued: Input should be a valid integer"),
    ("name: Api", "name: svd", "applications.0.deployments.0.name: no deployment svd, must be one of Api, Director"),
    ("name: Api", "name: Workers", "Workers always has one replica. Remove autoscaling_config"),
    ("      port: 8000", "      port: 8001", "http_options has 127.0.0.1:8000 but args have 127.0.0.1:8001"),
    ("application:build", "application:built", "must have exactly one application, with import_path"),
    ("proxy_location:", "proxy_location: x\nproxy_location:", "not YAML"),
]
"""Text of the config for a cluster, its replacement, and the error."""


def test_invalid_config_is_rejected(tmp_path):
    file, text = tmp_path / "c.yaml", (CONFIGS / "cluster.yaml").read_text()
    for valid, invalid, message in INVALID:
        assert valid in text
        file.write_text(text.replace(valid, invalid, 1))
        with pytest.raises(UsageError, match=re.escape(message)):
            check_config(file)
    file.unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        check_config(file)


def test_serve_validates_the_args():
    call = call_user_app_builder_with_args_if_necessary
    with pytest.raises(ValidationError, match="max_queue"):
        call(build, {"profile": "tiny", "max_queue": 7})
    with pytest.raises(ProfileError, match="must be one of demo"):
        call(build, {"profile": "nope", "gpus": "1x80GB"})
