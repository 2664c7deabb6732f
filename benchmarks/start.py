"""Time of each phase of `vidgen render` of one more line, and CPU time of short commands: `python benchmarks/start.py`.

Renders a line with the profile `demo` into a folder that has one already, several times, each in a new process. Prints the
median seconds of each phase, and the smallest CPU seconds of the commands and of a worker with stages that do nothing until it
is ready, as a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PHASES = ("imports", "plan", "start Ray", "start a worker, load", "render", "stop", "gallery")
COMMANDS = ("--version", "--help", "validate s.jsonl", "plan s.jsonl", "shot ball -p demo -o shot-NUMBER")
LINE = {"prompt": "a portrait of a person in a blue shirt by the sea on a sunny day"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", type=float, metavar="TIME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        sys.stderr.write(json.dumps(measure(arguments.measure)))
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        # The first run also builds weights and fills the disk cache of the operating system.
        for number in range(arguments.repeats + 1):
            with Path(folder, "s.jsonl").open("a") as script:
                script.write(json.dumps({"id": f"shot-{number}", **LINE}) + "\n")
            command = [sys.executable, __file__, "--measure", str(time.time())]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            if result.returncode:
                raise SystemExit(f"run {number} failed:\n{result.stdout}{result.stderr}")
            runs.append(json.loads(result.stderr.splitlines()[-1]))
        cpu_s = {f"vidgen {words}": round(cpu_seconds(words, folder, arguments.repeats), 2) for words in COMMANDS}
        cpu_s["worker"] = round(min(worker_cpu_seconds(Path(folder), arguments.repeats)), 2)
    medians = {phase: round(statistics.median(run[phase] for run in runs[1:]), 2) for phase in (*PHASES, "total")}
    sys.stdout.write(json.dumps({**medians, "cpu_s": cpu_s}, indent=1) + "\n")


def cpu_seconds(words: str, folder: str, repeats: int) -> float:
    """Return the smallest CPU seconds of a command and its processes. They vary less than its time."""
    used = []
    for number in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-m", "vidgen_ray", *words.replace("NUMBER", str(number)).split()],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(used)


def worker_cpu_seconds(folder: Path, repeats: int) -> list[float]:
    """Return the CPU seconds of new workers until they are ready."""
    import psutil
    import ray

    from benchmarks.local_ray import ENVIRONMENT, local_ray
    from benchmarks.noop_stages import STAGES, noop_profile
    from vidgen_ray.engine.config import EngineConfig
    from vidgen_ray.engine.worker import worker_class
    from vidgen_ray.outputs.folder import OutputFolder
    from vidgen_ray.planner.layout import WorkerSpec

    os.environ.update(ENVIRONMENT, PYTHONPATH=str(ROOT))
    config = EngineConfig("start", noop_profile(folder, 1), OutputFolder(folder / "out"), STAGES)
    used = []
    with local_ray(0):
        for _ in range(repeats):
            worker = worker_class().remote(config, WorkerSpec(tuple(STAGES), 0.5, 0.0))
            ray.get(worker.load.remote())
            times = psutil.Process(ray.get(worker.place.remote()).pid).cpu_times()
            used.append(times.user + times.system)
            ray.kill(worker)
    return used


def measure(started: float) -> dict[str, float]:
    """Run the command in this process, which was started at the time `started`. Return the seconds of each phase."""
    import ray

    from vidgen_ray.batch import render_script, results
    from vidgen_ray.cli import main as vidgen
    from vidgen_ray.engine import shell
    from vidgen_ray.report import gallery_page

    ends: dict[str, float] = {}

    def note(phase: str) -> Callable[[], None]:
        return lambda: ends.update({phase: time.time()})

    _before(render_script, "first_lines", note("imports"))
    _before(ray, "init", note("plan"))
    _after(ray, "init", note("start Ray"))
    _before(shell.Shell, "_do_Send", lambda: ends.setdefault("start a worker, load", time.time()))
    _before(results.RunResults, "finished", note("render"))
    _after(ray, "shutdown", note("stop"))
    _after(gallery_page, "write_gallery", note("gallery"))
    if vidgen(["render", "s.jsonl", "-o", "out", "-p", "demo", "--json"]):
        raise SystemExit("the run failed")
    times = [started, *(ends[phase] for phase in PHASES)]
    phases = {phase: end - begin for phase, (begin, end) in zip(PHASES, pairwise(times), strict=True)}
    return {**phases, "total": times[-1] - started}


def _before(owner: Any, name: str, action: Callable[[], object]) -> None:
    function = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: (action(), function(*args, **options))[1])


def _after(owner: Any, name: str, action: Callable[[], object]) -> None:
    function = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: (function(*args, **options), action())[0])


if __name__ == "__main__":
    main()
