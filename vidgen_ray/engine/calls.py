"""Calls to processes that hold stages: which steps go into one call, and the result of a call. Does not use Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine.oom_fallback import is_out_of_memory
from vidgen_ray.engine.retries import Kind
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import OtherWeights, OutOfMemory, VidgenError, WriteError
from vidgen_ray.graph import STAGE_BY_NAME, is_chunked
from vidgen_ray.outputs.records import Failure, StepRecord
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts

LOADING = "loading"
"""Failure stage of a process that could not load its weights."""
OUTPUT = "output"
"""Failure stage of writing files."""
BROKEN_CONTEXT = ("CUDA error", "CUDNN_STATUS", "device-side assert")
"""Texts in the message of an error after which every call on this process's GPU fails."""


@dataclass(frozen=True, slots=True)
class CallResult:
    """Result of a call to a worker or an encoder."""

    records: tuple[StepRecord, ...] = ()
    likeness: Artefacts = field(default_factory=lambda: Artefacts())
    """The artefacts that the likeness check needs. All others stay in Ray's object store."""
    failure: Failure | None = None
    kind: Kind = Kind.ERROR
    """Kind of the failure."""
    load_failed: bool = False
    """True if the process could not load its weights."""
    cancelled: bool = False
    context_broken: bool = False
    """True if every further call to this process would fail."""
    session_lost: bool = False
    """True if the encoder process that began the shot has crashed."""

    @classmethod
    def of_failure(cls, failed: StepFailed) -> CallResult:
        # A full disk may have room at the next attempt.
        other_weights = isinstance(failed.cause, OtherWeights)
        is_input = isinstance(failed.cause, VidgenError) and not isinstance(failed.cause, WriteError) and not other_weights
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
