"""Status of an engine at one moment. Does not use Ray."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from vidgen_ray.engine.processes import Table
from vidgen_ray.outputs.run_log import StageStatus

BUSY_WINDOW = 30
"""Snapshots (one per second) over which the utilization is averaged."""


class Progress(NamedTuple):
    """Progress of a call. The first one of a call means that its execution has started."""

    stage: str
    step: int
    """Completed denoising steps or frames."""
    steps: int
    """Total number of steps. 0 if not known yet."""
    gpu_seconds: float | None = None
    """GPU-seconds of a call that has ended or was stopped, or `None` if none has."""


class Snapshot(NamedTuple):
    """Status of an engine at one moment."""

    stages: dict[str, StageStatus]
    """Stage name -> status, in execution order. Only the stages that workers hold."""
    gpus_busy: float | None
    """GPU utilization over the last 30 seconds, 0 to 1. `None` without GPUs."""
    in_progress: int
    """Shots that have started and not finished."""
    quarantined: tuple[str, ...] = ()
    """Workers and encoders in quarantine or given up, with their nodes."""
    waiting_for: str | None = None
    """Resources that workers wait for before they can start, such as GPUs, and who holds them."""


class Attempt(NamedTuple):
    """One attempt of a step of a shot. A clip that is processed in chunks has one for each chunk."""

    shot: str
    """Empty for a worker that has loaded its weights."""
    stage: str
    attempt: int
    """Counted from 1."""
    outcome: str
    """`done`, `cached`, or the kind of the failure."""
    started_at: float
    """Time in seconds since 1970, by the clock of the worker. For encoders and workers that have not responded, the time by the
    clock of the driver at which the attempt was sent."""
    seconds: float
    waited: float
    """Seconds before `started_at` for a worker. 0 for the later steps of a call."""
    worker: str
    node: str | None
    """Address of the worker's node."""
    error: str | None = None
    message: str | None = None


class EngineObserver(Protocol):
    """Callbacks of an engine, in its event loop."""

    def attempt_ended(self, attempt: Attempt) -> None:
        """An attempt of a step of a shot has ended: done or failed."""

    def step_ended(self, stage: str, seconds: float, cached: bool) -> None:
        """A step of a shot ended."""

    def step_failed(self, stage: str, error_class: str) -> None:
        """An attempt of a stage failed. The last attempt counts too."""

    def retried(self, stage: str) -> None:
        """Another attempt of a stage starts."""

    def adapter_loads(self, n: int) -> None:
        """LoRA files were loaded into a model."""

    def frames_upscaled(self, n: int) -> None:
        """Frames were upscaled."""

    def quarantined(self, process: str, reason: str) -> None:
        """A worker or an encoder is quarantined. `process`: its name and node."""


class Utilization:
    """Calls of each stage and GPUs that are busy, as averages over the last samples."""

    def __init__(self) -> None:
        self._running: deque[Counter[str]] = deque(maxlen=BUSY_WINDOW)
        self._gpus: deque[float] = deque(maxlen=BUSY_WINDOW)

    def sample(self, table: Table, waiting: Mapping[str, int]) -> tuple[dict[str, StageStatus], float | None]:
        """Return the status of each stage and the GPU utilization, 0 to 1. `waiting`: stage -> waiting calls."""
        rows = table.rows.values()
        self._running.append(Counter(next(iter(row.calls.values())).stage for row in rows if row.calls))
        with_gpu = [row for row in rows if row.spec.gpus]
        if with_gpu:
            self._gpus.append(sum(row.spec.gpus for row in with_gpu if row.calls) / sum(row.spec.gpus for row in with_gpu))
        stages = dict.fromkeys(stage for row in rows for stage in row.spec.stages)
        statuses = {stage: self._status(stage, waiting.get(stage, 0), table.live(stage)) for stage in stages}
        return statuses, sum(self._gpus) / len(self._gpus) if self._gpus else None

    def _status(self, stage: str, queued: int, workers: int) -> StageStatus:
        running = [sample[stage] for sample in self._running]
        busy = sum(running) / len(running) / workers if workers else 0.0
        return StageStatus(queued, running[-1], workers, min(1.0, busy))
