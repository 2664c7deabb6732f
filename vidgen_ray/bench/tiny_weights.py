"""Builders of the weights `builtin:tiny/...`, found by `vidgen_ray.weights` through the entry point group `vidgen.weights`."""

from collections.abc import Callable, Mapping
from pathlib import Path

from vidgen_ray.bench import tiny_faces, tiny_networks

BUILDERS: Mapping[str, Callable[[Path], None]] = {
    "flux": tiny_networks.build_flux,
    "flux-schnell": tiny_networks.build_flux_schnell,
    "lora.safetensors": tiny_networks.build_lora,
    "hunyuandit": tiny_networks.build_hunyuandit,
    "klein": tiny_networks.build_klein,
    "klein-lora.safetensors": tiny_networks.build_klein_lora,
    "qwen-edit": tiny_networks.build_qwen_edit,
    "svd": tiny_networks.build_svd,
    "wan": tiny_networks.build_wan,
    "wan-ti2v": tiny_networks.build_wan_ti2v,
    "wan-lora.safetensors": tiny_networks.build_wan_lora,
    "ltx": tiny_networks.build_ltx,
    "ltx-distilled": tiny_networks.build_ltx_distilled,
    "ltx-lora.safetensors": tiny_networks.build_ltx_lora,
    "antelopev2": tiny_faces.build_antelopev2,
    "ir_se50.pth": tiny_faces.build_ir_se50,
    "infusenet": tiny_faces.build_infusenet,
    "sdxl": tiny_faces.build_sdxl,
    "instantid-sdxl": tiny_faces.build_instantid_sdxl,
}
"""Name after `tiny/` -> function that writes the file, or into the folder if the name has no suffix."""
