"""Turn the JSON files of tools/gpu_first_hour.py into docs/benchmarks-gpu.md, and store the seconds of stages for later plans.

python -m tools.gpu_results out/first-hour
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vidgen_ray.planner.cluster import CARDS
from vidgen_ray.planner.demand import Measurement, save_measurements

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks-gpu.md"
Row = Mapping[str, Any]


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the content of the files, in the order of the steps. Exits if there are none, or if they are of different GPUs."""
    steps = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    # A step whose packages are missing has only the row that says so.
    steps.sort(key=lambda step: "profile" not in step)
    kinds = {(step["profile"], step["card"]) for step in steps if "profile" in step}
    if len(kinds) != 1:
        sys.exit(f"{folder}: got the results of {sorted(kinds) or 'no step'}, must be those of one profile on one kind of GPU")
    return steps


def measurements(steps: Iterable[Row]) -> dict[str, list[Measurement]]:
    """Return stage -> measurements with the options of the profile."""
    found = defaultdict(list)
    for row in _rows(steps):
        if row.get("is_calibration") and row["problem"] is None:
            found[row["stage"]].append(Measurement.model_validate(row["measurement"]))
    return found


def page(steps: Sequence[Row]) -> str:
    """Return the page as Markdown."""
    machine, card, profile = (steps[0][name] for name in ("machine", "card", "profile"))
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    gpu = machine.get("gpu", machine["cpu"])
    source = "Random weights, by `tools/gpu_first_hour.py` and `tools/gpu_results.py`."
    parts = [f"# First measurements on {card}", f"{gpu}, profile `{profile}`, Python {machine['python']}, {versions}. {source}"]
    rows = {row["name"]: row for row in _rows(steps)}
    if speeds := rows.get("speeds"):
        known = next((each for each in CARDS if each.name == card), None)
        names = {
            "tflop_per_s": "16 bits, TFLOP/s",
            "gb_per_s": "memory, GB/s",
            "link_gb_per_s": "pinned host memory to GPU, GB/s",
        }
        cells = [(text, speeds.get(name), known and getattr(known, name)) for name, text in names.items()]
        parts += ["## Machine", _table(("speed", "measured", "data sheet"), cells)]
    if pinned := rows.get("pinned memory", {}).get("bytes_per_byte"):
        parts.append(f"Pinned host memory per byte of 9 MiB tensors: {pinned:.2f}.")
    findings = [each for each in rows.get("checks", {}).get("findings", ()) if each["status"] != "pass"]
    parts += [f"- {each['check']}: {each['text']}" for each in findings]
    tests = [row for row in rows.values() if "::" in row["name"]]
    if tests:
        passed = sum(row["problem"] is None for row in tests)
        parts += ["## Tests", f"`pytest -m gpu`: {passed} of {len(tests)} passed."]
    measured = [row for row in rows.values() if "measurement" in row]
    if measured:
        parts += ["## Stages", _table(COLUMNS, [_stage_cells(row, measured) for row in measured]), NOTE]
    for row in rows.values():
        for kind, lines in row.items():
            if kind in TABLES and lines:
                columns = list(lines[0])
                table = _table(("number", *columns), [(n, *(line.get(c) for c in columns)) for n, line in enumerate(lines, 1)])
                parts += [f"## {row['name']}: {kind}", table]
    if trials := [row for row in rows.values() if "trial" in row]:
        columns = list(trials[0]["trial"])
        cells = [(row["name"], *(row["trial"].get(name) for name in columns), row["rejected"] or "used") for row in trials]
        parts += ["## Trials", _table(("option", *columns, "outcome"), cells)]
    if workers := [row for row in rows.values() if "worker" in row]:
        columns = list(workers[0]["worker"])
        table = _table(("worker", *columns), [(row["name"], *(row["worker"].get(name) for name in columns)) for row in workers])
        parts += ["## Workers of Ray", table]
    if levels := [row for row in rows.values() if "levels" in row]:
        cells = [(row["name"], ", ".join(f"{name} {value:.3g}" for name, value in row["levels"].items())) for row in levels]
        parts += ["## Same bytes", _table(("stage", "mean difference from the first call, in levels of 255"), cells)]
    if problems := [row for row in rows.values() if row["problem"] is not None]:
        cells = [(row["name"], row["problem"].replace("\n", " ").replace("|", "\\|")[:200]) for row in problems]
        parts += ["## Not measured or failed", _table(("what", "why"), cells)]
    return "\n\n".join(parts) + "\n"


TABLES = ("rates", "kinds", "networks", "kernels", "calls", "moves", "peaks", "outcomes", "compiled")
"""Values of rows that are lists of objects with the same names."""
COLUMNS = (
    "measured",
    "size",
    "reference shot, s",
    "gain",
    "of the peak",
    "step, s",
    "fixed, s",
    "warm-up, s",
    "memory, GB",
    "planned, GB",
    "clock, MHz",
    "power, W",
    "clock limited by",
)
NOTE = (
    "Gain: seconds with the options of the profile / these. Planned: weights and activations of the memory table. "
    "Clock: at the highest power draw."
)


def _stage_cells(row: Row, measured: Iterable[Row]) -> tuple[Any, ...]:
    one = row["measurement"]
    plain = next((r["measurement"] for r in measured if r["stage"] == row["stage"] and r["is_calibration"]), None)
    gain = plain["seconds_of_reference"] / one["seconds_of_reference"] if plain and plain is not one else None
    share = None if row["peak_share"] is None else f"{row['peak_share']:.0%}"
    times = (one[name] for name in ("step_s", "fixed_s", "warmup_s", "peak_gb"))
    gpu = [row.get("gpu", {}).get(name) for name in ("clock_mhz", "power_w", "limited_by")]
    return row["name"], one["size"], one["seconds_of_reference"], gain, share, *times, row["planned_gb"], *gpu


def _rows(steps: Iterable[Row]) -> list[Row]:
    return [row for step in steps for row in step["rows"]]


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with the files of the steps")
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write; default: docs/benchmarks-gpu.md")
    args = parser.parse_args(argv)
    steps = read(args.folder)
    if steps[0]["card"] == "cpu" and args.page == PAGE:
        sys.exit(f"{args.folder}: was measured on a CPU; give another --page")
    args.page.write_text(page(steps))
    save_measurements(steps[0]["profile"], steps[0]["card"], measurements(steps))


if __name__ == "__main__":
    main()
