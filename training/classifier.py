"""A small classifier that says what it sees in a picture of the drawn world: what `tests/meaning` measures with.

    python -m training.classifier --out FOLDER

It learns from degraded drawings, since what it has to read are pictures drawn by a small model. It never sees one of those.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.dataset import drawn, scenes, to_tensor
from training.degrading import degraded
from training.drawing import styled
from training.loop import Schedule, arguments, train
from training.world import COLOURS, PLACES, STYLES, THINGS, WEATHERS, Person, Scene

SEEN_PX = 64
BATCH = 48
LABELS: dict[str, tuple[str, ...]] = {
    "place": PLACES,
    "weather": WEATHERS,
    "subject": (*THINGS, "person"),
    "colour": tuple(COLOURS),
    "side": ("left", "middle", "right"),
    "style": STYLES,
}
"""`colour` is that of the thing, or of the clothes."""
HELD_OUT = 500


class Classifier(nn.Module):
    """Pictures (B, 3, 64, 64) of -1 to 1 -> logits of each label."""

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 48, 64, 96)
        blocks, before = [], 3
        for width in widths:
            blocks += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(), nn.MaxPool2d(2)]
            before = width
        self.body = nn.Sequential(*blocks, nn.Conv2d(before, 96, 3, padding=1), nn.ReLU())
        # Where something is matters, so what is seen is not averaged over the picture.
        self.heads = nn.ModuleDict({name: nn.Linear(96 * (SEEN_PX // 16) ** 2, len(names)) for name, names in LABELS.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        seen = self.body(pictures).flatten(1)
        return {name: head(seen) for name, head in self.heads.items()}


def load(file: Path) -> Classifier:
    classifier = Classifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    return classifier.eval().requires_grad_(False)


def classified(classifier: Classifier, pictures: NDArray[np.uint8]) -> list[dict[str, str]]:
    """The likeliest name of each label, for each of the pictures (B, H, W, 3)."""
    logits = classifier(to_tensor(np.stack([_small(picture) for picture in pictures])))
    return [{name: LABELS[name][int(rows[n].argmax())] for name, rows in logits.items()} for n in range(len(pictures))]


def _small(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return cv2.resize(picture, (SEEN_PX, SEEN_PX), interpolation=cv2.INTER_AREA)


def truth(scene: Scene) -> dict[str, str]:
    subject = scene.subject
    is_person = isinstance(subject, Person)
    return {
        "place": scene.place,
        "weather": scene.weather,
        "subject": "person" if is_person else subject.kind,
        "colour": subject.clothes if is_person else subject.colour,
        "side": scene.side,
    }


def main() -> int:
    told = arguments(__doc__, steps=900, seed=9, data="out/training/data")
    world = scenes()
    pictures = drawn(world, told.data / "scenes.npy")
    names = [truth(scene) for scene in world]
    net = Classifier()

    def batch(generator: torch.Generator, first: int, last: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        which = torch.randint(first, last, (count,), generator=generator).tolist()
        chance = Random(int(torch.randint(0, 2**31, (1,), generator=generator)))
        styles = [chance.choice(STYLES) if chance.random() < 0.4 else "flat" for _ in which]
        spoil = np.random.default_rng(chance.getrandbits(32))
        some = [degraded(_small(styled(pictures[n], style)), spoil) for n, style in zip(which, styles, strict=True)]
        told_of = [{**names[n], "style": style} for n, style in zip(which, styles, strict=True)]
        labels = {label: torch.tensor([of.index(one[label]) for one in told_of]) for label, of in LABELS.items()}
        return to_tensor(np.stack(some)), labels

    def loss(step: int, generator: torch.Generator) -> Tensor:
        some, labels = batch(generator, HELD_OUT, len(world), BATCH)
        logits = net(some)
        return torch.stack([F.cross_entropy(logits[name], labels[name]) for name in LABELS]).sum()

    def look(step: int) -> None:
        with torch.no_grad():
            some, labels = batch(torch.Generator().manual_seed(1), 0, HELD_OUT, 256)
            right = {name: round((rows.argmax(1) == labels[name]).float().mean().item(), 3) for name, rows in net(some).items()}
        print(f"step {step}, share right of unseen, degraded drawings: {right}", flush=True)
        save_file({name: tensor.half() for name, tensor in net.state_dict().items()}, told.out / "classifier.safetensors")

    schedule = Schedule(told.steps, rate=2e-3, weight_decay=0.02)
    train({"classifier": net}, loss, schedule, told.out, told.seed, look=look, look_every=300)
    look(told.steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
