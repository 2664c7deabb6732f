"""What this machine remembers between runs: where built weights lie, and the digests of files it has read before."""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from vidgen_ray.atomic_files import write_atomically

HUB_BLOB = re.compile(r"[0-9a-f]{64}")


def cache_dir() -> Path:
    """`$VIDGEN_CACHE`, else `vidgen-ray` in the user's cache folder."""
    if chosen := os.environ.get("VIDGEN_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vidgen-ray"


def sha256_of(path: Path) -> str:
    """Of a file's content, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(path: Path) -> str:
    """sha256 of a file, or of a folder's relative paths and files. Remembered by path, size and time of change."""
    if path.is_file():
        return _file_digest(path)
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{file.relative_to(path).as_posix()}\0{_file_digest(file)}\n".encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    path = path.resolve()
    if path.parent.name == "blobs" and HUB_BLOB.fullmatch(path.name):
        # The hub's own cache names large files by their sha256.
        return path.name
    stat = path.stat()
    known_as = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    memo = cache_dir() / "digests" / known_as[:2] / known_as
    if memo.exists():
        return memo.read_text()
    found = sha256_of(path)
    # A cache that cannot be written is slow, not wrong.
    with suppress(OSError):
        write_atomically(memo, found)
    return found
