"""Where an output folder lies: what is done with its files, whether they are on a disk or in an object store.

Paths are relative to the output folder, with `/` between their parts. Nothing that is half written is ever seen under its
own name. What may be written in parts is made in a local folder first and published from there.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from vidgen_ray.errors import SetupError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class StoredFile(NamedTuple):
    """A file as a listing shows it."""

    bytes: int
    modified: float
    """Seconds since 1970, by the storage's own clock."""


class Storage(ABC):
    """The few things that an output folder needs. All of them raise OSError where the storage fails."""

    url: str
    """The place as a person may see it: without credentials."""
    local: Path | None
    """The folder, where it is one of this machine."""

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """A file's content, or none where there is no such file."""

    @abstractmethod
    def write(self, path: str, content: str | bytes) -> None:
        """Write a file whole or not at all."""

    @abstractmethod
    def new_file(self, path: str) -> AbstractContextManager[Path]:
        """A local file to write; at the end of the block it is `path`, whole. Nothing is left where the block raises."""

    @abstractmethod
    def local_copy(self, path: str) -> AbstractContextManager[Path]:
        """A local file with the content of `path`, which is not to be changed. Raises FileNotFoundError."""

    @abstractmethod
    def files(self, folder: str) -> dict[str, StoredFile]:
        """The files that lie directly in a folder; none where there is no such folder."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """The names of the folders that lie directly in a folder."""

    @abstractmethod
    def has(self, folder: str, sizes: Mapping[str, int]) -> bool:
        """Whether the folder has files of these names, each of exactly so many bytes."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Delete a file, if it is there."""

    @abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Delete a folder with all that is in it, if it is there."""

    @abstractmethod
    def workspace(self, beside: str) -> AbstractContextManager[Path]:
        """A local folder to make things in that will lie in the folder `beside`. It is gone at the end of the block."""

    @abstractmethod
    def publish(self, work: Path, folder: str, names: Sequence[str]) -> None:
        """Give finished files of a workspace their place, one after another, each of them whole."""

    @abstractmethod
    def publish_folder(self, work: Path, folder: str) -> None:
        """Give all that is in a workspace its place at once. Where the folder is there already, that one stays."""

    @abstractmethod
    def has_folder(self, folder: str) -> bool:
        """Whether a folder was published."""

    @abstractmethod
    def local_folder(self, folder: str) -> AbstractContextManager[Path | None]:
        """A local folder with the files of one that was published, not to be changed; or none where there is none."""

    @abstractmethod
    def abandoned(self, folders: Sequence[str]) -> Iterator[Path]:
        """What killed processes left half made directly in these folders, on this machine's disks."""

    @abstractmethod
    def place(self, path: str) -> Path | str:
        """Where a person finds a file: a path, or a URL without credentials."""


def absolute(root: str | Path) -> str | Path:
    """A URL as it is, a local path made absolute. Raises SetupError for a Path that was a URL."""
    if isinstance(root, str) and URL.match(root):
        return Path(root.removeprefix("file://")) if root.startswith("file://") else root
    if re.match(r"(s3|gs|gcs|abfs|file):/", str(root)):
        raise SetupError(f"output folder {root}: a Path loses a slash of a URL; give it as text")
    return Path(root).absolute()


def storage_at(root: str | Path) -> Storage:
    """The storage of an output folder."""
    from vidgen_ray.outputs.local_storage import LocalStorage
    from vidgen_ray.outputs.object_storage import ObjectStorage

    place = absolute(root)
    return LocalStorage(place) if isinstance(place, Path) else ObjectStorage(place)
