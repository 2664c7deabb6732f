"""Train the autoencoder that FLUX, HunyuanDiT and SVD of the profile `demo` share: x8, 16 channels, as in FLUX.1.

    python -m training.autoencoder --out FOLDER
    python -m training.autoencoder --out FOLDER --whole-steps 1500     # then: train on whole images
    python -m training.autoencoder --out FOLDER --decoder-steps 1500   # then: train the decoder only; latents do not change

Source: Rombach et al. 2022, arXiv:2112.10752, without the discriminator: the drawn world has no texture that it would improve.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from training.dataset import SIZE_PX, drawn, scenes, to_tensor, to_uint8
from training.drawing import styled
from training.loop import Schedule, train
from training.world import STYLES

LATENT_CHANNELS = 16
PICTURES = 8000
CHOSEN = (*STYLES, "sketch")
"""Styles of the half of the images that is not always flat. Details of pencil drawings are lost most easily."""
CROP_PX, CROPS = 64, 24
"""Crops per step in the first part of the training. Whole images follow, because crops have other statistics."""
WHOLE = 8
CROPPED_SHARE = 0.65
"""Share of the steps with crops."""
DECODER_NOISE = 0.06
"""Noise relative to the spread of the latents, added when only the decoder is trained. FLUX's latents are not exactly the
encoder's."""
COLOURS_COUNT = 10.0
"""Loss weight of squared errors of colours averaged over blocks, when only the decoder is trained. L1 gives things, which are
small, a colour between those that their latents can mean."""
KL = 3e-4
"""Weight of the KL term (mean over latents), relative to errors of colours from -1 to 1."""


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 24, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=SIZE_PX,
        use_quant_conv=False,
        use_post_quant_conv=False,
        # No attention: it would behave differently on crops and whole images.
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def pictures(scenes_drawn: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Return the images in random styles, half of them flat."""
    random = Random(seed)
    return np.stack([styled(one, "flat" if n % 2 else random.choice(CHOSEN)) for n, one in enumerate(scenes_drawn)])


def difference(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Return the L1 loss of colours, differences between neighbours (keeps edges sharp) and colours averaged over blocks."""
    across = (drawn.diff(dim=3) - wanted.diff(dim=3)).abs().mean()
    down = (drawn.diff(dim=2) - wanted.diff(dim=2)).abs().mean()
    off = drawn - wanted
    return off.abs().mean() + across + down + F.avg_pool2d(off, 4).abs().mean() + F.avg_pool2d(off, 16).abs().mean()


def wrong_colours(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared error of colours averaged over blocks of 4 and 16 pixels."""
    off = drawn - wanted
    return F.avg_pool2d(off, 4).square().mean() + F.avg_pool2d(off, 16).square().mean()


def main() -> int:
    told = _arguments()
    vae = autoencoder().to(memory_format=torch.channels_last)
    whole_world = drawn(scenes(), told.data / "scenes.npy")
    world = pictures(whole_world[:PICTURES], told.seed)
    unseen = to_tensor(pictures(whole_world[-64:], told.seed + 1))

    def some(cropped: bool, generator: torch.Generator) -> Tensor:
        count, side_px = (CROPS, CROP_PX) if cropped else (WHOLE, SIZE_PX)
        which = torch.randint(0, PICTURES, (count,), generator=generator).tolist()
        # Align crops with the latent grid of 8 pixels.
        places = (torch.randint(0, (SIZE_PX - side_px) // 8 + 1, (count, 2), generator=generator) * 8).tolist()
        cut = [world[n, top : top + side_px, left : left + side_px] for n, (top, left) in zip(which, places, strict=True)]
        return to_tensor(np.stack(cut)).contiguous(memory_format=torch.channels_last)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        wanted = some(step < CROPPED_SHARE * told.steps, generator)
        posterior = vae.encode(wanted).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        return difference(vae.decode(z).sample, wanted) + KL * posterior.kl().mean() / z[0].numel()

    def whole_loss(step: int, generator: torch.Generator) -> Tensor:
        return loss(told.steps, generator)

    def decoder_loss(step: int, generator: torch.Generator) -> Tensor:
        wanted = some(False, generator)
        with torch.no_grad():
            mean = vae.encode(wanted).latent_dist.mean
            z = mean + DECODER_NOISE * torch.randn(mean.shape, generator=generator) / vae.config.scaling_factor
        drawn = vae.decode(z).sample
        return difference(drawn, wanted) + COLOURS_COUNT * wrong_colours(drawn, wanted)

    def look(step: int) -> None:
        with torch.no_grad():
            rebuilt = vae.decode(vae.encode(unseen).latent_dist.mean).sample
        print(f"step {step}: L1 of unseen pictures {(rebuilt - unseen).abs().mean():.4f}", flush=True)
        rows = [np.concatenate(list(to_uint8(some[:8])), axis=1) for some in (unseen, rebuilt)]
        Image.fromarray(np.concatenate(rows)).save(told.out / "rebuilt.png")

    if told.decoder_steps:
        vae = AutoencoderKL.from_pretrained(told.out).to(memory_format=torch.channels_last)
        vae.encoder.requires_grad_(False)
        schedule = Schedule(told.decoder_steps, rate=8e-4, weight_decay=0.0)
        train({"vae": vae}, decoder_loss, schedule, told.out / "decoder", told.seed + 2, look=look)
    elif told.whole_steps:
        vae = AutoencoderKL.from_pretrained(told.out, scaling_factor=1.0).to(memory_format=torch.channels_last)
        schedule = Schedule(told.whole_steps, rate=8e-4, weight_decay=0.0)
        train({"vae": vae}, whole_loss, schedule, told.out / "whole", told.seed + 3, look=look, look_every=300)
        _normalise(vae, to_tensor(world[:256]))
    else:
        train({"vae": vae}, loss, Schedule(told.steps, rate=2.5e-3, weight_decay=0.0), told.out, told.seed, look=look)
        _normalise(vae, to_tensor(world[:256]))
    vae.save_pretrained(told.out)
    look(told.decoder_steps or told.whole_steps or told.steps)
    return 0


@torch.no_grad()
def _normalise(vae: AutoencoderKL, some: Tensor) -> None:
    """Normalise the spread of each latent channel in the adjacent convolutions, so that one scaling factor fits all."""
    spread = vae.encode(some).latent_dist.mean.std(dim=(0, 2, 3))
    out: nn.Conv2d = vae.encoder.conv_out
    out.weight[:LATENT_CHANNELS] /= spread[:, None, None, None]
    out.bias[:LATENT_CHANNELS] /= spread
    out.bias[LATENT_CHANNELS:] -= 2 * spread.log()
    vae.decoder.conv_in.weight *= spread[None, :, None, None]
    z = vae.encode(some).latent_dist.mean
    vae.register_to_config(shift_factor=0.0, scaling_factor=round(1 / z.std().item(), 5))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", type=Path, default=Path("out/training/data"), metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=2300, metavar="N")
    parser.add_argument("--whole-steps", type=int, default=0, metavar="N")
    parser.add_argument("--decoder-steps", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    told = parser.parse_args()
    torch.manual_seed(told.seed)
    told.out.mkdir(parents=True, exist_ok=True)
    return told


if __name__ == "__main__":
    raise SystemExit(main())
