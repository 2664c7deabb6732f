"""Storage back end of an output folder: the file operations, on a disk or in an object store.

Paths are relative to the output folder, with `/` as separator. Partly written files are never visible under their final
name: files that are written in pieces are created in a local workspace and published from there.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vidgen_ray.errors import SetupError

if TYPE_CHECKING:
    from vidgen_ray.outputs.conditional_object import ConditionalObject

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class StoredFile(NamedTuple):
    """Size and time of a file in a listing."""

    bytes: int
    modified: float
    """Time of the last change, in seconds since 1970, by the clock of the storage."""


class Storage(ABC):
    """File operations of an output folder. All of them raise OSError if the storage fails."""

    url: str
    """URL or path without credentials, for messages."""
    local: Path | None
    """Path of the folder. `None` for an object store."""

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """Return the content of a file, or `None` if it does not exist."""

    @abstractmethod
    def write(self, path: str, content: str | bytes) -> None:
        """Write a file atomically."""

    @abstractmethod
    def touch(self, path: str) -> None:
        """Set the modification time of a file to the current time of the storage. Raises FileNotFoundError."""

    @abstractmethod
    def conditional_object(self, path: str) -> ConditionalObject | None:
        """Return an object for conditional requests, or `None` if the storage or the installation cannot send them."""

    @abstractmethod
    def new_file(self, path: str) -> AbstractContextManager[Path]:
        """Yield a local path to write to. The file is published as `path` at the end of the block, unless the block raises."""

    @abstractmethod
    def local_copy(self, path: str) -> AbstractContextManager[Path]:
        """Yield a local, read-only file with the content of `path`. Raises FileNotFoundError."""

    @abstractmethod
    def files(self, folder: str) -> dict[str, StoredFile]:
        """Return the files directly in a folder by name. Empty if the folder does not exist."""

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in a folder."""

    @abstractmethod
    def has(self, folder: str, sizes: Mapping[str, int]) -> bool:
        """Return whether the folder has files of these names and sizes in bytes."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Delete a file if it exists."""

    @abstractmethod
    def delete_folder(self, folder: str) -> None:
        """Delete a folder and its content if it exists."""

    @abstractmethod
    def workspace(self, parent: str) -> AbstractContextManager[Path]:
        """Yield a temporary local folder for files to be published in `parent`. It is deleted at the end of the block."""

    @abstractmethod
    def publish(self, workspace: Path, folder: str, names: Sequence[str]) -> None:
        """Move finished files from a workspace to `folder`, one after another. Each appears atomically."""

    @abstractmethod
    def publish_folder(self, workspace: Path, folder: str) -> None:
        """Publish the content of a workspace as `folder`, atomically. An existing folder is kept."""

    @abstractmethod
    def has_folder(self, folder: str) -> bool:
        """Return whether a folder was published with `publish_folder`."""

    @abstractmethod
    def local_folder(self, folder: str) -> AbstractContextManager[Path | None]:
        """Yield a local, read-only folder with the files of a published folder, or `None` if it does not exist."""

    @abstractmethod
    def abandoned(self, folders: Sequence[str]) -> Iterator[Path]:
        """Yield the temporary files and folders of killed processes that are directly in these folders.

        Call it only while holding the lease of the output folder.
        """

    @abstractmethod
    def place(self, path: str) -> Path | str:
        """Return the location of a file, for messages: a path, or a URL without credentials."""


def absolute(root: str | Path) -> str | Path:
    """Return a URL unchanged, and a local path as an absolute path. Raises SetupError for a URL in a Path."""
    if isinstance(root, str) and URL.match(root):
        return Path(root.removeprefix("file://")) if root.startswith("file://") else root
    if re.match(r"(s3|gs|gcs|abfs|file):/", str(root)):
        raise SetupError(f"output folder {root}: a Path cannot hold a URL; pass it as a string")
    return Path(root).absolute()


def storage_at(root: str | Path) -> Storage:
    """Return the storage of an output folder, by its path or URL."""
    from vidgen_ray.outputs.local_storage import LocalStorage

    location = absolute(root)
    if isinstance(location, Path):
        return LocalStorage(location)
    from vidgen_ray.outputs.object_storage import ObjectStorage

    return ObjectStorage(location)
