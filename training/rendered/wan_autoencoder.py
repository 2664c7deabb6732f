"""Train the video autoencoder of the small Wan of the rendered world: x16, two frames per latent (AutoencoderKLWan).

    python -m training.rendered.wan_autoencoder --out FOLDER --vae FOLDER

Its latents are those of FLUX's autoencoder, packed by `training.wan_latents`. Only the last step in time of kernels over pixels
and frames is trained, see `training.wan_autoencoder`.
Source: Wan Team 2025, arXiv:2503.20314.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from training.autoencoder import wrong_colours
from training.channels_last import channels_last
from training.dataset import cached, to_tensor, to_uint8
from training.latents import cached_latents
from training.loop import Schedule, arguments, train
from training.rendered.autoencoder import difference
from training.rendered.decoder import COLOURS, NOISE, edge_sharpness
from training.rendered.tracks import TRACKS_SEED, tracks
from training.wan_autoencoder import LATENTS_COUNT, autoencoder, decoded, encoded
from training.wan_latents import packed

PATCH_PX, WIDTH, DECODER_WIDTH = 4, 32, 48
TRACKS, TRACK_FRAMES = 400, 9
CLIP_FRAMES = 5
"""Frames per clip: one, and the four that the encoder takes at a time after it."""
BATCH = 2
UNSEEN = 8
"""Tracks at the end that are not trained on."""


def main() -> int:
    told = arguments(__doc__, steps=3000, rate=1e-3, seed=12, vae="out/rendered/vae/vae", data="out/rendered/data")
    flux_vae = AutoencoderKL.from_pretrained(told.vae, torch_dtype=torch.float32).requires_grad_(False)
    channels_last(flux_vae)
    of = tracks(TRACKS, TRACKS_SEED, TRACK_FRAMES)
    frames = cached(told.data / "wan-pixels.npy", lambda: np.stack([track.frames() for track in of]))
    latents = cached_latents(told.data / "wan-pixels.pt", frames.reshape(-1, *frames.shape[2:]), flux_vae)
    latents = latents.unflatten(0, frames.shape[:2])
    vae = autoencoder(latents.shape[2], PATCH_PX, WIDTH, DECODER_WIDTH)

    def clips(generator: torch.Generator, first: int, last: int, count: int) -> tuple[Tensor, Tensor]:
        """Return clips (count, 3, CLIP_FRAMES, 256, 256) and their latents (count, 32, 3, 16, 16)."""
        which = torch.randint(first, last, (count,), generator=generator).tolist()
        starts = torch.randint(0, TRACK_FRAMES - CLIP_FRAMES + 1, (count,), generator=generator).tolist()
        taken = [(n, slice(start, start + CLIP_FRAMES)) for n, start in zip(which, starts, strict=True)]
        pixels = torch.stack([to_tensor(frames[at]).transpose(0, 1) for at in taken])
        return pixels, packed(torch.stack([latents[at] for at in taken]).float())

    def loss(step: int, generator: torch.Generator) -> Tensor:
        pixels, wanted = clips(generator, 0, TRACKS - UNSEEN, BATCH)
        noisy = wanted + NOISE * torch.randn(wanted.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            made, found = decoded(vae, noisy).float(), encoded(vae, pixels).float()
        made, true = (clip.transpose(1, 2).flatten(0, 1) for clip in (made, pixels))
        rebuilt = difference(made, true) + COLOURS * wrong_colours(made, true)
        return rebuilt + LATENTS_COUNT * (found - wanted).square().mean()

    def look(step: int) -> None:
        with torch.no_grad():
            pixels, wanted = clips(torch.Generator().manual_seed(1), TRACKS - UNSEEN, TRACKS, UNSEEN)
            found = encoded(vae, pixels)
            made = decoded(vae, wanted)
        off, error = (found - wanted).square().mean().item(), (made - pixels).abs().mean().item() / 2
        true, ours = (clip.transpose(1, 2).flatten(0, 1) for clip in (pixels, made))
        print(
            f"step {step}: latents off by {off:.4f}, L1 of frames {error:.4f}, sharpness {edge_sharpness(ours, true):.3f}",
            flush=True,
        )
        rows = [
            np.concatenate(list(to_uint8(clip[n].transpose(0, 1))), axis=1) for n in range(UNSEEN) for clip in (pixels, made)
        ]
        Image.fromarray(np.concatenate(rows)).save(told.out / "rebuilt.png")
        vae.save_pretrained(told.out / "vae")

    schedule = Schedule(told.steps, told.rate, weight_decay=0.0, muon_rate=0.02)
    train({"vae": vae}, loss, schedule, told.out, told.seed, look=look)
    look(told.steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
