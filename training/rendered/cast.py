"""Cast: thirty people of the rendered world, of whom ten have names, for examples, measurements and images.

python -m training.rendered.cast --out FOLDER    # write the portraits of the ten
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.rendered.drawing import draw
from training.rendered.world import Identity, Person, Scene, some_identity

CAST: dict[str, Identity] = {
    "ada": Identity("pale", "red", "long", "round", "green", glasses=False, beard=False, freckles=True, full_lips=True),
    "bo": Identity("dark", "black", "curly", "square", "brown", glasses=False, beard=True, thick_brows=True, broad_nose=True),
    "cleo": Identity("brown", "black", "bun", "long", "brown", glasses=True, beard=False, full_lips=True),
    "dan": Identity("tan", "brown", "short", "square", "blue", glasses=True, beard=True, thick_brows=True),
    "eve": Identity("tan", "blond", "bun", "round", "blue", glasses=False, beard=False, full_lips=True),
    "fay": Identity("pale", "black", "long", "long", "blue", glasses=True, beard=False),
    "gus": Identity("pale", "grey", "bald", "round", "brown", glasses=False, beard=True, thick_brows=True, broad_nose=True),
    "hal": Identity("brown", "grey", "short", "long", "green", glasses=False, beard=False, thick_brows=True),
    "ivy": Identity("dark", "blond", "curly", "round", "green", glasses=True, beard=False, full_lips=True),
    "jon": Identity("pale", "blond", "short", "square", "green", glasses=False, beard=True, freckles=True),
}
"""Name -> identity. Any two differ in at least three of the first seven traits."""
CLOTHES = ("blue", "yellow", "purple", "green", "red", "white", "orange", "pink", "blue", "purple")
PLACES = ("meadow", "city", "desert", "snow", "sea")
PORTRAIT_PX = 512
OTHERS, OTHERS_SEED = 20, 30


def others() -> list[Identity]:
    """Return twenty people without names, who differ from each other and from the cast in at least three traits."""
    random, found = Random(OTHERS_SEED), list(CAST.values())
    while len(found) < len(CAST) + OTHERS:
        one = some_identity(random)
        if all(differing(one, other) >= 3 for other in found):
            found.append(one)
    return found[len(CAST) :]


def differing(one: Identity, other: Identity) -> int:
    """Return the number of traits in which two people differ, of those that are told in prompts."""
    told = ("skin", "hair", "hair_style", "face_shape", "eyes", "glasses", "beard")
    return sum(getattr(one, trait) != getattr(other, trait) for trait in told)


def portrait(name: str, size_px: int = PORTRAIT_PX, x: float = 0.0) -> NDArray[np.uint8]:
    """Draw a frontal portrait by day, uint8 RGB (size_px, size_px, 3). `x`: horizontal position, -1 to 1 at the image edges."""
    number = list(CAST).index(name)
    return draw(Scene(PLACES[number % len(PLACES)], "sunny", pose(name, x), clouds=0.9, land=number), size_px)


def pose(name: str, x: float = 0.0) -> Person:
    """Return the person as placed in the portrait."""
    number = list(CAST).index(name)
    garment = ("sweater", "shirt")[number % 2]
    return Person(CAST[name], CLOTHES[number], x=x, y=-0.02, radius=0.5, looks=0.0, garment=garment)


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
