"""Train the autoencoder that FLUX, HunyuanDiT and SVD of the rendered world share: x16, 16 channels.

    python -m training.rendered.autoencoder --out FOLDER

FLUX.1's AutoencoderKL with one level more, so that an image of 256 pixels has the 64 tokens that FLUX.1 has for 128.
Source: Rombach et al. 2022, arXiv:2112.10752.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from training.channels_last import channels_last
from training.dataset import to_tensor, to_uint8
from training.loop import Schedule, arguments, train
from training.rendered.captioner import Classifier
from training.rendered.dataset import SIZE_PX, drawn, scenes
from training.rendered.drawing import detail_boxes, styled
from training.rendered.world import STYLES, Scene

FACTOR, LATENT_CHANNELS = 16, 16
CROP_PX, CROPS = 128, 16
AT_DETAILS = 0.8
"""Share of crops that show a part of a thing or a head."""
WHOLE, WHOLE_SHARE = 4, 0.25
"""Whole images per step, and their share of the steps: crops have other statistics."""
STYLED = 0.3
"""Share of images in a style other than flat."""
HELD_OUT = 64
MUON_RATE = 0.02
FEATURES = 0.5
"""Weight of the errors of the captioner's features, which show traits, relative to errors of colours from -1 to 1."""
KL = 3e-4
"""Weight of the KL term (mean over latents), relative to errors of colours from -1 to 1."""


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(16, 32, 64, 128, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE_PX,
        use_quant_conv=False,
        use_post_quant_conv=False,
        # No attention: it would behave differently on crops and whole images.
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def features(body: nn.Sequential, images: Tensor) -> list[Tensor]:
    """Return the activations of the captioner (B, C, H, W) after each of its blocks."""
    found = []
    for layer in body:
        images = layer(images)
        if isinstance(layer, nn.ReLU):
            found.append(images)
    return found


def load_captioner(file: Path) -> Classifier:
    captioner = Classifier()
    captioner.load_state_dict({name: weight.float() for name, weight in load_file(file).items()})
    channels_last(captioner.requires_grad_(False))
    return captioner


class Crops:
    """Random crops and whole images in random styles, as float tensors from -1 to 1."""

    def __init__(self, world: list[Scene], pictures: NDArray[np.uint8]) -> None:
        self.world, self.pictures = world, pictures

    def __call__(self, whole: bool, chance: Random) -> Tensor:
        made = []
        for _ in range(WHOLE if whole else CROPS):
            n = chance.randrange(len(self.world) - HELD_OUT)
            style = chance.choice(STYLES[1:]) if chance.random() < STYLED else "flat"
            picture = styled(np.asarray(self.pictures[n]), style)
            made.append(picture if whole else self._crop(picture, self.world[n], chance))
        return to_tensor(np.stack(made)).contiguous(memory_format=torch.channels_last)

    def _crop(self, picture: NDArray[np.uint8], scene: Scene, chance: Random) -> NDArray[np.uint8]:
        """Cut out a square that is aligned with the latents."""
        free = (SIZE_PX - CROP_PX) // FACTOR
        left, top = chance.randint(0, free), chance.randint(0, free)
        if chance.random() < AT_DETAILS:
            x0, y0, x1, y1 = chance.choice(detail_boxes(scene))
            x, y = chance.uniform(x0, x1), chance.uniform(y0, y1)
            centre_x, centre_y = ((value + 1) / 2 * SIZE_PX - CROP_PX / 2 for value in (x, y))
            left, top = (round(min(max(value / FACTOR, 0), free)) for value in (centre_x, centre_y))
        left, top = FACTOR * left, FACTOR * top
        return picture[top : top + CROP_PX, left : left + CROP_PX]


def difference(made: Tensor, wanted: Tensor) -> Tensor:
    """Return the L1 loss of colours, differences between neighbours (keeps edges sharp) and colours averaged over blocks."""
    off = made - wanted
    across, down = off.diff(dim=3).abs().mean(), off.diff(dim=2).abs().mean()
    blocks = F.avg_pool2d(off, 4).abs().mean() + F.avg_pool2d(off, 16).abs().mean()
    return off.abs().mean() + 1.5 * (across + down) + blocks


def main() -> int:
    told = arguments(
        __doc__,
        steps=3000,
        rate=1e-3,
        seed=1,
        data="out/rendered/data",
        captioner="out/rendered/captioner/captioner.safetensors",
    )
    vae = AutoencoderKL.from_pretrained(told.init, torch_dtype=torch.float32) if told.init else autoencoder()
    channels_last(vae)
    if told.init:
        vae.register_to_config(scaling_factor=1.0)
    captioner = load_captioner(told.captioner)
    world = scenes()
    pictures = drawn(world, told.data / "scenes.npy")
    crops = Crops(world, pictures)
    unseen = to_tensor(np.stack([styled(np.asarray(pictures[n - 16]), STYLES[n % 4 if n > 11 else 0]) for n in range(16)]))

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        wanted = crops(chance.random() < WHOLE_SHARE, chance)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(wanted).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            made = vae.decode(posterior.mean + posterior.std * noise).sample
            with torch.no_grad():
                looked_for = features(captioner.body, wanted)
            off = [F.l1_loss(ours, theirs) for ours, theirs in zip(features(captioner.body, made), looked_for, strict=True)]
        traits = FEATURES * torch.stack(off).float().sum()
        return difference(made.float(), wanted) + traits + KL * posterior.kl().float().mean() / noise[0].numel()

    def look(step: int) -> None:
        with torch.no_grad():
            rebuilt = torch.cat([vae.decode(vae.encode(one[None]).latent_dist.mean).sample for one in unseen])
        print(f"step {step}: L1 of unseen images {(rebuilt - unseen).abs().mean() / 2:.4f}", flush=True)
        rows = [
            np.concatenate(list(to_uint8(some[first : first + 8])), axis=1) for first in (0, 8) for some in (unseen, rebuilt)
        ]
        Image.fromarray(np.concatenate(rows)).save(told.out / "rebuilt.png")
        vae.save_pretrained(told.out / "vae")

    schedule = Schedule(told.steps, told.rate, weight_decay=0.0, muon_rate=MUON_RATE)
    train({"vae": vae}, loss, schedule, told.out, told.seed, look=look, look_every=250)
    normalise(vae, to_tensor(pictures[:256]))
    vae.save_pretrained(told.out / "vae")
    look(told.steps)
    return 0


@torch.no_grad()
def normalise(vae: AutoencoderKL, some: Tensor) -> None:
    """Normalise each latent channel in the adjacent convolutions, so that one scaling factor fits all and the shift is 0."""

    def means() -> Tensor:
        return torch.cat([vae.encode(part).latent_dist.mean for part in some.split(8)])

    before = means()
    shift, spread = before.mean(dim=(0, 2, 3)), before.std(dim=(0, 2, 3))
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    channels = vae.config.latent_channels
    out.weight[:channels] /= spread[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - shift) / spread
    out.bias[channels:] -= 2 * spread.log()
    # Exact apart from the border, where the convolution pads with 0, now the mean of a channel.
    into.bias += (into.weight.sum(dim=(2, 3)) * shift).sum(dim=1)
    into.weight *= spread[None, :, None, None]
    vae.register_to_config(shift_factor=0.0, scaling_factor=round(1 / means().std().item(), 5))


if __name__ == "__main__":
    raise SystemExit(main())
