"""Random identity networks in the published layouts and key names, small enough to run beside the tiny FLUX.

They answer to another face and to another pose with another picture; they know no face.
"""

from pathlib import Path

import torch
from diffusers import FluxControlNetModel

from vidgen_ray.nets.face_resampler import PROJECTION, FaceResampler, ResamplerSizes
from vidgen_ray.nets.infusenet import EMBEDDING_SIZE, NET_FOLDER, PROJECTION_FILE
from vidgen_ray.nets.libraries import quieten

quieten()

TOKEN_CHANNELS = 32
"""What the tiny FLUX has for T5's 4096."""


def build_infusenet(folder: Path) -> None:
    """InfuseNet for `tiny/flux` and `tiny/flux-schnell`: 1 double and 2 single blocks, told a guidance, 8 tokens."""
    torch.manual_seed(5)
    net = FluxControlNetModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TOKEN_CHANNELS,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=[4, 6, 6],
    )
    # diffusers starts them at zero, which would make the net say nothing.
    for silent in (net.controlnet_x_embedder, *net.controlnet_blocks, *net.controlnet_single_blocks):
        silent.reset_parameters()
    # Small enough to make two shards, as the published 11.8 GB are.
    net.eval().save_pretrained(folder / NET_FOLDER, max_shard_size="250KB")
    resampler = FaceResampler(
        ResamplerSizes(EMBEDDING_SIZE, tokens=8, channels=32, heads=2, depth=2, hidden=128, output=TOKEN_CHANNELS)
    )
    torch.save({PROJECTION: resampler.state_dict()}, folder / PROJECTION_FILE)
