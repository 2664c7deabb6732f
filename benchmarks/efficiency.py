"""Benchmark of GPU efficiency: vidgen, Ray Data, cosmos-xenna and rayorch on simulated GPUs.

efficiency = GPU-seconds of work / (GPUs x seconds from the first stage's start to the last commit). Since ready: the seconds of
each GPU count from when its first process has loaded its weights. Whole run: all seconds from the start of the process to its
end count. README.md lists what is not measured.

Stages take 1/25 of their time on an H100. The environment variable VIDGEN_BENCHMARK_TIME_SCALE sets another divisor.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.table import Table

from benchmarks import ours, simulated
from benchmarks.machine import machine, write_json
from benchmarks.peers import PEERS
from benchmarks.runs import Case, Run, compile_sources, run_once

PACKAGES = ("vidgen-ray", "ray", "cosmos-xenna", "rayorch", "numpy")
VIDGEN_LAYOUTS = ("auto", f"auto{ours.WITH_CACHE}", "fused", "staged")
"""`auto` lets the planner choose. The other layouts are used if they fit. The other systems have no stage cache."""
LAYOUTS: tuple[tuple[str, str], ...] = (*(("vidgen", layout) for layout in VIDGEN_LAYOUTS), *PEERS)
SYSTEMS = tuple(dict.fromkeys(system for system, _ in LAYOUTS))
QUICK = (("vidgen", "auto"), ("plain_ray_data", "five pools"), ("fused_ray_data", "fused"))
QUICK_SHOTS_PER_GPU = 3
QUICK_STALL_S = 25.0
STALL_S = 90.0
"""Seconds without an event after which a run is stopped. Starting 32 actors on 2 cores takes 30 s."""
MIN_EFFICIENCY = 0.1
"""Efficiency below which a run times out."""
STARTUP_S = 120.0
"""Time limit for the start-up of a run."""


def main() -> int:
    args = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 160)
    runs: dict[Case, list[Run]] = {}
    compile_sources()
    try:
        # Interleaved, so that other load on the machine affects all systems.
        for case in [case for _ in range(args.repeats) for case in _cases(args)]:
            if failed_before(runs.get(case, [])):
                continue
            run = run_once(case, limit_s=_limit_s(case), stall_s=args.stall, keep=args.keep)
            runs.setdefault(case, []).append(run)
            console.print(_line(case, run), highlight=False)
    except KeyboardInterrupt:
        console.print("Interrupted. Results so far:")
    rows = [row(case, case_runs) for case, case_runs in runs.items()]
    rows.sort(key=lambda row: (row["gpu_memory_gb"], row["gpus"], -(row["efficiency"] or 0)))
    console.print(_table(rows))
    console.print(
        f"A shot takes {simulated.SECONDS_PER_SHOT:.3f} GPU-seconds, 1/{simulated.TIME_SCALE:g} of an H100's. "
        "Medians, with minimum and maximum in brackets. "
        "total = startup + wall + shutdown; drain: part of wall after the first GPU ran out of work. "
        "CPU: of all processes, per shot. Not measured: contention on a shared GPU beyond taking turns, networks, failures, "
        "the CPU work of real models.",
        highlight=False,
    )
    if args.json:
        write_json(args.json, {"machine": {**machine(PACKAGES), "simulation": simulation()}, "rows": rows})
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Run three systems once with 2 GPUs and few shots.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the results as JSON.")
    parser.add_argument("--gpus", type=_numbers(int), default=[8, 4, 2, 1], metavar="1,2,4,8", help="Numbers of GPUs.")
    parser.add_argument("--memory", type=_numbers(float), default=[80.0, 48.0], metavar="80,48", help="GB of memory per GPU.")
    parser.add_argument("--systems", type=_systems, default=list(SYSTEMS), metavar=",".join(SYSTEMS), help="Systems to run.")
    parser.add_argument("--layouts", type=lambda text: text.split(","), help="Layouts to run. Default: all.")
    parser.add_argument("--repeats", type=int, default=3, help="Runs per case.")
    parser.add_argument("--shots-per-gpu", type=int, default=50, help="Shots per GPU.")
    parser.add_argument("--stall", type=float, default=STALL_S, help="Seconds without an event after which a run is stopped.")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="Copy logs and events there.")
    args = parser.parse_args()
    if args.quick:
        args.gpus, args.memory, args.repeats = [2], [80.0], 1
        args.shots_per_gpu, args.stall = QUICK_SHOTS_PER_GPU, QUICK_STALL_S
    return args


def _numbers(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
    def parse(text: str) -> list[float]:
        return [kind(part) for part in text.split(",")]

    return parse


def _systems(text: str) -> list[str]:
    systems = text.split(",")
    for system in systems:
        if system not in SYSTEMS:
            raise argparse.ArgumentTypeError(f"got {system!r}, must be one of {', '.join(SYSTEMS)}")
    return systems


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    layouts = QUICK if args.quick else LAYOUTS
    for memory_gb in args.memory:
        for gpus in args.gpus:
            for system, layout in layouts:
                if system in args.systems and (not args.layouts or layout in args.layouts):
                    yield Case(system, layout, gpus, memory_gb, args.shots_per_gpu * gpus)


def _limit_s(case: Case) -> float:
    return STARTUP_S + case.shots * simulated.SECONDS_PER_SHOT / case.gpus / MIN_EFFICIENCY


def failed_before(runs: Sequence[Run]) -> bool:
    """Return whether the last run of a case failed. Such a case is not repeated."""
    return bool(runs) and runs[-1].measurement is None


def row(case: Case, runs: Sequence[Run]) -> dict[str, Any]:
    """Return the result of a case: medians of its successful runs, or the reason of a failure."""
    result: dict[str, Any] = {
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
        "efficiency_since_ready": [m.efficiency_since_ready for _, m in measured],
        "efficiency_of_whole_run": [run.whole_run_efficiency for run, _ in measured],
        "wall_s": [m.wall_s for _, m in measured],
        "bound_s": [m.bound_s for _, m in measured],
        "startup_s": [run.startup_s for run, _ in measured],
        "ramp_s": [m.ramp_s for _, m in measured],
        "drain_s": [m.drain_s for _, m in measured],
        "swap_s": [m.swap_s for _, m in measured],
        "total_s": [run.total_s for run, _ in measured],
        "cpu_ms_per_shot": [1000 * run.cpu_s / case.shots for run, _ in measured],
        "load_1_min": [run.load_1_min for run in runs],
    }
    result |= {name: round(statistics.median(samples), 4) if samples else None for name, samples in values.items()}
    for name in ("efficiency", "wall_s", "total_s"):
        result[f"{name}_low"], result[f"{name}_high"] = (
            (round(min(values[name]), 4), round(max(values[name]), 4)) if measured else (None, None)
        )
    return result | {"failed_runs": len(failed), "reason": failed[0].reason if failed else None}


def simulation() -> dict[str, Any]:
    """Return the constants of the simulation."""
    return {
        "stage_seconds": {name: cost.seconds for name, cost in simulated.STAGES.items()},
        "model_gb": simulated.MODEL_GB,
        "time_scale": simulated.TIME_SCALE,
        "load_seconds_per_gb": simulated.LOAD_SECONDS_PER_GB,
        "swap_gb_per_second": simulated.SWAP_GB_PER_SECOND,
        "image_bytes": _byte_count(simulated.IMAGE_SHAPE),
        "frames_bytes": _byte_count(simulated.FRAMES_SHAPE),
        "upscaled_bytes": _byte_count(simulated.UPSCALED_SHAPE),
    }


def _byte_count(shape: Sequence[int]) -> int:
    return math.prod(shape)


def _line(case: Case, run: Run) -> str:
    name = f"{case.system}, {case.layout}, {case.gpus} x {case.gpu_memory_gb:g} GB, {case.shots} shots"
    if run.measurement is None:
        return f"{name}: failed: {run.reason} ({run.total_s:.0f} s)"
    measured = run.measurement
    others = f"since ready {measured.efficiency_since_ready:.3f}, whole run {run.whole_run_efficiency:.3f}"
    spent = f"total {run.total_s:.1f} s, {run.cpu_s:.1f} CPU s"
    return f"{name}: efficiency {measured.efficiency:.3f}, {others}, {spent}, load {run.load_1_min:.1f}"


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="GPU efficiency on simulated GPUs")
    for column in ("system", "layout"):
        table.add_column(column)
    numbers = (
        "GPUs",
        "GB",
        "shots",
        "efficiency",
        "since ready",
        "whole run",
        "wall s",
        "startup s",
        "drain s",
        "total s",
        "CPU ms",
    )
    for column in numbers:
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
            *(_numbers_of(row) if row["efficiency"] is not None else (row["reason"], *[""] * 7)),
        )
    return table


def _numbers_of(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['efficiency']:.3f} ({row['efficiency_low']:.3f}-{row['efficiency_high']:.3f})"
        + (f", {row['failed_runs']} failed" if row["failed_runs"] else ""),
        f"{row['efficiency_since_ready']:.3f}",
        f"{row['efficiency_of_whole_run']:.3f}",
        f"{row['wall_s']:.1f}",
        f"{row['startup_s']:.1f}",
        f"{row['drain_s']:.1f}",
        f"{row['total_s']:.1f} ({row['total_s_low']:.1f}-{row['total_s_high']:.1f})",
        f"{row['cpu_ms_per_shot']:.0f}",
    )


if __name__ == "__main__":
    raise SystemExit(main())
