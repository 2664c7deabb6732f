"""Architectures of the published weights: the config of each network, to build it at full size without its weights.

The configs are in `published_networks.json`. Their sources:

FLUX.1, HunyuanDiT and SDXL: `config.json` of the published repositories, as copied in lllyasviel/stable-diffusion-webui-forge,
`backend/huggingface/`, commit dfdcbab6. HunyuanDiT-v1.2 differs from the copied v1.0 in `use_style_cond_and_image_meta_size`.
SVD-XT: the defaults of diffusers' classes, which were written for it. InfuseNet: FLUX.1-dev's config with 4 double and 10
single blocks, as in modelscope/DiffSynth-Studio `diffsynth/configs/model_configs.py`; its size agrees with the published file
(11.8 GB in float32). IdentityNet: SDXL's UNet without its up blocks, as `ControlNetModel.from_unet` builds it.

FLUX.2 klein 4B: `scripts/convert_flux2_to_diffusers.py` of diffusers (commit 207bae7a); its text encoder is Qwen3-4B, with the
values of its `config.json`. Wan 2.2: `scripts/convert_wan_to_diffusers.py` of diffusers; UMT5-XXL as in `wan/modules/t5.py` of
Wan-Video/Wan2.2. LTX-Video 0.9.0: `scripts/convert_ltx_to_diffusers.py` of diffusers (commit 0871dc6e). Qwen-Image-Edit: the
defaults of diffusers' classes, which were written for it; its text encoder is Qwen2.5-VL-7B, with the config in
modelscope/DiffSynth-Studio `diffsynth/models/qwen_image_text_encoder.py` (commit 288fb760).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PublishedNetwork:
    """One network of a published model."""

    class_name: str
    """Class of diffusers or transformers."""
    config: Mapping[str, Any]
    config_name: str | None = None
    """Class of the config, for networks of transformers."""


NETWORKS: Mapping[str, PublishedNetwork] = {
    name: PublishedNetwork(**fields)
    for name, fields in json.loads(Path(__file__).with_name("published_networks.json").read_bytes()).items()
}
"""Model and component -> network."""


def build_network(name: str, dtype: torch.dtype, device: str = "meta") -> Any:
    """Build a network of `NETWORKS`. On the device `meta` it takes no memory; elsewhere its weights are random."""
    import diffusers
    import torch
    import transformers

    network = NETWORKS[name]
    library = diffusers if network.config_name is None else transformers
    network_class = getattr(library, network.class_name)
    with torch.device(device):
        if network.config_name is None:
            model = network_class(**network.config)
        else:
            model = network_class(getattr(transformers, network.config_name)(**network.config))
    # Some classes of diffusers ignore the default device for single parameters.
    return model.eval().requires_grad_(False).to(device, dtype)


def realesrgan_network(upscaler: str) -> Any:
    """Build the network of an upscaler of `builtin:realesrgan` without weights."""
    from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

    if upscaler == "animevideov3":
        return SRVGGNetCompact(num_in_ch=3, num_out_ch=3, num_feat=64, num_conv=16, upscale=4, act_type="prelu")
    blocks = {"x4plus-anime": 6, "x4plus": 23}[upscaler]
    return RRDBNet(in_nc=3, out_nc=3, num_filters=64, num_blocks=blocks, scale=4)
