"""Calls to processes that hold stages: which steps go into one call, how a clip is cut into chunks, what a call returns, and
how long it should take.

Does not use Ray.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine.retries import Kind
from vidgen_ray.errors import OtherWeights, OutOfMemory, VidgenError, WriteError
from vidgen_ray.graph import STAGE_BY_NAME, is_chunked
from vidgen_ray.outputs.records import Failure, StepRecord
from vidgen_ray.outputs.storage import is_disk_full
from vidgen_ray.planner.layout import WorkerSpec
from vidgen_ray.planner.solver import ENCODER_CPUS
from vidgen_ray.render.oom_fallback import is_out_of_memory
from vidgen_ray.render.step_runner import ForeignArtefacts, StepFailed, WrongResult
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts

LOADING = "loading"
"""Failure stage of a process that could not load its weights."""
OUTPUT = "output"
"""Stage of encoders: write and commit the files of a shot."""
ENCODER = WorkerSpec((OUTPUT,), ENCODER_CPUS, gpus=0.0)
"""An encoder that writes to a disk, as a worker of the engine. See `EngineConfig.encoder`."""
BROKEN_CONTEXT = ("CUDA error", "CUDNN_STATUS", "device-side assert")
"""Texts in the message of an error after which every call on this process's GPU fails."""


def is_encoder(spec: WorkerSpec) -> bool:
    return spec.stages == ENCODER.stages


@dataclass(frozen=True, slots=True)
class CallResult:
    """Result of a call to a worker or an encoder. Without records and failure, the call was cancelled."""

    records: tuple[StepRecord, ...] = ()
    likeness: Artefacts = field(default_factory=lambda: Artefacts())
    """The artefacts that the likeness check needs. All others stay in Ray's object store."""
    failure: Failure | None = None
    kind: Kind = Kind.ERROR
    """Kind of the failure."""
    load_failed: bool = False
    """True if the process could not load its weights."""
    context_broken: bool = False
    """True if every further call to this process would fail."""
    session_lost: bool = False
    """True if the encoder process that began the shot has crashed."""
    started_at: float | None = None
    """Time in seconds since 1970, by the clock of the worker. `None` for encoders."""
    seconds: float = 0.0
    """Seconds since then, of a failed call."""
    device: str = ""
    """GPU and driver of the worker. Empty on a CPU."""
    differences: tuple[float, ...] = ()
    """Differences of the result of a repeated call from others; see `worker_checks.difference`."""

    @classmethod
    def of_failure(cls, failed: StepFailed) -> CallResult:
        if isinstance(failed.cause, WriteError) or (failed.stage == OUTPUT and isinstance(failed.cause, OSError)):
            return cls(failure=failed.failure(), kind=Kind.DISK_FULL if is_disk_full(failed.cause) else Kind.WRITE)
        if isinstance(failed.cause, ForeignArtefacts):
            return cls(failure=failed.failure(), kind=Kind.FOREIGN)
        other_weights = isinstance(failed.cause, OtherWeights)
        is_input = isinstance(failed.cause, VidgenError) and not isinstance(failed.cause, OtherWeights | WrongResult)
        # A new process loads the weights again. Failed allocations leave the context as it was.
        too_large = isinstance(failed.cause, OutOfMemory)
        out_of_memory = too_large or is_out_of_memory(failed.cause)
        names_context = any(words in str(failed.cause) for words in BROKEN_CONTEXT)
        context_broken = other_weights or (names_context and not out_of_memory)
        kind = Kind.MEMORY if too_large else Kind.INPUT if is_input else Kind.ERROR
        return cls(failure=failed.failure(), kind=kind, context_broken=context_broken)


def group_steps(plan: ShotPlan, can_fuse: Callable[..., bool], *, share_features: bool) -> list[tuple[Step, ...]]:
    """Group the steps before the chunked ones into calls, with as many steps per call as possible.

    `can_fuse(first, *others)` tells whether every process that holds stage `first` also takes the other stages. With
    `share_features` a call ends after a stage whose result other shots use, too. A call ends before a likeness check.
    """
    steps = [step for step in plan.steps if not is_chunked(step.stage)]
    return _group(steps, can_fuse, lambda step: _ends_call(step, plan.shot, share_features))


def group_chunked_steps(plan: ShotPlan, can_fuse: Callable[..., bool]) -> list[tuple[Step, ...]]:
    """Group the chunked steps into calls, as `group_steps` does."""
    return _group([step for step in plan.steps if is_chunked(step.stage)], can_fuse, lambda step: False)


def _group(steps: Sequence[Step], can_fuse: Callable[..., bool], ends_call: Callable[[Step], bool]) -> list[tuple[Step, ...]]:
    groups: list[list[Step]] = []
    for step in steps:
        if groups and not ends_call(groups[-1][-1]) and can_fuse(*(member.stage for member in groups[-1]), step.stage):
            groups[-1].append(step)
        else:
            groups.append([step])
    return [tuple(group) for group in groups]


def _ends_call(step: Step, shot: Shot, share_features: bool) -> bool:
    stage = STAGE_BY_NAME[step.stage]
    return (share_features and stage.shared) or (shot.min_identity is not None and "image_likeness" in stage.writes)


T = TypeVar("T")

MAX_CHUNKS_AHEAD = 3
"""Processed chunks of one clip that may wait for the encoder. They are raw frames in Ray's object store."""


async def ordered_window(chunks: Iterable[slice], process: Callable[[slice], Awaitable[T]]) -> AsyncGenerator[T]:
    """Yield `process(chunk)` for each chunk, in order, with at most `MAX_CHUNKS_AHEAD` of them started ahead."""
    pending: deque[asyncio.Future[T]] = deque()
    try:
        for chunk in chunks:
            if len(pending) == MAX_CHUNKS_AHEAD:
                yield await pending.popleft()
            pending.append(asyncio.ensure_future(process(chunk)))
        while pending:
            yield await pending.popleft()
    finally:
        for task in pending:
            task.cancel()


RECENT_CALLS = 32
"""Calls per stage whose seconds are kept."""
USUAL_SHARE = 0.75
"""Share of them that took at most the expected seconds."""
FLOOR_S, FACTOR = 600.0, 10.0
"""A call times out after FACTOR times its expected seconds, but not before FLOOR_S: a model may be compiled for a new size."""


class Durations:
    """Seconds of the last calls of each stage, relative to the costs of their shots: stage -> cost, see `graph.durations`."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT_CALLS))
        """Stage -> seconds of the reference shot."""

    def add(self, costs: Mapping[str, float], records: Sequence[StepRecord], share: float = 1.0) -> None:
        """Add the seconds of a call. `share`: of the clip that it worked on."""
        for record in records:
            if costs[record.stage] and not record.cached:
                self._seconds[record.stage].append(record.seconds / (costs[record.stage] * share))

    def expected_s(self, costs: Mapping[str, float], share: float = 1.0) -> float:
        """Return the expected seconds of a call of these stages. Infinite if a stage was not measured yet."""
        return sum(self._usual_s(stage) * cost * share for stage, cost in costs.items() if cost)

    def _usual_s(self, stage: str) -> float:
        seconds = sorted(self._seconds[stage])
        return seconds[int(USUAL_SHARE * len(seconds))] if seconds else math.inf


def call_timeout_s(timeout_s: float, expected_s: float) -> float:
    """Return the timeout of a call whose stages have the timeout `timeout_s`."""
    return min(timeout_s, max(FLOOR_S, FACTOR * expected_s))
