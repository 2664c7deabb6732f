"""Train a small InfuseNet and its resampler: condition FLUX of the profile `demo` on face embeddings and keypoints.

    python -m training.infusenet --out FOLDER --flux FOLDER --faces FOLDER

FLUX is frozen. Most prompts describe clothes and place but not the person, so that the network has to learn it.
Source: Jiang et al. 2025, InfiniteYou, arXiv:2503.16418.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from numpy.typing import NDArray
from torch import Tensor

from training.captions import caption
from training.dataset import SIZE_PX, drawn, scenes
from training.drawing import draw, head_box, keypoints_px
from training.flux import BATCH, PATCHES, Reader, error, noised, velocity, weights
from training.latents import cached_latents, encoded, pack, places
from training.loop import Schedule, arguments, train
from training.world import PLACES, WEATHERS, Person, Scene, some_person
from vidgen_ray.nets.faces import TRAINING_AREA_PX, draw_keypoints, norm_crop
from vidgen_ray.nets.identity_networks import (
    EMBEDDING_SIZE,
    NET_FOLDER,
    PROJECTION,
    PROJECTION_FILE,
    FaceResampler,
    IdentityControlNet,
    ResamplerSizes,
)
from vidgen_ray.nets.ir_se50 import IRSE50Embedder
from vidgen_ray.stages.identity import MUST_AGREE

PEOPLE = 6500
PHOTO_PX = 128
HEAD_COUNTS = 6.0
"""Loss weight of the head relative to the rest of the image, which FLUX draws equally well without a photo."""
TRAITS_TOLD = 0.2
"""Share of samples whose prompt describes the person."""
SIDE_TOLD = 0.3
"""Share of samples whose prompt mentions the side. In the rest only the keypoints show it."""
POSELESS = 0.15
"""Share of samples without keypoints, as in shots with `pose: none`."""


def networks(flux: FluxPipeline) -> tuple[IdentityControlNet, FaceResampler]:
    net = IdentityControlNet(**_sizes(flux), num_layers=1, num_single_layers=1)
    # Initialise with the first blocks of FLUX, as usual for ControlNets.
    net.load_state_dict(flux.transformer.state_dict(), strict=False)
    tokens = flux.transformer.config.joint_attention_dim
    sizes = ResamplerSizes(EMBEDDING_SIZE, tokens=8, channels=96, heads=2, depth=2, hidden=192, output=tokens)
    resampler = FaceResampler(sizes)
    with torch.no_grad():
        # Embeddings have norm 1, which is too small compared to the biases of the resampler.
        resampler.proj_in.weight.mul_(EMBEDDING_SIZE**0.5)
    return net, resampler


def _sizes(flux: FluxPipeline) -> dict[str, Any]:
    of = flux.transformer.config
    return {name: of[name] for name in (*MUST_AGREE, "patch_size", "joint_attention_dim", "guidance_embeds")}


def photos(people: Sequence[Person], faces: IRSE50Embedder, random: Random) -> NDArray[np.float32]:
    """Return embeddings (N, 512) from another image of each person, so that the network learns the identity."""
    crops = []
    for person in people:
        other = some_person(random, person.identity)
        scene = Scene(random.choice(PLACES), random.choice(("sunny", *WEATHERS)), other, random.random())
        crop = norm_crop(draw(scene, PHOTO_PX), keypoints_px(other, PHOTO_PX))
        crops.append(np.ascontiguousarray(crop[:, :, ::-1]))
    embeddings = [faces.embed(np.stack(crops[first : first + 32])) for first in range(0, len(crops), 32)]
    return np.concatenate(embeddings)


def pose_pictures(people: Sequence[Person]) -> NDArray[np.uint8]:
    scale = SIZE_PX / TRAINING_AREA_PX**0.5
    return np.stack([draw_keypoints(keypoints_px(person, SIZE_PX), SIZE_PX, SIZE_PX, scale) for person in people])


def main() -> int:
    told = arguments(
        __doc__,
        steps=5000,
        rate=1.2e-3,
        seed=5,
        flux="out/training/flux/pipeline",
        data="out/training/data",
        faces="vidgen_ray/weights/demo",
    )
    flux = FluxPipeline.from_pretrained(told.flux, torch_dtype=torch.float32)
    vae = flux.vae
    for part in (flux.transformer, flux.text_encoder, flux.text_encoder_2):
        part.requires_grad_(False).eval()
    read = Reader(flux)
    world = scenes()
    who = [n for n, scene in enumerate(world) if isinstance(scene.subject, Person)][:PEOPLE]
    people = [world[n].subject for n in who]
    latents = pack(cached_latents(told.data / "latents.pt", drawn(world, told.data / "scenes.npy"), vae)[who].float())
    embeddings = _cached(told.data / "embeddings.pt", lambda: photos(people, _recogniser(told.faces), Random(told.seed)))
    poses = pack(_cached(told.data / "poses.pt", lambda: encoded(pose_pictures(people), vae)).float())
    black = pack(encoded(np.zeros((1, SIZE_PX, SIZE_PX, 3), np.uint8), vae).float())
    counts = weights((head_box(person) for person in people), HEAD_COUNTS)
    net, resampler = networks(flux)
    if told.init:
        net.load_state_dict(IdentityControlNet.from_pretrained(told.init / NET_FOLDER).state_dict())
        resampler.load_state_dict(torch.load(told.init / PROJECTION_FILE, weights_only=True)[PROJECTION])

    def loss(step: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(0, len(who), (BATCH,), generator=generator)
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        named = [None if chance.random() < TRAITS_TOLD else "a person" for _ in which]
        poseless = torch.rand(BATCH, generator=generator) < POSELESS
        sides = [nothing_else_does or chance.random() < SIDE_TOLD for nothing_else_does in poseless.tolist()]
        prompts = [
            caption(world[who[n]], chance, name=name, side=side)
            for n, name, side in zip(which.tolist(), named, sides, strict=True)
        ]
        mixed, times, wanted = noised(latents[which], generator)
        with torch.no_grad():
            states, pooled = read(prompts)
        pose = torch.where(poseless[:, None, None], black, poses[which])
        with net.identity(resampler(embeddings[which])):
            double, single = net(
                hidden_states=mixed,
                controlnet_cond=pose,
                timestep=times,
                pooled_projections=pooled,
                img_ids=places(PATCHES, PATCHES),
                return_dict=False,
            )
        drawn_so = velocity(
            flux.transformer,
            mixed,
            times,
            torch.ones(BATCH),
            states,
            pooled,
            controlnet_block_samples=double,
            controlnet_single_block_samples=single,
        )
        return error(drawn_so, wanted, counts[which])

    def look(step: int) -> None:
        net.save_pretrained(told.out / "weights" / NET_FOLDER)
        torch.save({PROJECTION: resampler.state_dict()}, told.out / "weights" / PROJECTION_FILE)

    schedule = Schedule(told.steps, told.rate, warm_up=60)
    train({"net": net, "resampler": resampler}, loss, schedule, told.out, told.seed, look=look, look_every=200)
    look(told.steps)
    return 0


def _recogniser(folder: Path) -> IRSE50Embedder:
    return IRSE50Embedder(folder / "ir_se50.pth", "cpu", torch.float32, 1)


def _cached(file: Path, make: Callable[[], Any]) -> Tensor:
    if not file.exists():
        torch.save(torch.as_tensor(make()), file)
    return torch.load(file, weights_only=True)


if __name__ == "__main__":
    raise SystemExit(main())
