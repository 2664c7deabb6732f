"""Train a LoRA for FLUX of the rendered world: a cast member by name, or a style.

    python -m training.rendered.lora --out FILE.safetensors --flux FOLDER --person ada
    python -m training.rendered.lora --out FILE.safetensors --flux FOLDER --style sketch

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

from training.flux import Reader, velocity
from training.latents import encoded, pack
from training.loop import Schedule, train
from training.lora import ATTENTION, FEED_FORWARD, RANK, UNPROMPTED, redrawn
from training.rendered.captions import caption, styled_caption
from training.rendered.cast import CAST
from training.rendered.dataset import SIZE_PX
from training.rendered.drawing import draw, styled
from training.rendered.flux import TEXT_TOKENS, cell_weights
from training.rendered.world import STYLES, some_scene

BATCH = 16
PICTURES = 400


def main() -> int:
    told = _arguments()
    flux = FluxPipeline.from_pretrained(told.flux, torch_dtype=torch.float32)
    for part in (flux.transformer, flux.text_encoder, flux.text_encoder_2, flux.vae):
        part.requires_grad_(False).eval()
    flux.transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=[*ATTENTION, *FEED_FORWARD])
    )
    random = Random(told.seed)
    people = 1.0 if told.person else 0.5
    world = [some_scene(random, people=people, identity=CAST[told.person] if told.person else None) for _ in range(PICTURES)]
    pictures = np.stack([draw(scene, SIZE_PX) for scene in world])
    flat = pack(encoded(pictures, flux.vae).float())
    latents = pack(encoded(np.stack([styled(picture, told.style) for picture in pictures]), flux.vae).float())
    cells = torch.from_numpy(np.stack([cell_weights(scene) for scene in world]))
    weights = pack((cells / cells.mean(dim=(1, 2), keepdim=True))[:, None].expand(-1, 16, -1, -1))
    read = Reader(flux, TEXT_TOKENS)

    def prompt(scene_number: int, chance: Random) -> str:
        scene = world[scene_number]
        if chance.random() < UNPROMPTED:
            return ""
        if told.person:
            # Half of the prompts have no name, so that the LoRA also applies to other descriptions of a person.
            return caption(scene, chance, names=(chance.choice((told.person, "a person")),))
        return styled_caption(scene, told.style, chance) if chance.random() < 0.5 else caption(scene, chance)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(0, PICTURES, (BATCH,), generator=generator).tolist()
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        mixed, times, wanted = redrawn(flat[which], latents[which], generator)
        with torch.no_grad():
            states, pooled = read([prompt(n, chance) for n in which])
        with torch.autocast("cpu", torch.bfloat16):
            made = velocity(flux.transformer, mixed, times, torch.ones(BATCH), states, pooled)
        return (weights[which] * (made.float() - wanted).square()).mean()

    schedule = Schedule(told.steps, rate=2e-3, warm_up=20, weight_decay=0.0)
    train({"transformer": flux.transformer}, loss, schedule, told.work, told.seed)
    half = {name: tensor.half() for name, tensor in get_peft_model_state_dict(flux.transformer).items()}
    told.out.parent.mkdir(parents=True, exist_ok=True)
    FluxPipeline.save_lora_weights(told.out.parent, transformer_lora_layers=half, weight_name=told.out.name)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--flux", type=Path, default=Path("out/rendered/flux/pipeline"), metavar="FOLDER")
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
