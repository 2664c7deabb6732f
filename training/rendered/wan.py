"""Train a small Wan on the rendered world: image and prompt to clip, with the speed given by words.

    python -m training.rendered.wan --out FOLDER --vae FOLDER --flux FOLDER

It learns on latents of FLUX's autoencoder, two frames packed in one, that `training.rendered.wan_autoencoder` encodes and
decodes. As in TI2V-5B, the first latents are those of the image. The text encoder is FLUX's T5, unchanged.
Source: Wan Team 2025, arXiv:2503.20314; Esser et al. 2024, arXiv:2403.03206 (flow matching).
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor, nn

from training.channels_last import channels_last
from training.dataset import to_uint8
from training.latents import encoded
from training.loop import Schedule, arguments, train
from training.rendered.captions import caption, styled_caption
from training.rendered.tracks import TRACKS_SEED, Track, tracks
from training.wan import SPEED_WORDS, UNPROMPTED, UNTOLD, Reader, denoised, denoising_loss, speed_words
from training.wan import transformer as transformer_before
from training.wan_latents import FRAMES

TRACKS = 1600
BATCH = 4
MUON_RATE = 0.01


def transformer(channels: int, text_channels: int) -> WanTransformer3DModel:
    config = transformer_before(channels, text_channels).config
    net = WanTransformer3DModel.from_config(config, num_attention_heads=8, ffn_dim=512, num_layers=6)
    # Start with all information of the latents in the tokens, and a velocity of zero.
    nn.init.orthogonal_(net.patch_embedding.weight.data.view(net.patch_embedding.out_channels, -1))
    nn.init.zeros_(net.proj_out.weight)
    nn.init.zeros_(net.proj_out.bias)
    return net


def prompt_for(track: Track, chance: Random) -> str:
    if chance.random() < UNPROMPTED:
        return ""
    told = caption(track.scene, chance) if track.style == "flat" else styled_caption(track.scene, track.style, chance)
    words = "" if chance.random() < UNTOLD else speed_words(track.speed, chance)
    return f"{told}, {words}" if words else told


def track_latents(of: list[Track], vae: AutoencoderKL, file: Path) -> Tensor:
    """Return latents (N, FRAMES, 16, 16, 16), scaled, from the cache file if it exists."""
    if not file.exists():
        fresh = file.with_suffix(".new")
        torch.save(torch.stack([encoded(track.frames(), vae) for track in of]), fresh)
        os.replace(fresh, file)
    return torch.load(file, weights_only=True)


def main() -> int:
    told = arguments(
        __doc__,
        steps=6000,
        rate=1.2e-3,
        seed=8,
        vae="out/rendered/vae/vae",
        data="out/rendered/data",
        flux="out/rendered/flux/pipeline",
    )
    vae = AutoencoderKL.from_pretrained(told.vae, torch_dtype=torch.float32).requires_grad_(False)
    channels_last(vae)
    flux = FluxPipeline.from_pretrained(told.flux, vae=vae, transformer=None, torch_dtype=torch.float32)
    read = Reader(flux)
    of = tracks(TRACKS, TRACKS_SEED, FRAMES)
    latents = track_latents(of, vae, told.data / "wan-tracks.pt")
    cells = torch.from_numpy(np.stack([track.detail_cells() for track in of])).float()
    net = transformer(latents.shape[2], flux.text_encoder_2.config.d_model)
    if told.init:
        net = WanTransformer3DModel.from_pretrained(told.init, subfolder="transformer", torch_dtype=torch.float32)
    unseen = tracks(8, TRACKS_SEED + 1, FRAMES)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        which = [chance.randrange(len(of)) for _ in range(BATCH)]
        text = read([prompt_for(of[n], chance) for n in which])
        with torch.autocast("cpu", torch.bfloat16):
            return denoising_loss(net, latents[which].float(), cells[which], text, generator)

    def look(step: int) -> None:
        look_at(net, read, vae, unseen, told.out / f"clips-{step}.png")
        net.save_pretrained(told.out / "transformer")

    schedule = Schedule(told.steps, told.rate, muon_rate=MUON_RATE)
    train({"transformer": net}, loss, schedule, told.out, told.seed, look=look, look_every=1000)
    look(told.steps)
    return 0


@torch.no_grad()
def look_at(net: WanTransformer3DModel, read: Reader, vae: AutoencoderKL, of: list[Track], file: Path) -> None:
    """Save a grid with one row per clip: for each track a slow and a fast one."""
    rows = []
    for n, track in enumerate(of):
        first = encoded(track.frame(0)[None], vae).float()
        for words in (SPEED_WORDS["slow"][0], SPEED_WORDS["fast"][0]):
            text = read([f"{caption(track.scene, Random(n))}, {words}"])
            clip = denoised(net, first, text, torch.Generator().manual_seed(n), 8)[0]
            pixels = vae.decode(clip / vae.config.scaling_factor + vae.config.shift_factor).sample
            rows.append(np.concatenate(list(to_uint8(pixels)), axis=1))
    Image.fromarray(np.concatenate(rows)).save(file)


if __name__ == "__main__":
    raise SystemExit(main())
