"""Train the face recogniser of the rendered world: a narrow IR-SE50, saved as `.pth` and as the ONNX file of a face pack.

    python -m training.rendered.face_recogniser --out FOLDER

In the embedding, the values of a trait are the corners of a simplex, and each trait has its own dimensions. The cosine of two
people decreases with the number of traits in which they differ and is about 0 for two random people.
Source: Wang et al. 2018, CosFace, arXiv:1801.09414, with classes of traits and of people; networks in vidgen_ray.nets.ir_se50.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from training.degrading import degraded
from training.face_recogniser import margins, to_tensor, write
from training.finishing import gather_statistics
from training.loop import Schedule, arguments, train
from training.rendered.cast import CAST, others
from training.rendered.drawing import draw, keypoints_px
from training.rendered.world import (
    EYES,
    FACE_SHAPES,
    HAIR_STYLES,
    HAIRS,
    SKINS,
    Identity,
    some_identity,
    some_person,
    some_scene,
)
from vidgen_ray.nets.faces import norm_crop
from vidgen_ray.nets.ir_se50 import EMBEDDING, IRSE50

WIDTHS = (16, 24, 32, 32)
"""Channel widths. Multiples of 8 are fast on CPUs. The last one determines the file size."""
PICTURES, BATCH = 5000, 32
SIZES_PX = (256, 256, 160, 384)
SMALLEST_RADIUS = 0.26
"""Faces of people who are seen from afar have too few pixels to be recognised."""
JITTER = 0.04
"""Simulated error of detected points relative to the face width, as two standard deviations."""
DROPOUT = 0.1
UNSEEN = "unseen"
"""Hair colour of a bald person without a beard, which is not visible."""
TRAITS: dict[str, tuple[object, ...]] = {
    "skin": tuple(SKINS),
    "hair": (*HAIRS, UNSEEN),
    "hair_style": HAIR_STYLES,
    "face_shape": FACE_SHAPES,
    "eyes": tuple(EYES),
    **dict.fromkeys(("glasses", "beard", "freckles", "thick_brows", "broad_nose", "full_lips"), (False, True)),
}


def labels(identity: Identity) -> list[int]:
    """Return the index of the value of each trait, in the order of TRAITS."""
    told = {trait: getattr(identity, trait) for trait in TRAITS}
    if identity.hair_style == "bald" and not identity.beard:
        told["hair"] = UNSEEN
    return [values.index(told[trait]) for trait, values in TRAITS.items()]


def corners() -> list[Tensor]:
    """Return a simplex (values, 512) per trait: unit rows that sum to 0. The simplices are orthogonal to each other."""
    turn = torch.linalg.qr(torch.randn(EMBEDDING, EMBEDDING, generator=torch.Generator().manual_seed(0)))[0]
    made, first = [], 0
    for values in TRAITS.values():
        n = len(values)
        made.append(functional.normalize((torch.eye(n) - 1 / n) @ turn[first : first + n]))
        first += n
    return made


class People:
    """Images with face keypoints and identities."""

    def __init__(self, count: int, seed: int, who: Sequence[Identity] = ()) -> None:
        """Draw the identities `who` in turn, or random ones. Random identities exclude the thirty, who are held out."""
        random = Random(seed)
        self.pictures: list[NDArray[np.uint8]] = []
        self.keypoints: list[NDArray[np.float32]] = []
        self.identities: list[Identity] = []
        known = {*CAST.values(), *others()}
        for n in range(count):
            identity = who[n % len(who)] if who else some_identity(random)
            while not who and identity in known:
                identity = some_identity(random)
            person = some_person(random, identity)
            while person.radius < SMALLEST_RADIUS:
                person = some_person(random, identity)
            scene, size_px = some_scene(random, identity=identity), random.choice(SIZES_PX)
            self.pictures.append(draw(replace(scene, subject=person), size_px))
            self.keypoints.append(keypoints_px(person, size_px))
            self.identities.append(identity)
        self.labels = torch.tensor([labels(identity) for identity in self.identities])

    def crops(self, which: Sequence[int], random: np.random.Generator, strength: float) -> NDArray[np.uint8]:
        """Return aligned faces (B, 112, 112, 3) in BGR, degraded with `strength` from 0 to 1."""
        made = []
        for n in which:
            points = self.keypoints[n]
            width = 2.2 * (points[1, 0] - points[0, 0])
            beside = random.normal(0, 0.5 * JITTER * width * strength, (5, 2))
            crop = norm_crop(self.pictures[n], points + beside)
            made.append((degraded(crop, random, strength) if strength else crop)[:, :, ::-1])
        return np.stack(made)


def main() -> int:
    told = arguments(__doc__, steps=1500, seed=11)
    people, everybody = People(PICTURES, told.seed), [*CAST.values(), *others()]
    some = People(10 * len(everybody), told.seed + 1, everybody)
    network, simplices = IRSE50(WIDTHS), corners()
    network.output_layer[1].p = DROPOUT

    def loss(step: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(0, PICTURES, (BATCH,), generator=generator).tolist()
        random = np.random.default_rng(int(torch.randint(0, 2**31, (), generator=generator)))
        # Start with clean images, which are easier to learn from.
        strength = min(1.0, 0.2 + 1.6 * step / told.steps)
        crops = people.crops(which, random, strength)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = network(to_tensor(crops))
        return margins(embeddings.float(), people.labels[which], simplices)

    def gather(batches: int) -> None:
        random = np.random.default_rng(0)
        crops = (people.crops([(n * 64 + k) % PICTURES for k in range(64)], random, 0.7) for n in range(batches))
        gather_statistics(network, map(to_tensor, crops))

    def look(step: int) -> None:
        gather(8)
        for strength in (0.0, 1.0):
            found = embedded(network, some.crops(range(len(some.pictures)), np.random.default_rng(0), strength))
            right = [(found @ simplex.T).argmax(1) == some.labels[:, n] for n, simplex in enumerate(simplices)]
            shares = ", ".join(f"{trait} {one.float().mean():.2f}" for trait, one in zip(TRAITS, right, strict=True))
            recognised = _recognised(found, everybody, network)
            print(f"step {step}, spoilt by {strength:.0f}: {shares}; the person {recognised:.3f}", flush=True)
        network.train()

    schedule = Schedule(told.steps, rate=4e-3, warm_up=50)
    train({"network": network}, loss, schedule, told.out, told.seed, look=look, look_every=300)
    gather(40)
    write(network, told.out)
    look(told.steps)
    return 0


@torch.no_grad()
def embedded(network: nn.Module, crops: NDArray[np.uint8]) -> Tensor:
    network.eval()
    return torch.cat([functional.normalize(network(to_tensor(crops[n : n + 32]))) for n in range(0, len(crops), 32)])


def _recognised(found: Tensor, everybody: Sequence[Identity], network: nn.Module) -> float:
    """Return the share of faces that are closest to a clean image of their own person, among the thirty."""
    first = People(len(everybody), 5, everybody)
    references = embedded(network, first.crops(range(len(everybody)), np.random.default_rng(0), 0.0))
    nearest = (found @ references.T).argmax(1)
    return float((nearest == torch.arange(len(found)) % len(everybody)).float().mean())


if __name__ == "__main__":
    raise SystemExit(main())
