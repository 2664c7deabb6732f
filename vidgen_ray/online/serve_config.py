"""Strict check of a config for `serve deploy`. Ray Serve itself ignores unknown keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from vidgen_ray.errors import UsageError
from vidgen_ray.online.application import API
from vidgen_ray.online.deployments import DIRECTOR, WORKERS
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.system.strict_yaml import load_yaml

IMPORT_PATH = "vidgen_ray.online.application:build"
NESTED_MODELS: dict[tuple[type[BaseModel], str], type[BaseModel]] = {
    (ServeDeploySchema, "applications"): ServeApplicationSchema,
    (ServeApplicationSchema, "deployments"): DeploymentSchema,
    (ServeApplicationSchema, "args"): OnlineSettings,
    (DeploymentSchema, "autoscaling_config"): AutoscalingConfig,
}
"""Models of keys whose annotation does not name one model: a plain dict or a union."""


def check_config(file: Path) -> tuple[ServeDeploySchema, OnlineSettings]:
    """Return the config and the settings of its application. Raises UsageError with all problems of the file."""
    try:
        content = load_yaml(file)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if unknown := list(_unknown_keys(content, ServeDeploySchema, ())):
        raise UsageError("\n".join(f"{file}: {problem}" for problem in unknown))
    try:
        config = ServeDeploySchema.model_validate(content)
        apps = [app for app in config.applications if app.import_path == IMPORT_PATH]
        if len(config.applications) != 1 or len(apps) != 1:
            raise UsageError(f"{file}: must have exactly one application, with import_path {IMPORT_PATH}")
        settings = OnlineSettings.model_validate(apps[0].args)
        for number, deployment in enumerate(apps[0].deployments):
            _check_deployment(deployment, f"{file}: applications.0.deployments.{number}")
    except ValidationError as error:
        raise UsageError("\n".join(f"{file}: {_dotted(e['loc'])}: {e['msg']}" for e in error.errors())) from None
    host, port = config.http_options.host, config.http_options.port
    if (host, port) != (settings.host, settings.port):
        raise UsageError(
            f"{file}: http_options has {host}:{port} but args have {settings.host}:{settings.port}. They must match."
        )
    return config, settings


def _check_deployment(deployment: DeploymentSchema, location: str) -> None:
    """Raise UsageError for a deployment that does not exist, and for replicas of one that has a single replica."""
    if deployment.name not in (names := (API, DIRECTOR, WORKERS)):
        raise UsageError(f"{location}.name: no deployment {deployment.name}, must be one of {', '.join(names)}")
    replicas = deployment.model_fields_set & {"num_replicas", "max_replicas_per_node", "autoscaling_config"}
    if deployment.name != API and replicas:
        raise UsageError(
            f"{location}: {deployment.name} always has one replica. Remove {', '.join(sorted(replicas))}. "
            "The number of workers follows from `gpus` and `layout`."
        )


def _unknown_keys(content: Any, model: type[BaseModel], location: tuple[str | int, ...]) -> Iterator[str]:
    """Yield a message for each key that the model or a nested model does not have."""
    if isinstance(content, list):
        for number, entry in enumerate(content):
            yield from _unknown_keys(entry, model, (*location, number))
        return
    if not isinstance(content, dict):
        return
    fields = {field.alias or name: (name, field) for name, field in model.model_fields.items()}
    for key, value in content.items():
        if key not in fields:
            yield f"{_dotted((*location, key))}: unknown key, must be one of {', '.join(sorted(fields))}"
            continue
        name, field = fields[key]
        nested = NESTED_MODELS.get((model, name)) or next(_models_in(field.annotation), None)
        if nested is not None:
            yield from _unknown_keys(value, nested, (*location, key))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation contains."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _dotted(loc: tuple[str | int, ...]) -> str:
    return ".".join(map(str, loc)) or "the file"
