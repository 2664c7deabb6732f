"""Cache folder of this machine, and file digests that are cached in it."""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from vidgen_ray.atomic_files import write_atomically

HUB_BLOB = re.compile(r"[0-9a-f]{64}")


def cache_dir() -> Path:
    """Return `$VIDGEN_CACHE`. Default: `vidgen-ray` in the user's cache folder."""
    if configured := os.environ.get("VIDGEN_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vidgen-ray"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's content, without the cache."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(path: Path) -> str:
    """Return the sha256 of a file, or of a folder's relative paths and file contents.

    Digests of files are cached by path, size and modification time.
    """
    if path.is_file():
        return _file_digest(path)
    total = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        total.update(f"{file.relative_to(path).as_posix()}\0{_file_digest(file)}\n".encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    path = path.resolve()
    if path.parent.name == "blobs" and HUB_BLOB.fullmatch(path.name):
        # The Hugging Face cache names large files by their sha256.
        return path.name
    stat = path.stat()
    cache_key = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()
    memo = cache_dir() / "digests" / cache_key[:2] / cache_key
    if memo.exists():
        return memo.read_text()
    sha256 = sha256_of(path)
    # The cache is optional.
    with suppress(OSError):
        write_atomically(memo, sha256)
    return sha256
