"""How a run tells of itself while it runs."""

from typing import NamedTuple, Protocol

from vidgen_ray.outputs.manifest import ManifestRow


class StageStatus(NamedTuple):
    """One stage at one moment."""

    queued: int
    """Shots that wait for a worker of this stage."""
    running: int
    workers: int
    busy: float
    """Share of the workers' time spent on work, 0 to 1, over the last 30 seconds."""


class Snapshot(NamedTuple):
    """A run at one moment. `stages` in the order of the chain, and only those that the script uses."""

    stages: dict[str, StageStatus]
    gpus_busy: float | None
    """Share of the GPUs' time spent on work, 0 to 1, over the last 30 seconds; None where a run has no GPU."""
    in_progress: int
    """Shots that have begun and not ended."""


class ProgressListener(Protocol):
    """Is told how a run goes, first by `refused`, then by `planned`, then by the others, one call at a time."""

    def on_rejected(self, row: ManifestRow) -> None:
        """A line failed before anything is rendered: it is wrong, or names something that is not there."""

    def on_planned(self, total: int, done_before: int, refused: int) -> None:
        """Called once, before anything is rendered; `total` lines include those done before and those refused."""

    def on_finished(self, row: ManifestRow) -> None:
        """A shot was rendered, or failed on the way."""

    def on_status(self, snapshot: Snapshot) -> None:
        """Called about every second while shots are rendered, by another thread than the rest."""
