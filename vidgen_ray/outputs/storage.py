"""Storage back end of an output folder: the file operations, and their implementation on a disk.

Paths are relative to the output folder, with `/` as separator. Partly written files are never visible under their final
name: files that are written in pieces are created in a local workspace and published from there. See object_storage for the
back end in an object store.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vidgen_ray.errors import SetupError
from vidgen_ray.system import files

REQUESTS_AT_ONCE = 32
"""Concurrent requests to an object store. Each takes tens of milliseconds."""
FILES_AT_ONCE = 1_000
"""Small files that are read together."""
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
GONE = "it is not mounted, was deleted or replaced, or the run does not hold its lease any more"
"""Error of an output folder in which nothing is created."""
MIN_FREE_BYTES, MIN_FREE_SHARE = 10**9, 0.05
"""A disk is almost full when less than both of these is free."""
FULL_DISK = {"errno": (errno.ENOSPC, errno.EDQUOT), "sqlite_errorcode": (sqlite3.SQLITE_FULL,), "sqlstate": ("53100",)}
"""Attribute of an error -> its values if a disk or a quota is full: of the system, of SQLite and of PostgreSQL."""


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

    def read_each(self, paths: Iterable[str]) -> Iterator[bytes | None]:
        """Yield the content of each file, or `None`, in order. Sends concurrent requests to an object store."""
        from more_itertools import batched

        with ThreadPoolExecutor(REQUESTS_AT_ONCE if self.local is None else 1) as pool:
            for batch in batched(paths, FILES_AT_ONCE):
                yield from pool.map(self.read, batch)

    @abstractmethod
    def write(self, path: str, content: str | bytes) -> None:
        """Write a file atomically."""

    @abstractmethod
    def create(self, path: str, content: bytes) -> object:
        """Create a file. Return `None` if it exists."""

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
    def publish(self, workspace: Path, paths: Mapping[str, str]) -> None:
        """Move finished files from a workspace to their paths, in any order. Each appears atomically. `paths`: by name."""

    def replace_folder(self, workspace: Path, folder: str, last: str, elsewhere: Mapping[str, str]) -> None:
        """Make the files of a workspace the only ones in a folder, except those with a path `elsewhere`.

        While the file `last` is in the folder, all others are, and those elsewhere are published.
        """
        names = {file.name for file in workspace.iterdir()} - elsewhere.keys()
        present = self.files(folder)
        if last in present:
            self.delete(f"{folder}/{last}")
        self.publish(workspace, {**elsewhere, **{name: f"{folder}/{name}" for name in names - {last}}})
        for stale in present.keys() - names:
            self.delete(f"{folder}/{stale}")
        self.publish(workspace, {last: f"{folder}/{last}"})

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


def no_results(storage: Storage) -> SetupError:
    """Return the error of a command about a folder that is empty or does not exist, which is probably the wrong one."""
    return SetupError(f"{storage.url}: has no results; pass the output folder of `vidgen render`")


def absolute(root: str | Path) -> str | Path:
    """Return a URL unchanged, and a local path as an absolute path. Raises SetupError for a URL in a Path."""
    if isinstance(root, str) and URL.match(root):
        return Path(root.removeprefix("file://")) if root.startswith("file://") else root
    if re.match(r"(s3|gs|az|abfs|file):/", str(root)):
        raise SetupError(f"output folder {root}: a Path cannot hold a URL; pass it as a string")
    return Path(root).absolute()


def storage_at(root: str | Path, lease_file: str | None = None) -> Storage:
    """Return the storage of an output folder, by its path or URL. `lease_file`: see `LocalStorage`."""
    location = absolute(root)
    if isinstance(location, Path):
        return LocalStorage(location, lease_file)
    from vidgen_ray.outputs.object_storage import ObjectStorage

    return ObjectStorage(location)


class LocalStorage(Storage):
    """Storage in a local folder at an absolute path. Temporary files are next to their target, so that renames are atomic."""

    local: Path

    def __init__(self, root: Path, lease_file: str | None = None) -> None:
        """`lease_file`: lease of the run that writes. In a folder without it, such as the mount point of a file system that is
        gone, no file is created.
        """
        self.local = root
        self.url = str(root)
        self._root = str(root)
        self._lease_file = lease_file

    def _made(self, folder: str) -> Path:
        """Create a folder in the output folder, and return it. Raises OSError if the output folder is gone.

        Only a writer without a lease creates the output folder itself.
        """
        if self._lease_file is not None and not os.path.exists(f"{self._root}/{self._lease_file}"):
            raise FileNotFoundError(errno.ENOENT, GONE, self._root)
        if (made := self.local / folder).is_dir():
            return made
        if self._lease_file is None:
            self.local.mkdir(parents=True, exist_ok=True)
        made = self.local
        for name in PurePosixPath(folder).parts:
            made /= name
            made.mkdir(exist_ok=True)
        return made

    def _made_for(self, path: str) -> Path:
        """Create the folder of a file, and return the path of the file."""
        folder, _, name = path.rpartition("/")
        return self._made(folder) / name

    # `read` and `has` are called for every shot of a script. Strings instead of Path objects make them three times as fast.

    def read(self, path: str) -> bytes | None:
        try:
            with open(f"{self._root}/{path}", "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def has(self, folder: str, sizes: Mapping[str, int]) -> bool:
        try:
            return all(os.stat(f"{self._root}/{folder}/{name}").st_size == size for name, size in sizes.items())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def write(self, path: str, content: str | bytes) -> None:
        files.write_atomically(self._made_for(path), content)

    def create(self, path: str, content: bytes) -> bool | None:
        try:
            with open(f"{self._root}/{path}", "xb") as file:
                file.write(content)
        except FileExistsError:
            return None
        return True

    def touch(self, path: str) -> None:
        """Set the modification time of a file to the current time. Raises FileNotFoundError."""
        os.utime(self.local / path)

    @contextmanager
    def new_file(self, path: str) -> Iterator[Path]:
        with files.new_file(self._made_for(path)) as tmp:
            yield tmp

    @contextmanager
    def local_copy(self, path: str) -> Iterator[Path]:
        if not (self.local / path).is_file():
            raise FileNotFoundError(path)
        yield self.local / path

    def files(self, folder: str) -> dict[str, StoredFile]:
        files = {}
        for entry in self._entries(folder):
            # A temporary file of another process may disappear meanwhile.
            with suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    files[entry.name] = StoredFile(stat.st_size, stat.st_mtime)
        return files

    def folders(self, folder: str) -> list[str]:
        return [entry.name for entry in self._entries(folder) if entry.is_dir(follow_symlinks=False)]

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.local / folder) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, path: str) -> None:
        (self.local / path).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        shutil.rmtree(self.local / folder, ignore_errors=True)

    @contextmanager
    def workspace(self, parent: str) -> Iterator[Path]:
        workspace = files.temporary_folder(self._made(parent))
        try:
            yield workspace
        finally:
            shutil.rmtree(workspace, ignore_errors=True)

    def publish(self, workspace: Path, paths: Mapping[str, str]) -> None:
        for name, path in paths.items():
            target = self._made_for(path)
            files.flush_to_disk(workspace / name)
            os.replace(workspace / name, target)

    def replace_folder(self, workspace: Path, folder: str, last: str, elsewhere: Mapping[str, str]) -> None:
        self.publish(workspace, elsewhere)
        target = self._made_for(folder)
        for file in workspace.iterdir():
            files.flush_to_disk(file)
        try:
            workspace.rename(target)
        except OSError:
            # It has files.
            super().replace_folder(workspace, folder, last, {})

    def publish_folder(self, workspace: Path, folder: str) -> None:
        target = self._made_for(folder)
        try:
            workspace.rename(target)
        except OSError:
            if not target.is_dir():
                raise

    def has_folder(self, folder: str) -> bool:
        return (self.local / folder).is_dir()

    @contextmanager
    def local_folder(self, folder: str) -> Iterator[Path | None]:
        yield self.local / folder if self.has_folder(folder) else None

    def abandoned(self, folders: Sequence[str]) -> Iterator[Path]:
        for folder in folders:
            yield from files.abandoned(self.local / folder)

    def place(self, path: str) -> Path:
        return self.local / path


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether the error, or one that it replaced, says that a disk or a quota is full."""
    while error is not None:
        if any(getattr(error, name, None) in values for name, values in FULL_DISK.items()):
            return True
        error = error.__context__
    return False


def low_space(folder: Path) -> str | None:
    """Return how much of the disk of a folder is free if it is almost full, else `None`. Raises OSError."""
    disk = shutil.disk_usage(folder)
    if disk.free >= min(MIN_FREE_BYTES, MIN_FREE_SHARE * disk.total):
        return None
    return f"{disk.free / 1e9:.3f} of {disk.total / 1e9:.3f} GB are free"
