"""An output folder in an object store (S3 and what speaks like it, GCS, Azure), through pyarrow's file systems.

An object is seen whole or not at all, and that is all an object store promises; so things of several files are done by
their last one. Credentials come from the environment or the URL and are never shown.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import pyarrow
import pyarrow.fs

from vidgen_ray import atomic_files
from vidgen_ray.cache_dir import cache_dir
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.storage import Storage, StoredFile

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
MARKER = ".complete"
"""The last object of a folder that is published at once: the names of its files."""
BLOCK_BYTES = 8 << 20


class ObjectStorage(Storage):
    """`root` is a URL that `pyarrow.fs.FileSystem.from_uri` takes: s3://bucket/prefix?endpoint_override=host:port&scheme=http

    It is opened when it is first used, so that it may travel between processes.
    """

    local = None

    def __init__(self, root: str) -> None:
        self.url = without_credentials(root)
        self._root = root

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStorage, (self._root,)

    def __repr__(self) -> str:
        return f"ObjectStorage({self.url})"

    @cached_property
    def _opened(self) -> tuple[pyarrow.fs.FileSystem, str]:
        scheme = self._root.partition("://")[0].lower()
        if scheme not in SCHEMES:
            raise SetupError(f"output folder {self.url}: must be a local path or a URL of {', '.join(SCHEMES)}")
        try:
            fs, base = pyarrow.fs.FileSystem.from_uri(_with_single_puts(self._root))
        # The message of either holds the URL with all that is in it.
        except (pyarrow.ArrowInvalid, OSError):
            raise SetupError(
                f"output folder {self.url}: is no URL that pyarrow.fs.FileSystem.from_uri takes, "
                "such as s3://bucket/prefix?region=eu-central-1; a secret with / or + in it belongs in the environment"
            ) from None
        return fs, base.rstrip("/")

    @property
    def _fs(self) -> pyarrow.fs.FileSystem:
        return self._opened[0]

    def _at(self, path: str) -> str:
        return f"{self._opened[1]}/{path}".rstrip("/")

    def read(self, path: str) -> bytes | None:
        try:
            with self._fs.open_input_file(self._at(path)) as file:
                content: bytes = file.read()
                return content
        except FileNotFoundError:
            return None

    def write(self, path: str, content: str | bytes) -> None:
        self._put(io.BytesIO(content.encode("utf-8") if isinstance(content, str) else content), path)

    @contextmanager
    def new_file(self, path: str) -> Iterator[Path]:
        with self.workspace("") as work:
            yield work / "file"
            self._upload(work / "file", path)

    @contextmanager
    def local_copy(self, path: str) -> Iterator[Path]:
        with self.workspace("") as work:
            self._download(path, work / "file")
            yield work / "file"

    def _upload(self, file: Path, path: str) -> None:
        with file.open("rb") as source:
            self._put(source, path)

    def _put(self, source: IO[bytes], path: str) -> None:
        # A stream that Ctrl-C closes leaves what was written so far as a finished object, so it is none of the main thread's.
        # Arrow's own copy_files does not tell when an upload has failed.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._stream_up, source, path).result()

    def _stream_up(self, source: IO[bytes], path: str) -> None:
        with self._fs.open_output_stream(self._at(path)) as stream:
            shutil.copyfileobj(source, stream, BLOCK_BYTES)

    def _download(self, path: str, file: Path) -> None:
        with self._fs.open_input_stream(self._at(path)) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)

    def files(self, folder: str) -> dict[str, StoredFile]:
        # Its time is none where a store does not tell it; then it counts as old.
        return {
            info.base_name: StoredFile(info.size, (info.mtime_ns or 0) / 1e9)
            for info in self._listing(folder)
            if info.type == pyarrow.fs.FileType.File
        }

    def folders(self, folder: str) -> list[str]:
        return [info.base_name for info in self._listing(folder) if info.type == pyarrow.fs.FileType.Directory]

    def _listing(self, folder: str) -> list[pyarrow.fs.FileInfo]:
        found: list[pyarrow.fs.FileInfo] = self._fs.get_file_info(
            pyarrow.fs.FileSelector(self._at(folder), allow_not_found=True)
        )
        return found

    def has(self, folder: str, sizes: Mapping[str, int]) -> bool:
        found = self.files(folder)
        return all(name in found and found[name].bytes == size for name, size in sizes.items())

    def delete(self, path: str) -> None:
        try:
            self._fs.delete_file(self._at(path))
        except FileNotFoundError:
            return

    def delete_folder(self, folder: str) -> None:
        # What makes it count goes first.
        for last in (MARKER, "shot.json"):
            self.delete(f"{folder}/{last}")
        try:
            self._fs.delete_dir(self._at(folder))
        except FileNotFoundError:
            return

    @contextmanager
    def workspace(self, beside: str) -> Iterator[Path]:
        # On this machine's disk, wherever it will be published.
        work = atomic_files.temporary_folder(_workspaces())
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def publish(self, work: Path, folder: str, names: Sequence[str]) -> None:
        for name in names:
            self._upload(work / name, f"{folder}/{name}")

    def publish_folder(self, work: Path, folder: str) -> None:
        if self.has_folder(folder):
            return
        names = sorted(file.name for file in work.iterdir())
        self.publish(work, folder, names)
        self.write(f"{folder}/{MARKER}", "\n".join(names))

    def has_folder(self, folder: str) -> bool:
        return self.read(f"{folder}/{MARKER}") is not None

    @contextmanager
    def local_folder(self, folder: str) -> Iterator[Path | None]:
        names = self.read(f"{folder}/{MARKER}")
        if names is None:
            yield None
            return
        with self.workspace("") as work:
            for name in names.decode().split("\n"):
                # One that is lost is missed by whoever needs it, as on a disk.
                try:
                    self._download(f"{folder}/{name}", work / name)
                except FileNotFoundError:
                    (work / name).unlink(missing_ok=True)
            yield work

    def abandoned(self, folders: Sequence[str]) -> Iterator[Path]:
        # An object store has no half-written objects; what is left is in the workspaces.
        return atomic_files.abandoned(_workspaces())

    def place(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{quote(path)}"


def _workspaces() -> Path:
    return cache_dir() / "unfinished"


def _with_single_puts(url: str) -> str:
    """Small objects in one request instead of the three of a multipart upload."""
    if not url.startswith("s3://") or "allow_delayed_open" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}allow_delayed_open=true"


def without_credentials(url: str) -> str:
    """The URL as scheme, bucket and prefix alone."""
    scheme, _, rest = url.partition("://")
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    bucket, slash, prefix = rest.partition("/")
    user, at, host = bucket.rpartition("@")
    if scheme.startswith("abfs") and ":" not in user:
        # There it is a container at an account.
        host = f"{user}{at}{host}"
    if ":" in host:
        # A secret with a slash in it: all before the last @ may be part of it.
        return f"{scheme}://{rest.rpartition('@')[2]}"
    return f"{scheme}://{host}{slash}{prefix}"
