"""Training images of the image models, drawn once and cached."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from training.dataset import cached
from training.rendered.drawing import draw
from training.rendered.world import Scene, some_scene

SIZE_PX = 256
SCENES, SCENES_SEED = 10000, 11
PEOPLE, PAIRS = 0.6, 0.1


def scenes() -> list[Scene]:
    random = Random(SCENES_SEED)
    return [some_scene(random, people=PEOPLE, pairs=PAIRS) for _ in range(SCENES)]


def drawn(scenes_of: list[Scene], file: Path) -> NDArray[np.uint8]:
    """Return the images (N, 256, 256, 3) of the scenes, from the cache file if it exists."""
    return cached(file, lambda: np.stack([draw(scene, SIZE_PX) for scene in scenes_of]))
