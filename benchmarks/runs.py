"""One run in a fresh process, watched: how long it took, what its events say, or why there is no number."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.local_ray import ENVIRONMENT
from benchmarks.measure import Measurement, efficiency
from benchmarks.one_run import REASON
from benchmarks.simulated import COMMIT, events, prepare

ROOT = Path(__file__).parent.parent
MARK = "VIDGEN_BENCHMARK_RUN"
"""In the environment of all processes of a run, to find those that outlive it."""
LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Case:
    system: str
    layout: str
    gpus: int
    gpu_memory_gb: float
    shots: int


@dataclass(frozen=True, slots=True)
class Run:
    """How one run went. Without a measurement there is a reason."""

    measurement: Measurement | None
    reason: str | None
    startup_s: float | None
    """From the start of the process to the first stage."""
    total_s: float
    """From the start of the process to its end."""
    load_1_min: float
    """Of the machine, before."""


def run_once(case: Case, *, limit_s: float, stall_s: float, keep: Path | None) -> Run:
    """Run a case; a run that lasts longer than `limit_s`, or in which nothing happens for `stall_s`, is ended.

    `keep`: a folder to which the run's log and events are copied.
    """
    folder = Path(tempfile.mkdtemp(prefix="vidgen-bench-"))
    try:
        prepare(folder, case.gpus, case.gpu_memory_gb)
        run = _watched(case, folder, limit_s, stall_s)
        if keep is not None:
            name = "-".join(str(part).replace(" ", "_") for part in (case.system, case.layout, case.gpus, case.gpu_memory_gb))
            shutil.copytree(folder, keep / f"{name}-{int(time.time())}")
        return run
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watched(case: Case, folder: Path, limit_s: float, stall_s: float) -> Run:
    load = os.getloadavg()[0]
    mark = folder.name
    command = [sys.executable, "-m", "benchmarks.one_run", "--system", case.system, "--layout", case.layout]
    command += ["--gpus", str(case.gpus), "--memory", str(case.gpu_memory_gb), "--shots", str(case.shots)]
    command += ["--folder", str(folder)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), MARK: mark}
    begun = time.time()
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            stopped = _wait(process, folder, limit_s, stall_s)
        finally:
            total_s = time.time() - begun
            _end(process, mark)
    done = events(folder)
    committed = len({event.shot for event in done if event.stage == COMMIT})
    if stopped is None and process.returncode != 0:
        reason = folder / REASON
        stopped = reason.read_text() if reason.exists() else f"ended with code {process.returncode}"
    if stopped is None and committed != case.shots:
        stopped = "ended as if it were done"
    if stopped is not None:
        told = f"{stopped}; {committed} of {case.shots} shots were done" if done else stopped
        return Run(None, told, None, total_s, load)
    try:
        measured = efficiency(done, case.gpus)
    except ValueError as error:
        return Run(None, str(error), None, total_s, load)
    return Run(measured, None, measured.first_start - begun, total_s, load)


def _wait(process: subprocess.Popen[bytes], folder: Path, limit_s: float, stall_s: float) -> str | None:
    """Until the process ends, or the reason why it must."""
    begun = last_news = time.monotonic()
    before = -1
    while process.poll() is None:
        now = time.monotonic()
        size = sum(file.stat().st_size for file in (folder / "events").iterdir())
        if size != before:
            before, last_news = size, now
        if now - begun > limit_s:
            return f"took longer than {limit_s:g} s"
        if now - last_news > stall_s:
            return f"stalls: nothing happened for {stall_s:g} s"
        time.sleep(LOOK_S)
    return None


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End the process, if it is still there, and whatever of its run outlives it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = list(_marked(mark))
    for other in left:
        try:
            other.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=10)


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
