"""Calls that wait for a worker, and workers, as the scheduler sees them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from vidgen_ray.planner.layout import WorkerSpec

CHUNK_LOAD = 0.25
"""Load of one chunk of frames to upscale."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One call to a worker."""

    stage: str
    """First stage of the call."""
    order: int
    """Sequence number of the shot. Smaller is older."""
    adapters: frozenset[Hashable] = frozenset()
    """LoRAs of the shot."""
    load: float = 1.0
    """Load that the call adds to a worker. 1 for a whole shot."""
    alone: bool = False
    """Run this work alone on its worker, because a process crashed while it ran this work and other work."""
    near: WorkerState | None = None
    """Worker that has the inputs. It is preferred among equally loaded workers, then workers on its node."""
    avoid: frozenset[WorkerState] = frozenset()
    """Workers on which this work failed. It runs there again only if no other live worker holds the stage."""

    def loras_active(self, worker: WorkerState) -> bool:
        """Return whether the LoRAs of the work are active on the worker. True for work without LoRAs."""
        return not self.adapters or self.adapters.issubset(worker.adapters)


@dataclass(eq=False)
class WorkerState:
    """A worker as the scheduler sees it. After `Scheduler.add_worker`, only the scheduler changes it, except for `node`."""

    spec: WorkerSpec
    adapters_kept: int
    """Maximum number of active LoRAs."""
    live: bool = field(init=False, default=False)
    """The process is up and has loaded its weights."""
    node: str | None = None
    """Node of the process. May change while the worker is not live."""
    probation: bool = False
    """The worker gets one call at a time, and only if no other worker can start it now. See `Scheduler.set_probation`."""
    load: float = 0.0
    """Load of the assigned work."""
    assigned: dict[Work, None] = field(default_factory=dict)
    """Assigned work in the order of assignment: the first runs, the others are prefetched."""
    adapters: list[Hashable] = field(default_factory=list)
    """Active LoRAs. The last used is last."""
    group: Sequence[str] = ()
    """Group of stages that is on the GPU after the assigned work, if groups of stages take turns."""
    turn: int = 0
    """Calls to this group in a row."""
    alone: bool = False
    """The assigned work must run alone."""
