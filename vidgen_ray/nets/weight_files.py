"""Read published weights: torch pickles without their code, folders in diffusers' layout, headers of LoRAs, checks for NaN."""

from __future__ import annotations

import json
import math
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen_ray.errors import SetupError, StageError, VidgenError, import_problem
from vidgen_ray.limits import MAX_LORA_BYTES, MAX_LORA_HEADER_BYTES

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


_PARTS = re.compile(r"^(?P<layer>.*)\.(?P<part>lora_A|lora_B|lora_down|lora_up)(\..+)?\.weight$")
"""A layer has two factors: lora_A and lora_B in the format of diffusers, lora_down and lora_up in that of kohya."""
FIRST = ("lora_A", "lora_down")
_ATTENTION = re.compile(r"attn[._](to_[qkv]|qkv)$")
"""Layers that take the hidden state."""
FLUX = "FLUX.1"
OTHER_MODELS = {
    "Stable Diffusion or SDXL": re.compile(
        r"^(lora_unet_(input|output|middle|down|up|mid)_block|lora_te\d?_text_model|unet\.(down|up|mid)_block)"
    ),
    "HunyuanDiT": re.compile(r"^(lora_unet_blocks_\d+_attn1|blocks\.\d+\.attn1)"),
    "Wan": re.compile(r"^(diffusion_model\.blocks\.\d+\.(self_attn|cross_attn|ffn)|lora_unet_blocks_\d+_(self|cross)_attn)"),
}
"""Base model -> names of tensors of its LoRAs, which FLUX has not."""
FLUX_NAMES = re.compile(r"^(transformer\.)?(single_transformer_blocks|(lora_unet_)?(double|single)_blocks)(\.|_\d)")
"""Names of tensors of FLUX's LoRAs, which video models have not."""
OTHER_KINDS = {"LoHa": ".hada_w1_a", "LoKr": ".lokr_w1", "textual inversion": "emb_params"}
"""Kind of adapter that is not supported -> part of the names of its tensors."""
FLOATS = ("F16", "BF16", "F32", "F64")


def check_lora_file(path: Path, base_model: str = FLUX) -> None:
    """Raise StageError if the file cannot be a LoRA for this model: too large, another format or model, no floats, half of a
    layer, factors of different rank."""
    from safetensors import SafetensorError, safe_open

    _check_size(path)
    try:
        # Only the header is read. With "pt", importing torch would take a second.
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            types = {name: each.get_dtype() for name, each in slices.items()}
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise StageError(f"lora {path.name}: not a readable .safetensors file ({error})") from None
    if not types:
        raise StageError(f"lora {path.name}: has no tensors")
    for kind, part in OTHER_KINDS.items():
        if any(part in name for name in types):
            raise StageError(f"lora {path.name}: is a {kind}, must be a LoRA for {base_model}")
    if not any("lora" in name.lower() for name in types):
        raise StageError(
            f"lora {path.name}: has no layers of a LoRA, must be a LoRA for {base_model}; its tensors are {_listed(types)}"
        )
    for model, names in (OTHER_MODELS if base_model == FLUX else {FLUX: FLUX_NAMES}).items():
        if any(names.match(name) for name in types):
            raise StageError(f"lora {path.name}: was trained for {model}, must be for {base_model}")
    for name, kind in types.items():
        if kind not in FLOATS:
            raise StageError(f"lora {path.name}: tensor {name[:80]} has type {kind}, must be one of {', '.join(FLOATS)}")
    ranks: dict[str, dict[bool, int | None]] = {}
    for name, shape in shapes.items():
        if found := _PARTS.match(name):
            is_first = found["part"] in FIRST
            ranks.setdefault(found["layer"], {})[is_first] = shape[0 if is_first else 1] if len(shape) >= 2 else None
    if alone := min((layer for layer, factors in ranks.items() if len(factors) == 1), default=None):
        raise StageError(f"lora {path.name}: layer {alone[:80]} has one of its two factors only; the file is damaged")
    for layer, factors in ranks.items():
        first, second = factors[True], factors[False]
        if first is not None and second is not None and first != second:
            raise StageError(
                f"lora {path.name}: the factors of layer {layer[:80]} have rank {first} and {second}; the file is damaged"
            )


def check_lora_width(path: Path, name: str, transformer: Path) -> None:
    """Raise StageError if a LoRA that `check_lora_file` accepts was trained for a FLUX of another size.

    `name`: of the LoRA in messages. `transformer`: folder of the network.
    """
    from safetensors import safe_open

    config = json.loads((transformer / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    with safe_open(path, "np") as file:
        for tensor in file.keys():  # noqa: SIM118  # not a mapping
            found = _PARTS.match(tensor)
            if found and found["part"] in FIRST and _ATTENTION.search(found["layer"]):
                of_lora = file.get_slice(tensor).get_shape()[-1]
                if of_lora != width:
                    raise StageError(f"lora {name}: is for a model of width {of_lora}, that of the profile has {width}")
                return


def _check_size(path: Path) -> None:
    """Raise StageError for a file that is too large to be read, or whose first 8 bytes, the size of its header, are wrong."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise StageError(f"lora {path.name}: cannot be read ({error.strerror})") from None
    if size > MAX_LORA_BYTES:
        raise StageError(f"lora {path.name}: has {size:,} bytes, must have at most {MAX_LORA_BYTES:,}")
    if header_bytes > MAX_LORA_HEADER_BYTES:
        allowed = f"must be at most {MAX_LORA_HEADER_BYTES:,}"
        raise StageError(
            f"lora {path.name}: not a readable .safetensors file (its header has {header_bytes:,} bytes, {allowed})"
        )


def _listed(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first[:80]} and {len(others)} more" if others else first[:80]
