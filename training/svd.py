"""Train a small Stable Video Diffusion on the drawn world: image to clip, with the speed given by the motion bucket.

    python -m training.svd --out FOLDER --vae FOLDER

Running the same command on a finished training saves the weights again, with the current decoder of the autoencoder.
The shared autoencoder decodes frame by frame, like Stability's `svd_image_decoder`. diffusers' AutoencoderKLTemporalDecoder
has 32 groups in its norms and cannot be as narrow as 8 channels; the pipeline accepts both. The CLIP image encoder keeps its
random weights, because the latents of the image carry the same information.
Source: Blattmann et al. 2023, arXiv:2311.15127; Karras et al. 2022, arXiv:2206.00364 (the preconditioning used here).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from training.dataset import SIZE_PX, to_tensor
from training.latents import encoded
from training.loop import Schedule, arguments, train
from training.tracks import TRACKS, TRACKS_SEED, Track, drawn_tracks, tracks

FRAMES, STRIDES = 8, (0, 1, 2)
TRACK_FRAMES = STRIDES[-1] * (FRAMES - 1) + 1
"""Frames per track. Clips are taken from tracks with different strides, so that each scene is seen at several speeds."""
STRIDE_SHARES = (0.06, 0.44, 0.5)
STARTS = (0, FRAMES - 1)
"""Frames of a track at which clips can start."""
NOISED = 2
"""Noisy versions of each first frame: with the usual noise, and with a random noise level."""
USUAL_NOISE, MOST_NOISE = 0.02, 0.3
SLOWEST_BUCKET, FASTEST_BUCKET = 1, 255
EMBEDDING = 32
BATCH = 2
UNCONDITIONED = 0.1
NOISE_LEVEL, NOISE_SPREAD = 0.6, 1.5
"""Mean and standard deviation of log(sigma). Motion is decided at high noise; at low noise it only has to be kept."""
SIGMA_MAX = 30.0
"""The original SVD starts at 700, for 25 frames of 72x128 latents. For 8 frames of 16x16, no signal is left at 30."""
MOVING = 1.0
"""Additional loss weight of changing areas. Most of a clip is sky and plain ground, which do not change."""
SUBJECT = 2.0
"""Additional loss weight of things and heads. Without it, they fall apart in fast clips, faces above all."""


def pipeline(vae: AutoencoderKL) -> StableVideoDiffusionPipeline:
    # With 64 channels, a group of GroupNorm has two channels. With 32 it would have one, which would remove the embeddings (one
    # constant per channel).
    unet = UNetSpatioTemporalConditionModel(
        sample_size=SIZE_PX // 8,
        in_channels=2 * vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(64, 64),
        layers_per_block=1,
        # Layers get the frame number only through attention, so the first block, which can resolve shifts of one latent, has
        # attention. The middle block has it, too, at 8x8. More attention costs more than it gains.
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "UpBlockSpatioTemporal"),
        cross_attention_dim=EMBEDDING,
        num_attention_heads=(2, 2),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        num_frames=FRAMES,
    )
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            projection_dim=EMBEDDING,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=224,
            intermediate_size=64,
            patch_size=16,
        )
    )
    return StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=clip.eval().requires_grad_(False),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            interpolation_type="linear",
            num_train_timesteps=1000,
            steps_offset=1,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=SIGMA_MAX,
        ),
        feature_extractor=CLIPImageProcessor(crop_size=224, size=224),
    )


LOUD = 8.0
"""Initial scale of the frame position and motion embeddings, relative to the default initialisation."""


@torch.no_grad()
def repeat_the_picture(unet: UNetSpatioTemporalConditionModel, spread: Tensor) -> None:
    """Initialise the network to repeat the image in every frame. `spread` (16,): spread of the latents of the image.

    At high noise, the velocity is the negated clean latents. Learning to copy them through norms and activations would take
    most of a short training. But z and -z in the two channels of a group have mean zero, and silu(z) - silu(-z) = z, so
    such pairs can be passed from the first convolution over the outermost skip connection to the last convolution.
    """
    channels = unet.config.out_channels
    weight = unet.conv_in.weight.mul_(0.1)
    for k in range(2 * channels):
        weight[2 * k, k, 1, 1] += 1
        weight[2 * k + 1, k, 1, 1] -= 1
    last = unet.up_blocks[-1].resnets[-1]
    for residual in (last.spatial_res_block.conv2, last.temporal_res_block.conv2):
        residual.weight.mul_(0.1)
    through, skipped = last.spatial_res_block.conv_shortcut.weight, unet.conv_in.out_channels
    through.mul_(0.1)
    through[:, -skipped:, 0, 0] += torch.eye(skipped)
    for attention in (unet.mid_block.attentions[0], unet.down_blocks[0].attentions[0]):
        attention.time_pos_embed.linear_2.weight.mul_(LOUD)
    unet.add_embedding.linear_2.weight.mul_(LOUD)
    out = unet.conv_out.weight.mul_(0.1)
    for k in range(channels):
        pair = 2 * (channels + k)
        out[k, pair, 1, 1] -= spread[k]
        out[k, pair + 1, 1, 1] += spread[k]


def keep_the_pairs(unet: UNetSpatioTemporalConditionModel) -> None:
    """Freeze the layers with the pairs, which would otherwise be lost within a few hundred steps."""
    for kept in (unet.conv_in, unet.up_blocks[-1].resnets[-1].spatial_res_block.conv_shortcut):
        kept.requires_grad_(False)


def bucket(speed: float) -> float:
    return SLOWEST_BUCKET + speed * (FASTEST_BUCKET - SLOWEST_BUCKET)


@torch.no_grad()
def prepared(of: list[Track], pipe: StableVideoDiffusionPipeline, file: Path) -> dict[str, Tensor]:
    """Return the training data of the tracks, from the cache file if it exists.

    `latents` (N, TRACK_FRAMES, 16, 16, 16), scaled. For the start frames: `first` (N, starts, NOISED, 16, 16, 16), not scaled
    (as in the pipeline), their `noise` (N, starts, NOISED), and `embeddings` (N, starts, EMBEDDING).
    """
    if file.exists():
        return torch.load(file, weights_only=True)
    generator, made = torch.Generator().manual_seed(TRACKS_SEED), {}
    for frames in drawn_tracks(of, file.with_name("tracks.npy")):
        made.setdefault("latents", []).append(encoded(frames, pipe.vae))
        starts = frames[list(STARTS)]
        other = (torch.rand(len(STARTS), generator=generator) * np.log(MOST_NOISE / 0.005)).exp() * 0.005
        noise = torch.stack([torch.full((len(STARTS),), USUAL_NOISE), other], dim=1)
        pictures = to_tensor(starts)[:, None].expand(-1, NOISED, -1, -1, -1)
        seen = pictures + noise[..., None, None, None] * torch.randn(pictures.shape, generator=generator)
        first = pipe.vae.encode(seen.flatten(0, 1).contiguous(memory_format=torch.channels_last)).latent_dist.mode()
        made.setdefault("first", []).append(first.unflatten(0, (len(STARTS), NOISED)).half())
        made.setdefault("noise", []).append(noise)
        told = pipe._encode_image([Image.fromarray(picture) for picture in starts], "cpu", 1, False)
        made.setdefault("embeddings", []).append(told[:, 0])
    data = {name: torch.stack(parts) for name, parts in made.items()}
    fresh = file.with_suffix(".new")
    torch.save(data, fresh)
    os.replace(fresh, file)
    return data


def denoising_loss(
    unet: UNetSpatioTemporalConditionModel,
    clips: Tensor,
    subjects: Tensor,
    conditions: dict[str, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Return the loss for clips (B, FRAMES, 16, 16, 16) at random noise levels.

    `subjects` (B, FRAMES, 16, 16): 1 where a latent shows the subject, otherwise 0. Conditions: `first`, `embeddings`, `ids`.
    """
    rows = len(clips)
    sigma = (torch.randn(rows, generator=generator) * NOISE_SPREAD + NOISE_LEVEL).exp().clamp(max=2 * SIGMA_MAX)
    s = sigma[:, None, None, None, None]
    noisy = clips + s * torch.randn(clips.shape, generator=generator)
    kept = (torch.rand(rows, generator=generator) >= UNCONDITIONED).float()
    first = (conditions["first"] * kept[:, None, None, None])[:, None].expand(-1, FRAMES, -1, -1, -1)
    seen = torch.cat([noisy / (s**2 + 1).sqrt(), first], dim=2)
    embeddings = (conditions["embeddings"] * kept[:, None])[:, None]
    told = unet(seen, 0.25 * sigma.log(), embeddings, conditions["ids"], return_dict=False)[0]
    velocity = (noisy / (s**2 + 1) - clips) * (s**2 + 1).sqrt() / s
    changes = (clips - clips[:, :1]).abs().mean(dim=2, keepdim=True).clamp(max=1)
    weights = 1 + MOVING * changes + SUBJECT * subjects[:, :, None]
    return (weights / weights.mean() * (told - velocity) ** 2).mean()


