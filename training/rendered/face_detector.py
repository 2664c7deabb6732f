"""Train the face detector of the rendered world: the small SCRFD of `training.face_detector`. It ignores faces in photos.

python -m training.rendered.face_detector --out FOLDER
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
import torch
from torch import Tensor

from training.face_detector import Detector, Sample, found_in, loss_of, on_canvas, photos, to_tensor, write
from training.finishing import gather_statistics
from training.loop import Schedule, arguments, train
from training.rendered.drawing import draw, face_box_px, keypoints_px, styled
from training.rendered.world import STYLES, Person, some_scene

PEOPLE, OTHERS = 1400, 1000
SIZES_PX = (256, 256, 160)
OF_PEOPLE, OF_OTHERS = 7, 4
"""Samples of people and of scenes without people in a batch, beside one photo."""


def people(count: int, seed: int) -> list[Sample]:
    """Return scenes with one person, in random styles."""
    random, made = Random(seed), []
    for _ in range(count):
        scene, size_px = some_scene(random, people=1.0), random.choice(SIZES_PX)
        person = scene.subject
        assert isinstance(person, Person)
        if random.random() < 0.4:
            # Smaller or larger than usual, and partly outside the image.
            radius, x = random.uniform(0.12, 0.75), random.uniform(-0.62, 0.62)
            person = replace(person, radius=radius, x=x, y=random.uniform(-0.3, 0.25))
        style = "flat" if random.random() < 0.6 else random.choice(STYLES)
        points = np.concatenate([face_box_px(person, size_px).reshape(2, 2), keypoints_px(person, size_px)])
        made.append((styled(draw(replace(scene, subject=person), size_px), style), points))
    return made


def others(count: int, seed: int) -> list[Sample]:
    """Return scenes without people."""
    random = Random(seed)
    made: list[Sample] = []
    for n in range(count):
        style = "flat" if n % 2 else random.choice(STYLES)
        scene = some_scene(random, people=0.0)
        made.append((styled(draw(scene, SIZES_PX[0], random.uniform(1, 1.6)), style), None))
    return made


def main() -> int:
    told = arguments(__doc__, steps=3000, seed=21)
    faces, empty, real = people(PEOPLE, told.seed), others(OTHERS, told.seed + 1), photos()
    unseen = people(60, told.seed + 2), others(60, told.seed + 3)
    network = Detector()

    def batch(random: np.random.Generator, strength: float) -> list[Sample]:
        pools: Sequence[Sequence[Sample]] = [faces] * OF_PEOPLE + [empty] * OF_OTHERS + [real]
        return [on_canvas(pool[random.integers(len(pool))], random, strength) for pool in pools]

    def loss(step: int, generator: torch.Generator) -> Tensor:
        random = np.random.default_rng(int(torch.randint(0, 2**31, (), generator=generator)))
        # Start with clean images, which are easier to learn from.
        samples = batch(random, min(1.0, 0.2 + 1.6 * step / told.steps))
        return loss_of(network(to_tensor(np.stack([picture for picture, _ in samples]))), samples)

    def gather(batches: int) -> None:
        random = np.random.default_rng(1)
        some = (to_tensor(np.stack([picture for picture, _ in batch(random, 0.7)])) for _ in range(batches))
        gather_statistics(network, some)

    def look(step: int) -> None:
        gather(20)
        network.eval()
        for strength in (0.0, 1.0):
            print(f"step {step}, degraded by {strength:.0f}: {found_in(network, unseen, strength)}", flush=True)
        network.train()

    schedule = Schedule(told.steps, rate=4e-3, warm_up=100, muon_rate=0.02)
    train({"network": network}, loss, schedule, told.out, told.seed, look=look, look_every=500)
    gather(100)
    write(network, told.out)
    look(told.steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
