"""Rows of one step of tools/gpu_first_hour.py: a JSON file that is written after each, so that a crash loses one measurement.

This module needs the standard library alone, so a step can state that its packages are missing.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu_state import gpu_state

UNFINISHED = "did not finish"
EXIT = ": exit"
"""End of the name of the row of a process that ended outside of its measurements."""
TIMEOUT = "killed at the end of the time of the call"
CASE_S = 240.0
"""Longest measurement in seconds, unless it has a limit of its own."""
GRACE_S = 15.0
"""Seconds after the limit of a measurement, after which code that never returns to Python is ended with its process."""
MIN_CASE_S = 40.0
"""Seconds that must be left of a call to begin a measurement."""
CRASHES = 2
"""Crashes of a measurement after which it is not repeated."""
CUT_OFFS = 3
"""Calls whose end cuts a measurement off, after which it is not repeated."""
TIME_IS_OVER = 3
"""Exit code of a step that has more to measure, in another process."""


class TimeIsOver(BaseException):
    """This process cannot make the next measurement: the time of the call does not suffice, or its GPU is lost."""


class Rows:
    """Rows of one step. Those that an earlier call has measured are kept.

    A row has `problem`: `None`, or why there is no result. Only a row that did not finish is measured again.
    """

    def __init__(self, file: Path, header: Mapping[str, Any] | None = None, until: float = float("inf")) -> None:
        """`until`: time of the monotonic clock at which the process must have ended."""
        self._file, self._until = file, until
        content = json.loads(file.read_text()) if file.exists() else {}
        self._rows: dict[str, dict[str, Any]] = {row["name"]: row for row in content.pop("rows", ())}
        self._header = {**content, **(header or {})}

    @property
    def problems(self) -> dict[str, str | None]:
        return {name: row["problem"] for name, row in self._rows.items()}

    @property
    def is_complete(self) -> bool:
        """True if the step has attempted all of its measurements."""
        return bool(self._header.get("complete"))

    def measure(
        self, cases: Mapping[str, Callable[[], Mapping[str, Any]]], limits_s: Mapping[str, float] | None = None
    ) -> None:
        """Add a row for each case that has none. An error of a case is the problem of its row. Raises TimeIsOver.

        `limits_s`: case -> its longest time in seconds, CASE_S for all others. A case in which the process crashed is the last
        one.
        """
        for name in sorted(cases, key=self._crashes):
            if self.is_measured(name):
                continue
            left = self._until - time.monotonic()
            if left < MIN_CASE_S:
                raise TimeIsOver
            self._measure_case(name, cases[name], (limits_s or {}).get(name, CASE_S), left - MIN_CASE_S / 2)

    def is_measured(self, name: str) -> bool:
        problem = self._rows.get(name, {"problem": UNFINISHED})["problem"]
        return problem is None or not problem.startswith(UNFINISHED) or self._crashes(name) >= CRASHES

    def _crashes(self, name: str) -> int:
        return self._count(name, "crashes")

    def _count(self, name: str, what: str) -> int:
        return int(self._rows.get(name, {}).get(what, 0))

    def _measure_case(self, name: str, case: Callable[[], Mapping[str, Any]], limit_s: float, left_s: float) -> None:
        crashes, cut_offs = self._crashes(name), self._count(name, "cut_offs")
        self.add(name, UNFINISHED, {"crashes": crashes, "cut_offs": cut_offs})
        begun, values, problem, state = time.monotonic(), {}, None, {}
        try:
            with gpu_state() as state, alarm(min(limit_s, left_s)):
                values = dict(case())
        except AlarmRang:
            problem = f"took longer than {limit_s:g} s"
            if left_s < limit_s:
                cut_offs += 1
                problem = f"the end of {cut_offs} calls cut it off; give a call more time with --limit-s"
                if cut_offs < CUT_OFFS:
                    self.add(name, UNFINISHED, {"crashes": crashes, "cut_offs": cut_offs})
                    raise TimeIsOver from None
        # A failed row does not affect the next ones. Libraries end the process by SystemExit, too.
        except (Exception, SystemExit) as error:
            problem = f"{type(error).__name__}: {error}"
        problem = values.pop("problem", problem)
        self.add(name, problem, {**values, "took_s": time.monotonic() - begun, "gpu": state})
        print(f"{name}: {problem or 'measured'}", file=sys.stderr, flush=True)  # noqa: T201
        if problem is not None and not is_gpu_usable():
            raise TimeIsOver

    def add(self, name: str, problem: str | None, values: Mapping[str, Any] | None = None) -> None:
        """Add or replace a row."""
        self._rows[name] = {"name": name, "problem": problem, **(values or {})}
        self._write()

    def add_exit(self, step: str, problem: str) -> None:
        """Add how the process of a step ended: to the row that it was measuring, else as a row of its own.

        A step whose process ends twice without a new row in between is complete.
        """
        unfinished = [row for row in self._rows.values() if row["problem"] == UNFINISHED]
        if not unfinished:
            name = step + EXIT
            rows, earlier = len(self._rows.keys() - {name}), self._rows.get(name, {})
            unfinished = [{"name": name, "crashes": self._crashes(name) if earlier.get("rows") == rows else 0, "rows": rows}]
            self._header["complete"] = unfinished[0]["crashes"] + 1 >= CRASHES
        for row in unfinished:
            self._rows[row["name"]] = {**row, "problem": f"{UNFINISHED}: {problem}", "crashes": row["crashes"] + 1}
        self._write()

    def complete(self) -> None:
        """State that all measurements were attempted. That the time of earlier calls was over is no problem then."""
        self._header["complete"] = True
        over = [name for name, row in self._rows.items() if name.endswith(EXIT) and TIMEOUT in row["problem"]]
        self._rows = {name: row for name, row in self._rows.items() if name not in over}
        self._write()

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps({**self._header, "rows": [*self._rows.values()]}, indent=1, default=str) + "\n")
        os.replace(new, self._file)


def is_gpu_usable() -> bool:
    """Return whether this process can still use its GPU. After an illegal access and other errors, all calls of CUDA fail."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception:
        return False
    return True


class AlarmRang(BaseException):
    """The time of a case is over. Not an Exception: a compiler or a trial would take it for an error of its own."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise AlarmRang in the block after these seconds. End the process with its traceback if the block does not end then."""

    def ring(*_: Any) -> None:
        raise AlarmRang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    # A thread that needs no lock of Python.
    faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
