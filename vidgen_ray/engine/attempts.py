"""Attempts of a call: what a failure means, where the next attempt runs, and how long a call should take. Does not use Ray.

An attempt is repeated on another process, then on another node, before the shot fails. An error that names a problem of the
shot counts as its own only if a second node confirms it, or a second process if there is one node. Any other error counts
against the shot once its process has finished a call of another shot later, and never if the process is quarantined instead.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from vidgen_ray.engine.messages import OUTPUT, Call, Kind, Repetition, Result
from vidgen_ray.engine.processes import CoreLimits, Process, Table, Where
from vidgen_ray.outputs.records import Failure


class Verdict(Enum):
    """State of the process of a failed attempt, as far as it is known."""

    OPEN = "open"
    WELL = "well"
    """It has finished a call of another shot since: the attempt counts against the shot."""
    SICK = "sick"
    """It was quarantined: the attempt does not count."""
    LOST = "lost"
    """It was lost with its node or its connection: the attempt does not count."""


@dataclass(eq=False, slots=True, repr=False)
class FailedAttempt:
    request: Request
    process: str
    node: str | None
    gpu_gb: float
    kind: Kind
    failure: Failure
    at: float
    verdict: Verdict = Verdict.OPEN
    is_forgiven: bool = False
    """The shot seems to be the cause: it does not count against the process, until another process finishes the call."""


@dataclass(eq=False, slots=True, repr=False)
class Running:
    """A call on its process."""

    number: int
    request: Request | None
    """`None`: its result is not needed. The process is busy until it ends."""
    process: Process
    load: float
    stage: str
    began: float = math.inf
    """Time since which no earlier call is before it."""
    deadline: float = math.inf
    check: float = math.inf
    """Time of the next check whether it is slow."""

    def extend(self, seconds: float, soonest: float) -> None:
        """Add seconds in which it may not have run. Its deadline does not pass before `soonest`."""
        if self.began < math.inf:
            self.began += seconds
        self.deadline = max(self.deadline + seconds, soonest)
        self.check = max(self.check + seconds, soonest)


@dataclass(eq=False, slots=True, repr=False)
class Request:
    """A call with the shots that have asked for it, from the question to the result."""

    call: Call
    askers: list[Call]
    """The calls of all shots that wait for the result, the first one first. None for a check of a worker."""
    running: dict[int, Running] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    """Numbers of attempts whose processes were lost. Their results can still come."""
    failures: list[FailedAttempt] = field(default_factory=list)
    """All of them, also those that do not count; see `counting`."""
    where: Where | None = None
    runs_alone: bool = False
    """Run it alone on its process, because a process crashed while it ran this call and others."""
    is_copied: bool = False
    """Its present attempt has run on a second process, too. Only once: otherwise a call that hangs has a copy for ever."""
    entry: tuple[float, int, Request] | None = None
    """Its place in a queue, if it waits there."""
    doubt_until: float | None = None
    """Set while it waits for what shows which processes of its failures are sick."""
    quiet_since: float | None = None
    """Time since when no other call could show that."""
    unwritten: FailedAttempt | None = None
    """A failed write, while the storage is checked."""
    repetition: Repetition | None = None
    """Set for a check of a worker. Nothing follows if it fails."""


def counting(failures: Sequence[FailedAttempt]) -> list[FailedAttempt]:
    """Return the attempts that count against the shot, or may count."""
    return [each for each in failures if each.verdict in (Verdict.OPEN, Verdict.WELL)]


def in_doubt(failures: Sequence[FailedAttempt]) -> bool:
    return any(each.verdict is Verdict.OPEN and each.kind is Kind.ERROR for each in failures)


def is_confirmed(failures: Sequence[FailedAttempt]) -> bool:
    """Return whether several processes failed, all with the same error."""
    return len({each.process for each in failures}) > 1 and len({each.failure.error for each in failures}) == 1


class Evidence:
    """Shots whose calls may show which processes are sick: calls in progress that have not failed anywhere themselves.

    A call that has failed is no evidence for others that have: they would wait for each other, one attempt after another.
    """

    def __init__(self) -> None:
        self._of_workers: Counter[float] = Counter()
        """Order of a shot -> its calls to workers."""
        self._of_all: Counter[float] = Counter()
        """The same, with calls to encoders."""

    def add(self, call: Call) -> None:
        """A call is in progress."""
        self._of_all[call.order] += 1
        if call.stage != OUTPUT:
            self._of_workers[call.order] += 1

    def remove(self, call: Call) -> None:
        """A call has ended, or has failed for the first time."""
        _count_down(self._of_all, call.order)
        if call.stage != OUTPUT:
            _count_down(self._of_workers, call.order)

    @property
    def is_scarce(self) -> bool:
        """Whether there may be none for some call."""
        return len(self._of_workers) <= 1

    def is_there_for(self, call: Call) -> bool:
        """Return whether a call of another shot may show which processes are sick."""
        # The session of an encoder may wait for a chunk that waits for evidence, too.
        orders = self._of_all if call.stage == OUTPUT else self._of_workers
        return len(orders) > (call.order in orders)


def _count_down(numbers: Counter[float], key: float) -> None:
    numbers[key] -= 1
    if not numbers[key]:
        del numbers[key]


def next_place(failures: Sequence[FailedAttempt], stage: str, table: Table, limit: int) -> Where | None:
    """Return where the next attempt runs: on another process, then on another node, on a larger GPU. `None`: nowhere."""
    too_small = max((each.gpu_gb for each in failures if each.kind is Kind.MEMORY), default=-1.0)
    more_gb = -1.0
    if limit > 1 and -1.0 < too_small < table.largest_gb(stage):
        # Only what happened on larger GPUs counts, as if there were no others.
        more_gb, failures = too_small, [each for each in failures if each.gpu_gb > too_small]
        if not failures:
            return Where(more_gb=more_gb)
    tried, nodes = frozenset(each.process for each in failures), frozenset(each.node for each in failures)
    not_tried, other_nodes = Where(tried, more_gb=more_gb), Where(not_nodes=nodes, more_gb=more_gb)
    others, others_on_other_nodes = table.count(stage, not_tried), table.count(stage, other_nodes)
    if all(each.kind in (Kind.INPUT, Kind.MEMORY) for each in failures):
        if limit == 1 or len(nodes) > 1 or not (others_on_other_nodes or (others and len(tried) == 1)):
            return None
        return other_nodes if others_on_other_nodes else not_tried
    if len(failures) >= limit and (limit == 1 or len(nodes) > 1 or not others_on_other_nodes):
        return None
    if len(failures) > 1 and len(nodes) == 1 and others_on_other_nodes:
        return other_nodes
    return not_tried if others else Where(more_gb=more_gb)


RECENT_CALLS = 32
"""Calls per stage whose seconds are kept."""
USUAL_SHARE = 0.75
"""Share of them that took at most the expected seconds."""


class Durations:
    """Seconds of the last calls of each stage, relative to the costs of their shots."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT_CALLS))
        """Stage -> seconds of the reference shot."""
        self._usual: dict[str, float] = {}

    def add(self, call: Call, result: Result) -> None:
        """Add the seconds of a call."""
        for step, cost in zip(result.steps, call.costs, strict=bool(call.costs)):
            if cost and step.seconds is not None:
                self._seconds[step.stage].append(step.seconds / cost)
                self._usual.pop(step.stage, None)

    def expected_s(self, call: Call) -> float:
        """Return the expected seconds of a call. Infinite if one of its stages was not measured yet."""
        if not call.costs:
            return math.inf
        return sum(self._usual_s(stage) * cost for stage, cost in zip(call.stages, call.costs, strict=True) if cost)

    def _usual_s(self, stage: str) -> float:
        if (usual_s := self._usual.get(stage)) is None:
            seconds = sorted(self._seconds[stage])
            usual_s = self._usual[stage] = seconds[int(USUAL_SHARE * len(seconds))] if seconds else math.inf
        return usual_s

    def timeout_s(self, call: Call, limits: CoreLimits) -> float:
        """Return the timeout of a call: that of its stages, or less if its expected seconds are known."""
        return min(call.timeout_s, max(limits.floor_s, limits.factor * self.expected_s(call)))
