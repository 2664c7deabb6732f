"""Train a small InfuseNet and its resampler: condition FLUX of the rendered world on face embeddings and keypoints.

    python -m training.rendered.infusenet --out FOLDER --flux FOLDER --faces FOLDER

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

from training.flux import Reader, noised, velocity
from training.infusenet import networks
from training.latents import cached_latents, encoded, pack, places
from training.loop import Schedule, arguments, train
from training.rendered.captions import caption
from training.rendered.dataset import SIZE_PX, drawn, scenes
from training.rendered.drawing import draw, keypoints_px
from training.rendered.flux import BATCH, TEXT_TOKENS, cell_weights
from training.rendered.world import PLACES, WEATHERS, Person, Scene, some_person
from vidgen_ray.nets.faces import TRAINING_AREA_PX, draw_keypoints, norm_crop
from vidgen_ray.nets.identity_networks import NET_FOLDER, PROJECTION, PROJECTION_FILE, IdentityControlNet
from vidgen_ray.nets.ir_se50 import IRSE50Embedder

PATCHES = 8
"""Patches per side of an image."""
SMALLEST_RADIUS = 0.24
"""Half the height of the smallest heads. Smaller ones do not show whom they belong to."""
PHOTOS = 2
"""Embeddings per person, of different images."""
TRAITS_TOLD = 0.2
"""Share of samples whose prompt describes the person."""
SIDE_TOLD = 0.3
"""Share of samples whose prompt mentions the side. In the rest only the keypoints show it."""
MUON_RATE = 0.01
POSELESS = 0.15
"""Share of samples without keypoints, as in shots with `pose: none`."""


def photos(people: Sequence[Person], faces: IRSE50Embedder, random: Random) -> NDArray[np.float32]:
    """Return embeddings (N, PHOTOS, 512) from other images of each person, so that the network learns the identity."""
    crops = []
    for person in people:
        for _ in range(PHOTOS):
            other = some_person(random, person.identity)
            while other.radius < SMALLEST_RADIUS:
                other = some_person(random, person.identity)
            weather = random.choice(("sunny", *WEATHERS))
            scene = Scene(random.choice(PLACES), weather, other, random.random(), land=random.randrange(8))
            crop = norm_crop(draw(scene, SIZE_PX), keypoints_px(other, SIZE_PX))
            crops.append(np.ascontiguousarray(crop[:, :, ::-1]))
    embeddings = [faces.embed(np.stack(crops[first : first + 32])) for first in range(0, len(crops), 32)]
    return np.concatenate(embeddings).reshape(len(people), PHOTOS, -1)


def pose_pictures(people: Sequence[Person]) -> NDArray[np.uint8]:
    scale = SIZE_PX / TRAINING_AREA_PX**0.5
    return np.stack([draw_keypoints(keypoints_px(person, SIZE_PX), SIZE_PX, SIZE_PX, scale) for person in people])


def main() -> int:
    told = arguments(
        __doc__,
        steps=5000,
        rate=1.2e-3,
        seed=5,
        flux="out/rendered/flux/pipeline",
        data="out/rendered/data",
        faces="out/rendered/recogniser",
    )
    flux = FluxPipeline.from_pretrained(told.flux, torch_dtype=torch.float32)
    for part in (flux.transformer, flux.text_encoder, flux.text_encoder_2, flux.vae):
        part.requires_grad_(False).eval()
    read = Reader(flux, TEXT_TOKENS)
    world = scenes()
    who = [n for n, scene in enumerate(world) if _one_person(scene)]
    people = [person for n in who for person in world[n].people]
    latents = pack(cached_latents(told.data / "latents.pt", drawn(world, told.data / "scenes.npy"), flux.vae)[who])
    recogniser = IRSE50Embedder(told.faces / "ir_se50.pth", "cpu", torch.float32, 1)
    embeddings = _cached(told.data / "embeddings.pt", lambda: photos(people, recogniser, Random(told.seed)))
    poses = pack(_cached(told.data / "poses.pt", lambda: encoded(pose_pictures(people), flux.vae)).float())
    black = pack(encoded(np.zeros((1, SIZE_PX, SIZE_PX, 3), np.uint8), flux.vae).float())
    cells = torch.from_numpy(np.stack([cell_weights(world[n]) for n in who]))
    cells /= cells.mean(dim=(1, 2), keepdim=True)
    net, resampler = networks(flux)
    if told.init:
        net.load_state_dict(IdentityControlNet.from_pretrained(told.init / NET_FOLDER).state_dict())
        resampler.load_state_dict(torch.load(told.init / PROJECTION_FILE, weights_only=True)[PROJECTION])

    def loss(step: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(0, len(who), (BATCH,), generator=generator)
        photo = torch.randint(0, PHOTOS, (BATCH,), generator=generator)
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        poseless = torch.rand(BATCH, generator=generator) < POSELESS
        prompts = [
            caption(
                world[who[n]],
                chance,
                names=() if chance.random() < TRAITS_TOLD else ("a person",),
                side=bool(without_pose) or chance.random() < SIDE_TOLD,
            )
            for n, without_pose in zip(which.tolist(), poseless.tolist(), strict=True)
        ]
        mixed, times, wanted = noised(latents[which].float(), generator)
        weights = pack(cells[which][:, None].expand(-1, 16, -1, -1))
        with torch.no_grad():
            states, pooled = read(prompts)
        pose = torch.where(poseless[:, None, None], black, poses[which])
        with torch.autocast("cpu", torch.bfloat16):
            with net.identity(resampler(embeddings[which, photo])):
                double, single = net(
                    hidden_states=mixed,
                    controlnet_cond=pose,
                    timestep=times,
                    pooled_projections=pooled,
                    img_ids=places(PATCHES, PATCHES),
                    return_dict=False,
                )
            made = velocity(
                flux.transformer,
                mixed,
                times,
                torch.ones(BATCH),
                states,
                pooled,
                controlnet_block_samples=double,
                controlnet_single_block_samples=single,
            )
        return ((made.float() - wanted).square() * weights).mean()

    def look(step: int) -> None:
        net.save_pretrained(told.out / "weights" / NET_FOLDER)
        torch.save({PROJECTION: resampler.state_dict()}, told.out / "weights" / PROJECTION_FILE)

    schedule = Schedule(told.steps, told.rate, warm_up=60, muon_rate=MUON_RATE)
    train({"net": net, "resampler": resampler}, loss, schedule, told.out, told.seed, look=look, look_every=500)
    look(told.steps)
    return 0


def _one_person(scene: Scene) -> bool:
    return len(scene.people) == 1 and scene.people[0].radius >= SMALLEST_RADIUS


def _cached(file: Path, make: Callable[[], Any]) -> Tensor:
    if not file.exists():
        torch.save(torch.as_tensor(make()), file)
    return torch.load(file, weights_only=True)


if __name__ == "__main__":
    raise SystemExit(main())
