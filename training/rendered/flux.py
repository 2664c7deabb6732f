"""Train a small FLUX.1-dev with its text encoders on the rendered world: text to image by flow matching.

    python -m training.rendered.flux --out FOLDER --vae FOLDER

The input for guidance, which FLUX.1-dev was distilled to use, is always 1: the profile `demo` guides by two passes per step.
Source: Esser et al. 2024, arXiv:2403.03206 (flow matching, logit-normal times); Black Forest Labs 2024, FLUX.1.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from training.channels_last import channels_last
from training.flux import CLIP_CHANNELS, T5_CHANNELS, Reader, noised, velocity
from training.latents import cached_latents, covered, pack
from training.loop import Schedule, arguments, train
from training.rendered.captions import caption
from training.rendered.dataset import SIZE_PX, drawn, scenes
from training.rendered.drawing import detail_boxes, eyes_box, subject_box
from training.rendered.world import Scene
from training.text import clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer

TEXT_TOKENS = 48
BATCH = 24
MUON_RATE = 0.01
UNPROMPTED = 0.1
"""Share of samples without a prompt."""
TRAITLESS = 0.15
"""Share of people whose prompt does not describe their traits."""
SUBJECT, DETAILS, EYES = 2.0, 3.0, 5.0
"""Additional loss weights of the subject, of things and heads, and of eyes. Most of an image is background, but prompts mostly
describe the subject, and an eye is smaller than a latent."""
PROMPTS = (
    "a red boat by the sea at sunset",
    "a green car in the desert on a sunny day",
    "a yellow balloon in the snow at night",
    "a blue house in a meadow on a cloudy day",
    "a portrait of a woman with long red hair, green eyes and freckles in a green shirt in a meadow on a sunny day",
    "a man with short black hair, brown skin, blue eyes and a beard in a yellow sweater on the left, in the city at night",
    "a person with curly blond hair, dark skin, brown eyes and glasses in a white shirt on the right, by the sea at sunset",
    "a half body picture of a person with grey hair in a bun, pale skin and glasses in a purple sweater in the snow in the fog",
)
"""Prompts of the preview images during training."""


def transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=T5_CHANNELS,
        pooled_projection_dim=CLIP_CHANNELS,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )


def pipeline(vae: AutoencoderKL) -> FluxPipeline:
    for_clip, for_t5 = clip_tokenizer(), t5_tokenizer(512)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.5),
        vae=vae,
        text_encoder=clip_encoder(for_clip, CLIP_CHANNELS, 2),
        tokenizer=for_clip,
        text_encoder_2=t5_encoder(for_t5, T5_CHANNELS, 2),
        tokenizer_2=for_t5,
        transformer=transformer(),
    )


def cell_weights(scene: Scene) -> NDArray[np.float32]:
    """Return the loss weights of the latents (16, 16) of a scene."""
    weights = np.ones((SIZE_PX // 16, SIZE_PX // 16), np.float32)
    for one in scene.people or [scene.subject]:
        weights += SUBJECT * covered(subject_box(one))
    for box in detail_boxes(scene):
        weights += DETAILS * covered(box)
    for person in scene.people:
        weights += EYES * covered(eyes_box(person))
    return weights


def look_at(pipe: FluxPipeline, file: Path) -> None:
    """Save a grid of generated images with one column per prompt and one row per seed."""
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for seed in range(3):
        pictures = pipe(
            list(PROMPTS),
            negative_prompt=[""] * len(PROMPTS),
            true_cfg_scale=3.0,
            guidance_scale=1.0,
            num_inference_steps=12,
            height=SIZE_PX,
            width=SIZE_PX,
            max_sequence_length=TEXT_TOKENS,
            generator=[torch.Generator().manual_seed(seed * 100 + n) for n in range(len(PROMPTS))],
        ).images
        rows.append(np.concatenate([np.asarray(picture) for picture in pictures], axis=1))
    Image.fromarray(np.concatenate(rows)).save(file)


def main() -> int:
    told = arguments(__doc__, steps=9000, rate=1.2e-3, seed=2, vae="out/rendered/vae/vae", data="out/rendered/data")
    vae = AutoencoderKL.from_pretrained(told.vae, torch_dtype=torch.float32)
    begun: dict[str, Any] = {"vae": vae, "torch_dtype": torch.float32}
    channels_last(vae)
    pipe = FluxPipeline.from_pretrained(told.init, **begun) if told.init else pipeline(vae)
    read = Reader(pipe, TEXT_TOKENS)
    world = scenes()
    latents = pack(cached_latents(told.data / "latents.pt", drawn(world, told.data / "scenes.npy"), vae))
    cells = torch.from_numpy(np.stack([cell_weights(scene) for scene in world]))
    cells /= cells.mean(dim=(1, 2), keepdim=True)
    nets = {"transformer": pipe.transformer, "t5": pipe.text_encoder_2, "clip": pipe.text_encoder}
    compiled = torch.compile(pipe.transformer)
    print(
        f"{pipe.transformer.num_parameters() / 1e6:.2f} M parameters, latents' spread {latents.float().std():.3f}", flush=True
    )

    def loss(step: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(0, len(world), (BATCH,), generator=generator).tolist()
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        prompts = [_typed(_told(world[n], chance), chance) if chance.random() >= UNPROMPTED else "" for n in which]
        mixed, times, wanted = noised(latents[which].float(), generator)
        weights = pack(cells[which][:, None].expand(-1, 16, -1, -1))
        with torch.autocast("cpu", torch.bfloat16):
            made = velocity(compiled, mixed, times, torch.ones(BATCH), *read(prompts))
        return ((made.float() - wanted).square() * weights).mean()

    def look(step: int) -> None:
        for net in nets.values():
            net.eval()
        look_at(pipe, told.out / f"drawn-{step}.png")
        pipe.save_pretrained(told.out / "pipeline")
        for net in nets.values():
            net.train()

    schedule = Schedule(told.steps, told.rate, warm_up=150, muon_rate=MUON_RATE)
    train(nets, loss, schedule, told.out, told.seed, look=look, look_every=500)
    look(told.steps)
    return 0


def _told(scene: Scene, chance: Random) -> str:
    """Return a caption. Sometimes it describes people only by their clothes, as in prompts used with a photo."""
    return caption(scene, chance, names=("a person", "a person") if chance.random() < TRAITLESS else ())


def _typed(prompt: str, chance: Random) -> str:
    """Vary the spelling of a prompt: sometimes with a capital letter and a full stop."""
    if chance.random() < 0.2:
        prompt = prompt[0].upper() + prompt[1:]
    return prompt + "." if chance.random() < 0.1 else prompt


if __name__ == "__main__":
    raise SystemExit(main())