def main() -> int:
    told = arguments(__doc__, steps=12000, rate=1e-3, seed=5, vae="out/training/vae", data="out/training/data")
    vae = AutoencoderKL.from_pretrained(told.vae, torch_dtype=torch.float32).requires_grad_(False)
    begun: dict[str, Any] = {"vae": vae, "torch_dtype": torch.float32}
    pipe = StableVideoDiffusionPipeline.from_pretrained(told.init, **begun) if told.init else pipeline(vae)
    pipe.set_progress_bar_config(disable=True)
    of = tracks(TRACKS, TRACKS_SEED, TRACK_FRAMES)
    data = prepared(of, pipe, told.data / "tracks.pt")
    if not told.init:
        repeat_the_picture(pipe.unet, data["first"].float().square().mean(dim=(0, 1, 2, 4, 5)).sqrt())
    keep_the_pairs(pipe.unet)
    cells = torch.from_numpy(np.stack([track.subject_cells() for track in of])).float()
    unseen = tracks(8, TRACKS_SEED + 1, TRACK_FRAMES)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        clips, subjects, first, embeddings, ids = [], [], [], [], []
        for _ in range(BATCH):
            n = chance.randrange(len(of))
            (stride,) = chance.choices(STRIDES, STRIDE_SHARES)
            speed = of[n].speed * stride / STRIDES[-1]
            start = chance.randrange(len(STARTS)) if stride < STRIDES[-1] else 0
            noised = chance.randrange(NOISED)
            frames = slice(STARTS[start], STARTS[start] + (stride * FRAMES or 1), stride or 1)
            clips.append(data["latents"][n, frames].expand(FRAMES, -1, -1, -1))
            subjects.append(cells[n, frames].expand(FRAMES, -1, -1))
            first.append(data["first"][n, start, noised])
            embeddings.append(data["embeddings"][n, start])
            # The motion bucket is per frame, so fps has no effect. Vary it anyway: unseen values would have undefined effects.
            fps = 6 if chance.random() < 0.5 else chance.randint(4, 25)
            ids.append((fps - 1, bucket(speed), float(data["noise"][n, start, noised])))
        conditions = {"first": torch.stack(first).float(), "embeddings": torch.stack(embeddings), "ids": torch.tensor(ids)}
        return denoising_loss(pipe.unet, torch.stack(clips).float(), torch.stack(subjects), conditions, generator)

    def look(step: int) -> None:
        look_at(pipe, unseen, told.out / f"clips-{step}.png")

    train(
        {"unet": pipe.unet},
        loss,
        Schedule(told.steps, told.rate, warm_up=50),
        told.out,
        told.seed,
        look=look,
        look_every=500,
    )
    look(told.steps)
    pipe.to(torch.float16).save_pretrained(told.out / "pipeline")
    return 0


def look_at(pipe: StableVideoDiffusionPipeline, of: list[Track], file: Path) -> None:
    """Save a grid with one row per clip: for each track a slow and a fast one.

    Appends the mean difference (0 to 1) between image and first frame, and between first and last frame, to a `.jsonl` file
    of the same name.
    """
    rows = []
    for n, track in enumerate(of):
        first = track.frame(0)
        for motion in (20, 250):
            (clip,) = pipe(
                Image.fromarray(first),
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
            off, changes = np.abs(clip[0] - first / 255).mean(), np.abs(clip[-1] - clip[0]).mean()
            seen = {"clip": n, "bucket": motion, "first_off": off.item(), "changes": changes.item()}
            with file.with_suffix(".jsonl").open("a") as measured:
                measured.write(json.dumps(seen) + "\n")
    Image.fromarray(np.concatenate(rows)).save(file)


if __name__ == "__main__":
    raise SystemExit(main())
