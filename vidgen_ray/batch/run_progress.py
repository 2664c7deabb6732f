"""Progress of a run: the listener interface."""

from typing import Protocol

from vidgen_ray.engine.status import Snapshot
from vidgen_ray.outputs.manifest import ManifestRow


class ProgressListener(Protocol):
    """Callbacks of a run, one call at a time."""

    def on_rejected(self, row: ManifestRow) -> None:
        """A line failed before rendering: it is wrong or refers to a missing file."""

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None:
        """Called repeatedly while the script is read, with the lines so far.

        `total` includes the lines already done (`skipped`) and the `rejected` ones. `complete`: the script was read to its end.
        """

    def on_finished(self, row: ManifestRow) -> None:
        """A shot was rendered or has failed."""

    def on_status(self, snapshot: Snapshot) -> None:
        """Called about every second during rendering."""

    def on_message(self, message: str) -> None:
        """A message for the user, such as a worker that was quarantined or what the run waits for."""
