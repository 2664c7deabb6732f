"""Train a small Wan on the drawn world: image and prompt to clip, with the speed given by words.

    python -m training.wan --out FOLDER --vae FOLDER --flux FOLDER

It learns on latents of FLUX's autoencoder, two frames packed in one, that `training.wan_autoencoder` encodes and decodes.
As in TI2V-5B, the first latents are those of the image, with a time of 0 for their tokens. The text encoder is FLUX's T5,
unchanged.
Source: Wan Team 2025, arXiv:2503.20314; Esser et al. 2024, arXiv:2403.03206 (flow matching).
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FluxPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import T5EncoderModel

from training.captions import caption, styled_caption
from training.dataset import to_uint8
from training.latents import encoded
from training.loop import Schedule, arguments, train
from training.tracks import TRACKS, TRACKS_SEED, Track, tracks
from training.wan_latents import FRAMES, PACKED, TRACK_FRAMES, packed, track_latents, unpacked

STRIDES, STRIDE_SHARES = (0, 1, 2), (0.06, 0.44, 0.5)
"""Clips are taken from tracks with different strides, so that each scene is seen at several speeds."""
TEXT_TOKENS = 64
BATCH = 4
UNPROMPTED, UNTOLD = 0.1, 0.2
"""Shares of samples without a prompt, and of prompts that do not tell the speed."""
SLOW, FAST = 0.35, 0.65
"""Speeds below and above which a clip is called slow or fast."""
SPEED_WORDS = {
    "still": ("nothing moves", "standing still"),
    "slow": ("moving slowly", "slow motion"),
    "": ("",),
    "fast": ("moving fast", "fast motion"),
}
TIME_LEVEL, TIME_SPREAD = 0.6, 1.2
"""Mean and standard deviation of logit(time). Motion is decided at high noise; at low noise it only has to be kept."""
FLOW_SHIFT = 3.0
MOST_NOISE = 0.15
"""Maximum noise added to the latents of the image, which come from another encoder and another model at inference."""
MOVING, SUBJECT = 1.0, 2.0
"""Additional loss weights of changing areas, and of things and heads."""


def transformer(channels: int, text_channels: int) -> WanTransformer3DModel:
    net = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        # Wider than the 128 numbers of a token, which have to pass through all layers beside what those add.
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=PACKED * channels,
        out_channels=PACKED * channels,
        text_dim=text_channels,
        freq_dim=64,
        ffn_dim=256,
        num_layers=4,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    # Start with all information of the latents in the tokens, and a velocity of zero.
    nn.init.orthogonal_(net.patch_embedding.weight.data.view(net.patch_embedding.out_channels, -1))
    nn.init.zeros_(net.proj_out.weight)
    nn.init.zeros_(net.proj_out.bias)
    return net


def scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT)


def pipeline(net: WanTransformer3DModel, vae: AutoencoderKLWan, flux: FluxPipeline) -> WanImageToVideoPipeline:
    return WanImageToVideoPipeline(
        tokenizer=flux.tokenizer_2,
        text_encoder=flux.text_encoder_2,
        vae=vae,
        scheduler=scheduler(),
        transformer=net,
        expand_timesteps=True,
    )


class Reader:
    """Encodes prompts as the pipeline does: padding has states of zero."""

    def __init__(self, flux: FluxPipeline) -> None:
        self.tokenizer, self.encoder = flux.tokenizer_2, flux.text_encoder_2

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """Return the states (B, TEXT_TOKENS, channels)."""
        told = self.tokenizer(
            prompts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, add_special_tokens=True, return_tensors="pt"
        )
        encoder: T5EncoderModel = self.encoder
        states: Tensor = encoder(told.input_ids, told.attention_mask).last_hidden_state
        return states * told.attention_mask[..., None]


def speed_words(speed: float, chance: Random) -> str:
    name = "still" if speed == 0 else "slow" if speed < SLOW else "fast" if speed > FAST else ""
    return chance.choice(SPEED_WORDS[name])


def prompt_for(track: Track, speed: float, chance: Random) -> str:
    if chance.random() < UNPROMPTED:
        return ""
    told = caption(track.scene, chance) if track.style == "flat" else styled_caption(track.scene, track.style, chance)
    words = "" if chance.random() < UNTOLD else speed_words(speed, chance)
    return f"{told}, {words}" if words else told


def denoised(net: WanTransformer3DModel, first: Tensor, text: Tensor, generator: torch.Generator, steps: int) -> Tensor:
    """Return latents of single frames (1, FRAMES, C, H, W), sampled from the first (1, C, H, W) as in the pipeline."""
    sampler = scheduler()
    sampler.set_timesteps(steps)
    begun = packed(first[:, None].expand(-1, FRAMES, -1, -1, -1))
    latents = torch.randn(begun.shape, generator=generator)
    for time in sampler.timesteps:
        latents[:, :, 0] = begun[:, :, 0]
        velocity = net(latents, _token_times(time[None], latents), text, return_dict=False)[0]
        latents = sampler.step(velocity, time, latents, return_dict=False)[0]
    latents[:, :, 0] = begun[:, :, 0]
    return unpacked(latents)


def _token_times(times: Tensor, latents: Tensor) -> Tensor:
    """Return the time of each token (B, tokens): 0 for the first latents, `times` (B,) for the others."""
    per_latent = latents.shape[3] // 2 * (latents.shape[4] // 2)
    every = times[:, None].expand(-1, latents.shape[2] * per_latent).clone()
    every[:, :per_latent] = 0
    return every


def main() -> int:
    told = arguments(
        __doc__,
        steps=8000,
        rate=1.2e-3,
        seed=8,
        vae="out/training/vae",
        data="out/training/data",
        flux="out/training/flux/pipeline",
    )
    vae = AutoencoderKL.from_pretrained(told.vae, torch_dtype=torch.float32).requires_grad_(False)
    flux = FluxPipeline.from_pretrained(told.flux, vae=vae, transformer=None, torch_dtype=torch.float32)
    read = Reader(flux)
    of = tracks(TRACKS, TRACKS_SEED, TRACK_FRAMES)
    latents = track_latents(of, vae, told.data)
    cells = torch.from_numpy(np.stack([track.subject_cells() for track in of])).float()
    net = transformer(latents.shape[2], flux.text_encoder_2.config.d_model)
    if told.init:
        net = WanTransformer3DModel.from_pretrained(told.init, subfolder="transformer", torch_dtype=torch.float32)
    unseen = tracks(8, TRACKS_SEED + 1, TRACK_FRAMES)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        clips, subjects, prompts = [], [], []
        for _ in range(BATCH):
            n = chance.randrange(len(of))
            (stride,) = chance.choices(STRIDES, STRIDE_SHARES)
            start = chance.randrange(TRACK_FRAMES - stride * (FRAMES - 1))
            frames = slice(start, start + (stride * FRAMES or 1), stride or 1)
            clips.append(latents[n, frames].expand(FRAMES, -1, -1, -1))
            subjects.append(cells[n, frames].expand(FRAMES, -1, -1))
            prompts.append(prompt_for(of[n], of[n].speed * stride / STRIDES[-1], chance))
        return denoising_loss(net, torch.stack(clips).float(), torch.stack(subjects), read(prompts), generator)

    def look(step: int) -> None:
        look_at(net, read, vae, unseen, told.out / f"clips-{step}.png")

    train({"transformer": net}, loss, Schedule(told.steps, told.rate), told.out, told.seed, look=look, look_every=1000)
    look(told.steps)
    net.save_pretrained(told.out / "transformer")
    return 0


def denoising_loss(
    net: WanTransformer3DModel, clips: Tensor, subjects: Tensor, text: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the loss for latents of single frames (B, FRAMES, C, H, W) at random times, without that of the first frame.

    `subjects` (B, FRAMES, H, W): 1 where a latent shows the subject, otherwise 0.
    """
    rows = len(clips)
    time = torch.sigmoid(torch.randn(rows, generator=generator) * TIME_SPREAD + TIME_LEVEL)
    wanted = packed(clips)
    noise = torch.randn(wanted.shape, generator=generator)
    seen = torch.lerp(wanted, noise, time[:, None, None, None, None])
    spread = MOST_NOISE * torch.rand((rows, 1, 1, 1, 1), generator=generator)
    first = torch.randn(clips[:, 0].shape, generator=generator)[:, None]
    seen[:, :, 0] = wanted[:, :, 0] + packed(spread * first)[:, :, 0]
    velocity = net(seen, _token_times(1000 * time, seen), text, return_dict=False)[0]
    changes = (clips - clips[:, :1]).abs().mean(dim=2, keepdim=True).clamp(max=1)
    weights = packed((1 + MOVING * changes + SUBJECT * subjects[:, :, None]).expand_as(clips))[:, :, 1:]
    return (weights / weights.mean() * (velocity - (noise - wanted))[:, :, 1:] ** 2).mean()


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
