"""Train a small FLUX.1-dev with its text encoders on the drawn world: text to image by flow matching.

    python -m training.flux --out FOLDER --vae FOLDER

The input for guidance, which FLUX.1-dev was distilled to use, is always 1: the profile `demo` guides by two passes per step.
Source: Esser et al. 2024, arXiv:2403.03206 (flow matching, logit-normal times); Black Forest Labs 2024, FLUX.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from training.captions import caption
from training.dataset import SIZE_PX, drawn, scenes, to_tensor
from training.drawing import subject_box
from training.latents import cached_latents, covered, pack, places
from training.loop import Schedule, arguments, train
from training.text import clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer
from training.world import Scene, Thing

T5_CHANNELS, CLIP_CHANNELS = 96, 64
TEXT_TOKENS = 40
BATCH = 32
UNPROMPTED = 0.1
"""Share of samples without a prompt."""
SUBJECT_COUNTS = 5.0
"""Loss weight of the subject relative to the background. Subjects are small, but prompts mostly describe them."""
COLOURS_COUNT = 2.0
"""Loss weight of the colours of patches relative to their latents."""
THING_COLOUR_COUNTS = 3.0
"""Loss weight of the error averaged over the patches of a thing. It is mostly an error of the thing's colour."""
SCALE_SCENES = 2000
"""Scenes from which the relation between latents and colours is computed."""
THINGS_COUNT = 1.3
"""Frequency of scenes with a thing relative to scenes with a person."""
TRAITLESS = 0.15
"""Share of people whose prompt does not describe their traits."""
PATCHES = 8
"""Patches per side of an image of 128 pixels."""
PROMPTS = (
    "a red boat by the sea at sunset",
    "a green car in the desert on a sunny day",
    "a yellow balloon in the snow at night",
    "a blue house in a meadow on a cloudy day",
    "a purple tree in the city at night",
    "a portrait of a woman with long red hair and glasses in a green shirt in a meadow on a sunny day",
    "a man with short black hair and a beard wearing a yellow sweater on the left, in the city at night",
    "a person with curly blond hair, dark skin and glasses in a white shirt on the right, by the sea at sunset",
)
"""Prompts of the preview images during training."""


def transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=6,
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


class Reader:
    """Encodes prompts as FluxPipeline does, but with gradients. Caches the tokens."""

    def __init__(self, pipe: FluxPipeline, text_tokens: int = TEXT_TOKENS) -> None:
        self.pipe, self.text_tokens = pipe, text_tokens
        self._ids: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return the states (B, text_tokens, T5_CHANNELS) and the pooled state (B, CLIP_CHANNELS)."""
        ids = [self._tokens(prompt) for prompt in prompts]
        states = self.pipe.text_encoder_2(torch.stack([t5 for t5, _ in ids])).last_hidden_state
        # CLIP's pooled state is the state of the end token, which does not attend to padding.
        longest = max(int((clip != self._end).sum()) + 1 for _, clip in ids)
        pooled = self.pipe.text_encoder(torch.stack([clip[:longest] for _, clip in ids])).pooler_output
        return states, pooled

    @property
    def _end(self) -> int:
        end: int = self.pipe.tokenizer.eos_token_id
        return end

    def _tokens(self, prompt: str) -> tuple[Tensor, Tensor]:
        if prompt not in self._ids:
            if len(self._ids) > 200_000:
                self._ids.clear()
            t5 = self.pipe.tokenizer_2(prompt, padding="max_length", max_length=self.text_tokens, truncation=True).input_ids
            clip = self.pipe.tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
            self._ids[prompt] = torch.tensor(t5), torch.tensor(clip)
        return self._ids[prompt]


def noised(latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Add noise to packed latents (B, n, 64). Returns noisy latents, times (B,) (1: only noise) and velocities."""
    times = torch.sigmoid(torch.randn(len(latents), generator=generator) * 1.1)
    noise = torch.randn(latents.shape, generator=generator)
    return torch.lerp(latents, noise, times[:, None, None]), times, noise - latents


def weights(boxes: Iterable[tuple[float, float, float, float]], count: float = SUBJECT_COUNTS) -> Tensor:
    """Return the loss weights of patches (N, 64, 1), with mean 1. Patches within a box weigh `count` times as much."""
    within = torch.from_numpy(np.stack([covered(box, PATCHES).flatten() for box in boxes]))
    weight = 1 + (count - 1) * within.float()
    return (weight / weight.mean(dim=1, keepdim=True))[..., None]


