"""Storage of an output folder in an object store (S3 and compatible stores, GCS, Azure), through pyarrow's file systems.

An object store only guarantees that single objects appear atomically, so the last object of a group of files marks the
group as complete. Credentials come from the environment or the URL and are never shown.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import pyarrow
import pyarrow.fs

from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.conditional_object import ConditionalObject, conditional_object
from vidgen_ray.outputs.storage import Storage, StoredFile
from vidgen_ray.system import files
from vidgen_ray.system.cache_dir import cache_dir

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
MARKER = ".complete"
"""Last object of a folder written by `publish_folder`. Contains the names of its files."""
BLOCK_BYTES = 8 << 20


class ObjectStorage(Storage):
    """Storage at a URL of `pyarrow.fs.FileSystem.from_uri`: s3://bucket/prefix?endpoint_override=host:port&scheme=http

    The file system is opened at the first use, so that instances can be pickled.
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
    def _file_system_and_prefix(self) -> tuple[pyarrow.fs.FileSystem, str]:
        scheme = self._root.partition("://")[0].lower()
        if scheme not in SCHEMES:
            raise SetupError(f"output folder {self.url}: must be a local path or a URL ({', '.join(SCHEMES)})")
        try:
            fs, base = pyarrow.fs.FileSystem.from_uri(_with_single_puts(self._root))
        # Their messages contain the URL with its credentials.
        except (pyarrow.ArrowInvalid, OSError):
            raise SetupError(
                f"output folder {self.url}: not a valid URL for pyarrow.fs.FileSystem.from_uri, "
                "such as s3://bucket/prefix?region=eu-central-1; pass secrets that contain / or + in the environment"
            ) from None
        return fs, base.rstrip("/")

    @property
    def _fs(self) -> pyarrow.fs.FileSystem:
        return self._file_system_and_prefix[0]

    def _at(self, path: str) -> str:
        return f"{self._file_system_and_prefix[1]}/{path}".rstrip("/")

    def read(self, path: str) -> bytes | None:
        try:
            with self._fs.open_input_file(self._at(path)) as file:
                content: bytes = file.read()
                return content
        except FileNotFoundError:
            return None

    def write(self, path: str, content: str | bytes) -> None:
        self._put(io.BytesIO(content.encode("utf-8") if isinstance(content, str) else content), path)

    def touch(self, path: str) -> None:
        content = self.read(path)
        if content is None:
            raise FileNotFoundError(path)
        self.write(path, content)

    def conditional_object(self, path: str) -> ConditionalObject | None:
        if not isinstance(self._fs, pyarrow.fs.S3FileSystem):
            return None
        return conditional_object(self._root, self._at(path), self._fs.region)

    @contextmanager
    def new_file(self, path: str) -> Iterator[Path]:
        with self.workspace("") as workspace:
            yield workspace / "file"
            self._upload(workspace / "file", path)

    @contextmanager
    def local_copy(self, path: str) -> Iterator[Path]:
        with self.workspace("") as workspace:
            self._download(path, workspace / "file")
            yield workspace / "file"

    def _upload(self, file: Path, path: str) -> None:
        with file.open("rb") as source:
            self._put(source, path)

    def _put(self, source: IO[bytes], path: str) -> None:
        # Upload in another thread: Ctrl-C in the main thread would close the stream and leave a truncated object as complete.
        # Not pyarrow.fs.copy_files: it does not report failed uploads.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(self._write_stream, source, path).result()

    def _write_stream(self, source: IO[bytes], path: str) -> None:
        with self._fs.open_output_stream(self._at(path)) as stream:
            shutil.copyfileobj(source, stream, BLOCK_BYTES)

    def _download(self, path: str, file: Path) -> None:
        with self._fs.open_input_stream(self._at(path)) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)

    def files(self, folder: str) -> dict[str, StoredFile]:
        # Some stores report no time. Such files count as old.
        return {
            info.base_name: StoredFile(info.size, (info.mtime_ns or 0) / 1e9)
            for info in self._listing(folder)
            if info.type == pyarrow.fs.FileType.File
        }

    def folders(self, folder: str) -> list[str]:
        return [info.base_name for info in self._listing(folder) if info.type == pyarrow.fs.FileType.Directory]

    def _listing(self, folder: str) -> list[pyarrow.fs.FileInfo]:
        infos: list[pyarrow.fs.FileInfo] = self._fs.get_file_info(
            pyarrow.fs.FileSelector(self._at(folder), allow_not_found=True)
        )
        return infos

    def has(self, folder: str, sizes: Mapping[str, int]) -> bool:
        files = self.files(folder)
        return all(name in files and files[name].bytes == size for name, size in sizes.items())

    def delete(self, path: str) -> None:
        try:
            self._fs.delete_file(self._at(path))
        except FileNotFoundError:
            return

    def delete_folder(self, folder: str) -> None:
        # Delete the file that marks the folder as complete first.
        for marker in (MARKER, "shot.json"):
            self.delete(f"{folder}/{marker}")
        try:
            self._fs.delete_dir(self._at(folder))
        except FileNotFoundError:
            return

    @contextmanager
    def workspace(self, parent: str) -> Iterator[Path]:
        # Always on the local disk, regardless of `parent`.
        _sweep_workspaces(_workspaces())
        workspace = files.temporary_folder(_workspaces())
        try:
            yield workspace
        finally:
            shutil.rmtree(workspace, ignore_errors=True)

    def publish(self, workspace: Path, folder: str, names: Sequence[str]) -> None:
        for name in names:
            self._upload(workspace / name, f"{folder}/{name}")

    def publish_folder(self, workspace: Path, folder: str) -> None:
        if self.has_folder(folder):
            return
        names = sorted(file.name for file in workspace.iterdir())
        self.publish(workspace, folder, names)
        self.write(f"{folder}/{MARKER}", "\n".join(names))

    def has_folder(self, folder: str) -> bool:
        return self.read(f"{folder}/{MARKER}") is not None

    @contextmanager
    def local_folder(self, folder: str) -> Iterator[Path | None]:
        names = self.read(f"{folder}/{MARKER}")
        if names is None:
            yield None
            return
        with self.workspace("") as workspace:
            for name in names.decode().split("\n"):
                # A lost file is left out, as on a disk. Callers check for the files that they need.
                try:
                    self._download(f"{folder}/{name}", workspace / name)
                except FileNotFoundError:
                    (workspace / name).unlink(missing_ok=True)
            yield workspace

    def abandoned(self, folders: Sequence[str]) -> Iterator[Path]:
        # Object stores have no partly written objects. Only local workspaces can be left over.
        return files.abandoned(_workspaces())

    def place(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{quote(path)}"


def _workspaces() -> Path:
    return cache_dir() / "unfinished"


@cache
def _sweep_workspaces(folder: Path) -> None:
    """Remove abandoned workspaces, once per process: on worker nodes nothing else does. They belong to no output folder."""
    for path in files.abandoned(folder):
        files.remove(path)


def _with_single_puts(url: str) -> str:
    """Return the URL with the option that uploads small objects in one request instead of three (multipart upload)."""
    if not url.startswith("s3://") or "allow_delayed_open" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}allow_delayed_open=true"


def without_credentials(url: str) -> str:
    """Return the scheme, bucket and prefix of a URL."""
    scheme, _, rest = url.partition("://")
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    bucket, slash, prefix = rest.partition("/")
    user, at, host = bucket.rpartition("@")
    if scheme.startswith("abfs") and ":" not in user:
        # abfs://CONTAINER@ACCOUNT: the part before the @ is no credential.
        host = f"{user}{at}{host}"
    if ":" in host:
        # The secret contains a slash. Everything up to the last @ may be part of it.
        return f"{scheme}://{rest.rpartition('@')[2]}"
    return f"{scheme}://{host}{slash}{prefix}"
