"""The configs for `serve deploy`: all keys are known and all deployments exist."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from vidgen_ray.errors import ProfileError
from vidgen_ray.online.application import API, build
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.planner import parse_gpus

CONFIGS = Path(__file__).parents[2] / "serve_configs"
GPUS = {"laptop": None, "gpu-80gb": None, "cluster": "8x80GB"}
"""Config -> GPUs that it names."""


def checked_config(text):
    """Return a config and the settings of its application. Fails for unknown keys, which Serve accepts."""
    config = ServeDeploySchema.model_validate(yaml.safe_load(text), extra="forbid")
    (app,) = config.applications
    assert app.import_path == "vidgen_ray.online.application:build"
    for deployment in app.deployments:
        assert deployment.name == API, "the others always have one replica"
        if isinstance(deployment.autoscaling_config, dict):
            AutoscalingConfig.model_validate(deployment.autoscaling_config, extra="forbid")
    settings = OnlineSettings.model_validate(app.args)
    assert (settings.host, settings.port) == (config.http_options.host, config.http_options.port)
    return config, settings


def test_shipped_configs_are_valid():
    assert {file.stem for file in CONFIGS.iterdir()} == set(GPUS)
    for name, gpus in GPUS.items():
        _, settings = checked_config((CONFIGS / f"{name}.yaml").read_text())
        assert (settings.host, settings.gpus) == ("127.0.0.1", gpus)
        if settings.gpus:
            assert parse_gpus(settings.gpus)


def test_serve_validates_the_args():
    with pytest.raises(ValueError, match="max_queue_s: needs gpus"):
        OnlineSettings(max_queue_s=60)
    call = call_user_app_builder_with_args_if_necessary
    with pytest.raises(ValidationError, match="max_queue"):
        call(build, {"profile": "tiny", "max_queue": 7})
    with pytest.raises(ProfileError, match="must be one of auto, demo"):
        call(build, {"profile": "nope", "gpus": "1x80GB"})
