"""Train the video autoencoder of the small Wan: x8, two frames per latent, in the form of Wan 2.2 (AutoencoderKLWan).

    python -m training.wan_autoencoder --out FOLDER --vae FOLDER

Its latents are those of FLUX's autoencoder, packed by `training.wan_latents`, so that `training.wan` needs no other latents.
All convolutions but those between frames see a single frame: only the last step in time of their kernels is trained, the
others stay 0 and are not stored. Decoded frames therefore do not depend on latents before them.
Source: Wan Team 2025, arXiv:2503.20314.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from PIL import Image
from torch import Tensor

from training.autoencoder import COLOURS_COUNT, DECODER_NOISE, difference, wrong_colours
from training.dataset import to_tensor, to_uint8
from training.loop import Schedule, arguments, train
from training.tracks import TRACKS, TRACKS_SEED, drawn_tracks, tracks
from training.wan_latents import PACKED, TRACK_FRAMES, packed, track_latents

CLIP_FRAMES = 5
"""Frames per clip: one, and the four that the encoder takes at a time after it."""
STRIDES = (1, 2, 3)
BATCH = 2
LATENTS_COUNT = 4.0
"""Loss weight of the squared error of the latents relative to that of the pixels."""
UNSEEN = 8
"""Tracks at the end that are not trained on."""


def autoencoder(channels: int, patch_px: int = 2, width: int = 16, decoder_width: int = 24) -> AutoencoderKLWan:
    """Return an untrained autoencoder for packed latents with `channels` per frame, of 4 x `patch_px` pixels each."""
    vae = AutoencoderKLWan(
        base_dim=width,
        decoder_base_dim=decoder_width,
        z_dim=PACKED * channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        is_residual=True,
        in_channels=3 * patch_px**2,
        out_channels=3 * patch_px**2,
        patch_size=patch_px,
        scale_factor_temporal=PACKED,
        scale_factor_spatial=4 * patch_px,
        latents_mean=[0.0] * PACKED * channels,
        latents_std=[1.0] * PACKED * channels,
    )
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size == (3, 3, 3):
            module.weight.data[:, :, :-1] = 0
            # The same result as with the zeros, in a third of the time.
            module.forward = _Spatial(module)
    return vae


class _Spatial:
    """The forward pass of a convolution of which only the last step in time is not zero."""

    def __init__(self, conv: WanCausalConv3d) -> None:
        self.conv = conv

    def __call__(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)
        done = F.conv2d(frames, self.conv.weight[:, :, -1], self.conv.bias, padding=1)
        return done.unflatten(0, (len(x), -1)).transpose(1, 2)


def encoded(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Return the mean latents (B, z, 1 + (F - 1) / 2, H / 8, W / 8) of clips (B, 3, F, H, W) from -1 to 1."""
    return vae.encode(clips).latent_dist.mean


def decoded(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Return clips (B, 3, F, H, W) as `vae.decode`, but not clamped to -1 to 1."""
    vae.clear_cache()
    seen, frames = vae.post_quant_conv(latents), []
    for n in range(seen.shape[2]):
        vae._conv_idx = [0]
        frames.append(vae.decoder(seen[:, :, n : n + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=n == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(frames, dim=2), patch_size=vae.config.patch_size)


def main() -> int:
    told = arguments(__doc__, steps=5500, rate=2e-3, seed=12, vae="out/training/vae", data="out/training/data")
    flux_vae = AutoencoderKL.from_pretrained(told.vae, torch_dtype=torch.float32).requires_grad_(False)
    of = tracks(TRACKS, TRACKS_SEED, TRACK_FRAMES)
    latents, frames = track_latents(of, flux_vae, told.data), drawn_tracks(of, told.data / "wan-tracks.npy")
    vae = autoencoder(latents.shape[2])

    def clips(generator: torch.Generator, first: int, last: int, count: int) -> tuple[Tensor, Tensor]:
        """Return clips (count, 3, CLIP_FRAMES, 128, 128) and their latents (count, 32, 3, 16, 16)."""
        which = torch.randint(first, last, (count,), generator=generator).tolist()
        strides = [STRIDES[n] for n in torch.randint(0, len(STRIDES), (count,), generator=generator).tolist()]
        begun = torch.rand(count, generator=generator).tolist()
        pixels, wanted = [], []
        for n, stride, share in zip(which, strides, begun, strict=True):
            start = int(share * (TRACK_FRAMES - stride * (CLIP_FRAMES - 1)))
            taken = slice(start, start + stride * (CLIP_FRAMES - 1) + 1, stride)
            pixels.append(to_tensor(frames[n, taken]).transpose(0, 1))
            wanted.append(latents[n, taken])
        return torch.stack(pixels), packed(torch.stack(wanted).float())

    def loss(step: int, generator: torch.Generator) -> Tensor:
        pixels, wanted = clips(generator, 0, TRACKS - UNSEEN, BATCH)
        noisy = wanted + DECODER_NOISE * torch.randn(wanted.shape, generator=generator)
        drawn, true = (clip.transpose(1, 2).flatten(0, 1) for clip in (decoded(vae, noisy), pixels))
        rebuilt = difference(drawn, true) + COLOURS_COUNT * wrong_colours(drawn, true)
        return rebuilt + LATENTS_COUNT * (encoded(vae, pixels) - wanted).square().mean()

    def look(step: int) -> None:
        with torch.no_grad():
            pixels, wanted = clips(torch.Generator().manual_seed(1), TRACKS - UNSEEN, TRACKS, UNSEEN)
            found = encoded(vae, pixels)
            drawn, whole = decoded(vae, wanted), decoded(vae, found)
        off = (found - wanted).square().mean(dim=(0, 1, 3, 4))
        l1 = [(clip - pixels).abs().mean().item() / 2 for clip in (drawn, whole)]
        print(
            f"step {step}: latents off by {off.tolist()}, L1 of decoded {l1[0]:.4f}, of encoded and decoded {l1[1]:.4f}",
            flush=True,
        )
        rows = [
            np.concatenate(list(to_uint8(clip[n].transpose(0, 1))), axis=1)
            for n in range(UNSEEN)
            for clip in (pixels, drawn, whole)
        ]
        Image.fromarray(np.concatenate(rows)).save(told.out / "rebuilt.png")

    train({"vae": vae}, loss, Schedule(told.steps, told.rate, weight_decay=0.0), told.out, told.seed, look=look)
    look(told.steps)
    vae.save_pretrained(told.out / "vae")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
