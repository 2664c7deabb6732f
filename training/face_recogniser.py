"""Train the face recogniser of the profile `demo`: a narrow IR-SE50, saved as `.pth` and as the ONNX file of a face pack.

    python -m training.face_recogniser --out FOLDER

In the embedding, the values of a trait are the corners of a simplex, and each trait has its own dimensions. The cosine of two
people decreases with the number of traits in which they differ and is about 0 for two random people.
Source: Wang et al. 2018, CosFace, arXiv:1801.09414, with classes of traits and of people; networks in vidgen_ray.nets.ir_se50.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from training.cast import CAST
from training.degrading import degraded
from training.drawing import draw, keypoints_px
from training.finishing import export, gather_statistics
from training.loop import Schedule, arguments, train
from training.world import EYES, FACE_SHAPES, HAIR_STYLES, HAIRS, SKINS, Identity, Person, some_identity, some_scene
from vidgen_ray.nets.faces import CROP_PX, norm_crop
from vidgen_ray.nets.ir_se50 import EMBEDDING, IRSE50

WIDTHS = (8, 16, 16, 16)
"""Channel widths. Multiples of 8 are fast on CPUs. The last one determines the file size."""
PICTURES, BATCH = 2600, 32
SIZES_PX = (128, 128, 128, 224)
JITTER = 0.04
"""Simulated error of detected points relative to the face width, as two standard deviations."""
DROPOUT = 0.1
TRAIT_SCALE, TRAIT_MARGIN, PERSON_SCALE, PERSON_MARGIN = 12.0, 0.15, 24.0, 0.10
LENGTH = EMBEDDING**0.5
"""Norm of the embeddings in the face pack. Their values are about 1, as in antelopev2."""
UNSEEN = "unseen"
"""Hair colour of a bald person without a beard, which is not visible."""
TRAITS: dict[str, tuple[object, ...]] = {
    "skin": tuple(SKINS),
    "hair": (*HAIRS, UNSEEN),
    "hair_style": HAIR_STYLES,
    "face_shape": FACE_SHAPES,
    "eyes": tuple(EYES),
    "glasses": (False, True),
    "beard": (False, True),
}


def labels(identity: Identity) -> list[int]:
    """Return the index of the value of each trait, in the order of TRAITS."""
    told = {trait: getattr(identity, trait) for trait in TRAITS}
    if identity.hair_style == "bald" and not identity.beard:
        told["hair"] = UNSEEN
    return [values.index(told[trait]) for trait, values in TRAITS.items()]


def frames() -> list[Tensor]:
    """Return a simplex (values, 512) per trait: unit rows that sum to 0. The simplices are orthogonal to each other."""
    turn = torch.linalg.qr(torch.randn(EMBEDDING, EMBEDDING, generator=torch.Generator().manual_seed(0)))[0]
    made, first = [], 0
    for values in TRAITS.values():
        n = len(values)
        corners = torch.eye(n) - 1 / n
        made.append(functional.normalize(corners @ turn[first : first + n]))
        first += n
    return made


class People:
    """Images with face keypoints and identities."""

    def __init__(self, count: int, seed: int, who: Sequence[Identity] | None = None) -> None:
        """Draw the identities `who` in turn, or random ones. Random identities exclude the cast, which is held out."""
        random = Random(seed)
        self.pictures: list[NDArray[np.uint8]] = []
        self.keypoints: list[NDArray[np.float32]] = []
        self.identities: list[Identity] = []
        known = set(CAST.values())
        for n in range(count):
            identity = who[n % len(who)] if who else some_identity(random)
            while not who and identity in known:
                identity = some_identity(random)
            scene, size_px = some_scene(random, identity=identity), random.choice(SIZES_PX)
            assert isinstance(scene.subject, Person)
            self.pictures.append(draw(scene, size_px))
            self.keypoints.append(keypoints_px(scene.subject, size_px))
            self.identities.append(identity)
        self.labels = torch.tensor([labels(identity) for identity in self.identities])

    def crops(self, which: Sequence[int], random: np.random.Generator, strength: float) -> NDArray[np.uint8]:
        """Return aligned faces (B, 112, 112, 3) in BGR, degraded with `strength` from 0 to 1."""
        made = []
        for n in which:
            points = self.keypoints[n]
            width = 2.2 * (points[1, 0] - points[0, 0])
            beside = random.normal(0, 0.5 * JITTER * width * strength, (5, 2))
            picture = degraded(self.pictures[n], random, strength) if strength else self.pictures[n]
            made.append(norm_crop(picture, points + beside)[:, :, ::-1])
        return np.stack(made)


def to_tensor(crops: NDArray[np.uint8]) -> Tensor:
    """Convert uint8 (B, 112, 112, 3) to (B, 3, 112, 112) from -1 to 1, in the same channel order."""
    return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def main() -> int:
    told = arguments(__doc__, steps=550, seed=11)
    people = People(PICTURES, told.seed)
    some = People(300, told.seed + 1, list(CAST.values()))
    network, corners = IRSE50(WIDTHS), frames()
    network.output_layer[1].p = DROPOUT

    def loss(step: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(0, PICTURES, (BATCH,), generator=generator).tolist()
        random = np.random.default_rng(int(torch.randint(0, 2**31, (), generator=generator)))
        # Start with clean images, which are easier to learn from.
        strength = min(1.0, 0.2 + 1.6 * step / told.steps)
        crops = people.crops(which, random, strength)
        return margins(network(to_tensor(crops)), people.labels[which], corners)

    def look(step: int) -> None:
        _gather(network, people)
        for strength in (0.0, 1.0):
            found = embedded(network, some.crops(range(300), np.random.default_rng(0), strength))
            right = [(found @ frame.T).argmax(1) == some.labels[:, n] for n, frame in enumerate(corners)]
            shares = ", ".join(f"{trait} {one.float().mean():.2f}" for trait, one in zip(TRAITS, right, strict=True))
            print(f"step {step}, spoilt by {strength:.0f}: {shares}; the person {_top_1(found, some, network):.3f}", flush=True)
        network.train()

    train(
        {"network": network}, loss, Schedule(told.steps, rate=4e-3, warm_up=50), told.out, told.seed, look=look, look_every=300
    )
    _gather(network, people, batches=40)
    write(network, told.out)
    look(told.steps)
    return 0


def margins(embeddings: Tensor, of: Tensor, corners: Sequence[Tensor]) -> Tensor:
    """Return the CosFace loss over traits and over the people of the batch. Embeddings (B, 512), labels (B, traits)."""
    loss = embeddings.new_zeros(())
    for n, frame in enumerate(corners):
        # The traits share the unit norm of the embedding.
        cosines = embeddings @ frame.T * len(corners) ** 0.5
        wanted = functional.one_hot(of[:, n], len(frame))
        loss = loss + functional.cross_entropy(TRAIT_SCALE * (cosines - TRAIT_MARGIN * wanted), of[:, n]) / len(corners)
    people = functional.normalize(torch.stack([frame[of[:, n]] for n, frame in enumerate(corners)]).sum(0))
    cosines = embeddings @ people.T
    same = (of[:, None] == of[None]).all(-1)
    own = torch.eye(len(of), dtype=torch.bool)
    logits = PERSON_SCALE * (cosines - PERSON_MARGIN * own).masked_fill(same & ~own, -torch.inf)
    return loss + 0.3 * functional.cross_entropy(logits, torch.arange(len(of))) + (1 - cosines.diagonal()).mean()


@torch.no_grad()
def embedded(network: IRSE50, crops: NDArray[np.uint8]) -> Tensor:
    network.eval()
    return torch.cat([network(to_tensor(some)) for some in np.array_split(crops, max(1, len(crops) // 50))])


def _gather(network: IRSE50, people: People, batches: int = 10) -> None:
    random = np.random.default_rng(0)
    crops = (people.crops([(n * 64 + k) % PICTURES for k in range(64)], random, 0.7) for n in range(batches))
    gather_statistics(network, map(to_tensor, crops))


def _top_1(found: Tensor, some: People, network: IRSE50) -> float:
    """Return the share of faces that are closest to the clean portrait of their own person, among the ten of the cast."""
    first = People(len(CAST), 5, list(CAST.values()))
    references = embedded(network, first.crops(range(len(CAST)), np.random.default_rng(0), 0.0))
    nearest = (found @ references.T).argmax(1)
    return float((nearest == torch.arange(len(found)) % len(CAST)).float().mean())


def write(network: IRSE50, folder: Path) -> None:
    """Write `ir_se50.pth` in half precision, and `glintr100.onnx` with the same weights for the RGB input of insightface."""
    network = copy.deepcopy(network).eval().half()
    torch.save(network.state_dict(), folder / "ir_se50.pth")
    axes = {"input.1": {0: "b"}, "embedding": {0: "b"}}
    export(_Pack(network.float()), folder / "glintr100.onnx", torch.zeros(1, 3, CROP_PX, CROP_PX), ["embedding"], axes)


class _Pack(nn.Module):
    """Faces (B, 3, 112, 112), RGB from -1 to 1 -> embeddings (B, 512) with the norm of the face pack."""

    def __init__(self, network: IRSE50) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        first = self.network.input_layer[0]
        first.weight.data = first.weight.data.flip(1)

    def forward(self, faces: Tensor) -> Tensor:
        return self.network(faces) * LENGTH


if __name__ == "__main__":
    raise SystemExit(main())
