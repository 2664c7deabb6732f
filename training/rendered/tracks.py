"""Scenes of the rendered world in motion, from which the video models are trained."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from training.latents import covered
from training.rendered.dataset import SIZE_PX
from training.rendered.drawing import detail_boxes, draw, in_image, styled
from training.rendered.world import STYLES, Scene, moved, some_scene

TRACKS, TRACKS_SEED = 1600, 21
PEOPLE, PAIRS = 0.6, 0.1
"""Share of tracks of people, and of pairs among them."""
STYLED = 0.3
"""Share of tracks in a style other than flat."""
STILL = 0.06
"""Share of tracks without motion."""


@dataclass(frozen=True, slots=True)
class Track:
    """A scene in motion."""

    scene: Scene
    speed: float
    """Speed over all frames, from 0 to 1 (maximum speed of the rendered world)."""
    style: str
    length: int
    """Number of frames."""

    def frames(self) -> NDArray[np.uint8]:
        """Return all frames (length, 256, 256, 3)."""
        return np.stack([self.frame(n) for n in range(self.length)])

    def frame(self, n: int) -> NDArray[np.uint8]:
        scene, nearer = self._at(n)
        return styled(draw(scene, SIZE_PX, nearer), self.style)

    def detail_cells(self) -> NDArray[np.bool_]:
        """Return the latents of all frames that show the thing or the heads (length, 16, 16)."""
        cells = []
        for n in range(self.length):
            scene, nearer = self._at(n)
            shown = [covered(in_image(box, nearer)) for box in detail_boxes(scene)]
            cells.append(np.logical_or.reduce(shown))
        return np.stack(cells)

    def _at(self, n: int) -> tuple[Scene, float]:
        """Return the scene of a frame and the zoom factor of the camera."""
        return moved(self.scene, n / (self.length - 1), self.speed)


def tracks(count: int, seed: int, length: int) -> list[Track]:
    random = Random(seed)
    return [
        Track(
            some_scene(random, people=PEOPLE, pairs=PAIRS),
            random.uniform(0.02, 1) ** 0.5 if random.random() >= STILL else 0.0,
            random.choice(STYLES[1:]) if random.random() < STYLED else "flat",
            length,
        )
        for _ in range(count)
    ]
