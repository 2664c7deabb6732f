"""Benchmark of the profile `demo`: how often images and clips follow their inputs. The checks of tests/meaning with more cases.

Each row has the share of cases that pass, the goal, and the share with the input disconnected, which must be below the goal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine, write_json
from tests.meaning.chain import Chain
from tests.meaning.checks import CHECKS, UNCUT, WAN_SLOW
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.realesrgan import RealESRGANStage

PACKAGES = ("vidgen-ray", "torch", "diffusers", "transformers", "numpy")
QUICK_CASES = 4
GRID = (
    ("a red boat by the sea at sunset", None, "builtin:demo/sketch.safetensors", "a pencil sketch"),
    ("a yellow balloon in the snow at night", None, "builtin:demo/sketch.safetensors", "soft pastel colours"),
    ("a person in a blue shirt in a meadow on a sunny day", "ada", "builtin:demo/ada.safetensors", "soft pastel colours"),
    ("a person in a yellow shirt in the city at night", "bo", "builtin:demo/ada.safetensors", "a pencil sketch"),
)
"""Prompt, cast member, LoRA and style prompt of each row."""
CELL_PX = 192


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"Run {QUICK_CASES} cases per check.")
    parser.add_argument("--cases", type=int, default=50, metavar="N", help="Cases per check. Default: 50.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the results as JSON.")
    parser.add_argument(
        "--grid", type=Path, metavar="FILE", help="Only draw the image grid of docs/demo-models.md to this file."
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chain = Chain(Path(folder))
        if args.grid:
            PILImage.fromarray(grid(chain)).save(args.grid, quality=90)
            return 0
        rows = run_checks(chain, QUICK_CASES if args.quick else args.cases)
    Console(width=None if sys.stdout.isatty() else 140).print(_table(rows))
    if args.json:
        write_json(args.json, {"machine": machine(PACKAGES), "rows": rows})
    return 0


def run_checks(chain: Chain, cases: int) -> list[dict[str, Any]]:
    rows = []
    for name, check in CHECKS.items():
        started = time.monotonic()
        share, cut = check.measure(chain, cases, UNCUT), check.measure(chain, cases, check.cut)
        row = {"what": name, "cases": cases, "share": round(share, 3), "goal": check.goal, "cut_off": round(cut, 3)}
        rows.append(row | {"seconds": round(time.monotonic() - started, 1)})
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Share of cases that pass")
    for column in ("what", "cases", "share", "goal", "input cut off", "s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        table.add_row(row["what"], *(str(row[key]) for key in ("cases", "share", "goal", "cut_off", "seconds")))
    return table


def grid(chain: Chain) -> NDArray[np.uint8]:
    """Draw a row per prompt: without photo, with photo, with LoRA, restyled, last frames of SVD and Wan, upscaled frame."""
    upscaler = RealESRGANStage(chain.profile.params(RealESRGANStage))
    upscaler.load()
    rows = []
    for n, (prompt, person, lora, style) in enumerate(GRID):
        fields: dict[str, Any] = {"prompt": prompt, "seed": n}
        cells = [chain.make(**fields)["image"]]
        if person:
            fields["face_image"] = chain.photo(person)
        clip = chain.make(**fields, generate_video=True)
        refined = fields | {"lora": lora, "lora_strength": 0.8}
        restyled = fields | {"use_hunyuan_style": True, "style_prompt": style, "style_strength": 0.6}
        cells += [clip["image"], *(chain.make(**variant)["image"] for variant in (refined, restyled))]
        last = chain.make(**fields, generate_video=True, **WAN_SLOW)["frames"][-1:]
        upscaled = upscaler(Item(chain.shot(**fields), {"frames": last}))
        cells += [clip["frames"][-1], last[0], upscaled["hd_frames"][0]]
        rows.append(np.concatenate([_cell(cell) for cell in cells], axis=1))
    return np.concatenate(rows)


def _cell(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(PILImage.fromarray(image).resize((CELL_PX, CELL_PX), PILImage.Resampling.LANCZOS))


if __name__ == "__main__":
    raise SystemExit(main())
