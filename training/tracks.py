"""Scenes in motion, from which the video models are trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from training.dataset import SIZE_PX, cached
from training.drawing import detail_box, draw, in_image, styled
from training.latents import covered
from training.world import STYLES, Scene, moved, some_scene

TRACKS, TRACKS_SEED = 1200, 21
PEOPLE = 0.5
"""Share of tracks of people."""
STYLED = 0.35
"""Share of tracks in a style other than flat."""


@dataclass(frozen=True, slots=True)
class Track:
    """A scene in motion."""

    scene: Scene
    speed: float
    """Speed over all frames, from 0 to 1 (maximum speed of the drawn world)."""
    style: str
    length: int
    """Number of frames."""

    def frames(self) -> NDArray[np.uint8]:
        """Return all frames (length, 128, 128, 3)."""
        return np.stack([self.frame(n) for n in range(self.length)])

    def frame(self, n: int) -> NDArray[np.uint8]:
        scene, nearer = self._at(n)
        return styled(draw(scene, SIZE_PX, nearer), self.style)

    def subject_cells(self) -> NDArray[np.bool_]:
        """Return the latents of all frames that show the thing or the head (length, 16, 16)."""
        cells = []
        for n in range(self.length):
            scene, nearer = self._at(n)
            cells.append(covered(in_image(detail_box(scene.subject), nearer)))
        return np.stack(cells)

    def _at(self, n: int) -> tuple[Scene, float]:
        """Return the scene of a frame and the zoom factor of the camera."""
        return moved(self.scene, n / (self.length - 1), self.speed)


def tracks(count: int, seed: int, length: int) -> list[Track]:
    random = Random(seed)
    return [
        Track(
            some_scene(random, people=PEOPLE),
            random.uniform(0.02, 1) ** 0.5,
            random.choice(STYLES[1:]) if random.random() < STYLED else "flat",
            length,
        )
        for _ in range(count)
    ]


def drawn_tracks(of: list[Track], file: Path) -> NDArray[np.uint8]:
    """Return the frames of all tracks (N, length, 128, 128, 3), from the cache file if it exists."""
    return cached(file, lambda: np.stack([track.frames() for track in of]))
