"""Train a small HunyuanDiT with its text encoders on the rendered world: restyle a flat image according to the prompt.

    python -m training.rendered.hunyuandit --out FOLDER --vae FOLDER

Running the same command on a finished training saves the weights again, with the current decoder of the autoencoder.
The samples are those of `training.hunyuandit`: most are between the noisy flat image and the styled one.
Source: Li et al. 2024, arXiv:2405.08748; Meng et al. 2021, SDEdit, arXiv:2108.01073.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, HunyuanDiT2DModel
from PIL import Image
from torch import Tensor, nn

from training.channels_last import channels_last
from training.hunyuandit import RESTYLED, SHORT_STYLES, STYLE_SHARES, STYLELESS, Reader, mixed, styled_latents
from training.hunyuandit import pipeline as pipeline_around
from training.loop import Schedule, arguments, train
from training.rendered.captions import STYLE_WORDS, caption
from training.rendered.dataset import SIZE_PX, drawn, scenes
from training.rendered.drawing import draw, styled
from training.rendered.flux import TRAITLESS, UNPROMPTED, cell_weights
from training.rendered.world import STYLES, Scene, some_scene
from vidgen_ray.nets.hunyuandit_img2img import HunyuanDiTImg2ImgPipeline

SCENES = 3000
"""Number of scenes of the dataset. Each is used in every style."""
UNSEEN, UNSEEN_SEED = 8, 32
BATCH = 16
MUON_RATE = 0.01


def pipeline(vae: AutoencoderKL) -> HunyuanDiTImg2ImgPipeline:
    pipe = pipeline_around(vae)
    pipe.transformer = HunyuanDiT2DModel.from_config(
        pipe.transformer.config, sample_size=SIZE_PX // 16, num_attention_heads=8, hidden_size=256
    )
    # Start with a velocity of zero.
    for parameter in pipe.transformer.proj_out.parameters():
        nn.init.zeros_(parameter)
    return pipe


def prompt_for(scene: Scene, style: str, chance: Random) -> str:
    if chance.random() < UNPROMPTED:
        return ""
    told = caption(scene, chance, names=("a person", "a person") if chance.random() < TRAITLESS else ())
    if style == "flat" and chance.random() < STYLELESS:
        return told
    words = SHORT_STYLES[style] if chance.random() < 0.25 else chance.choice(STYLE_WORDS[style])
    return f"{told}, {words}"


def main() -> int:
    told = arguments(__doc__, steps=4500, rate=1.2e-3, seed=6, vae="out/rendered/vae/vae", data="out/rendered/data")
    vae = AutoencoderKL.from_pretrained(told.vae, torch_dtype=torch.float32).requires_grad_(False)
    channels_last(vae)
    begun: dict[str, Any] = {"vae": vae, "torch_dtype": torch.float32}
    pipe = HunyuanDiTImg2ImgPipeline.from_pretrained(told.init, **begun) if told.init else pipeline(vae)
    pipe.set_progress_bar_config(disable=True)
    read, positions = Reader(pipe), pipe._positions(SIZE_PX, SIZE_PX)
    kept = pipe.scheduler.alphas_cumprod
    ratios = ((1 - kept) / kept).sqrt()
    world = scenes()[:SCENES]
    latents = styled_latents(drawn(scenes(), told.data / "scenes.npy")[:SCENES], vae, told.data / "styled.pt")
    weights = torch.from_numpy(np.stack([cell_weights(scene) for scene in world]))[:, None]
    weights /= weights.mean(dim=(2, 3), keepdim=True)
    unknown = Random(UNSEEN_SEED)
    unseen = [some_scene(unknown, people=0.7) for _ in range(UNSEEN)]
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
        with torch.autocast("cpu", torch.bfloat16):
            output = pipe.transformer(seen, times.float(), **read(prompts), image_rotary_emb=positions, return_dict=False)[0]
        return (weights[which] * (output.float().chunk(2, dim=1)[0] - velocity).square()).mean()

    def look(step: int) -> None:
        look_at(pipe, unseen, told.out / f"styled-{step}.png")

    schedule = Schedule(told.steps, told.rate, warm_up=150, muon_rate=MUON_RATE)
    train(nets, loss, schedule, told.out, told.seed, look=look, look_every=500)
    look(told.steps)
    pipe.to(torch.float16).save_pretrained(told.out / "pipeline")
    # Use the class name of diffusers, which has the same modules.
    index = told.out / "pipeline" / "model_index.json"
    index.write_text(index.read_text().replace("HunyuanDiTImg2ImgPipeline", "HunyuanDiTPipeline"))
    return 0


def look_at(pipe: HunyuanDiTImg2ImgPipeline, of: list[Scene], file: Path) -> None:
    """Save a grid: a row of flat images, and a row per style with the restyled images. Print their mean errors (0 to 1)."""
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
        off, flat_off = (float(np.abs(some - wanted).mean()) for some in (pictures, np.stack(flat) / 255))
        print(f"{style}: {off:.4f} from the wanted image, {flat_off:.4f} without restyling", flush=True)
    Image.fromarray(np.concatenate(rows)).save(file)


if __name__ == "__main__":
    raise SystemExit(main())
