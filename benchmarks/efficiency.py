"""How busy batch executors keep their GPUs: vidgen beside Ray Data, cosmos-xenna and rayorch, on simulated cards.

efficiency = GPU-seconds of work / (GPUs x seconds from the first stage's start to the last commit). Start-up is told apart,
the total includes it. What the numbers do not include is in README.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.table import Table

from benchmarks import simulated
from benchmarks.machine import machine, write_json
from benchmarks.peers import PEERS
from benchmarks.runs import Case, Run, run_once

PACKAGES = ("vidgen-ray", "ray", "cosmos-xenna", "rayorch", "numpy")
VIDGEN_LAYOUTS = ("auto", "fused", "colocated", "staged")
"""auto is what the planner picks; the others are pinned where they fit."""
LAYOUTS: tuple[tuple[str, str], ...] = (*(("vidgen", layout) for layout in VIDGEN_LAYOUTS), *PEERS)
SYSTEMS = tuple(dict.fromkeys(system for system, _ in LAYOUTS))
QUICK = (("vidgen", "auto"), ("plain_ray_data", "five pools"), ("fused_ray_data", "fused"))
QUICK_SHOTS_PER_GPU = 3
QUICK_STALL_S = 25.0
STALL_S = 90.0
"""Starting 32 actors on 2 cores takes 30 s."""
SLOWEST = 0.1
"""Efficiency below which a run is ended."""
STARTUP_S = 120.0


def main() -> int:
    told = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    runs: dict[Case, list[Run]] = {}
    try:
        # Interleaved, so that what else happens on the machine falls on all systems.
        for case in [case for _ in range(told.repeats) for case in _cases(told)]:
            if hopeless(runs.get(case, [])):
                continue
            run = run_once(case, limit_s=_limit_s(case), stall_s=told.stall, keep=told.keep)
            runs.setdefault(case, []).append(run)
            console.print(_line(case, run), highlight=False)
    except KeyboardInterrupt:
        console.print("interrupted; what was measured until now:")
    rows = [row(case, of_case) for case, of_case in runs.items()]
    rows.sort(key=lambda row: (row["gpu_memory_gb"], row["gpus"], -(row["efficiency"] or 0)))
    console.print(_table(rows))
    console.print(
        f"A shot is {simulated.SECONDS_PER_SHOT:.3f} GPU-seconds. Medians; in brackets the lowest and the highest. "
        "total = startup + wall + shutdown; drain is the part of the wall after the first GPU ran out of work. Not included: "
        "contention on a shared card beyond taking turns, networks, failures, the CPU work of real models.",
        highlight=False,
    )
    if told.json:
        write_json(told.json, {"machine": {**machine(PACKAGES), "simulation": simulation()}, "rows": rows})
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 GPUs, few shots, three systems, once: within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--gpus", type=_numbers(int), default=[8, 4, 2, 1], metavar="1,2,4,8")
    parser.add_argument("--memory", type=_numbers(float), default=[80.0, 48.0], metavar="80,48", help="GB of each GPU")
    parser.add_argument("--systems", type=_systems, default=list(SYSTEMS), metavar=",".join(SYSTEMS))
    parser.add_argument("--layouts", type=lambda text: text.split(","), help="of those systems; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shots-per-gpu", type=int, default=50)
    parser.add_argument("--stall", type=float, default=STALL_S, help="seconds without an event after which a run is ended")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep logs and events there")
    told = parser.parse_args()
    if told.quick:
        told.gpus, told.memory, told.repeats = [2], [80.0], 1
        told.shots_per_gpu, told.stall = QUICK_SHOTS_PER_GPU, QUICK_STALL_S
    return told


def _numbers(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    def parse(text: str) -> list[float]:
        return [kind(part) for part in text.split(",")]

    return parse


def _systems(text: str) -> list[str]:
    wanted = text.split(",")
    for system in wanted:
        if system not in SYSTEMS:
            raise argparse.ArgumentTypeError(f"got {system!r}, must be of {', '.join(SYSTEMS)}")
    return wanted


def _cases(told: argparse.Namespace) -> Iterator[Case]:
    wanted = QUICK if told.quick else LAYOUTS
    for memory_gb in told.memory:
        for gpus in told.gpus:
            for system, layout in wanted:
                if system in told.systems and (not told.layouts or layout in told.layouts):
                    yield Case(system, layout, gpus, memory_gb, told.shots_per_gpu * gpus)


def _limit_s(case: Case) -> float:
    return STARTUP_S + case.shots * simulated.SECONDS_PER_SHOT / case.gpus / SLOWEST


def hopeless(before: Sequence[Run]) -> bool:
    """Whether the case did not run before; trying it again would only take time."""
    return bool(before) and before[-1].measurement is None


def row(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    """What the table and the JSON say of a case: medians of the runs that ended well, or the reason why one did not."""
    whole: dict[str, Any] = {
        "system": case.system,
        "layout": case.layout,
        "gpus": case.gpus,
        "gpu_memory_gb": case.gpu_memory_gb,
        "shots": case.shots,
        "repeats": len(runs),
    }
    failed = [run for run in runs if run.measurement is None]
    measured = [(run, run.measurement) for run in runs if run.measurement is not None]
    values = {
        "efficiency": [m.efficiency for _, m in measured],
        "wall_s": [m.wall_s for _, m in measured],
        "bound_s": [m.bound_s for _, m in measured],
        "startup_s": [run.startup_s for run, _ in measured],
        "ramp_s": [m.ramp_s for _, m in measured],
        "drain_s": [m.drain_s for _, m in measured],
        "swap_s": [m.swap_s for _, m in measured],
        "total_s": [run.total_s for run, _ in measured],
        "load_1_min": [run.load_1_min for run in runs],
    }
    whole |= {name: round(statistics.median(of), 4) if of else None for name, of in values.items()}
    for name in ("efficiency", "wall_s", "total_s"):
        whole[f"{name}_low"], whole[f"{name}_high"] = (
            (round(min(values[name]), 4), round(max(values[name]), 4)) if measured else (None, None)
        )
    return whole | {"failed_runs": len(failed), "reason": failed[0].reason if failed else None}


def simulation() -> dict[str, Any]:
    """The constants behind the rows."""
    return {
        "stage_seconds": {name: cost.seconds for name, cost in simulated.STAGES.items()},
        "model_gb": simulated.MODEL_GB,
        "time_scale": simulated.TIME_SCALE,
        "load_seconds_per_gb": simulated.LOAD_SECONDS_PER_GB,
        "swap_gb_per_second": simulated.SWAP_GB_PER_SECOND,
        "image_bytes": _size(simulated.IMAGE_SHAPE),
        "frames_bytes": _size(simulated.FRAMES_SHAPE),
    }


def _size(shape: Sequence[int]) -> int:
    bytes_of_it = 1
    for side in shape:
        bytes_of_it *= side
    return bytes_of_it


def _line(case: Case, run: Run) -> str:
    what = f"{case.system}, {case.layout}, {case.gpus} x {case.gpu_memory_gb:g} GB, {case.shots} shots"
    if run.measurement is None:
        return f"{what}: no number: {run.reason} ({run.total_s:.0f} s)"
    return f"{what}: efficiency {run.measurement.efficiency:.3f}, total {run.total_s:.1f} s"


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="GPU efficiency on simulated cards")
    for column in ("system", "layout"):
        table.add_column(column)
    for column in ("GPUs", "GB", "shots", "efficiency", "wall s", "bound s", "startup s", "drain s", "total s"):
        table.add_column(column, justify="right", no_wrap=column != "efficiency")
    before = None
    for row in rows:
        case = row["gpus"], row["gpu_memory_gb"]
        if before not in (None, case):
            table.add_section()
        before = case
        table.add_row(
            row["system"],
            row["layout"],
            str(row["gpus"]),
            f"{row['gpu_memory_gb']:g}",
            str(row["shots"]),
            *(_numbers_of(row) if row["efficiency"] is not None else (row["reason"], *[""] * 5)),
        )
    return table


def _numbers_of(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['efficiency']:.3f} ({row['efficiency_low']:.3f}-{row['efficiency_high']:.3f})"
        + (f", {row['failed_runs']} failed" if row["failed_runs"] else ""),
        f"{row['wall_s']:.1f}",
        f"{row['bound_s']:.1f}",
        f"{row['startup_s']:.1f}",
        f"{row['drain_s']:.1f}",
        f"{row['total_s']:.1f} ({row['total_s_low']:.1f}-{row['total_s_high']:.1f})",
    )


if __name__ == "__main__":
    raise SystemExit(main())
