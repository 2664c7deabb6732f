"""Files and folders that appear whole or not at all, on a local or shared file system."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ABANDONED_AFTER_S = 86_400
"""Age at which what another machine left unfinished counts as abandoned; here it does when its process is gone."""


def temporary_prefix() -> str:
    """How the name of everything begins that this process has not finished."""
    return f".tmp-{os.uname().nodename}-{os.getpid()}-"


def temporary_folder(beside: Path) -> Path:
    """A new hidden folder in `beside`, which is made if it is not there."""
    beside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=beside, prefix=temporary_prefix()))
    folder.chmod(0o755)
    return folder


def temporary_file(beside: Path) -> Path:
    """A new hidden file in `beside`, which is made if it is not there."""
    beside.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=beside, prefix=temporary_prefix())
    os.fchmod(handle, 0o644)
    os.close(handle)
    return Path(name)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, to the disk, and give it its name last."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with new_file(path) as tmp:
        tmp.write_bytes(data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name at the end of the block; it is gone where the block raises."""
    tmp = temporary_file(path.parent)
    try:
        yield tmp
        flush_to_disk(tmp)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a finished file would survive a loss of power."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def abandoned(folder: Path) -> Iterator[Path]:
    """What lies directly in the folder and was left unfinished by a process that is gone."""
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return
    with entries:
        # Names first: a folder of many shots is looked through at every start.
        for name in [entry.name for entry in entries if entry.name.startswith(".tmp-")]:
            if _is_abandoned(folder / name):
                yield folder / name


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    host, _, pid = path.name.removeprefix(".tmp-").rpartition("-")[0].rpartition("-")
    if host == os.uname().nodename and pid.isdigit():
        return not Path(f"/proc/{pid}").exists()
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_AFTER_S
    except FileNotFoundError:
        return False
