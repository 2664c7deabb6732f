"""Read published weights: torch pickles without their code, folders in diffusers' layout, checks for NaN."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen_ray.errors import SetupError, VidgenError, import_problem

if TYPE_CHECKING:
    import torch


NOT_FINITE = "the model returned NaN or infinite values; check the weights, the LoRAs and the profile's dtype"


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all numbers are finite. The result of a GPU tensor is waited for."""
    import torch

    # A sum takes a tenth of the time of the exact check, which decides if it overflows.
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or bool(tensor.isfinite().all())


def not_finite(tensors: Mapping[str, Any], device: str | None = None) -> str | None:
    """Return the name of the first tensor of floating-point numbers that are not all finite. `device`: where to check them."""
    numbers = ((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point())
    return next((name for name, tensor in numbers if not is_finite(tensor if device is None else tensor.to(device))), None)


def require_finite_weights(
    networks: Mapping[str, Any], error: type[VidgenError] = SetupError, device: str | None = None
) -> None:
    """Raise an error if a parameter of a network holds NaN or infinity. `networks`: name in the message -> torch module.

    `device`: copy the parameters there one by one, to check them. Default: check them where they are.
    """
    for name, network in networks.items():
        if (parameter := not_finite(dict(network.named_parameters()), device)) is not None:
            raise error(
                f"{name}: {parameter} has NaN or infinite values; copy the weights again, or choose a dtype with their range"
            )


class NotTensors(ValueError):
    """The file is damaged, or holds other objects than tensors."""


def load_torch_file(file: Path) -> Any:
    """Return the content of the file on the CPU: tensors in dicts and lists.

    Raises NotTensors for other objects, and errors of almost any class for damaged files.
    """
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    # torch's own message says how to run the file's code.
    except (pickle.UnpicklingError, EOFError):
        raise NotTensors("is damaged, or holds other objects than tensors, which could run code") from None


@contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Turn any exception into a SetupError with this message and the reason: libraries raise many types for damaged files.

    An ImportError says nothing about the file: its SetupError names the package.
    """
    try:
        yield
    except ImportError as error:
        raise SetupError(import_problem(error)) from error
    except Exception as error:
        raise SetupError(f"{message}: {error}") from error


@lru_cache(maxsize=1)
def silence_libraries() -> None:
    """Turn off progress bars and warnings. Call before the first model is loaded. Idempotent."""
    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    # diffusers' own ControlNet for FLUX imports FluxPosEmbed from the deprecated module.
    warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)


def load_model(model_class: Any, published_as: str, folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Return `model_class.from_pretrained(folder)` on the device if the folder's configuration names the class `published_as`.

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
    with library_errors(f"{folder}: not the weights of a {published_as}"):
        model, loaded = model_class.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            device_map=None if device == "cpu" else device,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    for problem in ("missing_keys", "unexpected_keys"):
        if keys := sorted(loaded[problem]):
            raise SetupError(
                f"{folder}: {len(keys)} {problem.replace('_', ' ')}, the first is {keys[0]!r}; "
                "copy the published folder again, with its config.json"
            )
    require_finite_weights({f"{folder}: {published_as}": model})
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