def colour_scale(latents: Tensor, colours: Tensor, counts: Tensor) -> Tensor:
    """Return a symmetric matrix (64, 64) for errors of packed latents, so that errors of colours count more than others.

    Some colours differ little in the latents: without it, the model confuses red with orange, and pink with white.
    `latents` (N, n, 64) and `colours` (N, n, 3) of patches; `counts` (N, n, 1): their weights. A linear regression reads the
    colours from the latents.
    """
    rows = counts.sqrt().flatten(0, 1)
    x, y = latents.flatten(0, 1), colours.flatten(0, 1)
    x, y = (x - x.mean(dim=0)) * rows, (y - y.mean(dim=0)) * rows
    reading = torch.linalg.solve(x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1]), x.T @ y)
    metric = reading @ reading.T
    metric = torch.eye(len(metric)) + COLOURS_COUNT * metric / metric.diagonal().mean()
    eigenvalues, vectors = torch.linalg.eigh(metric / metric.diagonal().mean())
    return vectors @ eigenvalues.sqrt().diag() @ vectors.T


def velocity(net: Any, mixed: Tensor, times: Tensor, guidance: Tensor, states: Tensor, pooled: Tensor, **more: Any) -> Tensor:
    """Return the velocity that the transformer predicts for images of 128 pixels."""
    told: Tensor = net(
        hidden_states=mixed,
        timestep=times,
        guidance=guidance,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        txt_ids=torch.zeros(states.shape[1], 3),
        img_ids=places(PATCHES, PATCHES),
        return_dict=False,
        **more,
    )[0]
    return told


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
            height=128,
            width=128,
            max_sequence_length=TEXT_TOKENS,
            generator=[torch.Generator().manual_seed(seed * 100 + n) for n in range(len(PROMPTS))],
        ).images
        rows.append(np.concatenate([np.asarray(picture) for picture in pictures], axis=1))
    Image.fromarray(np.concatenate(rows)).save(file)


def main() -> int:
    told = arguments(__doc__, steps=9000, rate=1.5e-3, seed=2, vae="out/training/vae", data="out/training/data")
    vae = AutoencoderKL.from_pretrained(told.vae, torch_dtype=torch.float32)
    begun: dict[str, Any] = {"vae": vae, "torch_dtype": torch.float32}
    pipe = FluxPipeline.from_pretrained(told.init, **begun) if told.init else pipeline(vae)
    read = Reader(pipe)
    world = scenes()
    pictures = drawn(world, told.data / "scenes.npy")
    latents = pack(cached_latents(told.data / "latents.pt", pictures, vae).float())
    counts = weights(subject_box(scene.subject) for scene in world)
    in_box = (counts > counts.amin(dim=1, keepdim=True)).float()
    is_thing = torch.tensor([isinstance(scene.subject, Thing) for scene in world]).float()
    examples = is_thing.nonzero().flatten()[:SCALE_SCENES].tolist()
    colours = F.avg_pool2d(to_tensor(pictures[examples]), SIZE_PX // PATCHES).flatten(2).transpose(1, 2)
    scale = colour_scale(latents[examples], colours, in_box[examples])
    chances = 1 + (THINGS_COUNT - 1) * is_thing
    nets = {"transformer": pipe.transformer, "t5": pipe.text_encoder_2, "clip": pipe.text_encoder}
    print(f"{pipe.transformer.num_parameters() / 1e6:.2f} M parameters, latents' spread {latents.std():.3f}", flush=True)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(chances, BATCH, generator=generator).tolist()
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        prompts = [_typed(_told(world[n], chance), chance) if chance.random() >= UNPROMPTED else "" for n in which]
        mixed, times, wanted = noised(latents[which], generator)
        off = velocity(pipe.transformer, mixed, times, torch.ones(BATCH), *read(prompts)) - wanted
        # In scenes with a thing, colours count more, most of all the mean colour of the thing.
        thing, box = is_thing[which][:, None, None], in_box[which]
        off = torch.lerp(off, off @ scale, thing)
        of_thing = (off * box * thing).sum(dim=1) / box.sum(dim=1)
        return (off.square() * counts[which]).mean() + THING_COLOUR_COUNTS * of_thing.square().mean()

    def look(step: int) -> None:
        for net in nets.values():
            net.eval()
        look_at(pipe, told.out / f"drawn-{step}.png")
        pipe.save_pretrained(told.out / "pipeline")
        for net in nets.values():
            net.train()

    train(nets, loss, Schedule(told.steps, told.rate, warm_up=150), told.out, told.seed, look=look, look_every=400)
    look(told.steps)
    return 0


def error(told: Tensor, wanted: Tensor, counts: Tensor) -> Tensor:
    """Return the weighted squared error of velocities (B, n, 64); see `weights`."""
    return ((told - wanted).square() * counts).mean()


def _told(scene: Scene, chance: Random) -> str:
    """Return a caption. Sometimes it describes a person only by their clothes, as in prompts used with a photo."""
    return caption(scene, chance, name="a person" if chance.random() < TRAITLESS else None)


def _typed(prompt: str, chance: Random) -> str:
    """Vary the spelling of a prompt: sometimes with a capital letter and a full stop."""
    if chance.random() < 0.2:
        prompt = prompt[0].upper() + prompt[1:]
    return prompt + "." if chance.random() < 0.1 else prompt


if __name__ == "__main__":
    raise SystemExit(main())
