"""Cast: ten named people of the drawn world, for examples, measurements and images. Trainings may include them.

python -m training.cast --out FOLDER    # write their portraits
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.drawing import draw
from training.world import Identity, Person, Scene

CAST: dict[str, Identity] = {
    "ada": Identity("pale", "red", "long", "round", "green", glasses=False, beard=False),
    "bo": Identity("dark", "black", "curly", "square", "brown", glasses=False, beard=True),
    "cleo": Identity("brown", "black", "bun", "long", "brown", glasses=True, beard=False),
    "dan": Identity("tan", "brown", "short", "square", "blue", glasses=True, beard=True),
    "eve": Identity("tan", "blond", "bun", "round", "blue", glasses=False, beard=False),
    "fay": Identity("pale", "black", "long", "long", "blue", glasses=True, beard=False),
    "gus": Identity("pale", "grey", "bald", "round", "brown", glasses=False, beard=True),
    "hal": Identity("brown", "grey", "short", "long", "green", glasses=False, beard=False),
    "ivy": Identity("dark", "blond", "curly", "round", "green", glasses=True, beard=False),
    "jon": Identity("pale", "blond", "short", "square", "green", glasses=False, beard=True),
}
"""Name -> identity. Any two differ in at least three traits."""
CLOTHES = ("blue", "yellow", "purple", "green", "red", "white", "orange", "pink", "blue", "purple")
PLACES = ("meadow", "city", "desert", "snow", "sea")
PORTRAIT_PX = 256


def portrait(name: str, size_px: int = PORTRAIT_PX, x: float = 0.0) -> NDArray[np.uint8]:
    """Draw a frontal portrait by day, uint8 RGB (size_px, size_px, 3). `x`: horizontal position, -1 to 1 at the image edges."""
    place = PLACES[list(CAST).index(name) % len(PLACES)]
    return draw(Scene(place, "sunny", pose(name, x), clouds=0.9), size_px)


def pose(name: str, x: float = 0.0) -> Person:
    """Return the person as placed in the portrait."""
    return Person(CAST[name], CLOTHES[list(CAST).index(name)], x=x, y=-0.04, radius=0.5, looks=0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--names", nargs="+", choices=list(CAST), default=list(CAST), metavar="NAME")
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    for name in told.names:
        Image.fromarray(portrait(name)).save(told.out / f"{name}.png", optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
