"""Benchmark of the batch engine's overhead: a long script with stages that do nothing, then the same script again (resume).

The output files are tiny, but are written and committed as usual, by other processes than the driver.

With `--slots`: CPU time of the scheduler and of the director for large clusters, with fake actors in simulated time: a thousand
actors do not fit on one machine. The cost of Ray's calls is measured with one real actor and added.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.table import Table

from benchmarks.local_ray import ENVIRONMENT, local_ray
from benchmarks.machine import machine, write_json
from benchmarks.noop_stages import STAGES, line, noop_profile
from benchmarks.simulated_director import measure_director, measure_ray_call_ms
from benchmarks.simulated_scheduling import LAYOUTS, Simulation

ROOT = Path(__file__).parent.parent
LINES = 10_000
QUICK_LINES = 300
CPU_WORKERS = 2
"""Slots of the run. More would compete with the driver, which is measured, for CPUs."""
GOALS = {
    "driver_cpu_ms_per_shot": 5.0,
    "resume_s_per_10000": 2.0,
    "scheduler_cpu_ms_per_shot": 3.0,
    "director_cpu_ms_per_shot": 20.0,
}
SLOT_LAYOUTS = ("fused", "hybrid")
SHOTS_PER_SLOT = 6
MIN_SHOTS = 600
"""Shots of a simulated run with few slots. Shorter runs are measured less exactly."""


class RunClock:
    """Progress listener that records the planning time and counts results by status."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.planned_s = 0.0
        self.counts: dict[str, int] = defaultdict(int)

    def on_rejected(self, row: Any) -> None:
        self.counts["rejected"] += 1

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None:
        self.planned_s = time.monotonic() - self.started
        if skipped:
            self.counts["skipped"] = skipped

    def on_finished(self, row: Any) -> None:
        self.counts[row.status] += 1

    def on_status(self, snapshot: Any) -> None: ...

    def on_message(self, message: str) -> None: ...


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"Use {QUICK_LINES} lines.")
    parser.add_argument("--lines", type=int, default=None, help=f"Lines of the script. Default: {LINES}.")
    parser.add_argument("--slots", type=_counts, metavar="N,N,...", help="Simulate runs with so many GPUs instead.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the results as JSON.")
    args = parser.parse_args()
    if args.slots:
        os.environ.update(ENVIRONMENT, PYTHONPATH=str(ROOT))
        with local_ray(0):
            call_ms = measure_ray_call_ms()
        rows = [row for slots in args.slots for layout in SLOT_LAYOUTS for row in measure_slots(layout, slots, call_ms)]
        _print(rows, "Overhead per shot of 25 frames at 4096x2304, simulated")
        if args.json:
            write_json(args.json, {"machine": machine(("vidgen-ray",)), "rows": rows})
        return 0
    lines = args.lines or (QUICK_LINES if args.quick else LINES)
    folder = Path(tempfile.mkdtemp(prefix="vidgen-overhead-"))
    # Ray reads its variables before it starts. PYTHONPATH lets its workers find this package. With the seconds that an earlier
    # run has measured, the plan would use all of Ray's CPUs for encoders, and this machine has fewer.
    os.environ.update(ENVIRONMENT, PYTHONPATH=str(ROOT), VIDGEN_CACHE=str(folder / "cache"))
    try:
        rows = measure(lines, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _print(rows, f"Overhead of the batch engine, {lines} lines")
    if args.json:
        write_json(args.json, {"machine": machine(("vidgen-ray", "ray")), "rows": rows})
    return 0


def measure_slots(layout: str, slots: int, call_ms: float) -> list[dict[str, Any]]:
    """Simulate a run with `slots` GPUs and return rows of label, value and unit. `call_ms`: CPU time of one call of Ray."""
    specs, shots = LAYOUTS[layout](slots), max(MIN_SHOTS, SHOTS_PER_SLOT * slots)
    result = Simulation(specs, shots).run()
    director = measure_director(specs, shots)
    values = {
        "scheduler_cpu_ms_per_shot": (1000 * result.scheduler_cpu_s / shots, "ms"),
        "event_loop_cpu_ms_per_shot": (director.cpu_ms_per_shot, "ms"),
        "calls_per_shot": (director.calls_per_shot, ""),
        "director_cpu_ms_per_shot": (director.cpu_ms_per_shot + director.calls_per_shot * call_ms, "ms"),
        "shots_per_s": (director.shots_per_simulated_s, "1/s"),
    }
    return [
        {"system": layout, "what": what, "value": round(value, 4), "unit": unit, "slots": slots, "shots": shots}
        for what, (value, unit) in values.items()
    ]


def _counts(text: str) -> list[int]:
    """Parse positive integers separated by commas."""
    counts = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be positive integers separated by commas, such as 10,100")
    return counts


def _print(rows: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    with_slots = "slots" in rows[0]
    for column in (*(("slots", "layout") if with_slots else ()), "what", "value", "unit", "goal"):
        table.add_column(column, justify="right" if column in ("slots", "value", "goal") else "left")
    for row in rows:
        goal = GOALS.get(row["what"])
        place = (str(row["slots"]), row["system"]) if with_slots else ()
        table.add_row(*place, row["what"], f"{row['value']:.2f}", row["unit"], "" if goal is None else f"{goal:g}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def measure(lines: int, folder: Path) -> list[dict[str, Any]]:
    """Run the script twice and return rows of label, value and unit."""
    script = folder / "script.jsonl"
    with open(script, "w") as file:
        file.writelines(json.dumps(line(number)) + "\n" for number in range(lines))
    with local_ray(0):
        before_bytes = _peak_rss_bytes()
        cpu_before, first = time.process_time(), RunClock()
        _render(script, folder, first)
        wall_s, cpu_s = time.monotonic() - first.started, time.process_time() - cpu_before
        peak_bytes = _peak_rss_bytes()
        _check_counts(first.counts, {"done": lines})
        cpu_before, again = time.process_time(), RunClock()
        _render(script, folder, again)
        resume_s, resume_cpu_s = time.monotonic() - again.started, time.process_time() - cpu_before
        _check_counts(again.counts, {"skipped": lines})
    values = {
        "driver_cpu_ms_per_shot": (1000 * cpu_s / lines, "ms"),
        "wall_ms_per_shot": (1000 * wall_s / lines, "ms"),
        "driver_peak_rss_mb": (peak_bytes / 2**20, "MB"),
        "driver_rss_growth_mb": ((peak_bytes - before_bytes) / 2**20, "MB"),
        "plan_s": (first.planned_s, "s"),
        "resume_s": (resume_s, "s"),
        "resume_cpu_s": (resume_cpu_s, "s"),
        "resume_s_per_10000": (resume_s * 10_000 / lines, "s"),
    }
    return [
        {"system": "vidgen", "what": what, "value": round(value, 4), "unit": unit, "lines": lines}
        for what, (value, unit) in values.items()
    ]


def _render(script: Path, folder: Path, listener: RunClock) -> None:
    from vidgen_ray.batch.render_script import render_shots
    from vidgen_ray.batch.run_options import RenderOptions
    from vidgen_ray.outputs.folder import OutputFolder
    from vidgen_ray.script.lines import ScriptSettings

    options = RenderOptions(cache="none", stages=STAGES)
    profile = noop_profile(folder, CPU_WORKERS)
    render_shots(ScriptSettings(script), profile, OutputFolder(folder / "out"), options, listener=listener)


def _check_counts(counts: dict[str, int], expected: dict[str, int]) -> None:
    if dict(counts) != expected:
        raise RuntimeError(f"lines by status: got {dict(counts)}, expected {expected}")


def _peak_rss_bytes() -> int:
    """Return the peak memory of this process since its start."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    raise SystemExit(main())
