"""Retries of calls: what a failure means, and where the next attempt runs. Shared by workers and encoders. Does not use Ray.

An attempt is repeated on another worker, then on another node, before the shot fails. An error that names a problem of the shot
counts as the shot's own only if a second node confirms it, or a second worker if there is one node. Any other error counts
against the shot once its worker has finished a call of another shot later, and never if the worker is quarantined instead.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar

from vidgen_ray.engine.status import EngineObserver
from vidgen_ray.outputs.records import Failure

ATTEMPTS = 3
"""Default number of attempts per step before the shot has failed. The first one counts."""
IN_DOUBT_FACTOR = 2
"""Attempts, as a multiple, if nothing shows whether the processes are sick, and others have not tried it yet."""

R = TypeVar("R")
P = TypeVar("P", bound=Hashable)


class Kind(Enum):
    """Kind of a failed attempt."""

    INPUT = "refused"
    """The stage refused the shot or its files, with an error for the user. Repeated once elsewhere to confirm it."""
    MEMORY = "out of memory"
    """The shot does not fit into the GPU memory of the process, also with the lowest-memory settings. Repeated on larger GPUs,
    if there are any, otherwise once elsewhere."""
    WRITE = "write failed"
    """A file could not be written. The cause is the storage if nothing else can write to it either, otherwise the process."""
    DISK_FULL = "disk full"
    """A file could not be written, because the disk or a quota is full."""
    ERROR = "error"
    """Any other error, a timeout, or a crash that no other call can have caused."""
    NODE = "node error"
    """Ray could not store the result on the node, such as on a full disk. The process is quarantined, and with others of its
    node the whole node, so the attempt does not count against the shot."""
    SHARED_CRASH = "shared crash"
    """The process crashed with several calls in progress. Each is repeated alone, so that one line costs no other line."""
    FOREIGN = "foreign"
    """The inputs of the call were those of another shot. The shot runs again."""
    NOT_RUN = "not run"
    """The call is not the cause: it was never started, or the process was restarted for another reason."""


class Verdict(Enum):
    """State of the process of a failed attempt, as far as it is known."""

    OPEN = "open"
    WELL = "well"
    """It has finished a call of another shot since: the attempt counts against the shot."""
    SICK = "sick"
    """It was quarantined, or lost with its node or its connection: the attempt does not count."""


class Candidate(NamedTuple, Generic[P]):
    """A process that could run the call."""

    key: P
    node: str | None
    gpu_gb: float = 0.0
    """GPU memory that it may use. 0 if unknown."""


class AttemptFailed(Exception):
    """An attempt failed."""

    def __init__(
        self, kind: Kind, failure: Failure, process: Candidate[Any], started_at: float | None = None, seconds: float = 0.0
    ) -> None:
        """`started_at` and `seconds`: see `CallResult`."""
        self.kind = kind
        self.started_at, self.seconds = started_at, seconds
        self.failure = failure
        self.process = process
        self.failed_at = time.monotonic()
        self.verdict = Verdict.OPEN
        self.forgiven = False
        """The shot seems to be the cause: the failure is not counted against the process."""
        super().__init__(failure.message)


class ShotFailed(Exception):
    """The shot has failed. Further attempts are not made."""

    def __init__(self, failure: Failure, kind: Kind = Kind.ERROR) -> None:
        self.failure = failure
        self.kind = kind
        super().__init__(failure.message)


class InputsLost(Exception):
    """The inputs of a call were lost with the process or node that held them, before or during the call. Run the shot again."""


def drop_frames(error: BaseException) -> None:
    """Drop the traceback of an error that is kept: its stack frames would keep results of calls in the object store."""
    error.__traceback__ = error.__context__ = error.__cause__ = None


async def run_with_retries(
    attempt: Callable[[frozenset[P], bool], Awaitable[R]],
    candidates: Callable[[], Sequence[Candidate[P]]],
    blame: Callable[[AttemptFailed], None],
    evidence: Callable[[Sequence[AttemptFailed]], Awaitable[None]],
    storage_is_cause: Callable[[AttemptFailed], Awaitable[bool]],
    *,
    limit: int,
    observer: EngineObserver,
) -> R:
    """Return the result of `attempt`, repeated until it succeeds or the shot has failed.

    `attempt` gets the processes to avoid, and whether the call must run alone on its process. It raises AttemptFailed.
    `candidates` returns the processes that could run the call, now or once they have started. `blame` counts a failure against
    its process, unless it is forgiven. `evidence` waits until the verdicts are known, or nothing can show them.
    `storage_is_cause` tells it of a failed write, once the storage can be written again; then the attempt does not count.
    `limit`: attempts, counting the first. Attempts lost with a node, a connection or a sick process do not count.
    Raises ShotFailed.
    """
    failed: list[AttemptFailed] = []
    alone = False
    avoid: frozenset[P] = frozenset()

    def following(most: int) -> frozenset[P] | None:
        """Return the processes that the next attempt avoids. `None`: no further attempt. `most`: attempts."""
        return None if len(failed) >= IN_DOUBT_FACTOR * limit else _next(failed, candidates(), most)

    while True:
        try:
            result = await attempt(avoid, alone)
        except AttemptFailed as failure:
            drop_frames(failure)
            if failure.kind is Kind.NOT_RUN:
                continue
            if failure.kind is Kind.SHARED_CRASH:
                alone = True
                continue
            if failure.kind in (Kind.WRITE, Kind.DISK_FULL):
                if await storage_is_cause(failure):
                    continue
                failure.kind = Kind.ERROR
            failed = [*_counting(failed), failure]
            observer.step_failed(failure.failure.stage, failure.failure.error)
            # A refusal, or several processes with one error: the shot seems to be the cause, until another process renders it.
            failure.forgiven = failure.kind is Kind.INPUT
            for each in failed if failure.kind is Kind.ERROR and _is_confirmed(failed) else ():
                each.forgiven = True
            if failure.kind is not Kind.MEMORY:
                blame(failure)
            last = failure.failure
            next_avoid = following(limit)
            if next_avoid is None and any(each.kind is Kind.ERROR for each in failed):
                await evidence(failed)
                failed = _counting(failed)
                next_avoid = following(limit)
                tried = {each.process.key for each in failed}
                in_doubt = any(each.verdict is Verdict.OPEN for each in failed)
                if next_avoid is None and limit > 1 and in_doubt and any(each.key not in tried for each in candidates()):
                    next_avoid = following(IN_DOUBT_FACTOR * limit)
            if next_avoid is None:
                raise ShotFailed(last.model_copy(update={"attempts": len(failed)}), failure.kind) from None
            avoid = next_avoid
            observer.retried(last.stage)
        else:
            for each in failed:
                # The shot is fine: another process rendered it.
                if each.forgiven:
                    each.forgiven = False
                    blame(each)
            return result


def _counting(failed: Sequence[AttemptFailed]) -> list[AttemptFailed]:
    """Return the attempts that were not lost with a sick process."""
    return [each for each in failed if each.verdict is not Verdict.SICK]


def _next(failed: Sequence[AttemptFailed], candidates: Sequence[Candidate[P]], limit: int) -> frozenset[P] | None:
    """Return the processes that the next attempt avoids. `None`: no further attempt."""
    tried = {each.process.key for each in failed}
    nodes = {each.process.node for each in failed}
    other_nodes = [process for process in candidates if process.node not in nodes]
    others = [process for process in candidates if process.key not in tried]
    on_tried_nodes = frozenset(process.key for process in candidates if process.node in nodes)
    on_tried_processes = frozenset(process.key for process in candidates if process.key in tried)
    too_small = [each.process.gpu_gb for each in failed if each.kind is Kind.MEMORY]
    larger = {process.key for process in candidates if too_small and process.gpu_gb > max(too_small)}
    if larger and limit > 1:
        return frozenset(process.key for process in candidates if process.key not in larger)
    if failed and all(each.kind in (Kind.INPUT, Kind.MEMORY) for each in failed):
        if limit == 1 or len(nodes) > 1 or not (other_nodes or (others and len(tried) == 1)):
            return None
        return on_tried_nodes if other_nodes else on_tried_processes
    if len(failed) >= limit and (limit == 1 or len(nodes) > 1 or not other_nodes):
        return None
    if len(failed) > 1 and len(nodes) == 1 and other_nodes:
        return on_tried_nodes
    return on_tried_processes if others else frozenset()


def _is_confirmed(failed: Sequence[AttemptFailed]) -> bool:
    """Return whether several processes failed, all with the same error."""
    return len({each.process.key for each in failed}) > 1 and len({each.failure.error for each in failed}) == 1


def first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
