"""Results of calls to workers and encoders. Does not use Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

from vidgen_ray.engine.messages import OUTPUT, Kind
from vidgen_ray.errors import OtherWeights, OutOfMemory, VidgenError, WriteError
from vidgen_ray.outputs.records import Failure, StepRecord
from vidgen_ray.outputs.storage import is_disk_full
from vidgen_ray.planner.layout import WorkerSpec
from vidgen_ray.planner.solver import ENCODER_CPUS
from vidgen_ray.render.step_runner import ForeignArtefacts, StepFailed, WrongResult
from vidgen_ray.stages.base import Artefacts
from vidgen_ray.system.free_memory import is_out_of_memory

ENCODER = WorkerSpec((OUTPUT,), ENCODER_CPUS, gpus=0.0)
"""An encoder that writes to a disk, as a worker of the engine. See `EngineConfig.encoder`."""
BROKEN_CONTEXT = ("CUDA error", "Triton Error [CUDA]", "CUDNN_STATUS", "device-side assert")
"""Texts in the message of an error after which every call on this process's GPU fails."""


class ShotFailed(Exception):
    """The shot has failed. Further attempts are not made."""

    def __init__(self, failure: Failure, kind: Kind = Kind.ERROR) -> None:
        self.failure = failure
        self.kind = kind
        super().__init__(failure.message)


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
    """Differences of the result of a repeated call from others; see `worker.difference`."""

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
