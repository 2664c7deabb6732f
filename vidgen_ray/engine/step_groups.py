"""A shot's way through processes that hold stages: which steps go together in one call, and how a call went.

Shared by the executors. Knows no Ray.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import VidgenError, WriteError
from vidgen_ray.outputs.records import Failure, StepRecord
from vidgen_ray.stages.base import Artefacts
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.likeness import ImageLikenessStage
from vidgen_ray.stages.realesrgan import RealESRGANStage

T = TypeVar("T")

LOADING = "loading"
"""Stage of the failure of a process that could not load its weights."""
OUTPUT = "output"
"""Stage of what goes wrong while files are written."""
BROKEN_CONTEXT = ("CUDA error", "CUDNN_STATUS", "device-side assert")
"""In the message of an error after which nothing runs on this process's GPU any more."""
CHUNKS_AHEAD = 3
"""Of one clip beyond the encoder. Enlarged frames lie outside of every accounting of memory but ours."""


@dataclass(frozen=True, slots=True)
class CallResult:
    """How a call went.

    A failure is `final` where the same call would fail again, and the process is `wedged` where every call would. What an
    encoder has `forgotten` was begun by a process that is dead.
    """

    records: tuple[StepRecord, ...] = ()
    likeness: Artefacts = field(default_factory=lambda: Artefacts())
    """Of what the shot has now that by which it is judged; the rest stays in Ray's memory."""
    failure: Failure | None = None
    final: bool = False
    context_broken: bool = False
    session_lost: bool = False

    @classmethod
    def of_failure(cls, failed: StepFailed) -> CallResult:
        # A disk that is full now may have room at the next attempt.
        final = isinstance(failed.cause, VidgenError) and not isinstance(failed.cause, WriteError)
        context_broken = any(words in str(failed.cause) for words in BROKEN_CONTEXT)
        return cls(failure=failed.failure(), final=final, context_broken=context_broken)


def group_steps(plan: ShotPlan, can_fuse: Callable[..., bool], *, face_is_shared: bool) -> list[tuple[Step, ...]]:
    """The steps up to the clip, as calls: as many together as those can take who may have the first of them.

    `together(first, *others)` says whether every process that holds the first of these stages takes the others, too.
    A face's features end a call where other shots want them, too; so does a picture that is to be judged.
    """
    ends = {
        *([InstantIDStage.name] if face_is_shared else []),
        *([ImageLikenessStage.name] if plan.shot.min_identity is not None else []),
    }
    calls: list[list[Step]] = []
    for step in plan.steps:
        if step.stage == RealESRGANStage.name:
            continue
        if calls and calls[-1][-1].stage not in ends and can_fuse(*(s.stage for s in (*calls[-1], step))):
            calls[-1].append(step)
        else:
            calls.append([step])
    return [tuple(steps) for steps in calls]


async def ordered_window(cuts: Iterable[slice], enlarged: Callable[[slice], Awaitable[T]]) -> AsyncGenerator[T]:
    """What is made of each cut of a clip, in order; so many at once that `CHUNKS_AHEAD` are on their way or wait."""
    pending: deque[asyncio.Future[T]] = deque()
    try:
        for cut in cuts:
            if len(pending) == CHUNKS_AHEAD:
                yield await pending.popleft()
            pending.append(asyncio.ensure_future(enlarged(cut)))
        while pending:
            yield await pending.popleft()
    finally:
        for task in pending:
            task.cancel()
