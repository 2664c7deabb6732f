"""LoRA files: what they were trained for, and whether they are whole, from their headers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from vidgen_ray.errors import StageError
from vidgen_ray.limits import MAX_LORA_BYTES, MAX_LORA_HEADER_BYTES

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
