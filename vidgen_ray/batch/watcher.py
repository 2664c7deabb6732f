"""How a run tells of itself while it runs."""

from typing import Protocol

from vidgen_ray.outputs.manifest import ManifestRow


class Watcher(Protocol):
    """Is told how a run goes."""

    def planned(self, total: int, done_before: int, refused: int) -> None: ...

    def ended(self, row: ManifestRow) -> None: ...
