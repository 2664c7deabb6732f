"""Run one case in a new process and measure it. Stops runs that stall or take too long."""

from __future__ import annotations

import compileall
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.local_ray import ENVIRONMENT
from benchmarks.measure import Measurement, efficiency
from benchmarks.one_run import REASON
from benchmarks.simulated import COMMIT, events, prepare

ROOT = Path(__file__).parent.parent
RUN_ID_VARIABLE = "VIDGEN_BENCHMARK_RUN"
"""Environment variable of all processes of a run, to find processes that are left over."""
POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Case:
    """One system and layout on one simulated machine."""

    system: str
    layout: str
    gpus: int
    gpu_memory_gb: float
    shots: int


@dataclass(frozen=True, slots=True)
class Run:
    """Result of one run: a measurement, or the reason why there is none."""

    measurement: Measurement | None
    reason: str | None
    startup_s: float | None
    """Seconds from the start of the process to the first stage."""
    total_s: float
    """Seconds from the start of the process to its end."""
    cpu_s: float
    """CPU seconds of all processes of the run, those of Ray included."""
    load_1_min: float
    """Load average of the machine before the run."""

    @property
    def whole_run_efficiency(self) -> float | None:
        """Share of the whole run in which all GPUs would be busy with the work. `None` if there is no measurement."""
        return None if self.measurement is None else self.measurement.bound_s / self.total_s


def compile_sources() -> None:
    """Compile this checkout to bytecode, as installed packages are, so that no process of a run compiles it."""
    for package in ("benchmarks", "vidgen_ray"):
        compileall.compile_dir(ROOT / package, quiet=1)


def run_once(case: Case, *, limit_s: float, stall_s: float, keep: Path | None) -> Run:
    """Run a case. The run is stopped after `limit_s`, or after `stall_s` without an event.

    `keep`: folder to which the log and events of the run are copied.
    """
    folder = Path(tempfile.mkdtemp(prefix="vidgen-bench-"))
    try:
        prepare(folder, case.gpus, case.gpu_memory_gb)
        run = _run_process(case, folder, limit_s, stall_s)
        if keep is not None:
            name = "-".join(str(part).replace(" ", "_") for part in (case.system, case.layout, case.gpus, case.gpu_memory_gb))
            shutil.copytree(folder, keep / f"{name}-{int(time.time())}")
        return run
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_process(case: Case, folder: Path, limit_s: float, stall_s: float) -> Run:
    load = os.getloadavg()[0]
    run_id = folder.name
    command = [sys.executable, "-m", "benchmarks.one_run", "--system", case.system, "--layout", case.layout]
    command += ["--gpus", str(case.gpus), "--memory", str(case.gpu_memory_gb), "--shots", str(case.shots)]
    command += ["--folder", str(folder)]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), RUN_ID_VARIABLE: run_id}
    # With the seconds that an earlier run has measured, the plan would be another one.
    environment["VIDGEN_CACHE"] = str(folder / "cache")
    started, times = time.time(), CpuTimes(run_id)
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            reason = _wait(process, folder, limit_s, stall_s, times)
        finally:
            total_s = time.time() - started
            _stop(process, run_id)
    recorded = events(folder)
    committed = len({event.shot for event in recorded if event.stage == COMMIT})
    if reason is None and process.returncode != 0:
        file = folder / REASON
        reason = file.read_text() if file.exists() else f"exited with code {process.returncode}"
    if reason is None and committed != case.shots:
        reason = "exited with code 0 before all shots were done"
    if reason is not None:
        message = f"{reason}; {committed} of {case.shots} shots done" if recorded else reason
        return Run(None, message, None, total_s, times.total_s, load)
    try:
        measured = efficiency(recorded, case.gpus)
    except ValueError as error:
        return Run(None, str(error), None, total_s, times.total_s, load)
    return Run(measured, None, measured.first_start - started, total_s, times.total_s, load)


class CpuTimes:
    """CPU times of the processes of a run, as last sampled: the parents of Ray's processes do not wait for them."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._is_own: dict[psutil.Process, bool] = {}
        self._seconds: dict[psutil.Process, float] = {}

    def sample(self) -> None:
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process not in self._is_own:
                    self._is_own[process] = process.environ().get(RUN_ID_VARIABLE) == self._run_id
                if self._is_own[process]:
                    self._seconds[process] = sum(process.cpu_times()[:2])

    @property
    def total_s(self) -> float:
        return sum(self._seconds.values())


def _wait(process: subprocess.Popen[bytes], folder: Path, limit_s: float, stall_s: float, times: CpuTimes) -> str | None:
    """Wait for the process to exit. Returns the reason if it must be stopped, else `None`."""
    started = last_event = time.monotonic()
    last_size = -1
    while process.poll() is None:
        now = time.monotonic()
        times.sample()
        size = sum(file.stat().st_size for file in (folder / "events").iterdir())
        if size != last_size:
            last_size, last_event = size, now
        if now - started > limit_s:
            return f"timeout after {limit_s:g} s"
        if now - last_event > stall_s:
            return f"stalled: no event for {stall_s:g} s"
        time.sleep(POLL_S)
    return None


def _stop(process: subprocess.Popen[bytes], run_id: str) -> None:
    """Kill the process if it is still running, and all left-over processes of the run."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    others = list(_processes_of(run_id))
    for other in others:
        try:
            other.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(others, timeout=10)


def _processes_of(run_id: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_ID_VARIABLE) == run_id:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
