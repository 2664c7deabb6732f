"""Train the decoder of the rendered world's autoencoder for sharp images. Latents do not change.

    python -m training.rendered.decoder --out FOLDER --vae FOLDER --captioner FILE

The latents get noise, because those of FLUX and SVD are not exactly the encoder's. Beside the loss of colours there are one of
the features of the captioner, which sees traits, and a discriminator of patches, which makes edges and textures sharp.
Source: Rombach et al. 2022, arXiv:2112.10752; Isola et al. 2017, arXiv:1611.07004 (patches); Lim and Ye 2017, arXiv:1705.02894
(hinge loss).
"""

from __future__ import annotations

from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from training.autoencoder import wrong_colours
from training.channels_last import channels_last
from training.dataset import to_tensor, to_uint8
from training.loop import Schedule, arguments, train
from training.rendered.autoencoder import FEATURES, HELD_OUT, WHOLE_SHARE, Crops, difference, features, load_captioner
from training.rendered.dataset import drawn, scenes
from training.rendered.drawing import styled
from training.rendered.world import STYLES

NOISE = 0.08
"""Standard deviation of the noise relative to the spread of the latents, at most."""
COLOURS, ADVERSARIAL = 4.0, 0.15
"""Loss weights relative to the error of colours from -1 to 1."""
WITHOUT_DISCRIMINATOR = 200
"""First steps, in which only the discriminator learns from it."""


class Discriminator(nn.Module):
    """Images (B, 3, H, W) -> logits of patches of about 30 pixels (B, 1, H / 8, W / 8): positive for drawings."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in (32, 64, 96):
            layers += [nn.utils.parametrizations.spectral_norm(nn.Conv2d(before, width, 4, 2, 1)), nn.LeakyReLU(0.2)]
            before = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def edge_sharpness(made: Tensor, wanted: Tensor) -> float:
    """Return the mean contrast of neighbouring pixels along the edges of `wanted`, relative to that of `wanted`."""
    across, down = wanted.diff(dim=3).abs(), wanted.diff(dim=2).abs()
    edges = [(across > 0.25, made.diff(dim=3).abs(), across), (down > 0.25, made.diff(dim=2).abs(), down)]
    found = sum(float(ours[where].sum()) for where, ours, _ in edges)
    return found / sum(float(theirs[where].sum()) for where, _, theirs in edges)


def main() -> int:
    told = arguments(
        __doc__,
        steps=2000,
        rate=1e-3,
        seed=4,
        vae="out/rendered/vae/vae",
        captioner="out/rendered/captioner/captioner.safetensors",
        data="out/rendered/data",
    )
    vae = AutoencoderKL.from_pretrained(told.init or told.vae, torch_dtype=torch.float32)
    vae.encoder.requires_grad_(False)
    channels_last(vae)
    captioner = load_captioner(told.captioner)
    discriminator = Discriminator()
    discriminator.to(memory_format=torch.channels_last)
    world = scenes()
    pictures = drawn(world, told.data / "scenes.npy")
    crops = Crops(world, pictures)
    unseen = to_tensor(
        np.stack([styled(np.asarray(pictures[n - HELD_OUT]), STYLES[n % 4 if n > 11 else 0]) for n in range(16)])
    )

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        wanted = crops(chance.random() < WHOLE_SHARE, chance)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                mean = vae.encode(wanted).latent_dist.mean
                spread = NOISE * torch.rand((len(mean), 1, 1, 1), generator=generator) / vae.config.scaling_factor
                z = mean + spread * torch.randn(mean.shape, generator=generator)
                looked_for = features(captioner.body, wanted)
            made = vae.decode(z).sample
            off = [F.l1_loss(ours, theirs) for ours, theirs in zip(features(captioner.body, made), looked_for, strict=True)]
            frozen = {name: value.detach() for name, value in discriminator.named_parameters()}
            fooled = -torch.func.functional_call(discriminator, frozen, (made,)).float().mean()
            on_drawn, on_made = discriminator(wanted), discriminator(made.detach())
        told_apart = F.relu(1 - on_drawn.float()).mean() + F.relu(1 + on_made.float()).mean()
        made = made.float()
        whole = difference(made, wanted) + COLOURS * wrong_colours(made, wanted) + FEATURES * torch.stack(off).float().sum()
        return whole + told_apart + (ADVERSARIAL * fooled if step >= WITHOUT_DISCRIMINATOR else 0.0)

    @torch.no_grad()
    def look(step: int) -> None:
        rebuilt = torch.cat([vae.decode(vae.encode(one[None]).latent_dist.mean).sample for one in unseen])
        error, sharp = (rebuilt - unseen).abs().mean() / 2, edge_sharpness(rebuilt, unseen)
        print(f"step {step}: L1 of unseen images {error:.4f}, sharpness along edges {sharp:.3f}", flush=True)
        rows = [
            np.concatenate(list(to_uint8(some[first : first + 8])), axis=1) for first in (0, 8) for some in (unseen, rebuilt)
        ]
        Image.fromarray(np.concatenate(rows)).save(told.out / "rebuilt.png")
        vae.save_pretrained(told.out / "vae")

    schedule = Schedule(told.steps, told.rate, weight_decay=0.0, clip=20.0, muon_rate=0.005)
    train({"decoder": vae.decoder, "discriminator": discriminator}, loss, schedule, told.out, told.seed, look=look)
    look(told.steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
