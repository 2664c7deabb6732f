"""State of weights on this machine: present, incomplete or missing, with their size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vidgen_ray.errors import SetupError
from vidgen_ray.model_files import loaded_files
from vidgen_ray.weights import resolve

State = Literal["present", "missing", "built in"]


@dataclass(frozen=True, slots=True)
class LocalWeights:
    """Weights of one reference, as they are on this machine."""

    reference: str
    state: State
    """`built in`: shipped, or built on this machine when they are first needed."""
    path: Path | None
    """`None` unless present."""
    size_bytes: int | None
    """Size of the files that are loaded. `None` unless present."""
    problem: str | None
    """Why the weights are not present, and what to do."""


def local_weights(reference: str, relative_to: Path | None = None) -> LocalWeights:
    """Return the state of a reference as profiles write it. Nothing is downloaded or built."""
    if reference.startswith("builtin:"):
        return LocalWeights(reference, "built in", None, None, None)
    try:
        path = resolve(reference, relative_to)
    except SetupError as error:
        return LocalWeights(reference, "missing", None, None, str(error))
    files = [path] if path.is_file() else loaded_files(path)
    return LocalWeights(reference, "present", path, sum(file.stat().st_size for file in files), None)
