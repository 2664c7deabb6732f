"""LoRA files: what they were trained for, whether they are whole, and the names of their tensors that diffusers reads.

Programs that train LoRAs name tensors in their own ways, by the layers of the authors' code or of diffusers' classes. diffusers
0.42 reads most of them; it finds no layers in others, or refuses the whole file for one unknown name.
"""

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
_WRAPPED = re.compile(r"^(base_model\.model\.|pipe\.dit\.|diffusion_model\.|transformer\.|lora_unet_)*")
"""Text in front of the names of layers, by peft, DiffSynth, ComfyUI and ai-toolkit, diffusers, kohya."""
TEXT_ENCODERS = re.compile(r"^(lora_te\d?_|text_encoder(_\d)?\.|text_encoders\.)")
"""Names of layers of text encoders. Several models share a text encoder."""
FLUX_NAMES = re.compile(r"^((double|single)_blocks|single_transformer_blocks|lora_transformer_single_transformer_blocks)[._]\d")
"""Names of layers of FLUX without what is in front of them, which others do not have."""
STABLE_DIFFUSION = "Stable Diffusion or SDXL"
STABLE_DIFFUSION_NAMES = re.compile(r"^(unet\.)?(input|output|middle|down|up|mid)_block")
HUNYUAN_NAMES = re.compile(r"^blocks[._]\d+[._]attn1[._]")
"""Wan's layers have these names, too."""
WAN_NAMES = re.compile(r"^blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]")
OTHER_MODELS = {STABLE_DIFFUSION: STABLE_DIFFUSION_NAMES, "HunyuanDiT": HUNYUAN_NAMES, "Wan": WAN_NAMES}
"""Model that is not FLUX -> names of its layers."""
OTHER_KINDS = {
    "LoHa": re.compile(r"\.hada_w1_a$"),
    "LoKr": re.compile(r"\.lokr_w1(_a)?$"),
    "textual inversion": re.compile("emb_params"),
    # diffusers loads it without its magnitudes, which is another LoRA.
    "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector(\.weight)?)$"),
}
"""Kind of adapter that is not supported -> names of its tensors."""
FLOATS = ("F16", "BF16", "F32", "F64")


def check_lora_file(path: Path, base_model: str = FLUX) -> None:
    """Raise StageError if the file cannot be a LoRA for this model: too large, another format or model, no floats, half of a
    layer, factors of different rank or of rank 0."""
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
        if any(part.search(name) for name in types):
            raise StageError(f"lora {path.name}: is a {kind}, must be a LoRA for {base_model}")
    if not any("lora" in name.lower() for name in types):
        raise StageError(
            f"lora {path.name}: has no layers of a LoRA, must be a LoRA for {base_model}; its tensors are {_listed(types)}"
        )
    _check_model(path, types, base_model)
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
        if 0 in (first, second):
            raise StageError(f"lora {path.name}: layer {layer[:80]} has rank 0, must be at least 1; the file is damaged")
        if first is not None and second is not None and first != second:
            raise StageError(
                f"lora {path.name}: the factors of layer {layer[:80]} have rank {first} and {second}; the file is damaged"
            )


def _check_model(path: Path, names: Iterable[str], base_model: str) -> None:
    """Raise StageError if layers are another model's, or only those of text encoders."""
    layers = [_WRAPPED.sub("", name) for name in names if not TEXT_ENCODERS.match(name)]
    if not layers:
        raise StageError(f"lora {path.name}: has layers of text encoders only, must have layers of {base_model}")
    is_flux = any(FLUX_NAMES.match(layer) for layer in layers)
    others = OTHER_MODELS if base_model == FLUX else {STABLE_DIFFUSION: STABLE_DIFFUSION_NAMES}
    other = next((model for model, own in others.items() if any(own.match(layer) for layer in layers)), None)
    if is_flux and other:
        raise StageError(f"lora {path.name}: has layers of {FLUX} and of {other}, must have those of {base_model} only")
    if other is None and is_flux and base_model != FLUX:
        other = FLUX
    if other:
        raise StageError(f"lora {path.name}: was trained for {other}, must be for {base_model}")


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


