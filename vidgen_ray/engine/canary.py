"""Canary checks: a worker repeats a call of another one, to find a GPU that computes other images than others of its kind.

Two that differ may both be well. A third one decides which of them is sick; without it, the difference is only logged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from vidgen_ray.engine.attempts import Request
from vidgen_ray.engine.messages import Call, Repetition, Result
from vidgen_ray.engine.processes import CoreLimits, Process, Table

CANARY = "canary"
"""Stage of a check in the log."""
MAX_BLOCK_DIFFERENCE = 48.0
"""Largest mean difference of a block of pixels, of 255, between two healthy workers: other kernels change details, a sick GPU
or damaged weights the image. Not measured on GPUs."""


@dataclass(slots=True)
class _Check:
    call: Call
    result: Result
    maker: Process
    due: Process
    """The worker that is checked."""
    first: Result | None = None
    """Result of the checked worker, if a third one decides."""


class Canary:
    """Decides when workers are checked, and which one is sick."""

    def __init__(
        self,
        table: Table,
        limits: CoreLimits,
        repeat: Callable[[Process, Call, Repetition], Request],
        on_sick: Callable[[Process, Call, bool], None],
    ) -> None:
        """`on_sick` gets a worker, the call that shows it, and whether it was found sick before and has not been well since."""
        self._table, self._limits, self._repeat, self._on_sick = table, limits, repeat, on_sick
        self._due: dict[Process, None] = {}
        """Workers whose check is due, the first one first. Few: each finished call looks through them."""
        self.checks: dict[Request, _Check] = {}

    def finished(self, maker: Process, call: Call, result: Result) -> None:
        """Count a call, and let the worker repeat it whose check is due, if there is one."""
        if not (call.is_checked and result.is_usual and maker.is_live) or maker.spec.server:
            return
        maker.calls_to_check -= 1
        if maker.calls_to_check <= 0:
            self._due[maker] = None
        due = next(self._peers(maker, self._due), None)
        # A check keeps the output of a call in Ray's object store.
        if due is not None and len(self.checks) <= len(self._table.rows) // self._limits.checked_calls:
            self._check_after(due, self._limits.checked_calls)
            request = self._repeat(due, call, Repetition(result, (result,)))
            self.checks[request] = _Check(call, result, maker, due)

    def repeated(self, request: Request, by: Process, result: Result) -> str:
        """Take the result of a repetition. Return its outcome, for the log."""
        check = self.checks.pop(request)
        if not result.is_usual:
            if check.due.is_live:
                self._due[check.due] = None
            return "not comparable"
        same = [difference <= MAX_BLOCK_DIFFERENCE for difference in result.differences]
        if check.first is None and same[0]:
            check.due.is_found_sick = check.maker.is_found_sick = False
            self._check_after(check.maker, self._limits.checked_calls)
        elif check.first is None:
            third = next((each for each in self._peers(check.maker, self._holders(check.call)) if each is not by), None)
            if third is None:
                # Another worker may have finished a call by the next check.
                self._check_after(by, self._limits.first_checked_call)
            else:
                check.first = result
                again = self._repeat(third, check.call, Repetition(check.result, (check.result, result)))
                self.checks[again] = check
        elif same[0] != same[1]:
            sick = check.due if same[0] else check.maker
            if sick.is_live:
                was_found_before, sick.is_found_sick = sick.is_found_sick, True
                self._on_sick(sick, check.call, was_found_before)
        return "done" if all(same) else "differs"

    def failed(self, request: Request) -> None:
        """A repetition has failed. Not repeated at once: each one may crash its worker."""
        self._check_after(self.checks.pop(request).due, self._limits.first_checked_call)

    def forget(self, process: Process) -> list[Request]:
        """The process of a row is gone. Return the repetitions that wait for it."""
        self._due.pop(process, None)
        waiting = [each for each in self.checks if each.entry and each.where is not None and each.where.only == process.name]
        for request in waiting:
            self.failed(request)
        return waiting

    def _check_after(self, process: Process, calls: int) -> None:
        self._due.pop(process, None)
        process.calls_to_check = calls

    def _holders(self, call: Call) -> Iterator[Process]:
        return self._table.holders_of(call.stage)

    @staticmethod
    def _peers(maker: Process, processes: Iterable[Process]) -> Iterator[Process]:
        """Yield the live ones of these workers that are of the kind of the maker, without itself."""
        others = (each for each in processes if each.is_live and each is not maker)
        return (each for each in others if (each.spec, each.device) == (maker.spec, maker.device))
