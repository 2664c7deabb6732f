"""Checks a config for `serve deploy` by the letter: Serve itself takes unknown keys without a word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from vidgen_ray.errors import UsageError
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.strict_yaml import StrictLoader

IMPORT_PATH = "vidgen_ray.online.application:build"
WITHIN: dict[tuple[type[BaseModel], str], type[BaseModel]] = {
    (ServeDeploySchema, "applications"): ServeApplicationSchema,
    (ServeApplicationSchema, "deployments"): DeploymentSchema,
    (ServeApplicationSchema, "args"): OnlineSettings,
    (DeploymentSchema, "autoscaling_config"): AutoscalingConfig,
}
"""What a key holds, where its annotation does not say it: a plain dict, or one thing of several."""


def check_config(file: Path) -> tuple[ServeDeploySchema, OnlineSettings]:
    """The config, and the settings of its application. Raises UsageError with everything that is wrong in the file."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if unknown := list(_unknown(content, ServeDeploySchema, ())):
        raise UsageError("\n".join(f"{file}: {problem}" for problem in unknown))
    try:
        config = ServeDeploySchema.model_validate(content)
        apps = [app for app in config.applications if app.import_path == IMPORT_PATH]
        if len(config.applications) != 1 or len(apps) != 1:
            raise UsageError(f"{file}: must have one application, with import_path {IMPORT_PATH}")
        settings = OnlineSettings.model_validate(apps[0].args)
    except ValidationError as error:
        raise UsageError("\n".join(f"{file}: {_place(e['loc'])}: {e['msg']}" for e in error.errors())) from None
    listens = config.http_options.host, config.http_options.port
    if listens != (settings.host, settings.port):
        raise UsageError(
            f"{file}: http_options listens on {listens[0]}:{listens[1]}, args say {settings.host}:{settings.port}; "
            "they must agree"
        )
    return config, settings


def _unknown(content: Any, model: type[BaseModel], place: tuple[str | int, ...]) -> Iterator[str]:
    """Keys that the model does not have, here and in all that is within."""
    if isinstance(content, list):
        for number, entry in enumerate(content):
            yield from _unknown(entry, model, (*place, number))
        return
    if not isinstance(content, dict):
        return
    fields = {field.alias or name: (name, field) for name, field in model.model_fields.items()}
    for key, value in content.items():
        if key not in fields:
            yield f"{_place((*place, key))}: there is no such key, must be one of {', '.join(sorted(fields))}"
            continue
        name, field = fields[key]
        within = WITHIN.get((model, name)) or next(_models(field.annotation), None)
        if within is not None:
            yield from _unknown(value, within, (*place, key))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _place(loc: tuple[str | int, ...]) -> str:
    return ".".join(map(str, loc)) or "the file"
