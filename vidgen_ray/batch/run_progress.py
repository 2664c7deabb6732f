"""Progress of a run: status snapshots and the listener interface."""

from typing import NamedTuple, Protocol

from vidgen_ray.outputs.manifest import ManifestRow


class StageStatus(NamedTuple):
    """Status of one stage at one moment."""

    queued: int
    """Calls that wait for a worker of this stage."""
    running: int
    """Calls that a worker is running."""
    workers: int
    """Live workers that hold the stage."""
    busy: float
    """Utilization of these workers over the last 30 seconds, 0 to 1."""


class Snapshot(NamedTuple):
    """Status of a run at one moment."""

    stages: dict[str, StageStatus]
    """Stage name -> status, in execution order. Only the stages that the script uses."""
    gpus_busy: float | None
    """GPU utilization over the last 30 seconds, 0 to 1. `None` if the run has no GPU."""
    in_progress: int
    """Shots that have started and not finished."""


class ProgressListener(Protocol):
    """Callbacks of a run: first `on_rejected`, then `on_planned`, then the others, one call at a time."""

    def on_rejected(self, row: ManifestRow) -> None:
        """A line failed before rendering: it is wrong or refers to a missing file."""

    def on_planned(self, total: int, done_before: int, refused: int) -> None:
        """Called once before rendering. `total` includes the lines already done and the rejected ones (`refused`)."""

    def on_finished(self, row: ManifestRow) -> None:
        """A shot was rendered or has failed."""

    def on_status(self, snapshot: Snapshot) -> None:
        """Called about every second during rendering, from another thread than the other callbacks."""
