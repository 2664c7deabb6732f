"""One network from a folder in diffusers' layout: complete, of the right kind and size, or refused with a sentence."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.libraries import silence_libraries


def load_model(model_class: Any, published_as: str, folder: Path, dtype: torch.dtype) -> Any:
    """`model_class.from_pretrained(folder)` where the folder's configuration names the class `published_as`.

    Local safetensors only. Raises SetupError for a folder that is not there, holds another kind of model, or does not
    hold exactly the tensors of this one: diffusers would go on with random ones for those that miss.
    """
    silence_libraries()
    try:
        kind = json.loads((folder / "config.json").read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SetupError(f"{folder}: no config.json of a {published_as}; copy the folder there as it is published") from None
    if kind != published_as:
        raise SetupError(f"{folder}: holds a {kind}, must be a {published_as}; copy the folder there as it is published")
    try:
        model, loaded = model_class.from_pretrained(
            str(folder), torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    # Damaged files raise whatever their reader stumbles over.
    except Exception as error:
        raise SetupError(f"{folder}: not the weights of a {published_as}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys"):
        if keys := sorted(loaded[problem]):
            raise SetupError(
                f"{folder}: {problem.replace('_', ' ')}, {len(keys)} of them, the first {keys[0]!r}; "
                "copy the folder again, with its config.json, as it is published"
            )
    return model.eval().requires_grad_(False)


def require_same(config: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str], folder: Path, others: str) -> None:
    """SetupError where the configuration of the model in `folder` differs from that of the model it is to work beside."""
    for name in names:
        # What a configuration file holds as a list is a tuple where the file leaves it to the default.
        got, needed = (tuple(v) if isinstance(v, list) else v for v in (config[name], other[name]))
        if got != needed:
            raise SetupError(
                f"{folder}: {name} is {got}, the profile's {others} weights have {needed}; use one that was trained for them"
            )
