"""Benchmark of the profile `demo`: how often images and clips follow their inputs. The checks of tests/meaning with more cases.

Each row has the share of cases that pass, the goal, and the share with the input disconnected, which must be below the goal.
`--captions` measures the captioner of `vidgen caption` instead: precision and recall of each label.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine, write_json
from tests.meaning.chain import Chain
from tests.meaning.checks import CHECKS, UNCUT
from training.captions import caption
from training.classifier import truth as truth_of
from training.degrading import degraded
from training.drawing import draw
from training.world import some_scene
from vidgen_ray.dataset import demo_captioner

PACKAGES = ("vidgen-ray", "torch", "diffusers", "transformers", "numpy")
QUICK_CASES = 4
CLIP = {"num_frames": 8, "fps": 6, "motion_bucket_id": 60}
"""Clips that are captioned."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"Run {QUICK_CASES} cases per check.")
    parser.add_argument("--cases", type=int, default=50, metavar="N", help="Cases per check. Default: 50.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the results as JSON.")
    parser.add_argument(
        "--captions", action="store_true", help="Measure the captioner, with this many clips, and ten times as many drawings."
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chain = Chain(Path(folder))
        cases = QUICK_CASES if args.quick else args.cases
        rows = captioned(chain, cases) if args.captions else run_checks(chain, cases)
    if args.captions:
        table = Table(*rows[0], title="Precision and recall of labels, cases in brackets")
        for row in rows:
            table.add_row(*map(str, row.values()))
    else:
        table = _table(rows)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
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


def captioned(chain: Chain, cases: int) -> list[dict[str, Any]]:
    """Return precision and recall of each label, on degraded drawings that were not trained on, and on clips.

    The truth about a clip is the prompt from which it was rendered. It is also asked for what the prompt of the next clip says
    otherwise, which it must not show: `swapped` is the share of these facts that is found.
    """
    network, random, spoil = demo_captioner.load(), Random(12), np.random.default_rng(12)
    said, right, true = Counter[str](), Counter[str](), Counter[str]()
    for scene in (some_scene(random, people=0.55) for _ in range(10 * cases)):
        found = demo_captioner.labels(demo_captioner.read(network, degraded(draw(scene, 128), spoil)[None]))
        truth = truth_of(scene)
        of_label = {name: value for name, value in found.items() if name in truth}
        said.update([*of_label])
        true.update([*truth])
        right.update(name for name, value in of_label.items() if truth[name] == value)
    prompts = [caption(some_scene(random, people=0.55), random) for _ in range(cases)]
    own, swapped = defaultdict[str, list[bool]](list), defaultdict[str, list[bool]](list)
    for number, prompt in enumerate(prompts):
        frames = chain.make(prompt=prompt, seed=number, generate_video=True, **CLIP)["frames"]
        seen = demo_captioner.read(network, frames[np.linspace(0, len(frames) - 1, 4).astype(int)])
        asked = {fact.label: fact for fact in demo_captioner.facts(prompt, seen)}
        for fact in asked.values():
            own[fact.label].append(fact.shown == "yes")
        for fact in demo_captioner.facts(prompts[(number + 1) % cases], seen):
            if fact.label not in asked or asked[fact.label].value != fact.value:
                swapped[fact.label].append(fact.shown == "yes")

    def share(part: int, whole: int) -> str:
        return f"{part / whole:.2f} ({whole})" if whole else "-"

    return [
        {
            "label": name,
            "drawings: precision": share(right[name], said[name]),
            "recall": share(right[name], true[name]),
            "clips: precision": share(sum(own[name]), sum(own[name]) + sum(swapped[name])),
            "recall ": share(sum(own[name]), len(own[name])),
            "swapped": share(sum(swapped[name]), len(swapped[name])),
        }
        for name in demo_captioner.LABELS
    ]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="Share of cases that pass")
    for column in ("what", "cases", "share", "goal", "input cut off", "s"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        table.add_row(row["what"], *(str(row[key]) for key in ("cases", "share", "goal", "cut_off", "seconds")))
    return table


if __name__ == "__main__":
    raise SystemExit(main())
