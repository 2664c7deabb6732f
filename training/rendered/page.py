"""Draw a page of random scenes of the rendered world, to be looked at.

python -m training.rendered.page --out FILE.webp
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from training.rendered.drawing import draw
from training.rendered.world import some_scene

ROWS, COLUMNS = 6, 8
PEOPLE, PAIRS = 0.6, 0.12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seed", type=int, default=3, metavar="N")
    parser.add_argument("--size", type=int, default=256, metavar="PX")
    told = parser.parse_args()
    random = Random(told.seed)
    drawn = [draw(some_scene(random, people=PEOPLE, pairs=PAIRS), told.size) for _ in range(ROWS * COLUMNS)]
    rows = [np.concatenate(drawn[first : first + COLUMNS], axis=1) for first in range(0, len(drawn), COLUMNS)]
    Image.fromarray(np.concatenate(rows)).save(told.out, quality=85)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
