"""Load one network from a folder in diffusers' layout, and check its kind, sizes and completeness."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.finite import require_finite_weights
from vidgen_ray.nets.libraries import silence_libraries

if TYPE_CHECKING:
    import torch


def load_model(model_class: Any, published_as: str, folder: Path, dtype: torch.dtype) -> Any:
    """Return `model_class.from_pretrained(folder)` if the folder's configuration names the class `published_as`.

    Reads local safetensors only. Raises SetupError if the folder is missing, holds another kind of model, or lacks tensors
    or has unexpected ones. diffusers would initialise missing tensors randomly.
    """
    silence_libraries()
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SetupError(f"{folder}: no config.json of a {published_as}; copy the published folder to this path") from None
    if kind != published_as:
        raise SetupError(f"{folder}: holds a {kind}, must be a {published_as}; copy the published folder to this path")
    try:
        model, loaded = model_class.from_pretrained(
            str(folder), torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    # diffusers raises many exception types for damaged files.
    except Exception as error:
        raise SetupError(f"{folder}: not the weights of a {published_as}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys"):
        if keys := sorted(loaded[problem]):
            raise SetupError(
                f"{folder}: {len(keys)} {problem.replace('_', ' ')}, the first is {keys[0]!r}; "
                "copy the published folder again, with its config.json"
            )
    try:
        require_finite_weights({published_as: model})
    except ValueError as error:
        raise SetupError(f"{folder}: {error}") from None
    return model.eval().requires_grad_(False)


def require_same(config: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str], folder: Path, others: str) -> None:
    """Raise SetupError if the model in `folder` and the profile's `others` weights differ in one of these config values."""
    for name in names:
        # Lists come from a config file, tuples from the class's defaults.
        got, needed = (tuple(v) if isinstance(v, list) else v for v in (config[name], other[name]))
        if got != needed:
            raise SetupError(
                f"{folder}: {name} is {got}, the profile's {others} weights have {needed}; use weights trained for that model"
            )
