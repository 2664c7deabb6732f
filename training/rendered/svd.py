"""Train a small Stable Video Diffusion on the rendered world: image to clip, with the speed given by the motion bucket.

    python -m training.rendered.svd --out FOLDER --vae FOLDER

Running the same command on a finished training saves the weights again, with the current decoder of the autoencoder.
The shared autoencoder decodes frame by frame, like Stability's `svd_image_decoder`. The CLIP image encoder keeps its random
weights, because the latents of the image carry the same information.
Source: Blattmann et al. 2023, arXiv:2311.15127; Karras et al. 2022, arXiv:2206.00364 (the preconditioning used here).
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from torch import Tensor

from training.channels_last import channels_last
from training.dataset import to_tensor
from training.latents import encoded
from training.loop import Schedule, arguments, train
from training.rendered.dataset import SIZE_PX
from training.rendered.tracks import TRACKS, TRACKS_SEED, Track, tracks
from training.svd import (
    FRAMES,
    USUAL_NOISE,
    bucket,
    denoising_loss,
    keep_the_pairs,
    repeat_the_picture,
)
from training.svd import pipeline as pipeline_around

MOST_NOISE = 0.3
BATCH = 4
MUON_RATE = 0.01


def pipeline(vae: AutoencoderKL) -> StableVideoDiffusionPipeline:
    pipe = pipeline_around(vae)
    pipe.unet = UNetSpatioTemporalConditionModel.from_config(
        pipe.unet.config,
        sample_size=SIZE_PX // 16,
        block_out_channels=(96, 128),
        num_attention_heads=(3, 4),
    )
    return pipe


@torch.no_grad()
def prepared(of: list[Track], pipe: StableVideoDiffusionPipeline, file: Path) -> dict[str, Tensor]:
    """Return the training data of the tracks, from the cache file if it exists.

    `latents` (N, FRAMES, 16, 16, 16), scaled. Of the first frame: `first` (N, 2, 16, 16, 16), not scaled (as in the pipeline),
    with the usual noise and with a random level of `noise` (N, 2), and `embeddings` (N, EMBEDDING).
    """
    if file.exists():
        return torch.load(file, weights_only=True)
    generator, made = torch.Generator().manual_seed(TRACKS_SEED), {}
    for track in of:
        frames = track.frames()
        made.setdefault("latents", []).append(encoded(frames, pipe.vae))
        other = float((torch.rand(1, generator=generator) * np.log(MOST_NOISE / 0.005)).exp() * 0.005)
        noise = torch.tensor([USUAL_NOISE, other])
        seen = to_tensor(frames[:1]).expand(2, -1, -1, -1)
        seen = seen + noise[:, None, None, None] * torch.randn(seen.shape, generator=generator)
        seen = seen.contiguous(memory_format=torch.channels_last)
        made.setdefault("first", []).append(pipe.vae.encode(seen).latent_dist.mode().half())
        made.setdefault("noise", []).append(noise)
        made.setdefault("embeddings", []).append(pipe._encode_image([Image.fromarray(frames[0])], "cpu", 1, False)[0, 0])
    data = {name: torch.stack(parts) for name, parts in made.items()}
    fresh = file.with_suffix(".new")
    torch.save(data, fresh)
    os.replace(fresh, file)
    return data


def main() -> int:
    told = arguments(__doc__, steps=8000, rate=1e-3, seed=5, vae="out/rendered/vae/vae", data="out/rendered/data")
    vae = AutoencoderKL.from_pretrained(told.vae, torch_dtype=torch.float32).requires_grad_(False)
    channels_last(vae)
    begun: dict[str, Any] = {"vae": vae, "torch_dtype": torch.float32}
    pipe = StableVideoDiffusionPipeline.from_pretrained(told.init, **begun) if told.init else pipeline(vae)
    pipe.set_progress_bar_config(disable=True)
    of = tracks(TRACKS, TRACKS_SEED, FRAMES)
    data = prepared(of, pipe, told.data / "tracks.pt")
    if not told.init:
        repeat_the_picture(pipe.unet, data["first"].float().square().mean(dim=(0, 1, 3, 4)).sqrt())
    keep_the_pairs(pipe.unet)
    cells = torch.from_numpy(np.stack([track.detail_cells() for track in of])).float()
    unseen = tracks(8, TRACKS_SEED + 1, FRAMES)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        which = [chance.randrange(len(of)) for _ in range(BATCH)]
        noised = [chance.randrange(2) for _ in which]
        first = torch.stack([data["first"][n, k] for n, k in zip(which, noised, strict=True)]).float()
        # The motion bucket is per frame, so fps has no effect. Vary it anyway: unseen values would have undefined effects.
        fps = [6 if chance.random() < 0.5 else chance.randint(4, 25) for _ in which]
        ids = [
            (rate - 1, bucket(of[n].speed), float(data["noise"][n, k])) for n, k, rate in zip(which, noised, fps, strict=True)
        ]
        conditions = {"first": first, "embeddings": data["embeddings"][which], "ids": torch.tensor(ids)}
        with torch.autocast("cpu", torch.bfloat16):
            return denoising_loss(pipe.unet, data["latents"][which].float(), cells[which], conditions, generator)

    def look(step: int) -> None:
        look_at(pipe, unseen, told.out / f"clips-{step}.png")

    schedule = Schedule(told.steps, told.rate, warm_up=50, muon_rate=MUON_RATE)
    train({"unet": pipe.unet}, loss, schedule, told.out, told.seed, look=look, look_every=500)
    look(told.steps)
    pipe.to(torch.float16).save_pretrained(told.out / "pipeline")
    return 0


def look_at(pipe: StableVideoDiffusionPipeline, of: list[Track], file: Path) -> None:
    """Save a grid with one row per clip: for each track a slow and a fast one."""
    rows = []
    for n, track in enumerate(of):
        first = Image.fromarray(track.frame(0))
        for motion in (20, 250):
            (clip,) = pipe(
                first,
                height=SIZE_PX,
                width=SIZE_PX,
                num_frames=FRAMES,
                num_inference_steps=8,
                max_guidance_scale=1.0,
                fps=6,
                motion_bucket_id=motion,
                generator=torch.Generator().manual_seed(n),
                output_type="np",
            ).frames
            rows.append(np.concatenate(list(np.rint(clip * 255).astype(np.uint8)), axis=1))
    Image.fromarray(np.concatenate(rows)).save(file)


if __name__ == "__main__":
    raise SystemExit(main())
