"""Train a small HunyuanDiT with its text encoders on the drawn world: restyle a flat image according to the prompt.

    python -m training.hunyuandit --out FOLDER --vae FOLDER

Running the same command on a finished training saves the weights again, with the current decoder of the autoencoder.
The stage starts from a noisy image in another style. Most samples are therefore latents between the noisy flat image and the
styled one, at the position that the sampler has reached at that noise level. The rest are ordinary noisy images.
The variance half of the output is not trained, because no scheduler of the stage uses it.
Source: Li et al. 2024, arXiv:2405.08748; Meng et al. 2021, SDEdit, arXiv:2108.01073.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, HunyuanDiT2DModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import T5EncoderModel

from training.captions import STYLE_WORDS, caption
from training.dataset import SIZE_PX, drawn, scenes
from training.drawing import detail_box, draw, styled
from training.latents import covered, encoded
from training.loop import Schedule, arguments, train
from training.text import bert_encoder, bert_tokenizer, t5_encoder, t5_tokenizer
from training.world import STYLES, Scene, some_scene
from vidgen_ray.nets.hunyuandit_img2img import HunyuanDiTImg2ImgPipeline

SCENES = 3000
"""Number of scenes of the dataset. Each is used in every style."""
UNSEEN, UNSEEN_SEED = 6, 32
BERT_TOKENS, T5_TOKENS = 77, 256
"""Lengths to which the pipeline pads prompts, independently of the tokenizers."""
T5_NEAR, T5_COMPUTED = 16, 80
"""T5_NEAR: maximum distance of relative positions that this T5 distinguishes. All padding at least this far behind the prompt
has the same state, so only T5_COMPUTED tokens are computed. Prompts are truncated to T5_COMPUTED - T5_NEAR tokens."""
TEXT_CHANNELS = 64
BATCH = 16
UNPROMPTED, TRAITLESS, STYLELESS = 0.1, 0.15, 0.5
"""Shares of samples without prompt, of people described only by their clothes, of flat images without style in the prompt."""
RESTYLED = 0.65
"""Share of samples with a prompt that start from the flat image."""
STRENGTHS = (0.25, 0.85)
"""Range of the restyle strength."""
BETAS = (0.0001, 0.0034)
"""Less noise than the original 0.00085 to 0.018: the same noise destroys more of an image with fewer pixels.
Source: Hoogeboom et al. 2023, simple diffusion, arXiv:2301.11093."""
STYLE_SHARES = (0.15, 0.45, 0.2, 0.2)
"""Shares of STYLES. Faces are hardest to keep in sketches."""
SUBJECT = 4.0
"""Additional loss weight of things and heads."""
SHORT_STYLES = {"flat": "flat", "sketch": "sketch", "night": "night", "pastel": "pastel"}


def transformer(channels: int) -> HunyuanDiT2DModel:
    return HunyuanDiT2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=channels,
        patch_size=2,
        sample_size=SIZE_PX // 8,
        hidden_size=192,
        num_layers=6,
        mlp_ratio=2.0,
        learn_sigma=True,
        cross_attention_dim=TEXT_CHANNELS,
        cross_attention_dim_t5=TEXT_CHANNELS,
        pooled_projection_dim=TEXT_CHANNELS,
        text_len=BERT_TOKENS,
        text_len_t5=T5_TOKENS,
        activation_fn="gelu-approximate",
        use_style_cond_and_image_meta_size=False,
    )


def pipeline(vae: AutoencoderKL) -> HunyuanDiTImg2ImgPipeline:
    for_bert, for_t5 = bert_tokenizer(BERT_TOKENS), t5_tokenizer(T5_TOKENS)
    t5_config = t5_encoder(for_t5, TEXT_CHANNELS, 1).config
    t5_config.relative_attention_max_distance = T5_NEAR
    return HunyuanDiTImg2ImgPipeline(
        vae=vae,
        text_encoder=bert_encoder(for_bert, TEXT_CHANNELS, 2),
        tokenizer=for_bert,
        transformer=transformer(vae.config.latent_channels),
        scheduler=DDPMScheduler(
            num_train_timesteps=1000,
            beta_start=BETAS[0],
            beta_end=BETAS[1],
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=T5EncoderModel(t5_config),
        tokenizer_2=for_t5,
    )


class Reader:
    """Encodes prompts as the pipeline does, but with gradients. Caches the tokens."""

    def __init__(self, pipe: HunyuanDiTImg2ImgPipeline) -> None:
        self.pipe = pipe
        self._ids: dict[str, tuple[list[int], list[int]]] = {}

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return the states of Bert (B, 77, TEXT_CHANNELS) and T5 (B, 256, TEXT_CHANNELS), and their masks."""
        ids = [self._tokens(prompt) for prompt in prompts]
        longest = max(len(bert) for bert, _ in ids)
        bert_ids, bert_mask = _padded([bert for bert, _ in ids], longest, self.pipe.tokenizer.pad_token_id)
        t5_ids, t5_mask = _padded([t5 for _, t5 in ids], T5_COMPUTED, self.pipe.tokenizer_2.pad_token_id)
        bert = self.pipe.text_encoder(bert_ids, attention_mask=bert_mask).last_hidden_state
        t5 = self.pipe.text_encoder_2(t5_ids, attention_mask=t5_mask).last_hidden_state
        # States of padding are masked, but the pooler of the T5 states uses them all.
        return {
            "encoder_hidden_states": F.pad(bert, (0, 0, 0, BERT_TOKENS - longest)),
            "text_embedding_mask": F.pad(bert_mask, (0, BERT_TOKENS - longest)),
            "encoder_hidden_states_t5": torch.cat([t5, t5[:, -1:].expand(-1, T5_TOKENS - T5_COMPUTED, -1)], dim=1),
            "text_embedding_mask_t5": F.pad(t5_mask, (0, T5_TOKENS - T5_COMPUTED)),
        }

    def _tokens(self, prompt: str) -> tuple[list[int], list[int]]:
        if prompt not in self._ids:
            if len(self._ids) > 100_000:
                self._ids.clear()
            bert = self.pipe.tokenizer(prompt, truncation=True, max_length=BERT_TOKENS).input_ids
            t5 = self.pipe.tokenizer_2(prompt, truncation=True, max_length=T5_COMPUTED - T5_NEAR).input_ids
            self._ids[prompt] = bert, t5
        return self._ids[prompt]