_TENSOR = re.compile(
    r"^(?P<layer>.+?)\.((?P<factor>lora_A|lora_B|lora_down|lora_up)(\.default)?\.(?P<kind>weight|bias)|(?P<other>alpha|diff|diff_b))$"
)
_FLUX_LAYER = re.compile(
    r"((double_blocks_\d+_(img|txt)_(attn_qkv|attn_proj|mlp_0|mlp_2|mod_lin)|single_blocks_\d+_(linear1|linear2|modulation_lin))"
    r"|img_in|txt_in|(time|vector|guidance)_in_(in|out)_layer|final_layer_(linear|adaLN_modulation_1)"
    r"|single_stream_modulation_lin|double_stream_modulation_(img|txt)_lin)"
)
"""Layers of the authors' code of FLUX.1 and FLUX.2, with kohya's underscores."""
_WAN_BLOCK = re.compile(r"blocks_(?P<block>\d+)_(?P<part>self_attn|cross_attn|ffn)_(?P<own>q|k|v|o|k_img|v_img|0|2)")
"""Layers of the blocks in the authors' code of Wan, with kohya's underscores."""
_WAN_ENDS = (
    *("head.head", "time_projection.1", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
    *("img_emb.proj.1", "img_emb.proj.3"),
)
"""Layers before and behind the blocks of Wan that LoRAs change."""
_IS_PEFT = re.compile(r"\.lora_[AB](\.default)?\.weight$")
_UNKNOWN_TEXT_ENCODERS = re.compile(r"^(lora_te[23]_|text_encoder_\d\.|text_encoders\.t5xxl\.)")
"""Text encoders whose LoRAs diffusers does not load."""
_LEFT = re.compile(r"\.processor\.|^lora_transformer_")
"""Names of XLabs and OneTrainer, all of which diffusers reads."""


def names_for_diffusers(names: Iterable[str], *, is_flux1: bool) -> dict[str, str | None]:
    """Return each tensor of a LoRA with the name that diffusers reads. `None` for those of layers that no model has.

    `is_flux1`: for FLUX.1, whose layers of the authors' code diffusers reads in kohya's names only. Names of other models than
    FLUX and Wan are left.
    """
    found: dict[str, str | None] = {name: name for name in names}
    if any("query_norm.scale" in name for name in found):
        # A control LoRA of FLUX.1 in the authors' names, which diffusers reads.
        return found
    layers = [name for name in found if not (TEXT_ENCODERS.match(name) or _LEFT.search(name))]
    # The converters of FLUX's layers with dots know no scales (alpha).
    in_kohya_names = is_flux1 or not all(_IS_PEFT.search(name) for name in layers)
    of_authors = {name: _name_of_authors_layer(name, in_kohya_names=in_kohya_names) for name in layers}
    has_diffusers_names = any(name.startswith("transformer.") and new is None for name, new in of_authors.items())
    if any(of_authors.values()) and not has_diffusers_names:
        found |= of_authors
    else:
        found |= {name: None if of_authors[name] else _name_of_diffusers_layer(name) for name in layers}
    return found | {name: None for name in found if _UNKNOWN_TEXT_ENCODERS.match(name)}


def _name_of_authors_layer(name: str, *, in_kohya_names: bool) -> str | None:
    """Return the name that diffusers reads for a layer of the authors' code. `None` for other layers.

    `in_kohya_names`: return kohya's names for layers of FLUX.
    """
    tensor = _TENSOR.match(name)
    if tensor is None:
        return None
    layer, end = _WRAPPED.sub("", tensor["layer"]), _end(tensor)
    flat = layer.replace(".", "_")
    if _FLUX_LAYER.fullmatch(flat):
        if in_kohya_names:
            return f"lora_unet_{flat}.{end.replace('lora_A', 'lora_down').replace('lora_B', 'lora_up')}"
        return f"diffusion_model.{layer}.{end}"
    if block := _WAN_BLOCK.fullmatch(flat):
        return f"diffusion_model.blocks.{block['block']}.{block['part']}.{block['own']}.{end}"
    return f"diffusion_model.{layer}.{end}" if layer in _WAN_ENDS else None


def _name_of_diffusers_layer(name: str) -> str:
    """Return the name of a layer of diffusers' class with diffusers' prefix. Names that are not those of tensors are left."""
    tensor = _TENSOR.match(name)
    return f"transformer.{_WRAPPED.sub('', tensor['layer'])}.{_end(tensor)}" if tensor else name


def layer_of(name: str) -> str:
    """Return the layer of a tensor of a LoRA, the name itself if it is another tensor."""
    tensor = _TENSOR.match(name)
    return tensor["layer"] if tensor else name


def _end(tensor: re.Match[str]) -> str:
    """Return the part of a tensor's name behind its layer, without the name of peft's adapter."""
    return f"{tensor['factor']}.{tensor['kind']}" if tensor["factor"] else tensor["other"]


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
