"""Cache folder of this machine, and file digests and results that are stored in it."""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter

from vidgen_ray.system.files import write_atomically
from vidgen_ray.system.model_files import loaded_files

HUB_BLOB = re.compile(r"[0-9a-f]{64}")
CLOCK_RESOLUTION_NS = 2_000_000_000
"""Coarsest resolution of file times, that of FAT."""
_T = TypeVar("_T")


def cache_dir() -> Path:
    """Return `$VIDGEN_CACHE`. Default: `vidgen-ray` in the user's cache folder."""
    if configured := os.environ.get("VIDGEN_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vidgen-ray"


class CacheFile(Generic[_T]):
    """JSON file in the cache folder, which processes update one at a time."""

    def __init__(self, name: str, content: TypeAdapter[dict[str, _T]]) -> None:
        self.name = name
        self._content = content

    @property
    def path(self) -> Path:
        return cache_dir() / self.name

    def read(self) -> dict[str, _T]:
        """Return the content. Empty if there is no valid file."""
        try:
            return self._content.validate_json(self.path.read_bytes())
        except (OSError, ValueError):
            return {}

    @contextmanager
    def update(self) -> Iterator[dict[str, _T]]:
        """Yield the content and store it with its changes at the end of the block. Raises OSError if that is not possible."""
        from filelock import FileLock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}.lock"):
            content = self.read()
            yield content
            stored = self._content.dump_python(content, mode="json")
            write_atomically(self.path, json.dumps(stored, indent=1, sort_keys=True) + "\n")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, without the cache."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(path: Path) -> str:
    """Return the sha256 of a file, or of the relative paths and contents of the files in a folder that are loaded.

    See `loaded_files`. Digests of files are cached, see `file_version`.
    """
    if path.is_file():
        return _file_digest(path)
    total = hashlib.sha256()
    for file in loaded_files(path):
        total.update(f"{file.relative_to(path).as_posix()}\0{_file_digest(file)}\n".encode())
    return total.hexdigest()


def file_version(path: Path) -> tuple[int, int, int, int]:
    """Return inode, size in bytes, and times of the last change of content and of status: they differ after any change.

    The content can be replaced without a change of its size and modification time, as `cp --preserve` does.
    """
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _file_digest(path: Path) -> str:
    path = path.resolve()
    if path.parent.name == "blobs" and HUB_BLOB.fullmatch(path.name):
        # The Hugging Face cache names large files by their sha256.
        return path.name
    version = file_version(path)
    cache_key = hashlib.sha256("\0".join(map(str, (path, *version))).encode()).hexdigest()
    memo = cache_dir() / "digests" / cache_key[:2] / cache_key
    # The cache is optional: it may also belong to another user.
    with suppress(OSError):
        return memo.read_text()
    sha256 = sha256_of(path)
    # A later change within the resolution of the file system's clock would have the same times.
    settled = time.time_ns() - version[-1] > CLOCK_RESOLUTION_NS
    if settled and file_version(path) == version:
        with suppress(OSError):
            write_atomically(memo, sha256)
    return sha256
