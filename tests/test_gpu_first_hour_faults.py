"""Simulation of tools/gpu_first_hour.py in which every step fails once: its steps, with invented measurements and time."""

import subprocess
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_rows, gpu_steps
from benchmarks.gpu_rows import MIN_CASE_S, TIME_IS_OVER, AlarmRang, Rows
from tools import gpu_first_hour, gpu_results
from tools.gpu_first_hour import EXIT_S
from vidgen_ray.stages import speed

CASE_S, LIMIT_S = 20.0, 510.0
LEFT_S = EXIT_S + MIN_CASE_S + 20.0
"""Time of a call in which the measurement begins that is cut off, in seconds."""
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"
FAULTS = {
    "error": "ValueError: wrong",
    "out of memory": f"OutOfMemoryError: {NO_MEMORY}",
    "crash": None,
    "cut off": None,
    "does not end": None,
    "cannot start": None,
}
"""Fault -> what remains of it in the row that it hit."""


class ProcessDied(BaseException):
    """The process of a step is killed."""


class DoesNotEnd(BaseException):
    """The process of a step runs until it is killed at the end of the call."""


class Hour:
    """Runs the command in invented time. Its steps have a fault in their first row, at the first attempt."""

    def __init__(self, folder, faults):
        """`faults`: step -> its fault."""
        self.results = folder / "results"
        self.measured = Counter()
        """(step, row) -> how often it was measured."""
        self.first = {}
        """Step -> its first row."""
        self._open = dict(faults)
        self.now = self.until = self.alarm_s = 0.0
        self.step = ""

    def call(self):
        """Run one call of the command and return its exit code."""
        self.until = self.now + LIMIT_S
        arguments = ["--results", str(self.results), "--profile", "tiny", "--lora", "builtin:tiny/lora.safetensors"]
        code = gpu_first_hour.main(arguments)
        assert self.now <= self.until
        return code

    def start(self, command, stdout, **_):
        """Stand for `subprocess.Popen`."""
        self.step = command[3]
        return SimpleNamespace(pid=0, wait=partial(self._wait, command[3:], stdout))

    def _wait(self, arguments, log, timeout):
        self.now += 5.0
        log.write(b"a line of the log\n")
        if self._take("cannot start"):
            return 1
        if self._open.get(self.step) == "cut off":
            self.now = max(self.now, self.until - LEFT_S)
        try:
            return gpu_steps.main(arguments)
        except ProcessDied:
            return -9
        except DoesNotEnd:
            self.now = self.until
            raise subprocess.TimeoutExpired("a step", timeout) from None

    def _take(self, *faults):
        """Return the fault of the step if it is one of these and has not happened."""
        return self._open.pop(self.step) if self._open.get(self.step) in faults else None

    def measure(self, name):
        """Stand for a measurement."""
        self.first.setdefault(self.step, name)
        self.measured[self.step, name] += 1
        fault = self._take(*FAULTS)
        if fault == "cut off":
            self.now += self.alarm_s
            raise AlarmRang
        self.now += CASE_S
        if fault == "error":
            raise ValueError("wrong")
        if fault == "out of memory":
            raise torch.OutOfMemoryError(NO_MEMORY)
        if fault == "crash":
            raise ProcessDied
        if fault == "does not end":
            raise DoesNotEnd
        return {"value": 1}

    @contextmanager
    def alarm(self, seconds):
        self.alarm_s = seconds
        yield

    def run_tests(self, arguments, plugins):
        """Stand for `pytest.main`."""
        done = {each.removeprefix("--deselect=") for each in arguments if each.startswith("--deselect=")}
        for name in [name for name in ("test_gpu.py::a", "test_gpu.py::b") if name not in done]:
            error = None
            try:
                self.measure(name)
            except AlarmRang:
                raise DoesNotEnd from None
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
            report = SimpleNamespace(when="call", outcome="failed" if error else "passed", passed=not error, longrepr=error)
            plugins[0].pytest_runtest_logreport(SimpleNamespace(**vars(report), nodeid=name, duration=1.0))
        return 0


@pytest.fixture
def hour(tmp_path, monkeypatch):
    """Return a function that makes the simulation."""

    def make(faults):
        made, real = Hour(tmp_path, faults), Rows.measure
        clock = SimpleNamespace(monotonic=lambda: made.now)
        processes = SimpleNamespace(
            Popen=lambda command, **options: nullcontext(made.start(command, **options)),
            TimeoutExpired=subprocess.TimeoutExpired,
        )
        fakes = {
            (gpu_first_hour, "subprocess"): processes,
            (gpu_rows, "time"): clock,
            (gpu_rows, "alarm"): made.alarm,
            (gpu_first_hour, "time"): clock,
            (gpu_first_hour.os, "killpg"): lambda pid, number: None,
            (gpu_first_hour, "package_folders"): list,
            (gpu_steps, "pytest"): SimpleNamespace(main=made.run_tests, TestReport=object),
            (speed, "COMPILE_BACKEND"): speed.COMPILE_BACKEND,
        }
        for (owner, name), fake in fakes.items():
            monkeypatch.setattr(owner, name, fake)
        monkeypatch.setattr("vidgen_ray.engine.ray_cluster.connected", lambda *_: nullcontext())
        monkeypatch.setattr(
            Rows,
            "measure",
            lambda rows, cases, limits_s=None: real(rows, {name: partial(made.measure, name) for name in cases}, limits_s),
        )
        return made

    return make


def check(hour, faults):
    """Run calls until all is measured, and check the rows of each step and the page."""
    codes = [hour.call()]
    while codes[-1] == TIME_IS_OVER and len(codes) < 60:
        codes.append(hour.call())
    assert codes[-1] == 0
    assert hour.call() == 0, "nothing is left"
    assert len(codes) > 2, "the calls end in time"
    files = {file.stem.partition("-")[2].partition("-")[0]: file for file in hour.results.glob("*.json")}
    assert files.keys() == {*gpu_first_hour.STEPS}
    for step, file in files.items():
        fault, first, rows = faults.get(step), hour.first[step], Rows(file)
        assert rows.is_complete
        problems = rows.problems
        # The reason why a process ended outside of its measurements stays.
        problems.pop(step + gpu_rows.EXIT, None)
        reason = problems.pop(first)
        assert (reason or "").endswith(FAULTS.get(fault) or ""), (step, fault, reason)
        assert (reason is None) == (FAULTS.get(fault) is None), (step, fault, reason)
        assert not any(problems.values()), (step, fault, problems)
        again = {(step, first)} if fault in ("crash", "cut off", "does not end") else set()
        counts = {key: n for key, n in hour.measured.items() if key[0] == step}
        assert counts == {key: 1 + (key in again) for key in counts}, (step, fault)
    page = gpu_results.page(gpu_results.read(hour.results))
    assert all(reason in page for reason in {FAULTS[fault] for fault in faults.values()} if reason)
    return codes


def test_hour_in_which_every_step_has_a_fault(hour):
    faults = dict(zip(gpu_first_hour.STEPS, [*FAULTS] * len(gpu_first_hour.STEPS), strict=False))
    check(hour(faults), faults)


@pytest.mark.parametrize("fault", FAULTS)
def test_hour_in_which_every_step_has_this_fault(hour, fault):
    faults = dict.fromkeys(gpu_first_hour.STEPS, fault)
    check(hour(faults), faults)
