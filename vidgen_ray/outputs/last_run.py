"""Read `run.json`: the last run in an output folder, and settings of its profile."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel

from vidgen_ray.outputs.folder import OutputFolder

M = TypeVar("M", bound=BaseModel)


def read_last_run(outputs: OutputFolder) -> Any:
    """Return the content of `run.json`, or an empty mapping if there was no run. Raises ValueError if it is damaged."""
    return json.loads(outputs.storage.read("run.json") or b"{}")


def setting_of_last_run(outputs: OutputFolder, name: str, model: type[M]) -> M | None:
    """Return a setting of the last run's profile, or `None` if there was no run."""
    try:
        return model.model_validate(read_last_run(outputs)["profile"][name])
    except (ValueError, KeyError, TypeError):
        return None
