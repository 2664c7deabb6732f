"""Train a LoRA for FLUX of the profile `demo`: a cast member by name, or a style of the drawn world.

    python -m training.lora --out FILE.safetensors --flux FOLDER --person ada
    python -m training.lora --out FILE.safetensors --flux FOLDER --style sketch

Source: Hu et al. 2021, LoRA, arXiv:2106.09685; peft. The file has the layout of diffusers' FLUX training scripts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from training.captions import caption, styled_caption
from training.cast import CAST
from training.dataset import SIZE_PX
from training.drawing import draw, styled, subject_box
from training.flux import Reader, error, noised, velocity, weights
from training.latents import encoded, pack
from training.loop import Schedule, train
from training.world import STYLES, some_scene

RANK = 8
BATCH = 16
PICTURES = 400
UNPROMPTED = 0.1
"""Share of samples without a prompt, for the second pass of classifier-free guidance."""
LEAST_NOISE = 0.5
"""Noise from which image to image starts at least: 0 is none, 1 is only noise."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("proj_mlp", "ff.net.0.proj", "ff.net.2")


def main() -> int:
    told = _arguments()
    flux = FluxPipeline.from_pretrained(told.flux)
    for part in (flux.transformer, flux.text_encoder, flux.text_encoder_2, flux.vae):
        part.requires_grad_(False).eval()
    flux.transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=[*ATTENTION, *FEED_FORWARD])
    )
    random = Random(told.seed)
    world = [some_scene(random, identity=CAST[told.person] if told.person else None) for _ in range(PICTURES)]
    pictures = np.stack([draw(scene, SIZE_PX) for scene in world])
    flat = pack(encoded(pictures, flux.vae).float())
    latents = pack(encoded(np.stack([styled(picture, told.style) for picture in pictures]), flux.vae).float())
    read = Reader(flux)
    counts = weights(subject_box(scene.subject) for scene in world)

    def prompt(scene_number: int, chance: Random) -> str:
        scene = world[scene_number]
        if chance.random() < UNPROMPTED:
            return ""
        if told.person:
            # Half of the prompts have no name, so that the LoRA also applies to other descriptions of a person.
            return caption(scene, chance, name=chance.choice((told.person, "a person")))
        return styled_caption(scene, told.style, chance) if chance.random() < 0.5 else caption(scene, chance)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(0, PICTURES, (BATCH,), generator=generator).tolist()
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        mixed, times, wanted = redrawn(flat[which], latents[which], generator)
        with torch.no_grad():
            states, pooled = read([prompt(n, chance) for n in which])
        return error(velocity(flux.transformer, mixed, times, torch.ones(BATCH), states, pooled), wanted, counts[which])

    schedule = Schedule(told.steps, rate=2e-3, warm_up=20, weight_decay=0.0)
    train({"transformer": flux.transformer}, loss, schedule, told.work, told.seed)
    half = {name: tensor.half() for name, tensor in get_peft_model_state_dict(flux.transformer).items()}
    told.out.parent.mkdir(parents=True, exist_ok=True)
    FluxPipeline.save_lora_weights(told.out.parent, transformer_lora_layers=half, weight_name=told.out.name)
    return 0


def redrawn(flat: Tensor, wanted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Add noise to packed latents (B, n, 64). Returns noisy latents, times (B,) and velocities, as `noised` does.

    Half of the samples are those of image to image, which started from the noisy flat image and moves straight to `wanted`.
    """
    mixed, times, _ = noised(wanted, generator)
    begun = torch.rand(len(wanted), generator=generator) * (1 - LEAST_NOISE) + LEAST_NOISE
    begun = torch.where(torch.rand(len(wanted), generator=generator) < 0.5, torch.maximum(begun, times), 1.0)
    left = (times / begun * (1 - begun))[:, None, None]
    mixed = mixed + left * (flat - wanted)
    return mixed, times, (mixed - wanted) / times[:, None, None]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--flux", type=Path, default=Path("out/training/flux/pipeline"), metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=600, metavar="N")
    parser.add_argument("--seed", type=int, default=7, metavar="N")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--person", choices=list(CAST), metavar="NAME")
    kind.add_argument("--style", choices=STYLES, default="flat", metavar="STYLE")
    told = parser.parse_args()
    told.work = told.out.with_suffix("")
    torch.set_num_threads(1)
    torch.manual_seed(told.seed)
    return told


if __name__ == "__main__":
    raise SystemExit(main())