def _padded(rows: list[list[int]], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Return the padded ids (B, length) and their mask."""
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def styled_latents(flat: NDArray[np.uint8], vae: AutoencoderKL, file: Path) -> Tensor:
    """Return scaled latents (N, styles, 16, 16, 16) of flat images (N, 128, 128, 3) in all STYLES. Cached in the file."""
    if not file.exists():
        made = [encoded(np.stack([styled(picture, style) for style in STYLES]), vae) for picture in flat]
        fresh = file.with_suffix(".new")
        torch.save(torch.stack(made), fresh)
        os.replace(fresh, file)
    return torch.load(file, weights_only=True)


def prompt_for(scene: Scene, style: str, chance: Random) -> str:
    if chance.random() < UNPROMPTED:
        return ""
    told = caption(scene, chance, name="a person" if chance.random() < TRAITLESS else None)
    if style == "flat" and chance.random() < STYLELESS:
        return told
    words = SHORT_STYLES[style] if chance.random() < 0.25 else chance.choice(STYLE_WORDS[style])
    return f"{told}, {words}"


def mixed(
    flat: Tensor, wanted: Tensor, restyled: Tensor, ratios: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the network inputs (B, 16, 16, 16) for the targets `wanted`, the times (B,) and the velocities.

    For samples with `restyled` (B,), the sampler started from `flat` at the noise level of a random strength and moves
    straight to `wanted`: the remaining share of `flat` equals the remaining share of the noise. `ratios` (1000,):
    noise-to-signal ratios of the schedule.
    """
    rows = len(wanted)
    low, high = STRENGTHS
    begun = ((low + (high - low) * torch.rand(rows, generator=generator)) * len(ratios)).long()
    walked = torch.rand(rows, generator=generator)
    # Sample the first step, which starts from the flat image, more often: it matters most.
    walked = torch.where(torch.rand(rows, generator=generator) < 0.25, 1.0, walked)
    anywhere = torch.randint(0, len(ratios), (rows,), generator=generator)
    times = torch.where(restyled, (begun * walked).long(), anywhere)
    ratio = ratios[times]
    left = torch.where(restyled, ratio / ratios[begun], 0.0)[:, None, None, None]
    signal = (1 / (ratio**2 + 1).sqrt())[:, None, None, None]
    spread = (1 - signal**2).sqrt()
    seen = signal * torch.lerp(wanted, flat, left) + spread * torch.randn(wanted.shape, generator=generator)
    # Treat everything that is not `wanted` as noise.
    noise = (seen - signal * wanted) / spread
    return seen, times, signal * noise - spread * wanted


def main() -> int:
    told = arguments(__doc__, steps=4500, rate=1.2e-3, seed=6, vae="out/training/vae", data="out/training/data")
    vae = AutoencoderKL.from_pretrained(told.vae, torch_dtype=torch.float32).requires_grad_(False)
    begun: dict[str, Any] = {"vae": vae, "torch_dtype": torch.float32}
    pipe = HunyuanDiTImg2ImgPipeline.from_pretrained(told.init, **begun) if told.init else pipeline(vae)
    pipe.set_progress_bar_config(disable=True)
    read, positions = Reader(pipe), pipe._positions(SIZE_PX, SIZE_PX)
    kept = pipe.scheduler.alphas_cumprod
    ratios = ((1 - kept) / kept).sqrt()
    world = scenes()[:SCENES]
    latents = styled_latents(drawn(scenes(), told.data / "scenes.npy")[:SCENES], vae, told.data / "styled.pt")
    weights = 1 + SUBJECT * torch.from_numpy(np.stack([covered(detail_box(scene.subject)) for scene in world])).float()[:, None]
    weights /= weights.mean()
    unknown = Random(UNSEEN_SEED)
    unseen = [some_scene(unknown, people=0.5) for _ in range(UNSEEN)]
    # Start with a velocity of zero.
    for parameter in () if told.init else pipe.transformer.proj_out.parameters():
        nn.init.zeros_(parameter)
    nets = {"transformer": pipe.transformer, "bert": pipe.text_encoder, "t5": pipe.text_encoder_2}

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        which = [chance.randrange(len(world)) for _ in range(BATCH)]
        styles = chance.choices(range(len(STYLES)), STYLE_SHARES, k=BATCH)
        prompts = [prompt_for(world[n], STYLES[style], chance) for n, style in zip(which, styles, strict=True)]
        # Without a prompt the style is unknown, so such samples are not restyled.
        restyled = torch.tensor([prompt != "" and chance.random() < RESTYLED for prompt in prompts])
        flat, wanted = latents[which, 0].float(), latents[which, styles].float()
        seen, times, velocity = mixed(flat, wanted, restyled, ratios, generator)
        output = pipe.transformer(seen, times.float(), **read(prompts), image_rotary_emb=positions, return_dict=False)[0]
        return (weights[which] * (output.chunk(2, dim=1)[0] - velocity).square()).mean()

    def look(step: int) -> None:
        look_at(pipe, unseen, told.out / f"styled-{step}.png")

    train(nets, loss, Schedule(told.steps, told.rate, warm_up=150), told.out, told.seed, look=look, look_every=400)
    look(told.steps)
    pipe.to(torch.float16).save_pretrained(told.out / "pipeline")
    # Use the class name of diffusers, which has the same modules.
    index = told.out / "pipeline" / "model_index.json"
    index.write_text(index.read_text().replace("HunyuanDiTImg2ImgPipeline", "HunyuanDiTPipeline"))
    return 0


def look_at(pipe: HunyuanDiTImg2ImgPipeline, of: list[Scene], file: Path) -> None:
    """Save a grid: a row of flat images, and a row per style with the restyled images.

    Appends the mean errors (0 to 1) of the restyled and of the flat images to a `.jsonl` file of the same name.
    """
    chance, flat = Random(0), [draw(scene, SIZE_PX) for scene in of]
    rows = [np.concatenate(flat, axis=1)]
    for style in STYLES[1:]:
        restyled = [
            pipe(
                f"{caption(scene, chance)}, {STYLE_WORDS[style][0]}",
                Image.fromarray(picture),
                strength=0.6,
                num_inference_steps=10,
                guidance_scale=1.0,
                generator=torch.Generator().manual_seed(n),
                output_type="np",
            ).images
            for n, (scene, picture) in enumerate(zip(of, flat, strict=True))
        ]
        pictures = np.concatenate(restyled)
        rows.append(np.rint(np.concatenate(list(pictures), axis=1) * 255).astype(np.uint8))
        wanted = np.stack([styled(picture, style) for picture in flat]) / 255
        seen = {
            "style": style,
            "off": np.abs(pictures - wanted).mean(),
            "flat_off": np.abs(np.stack(flat) / 255 - wanted).mean(),
        }
        with file.with_suffix(".jsonl").open("a") as measured:
            measured.write(json.dumps(seen) + "\n")
    Image.fromarray(np.concatenate(rows)).save(file)


if __name__ == "__main__":
    raise SystemExit(main())
