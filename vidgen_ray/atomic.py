"""Files and folders that appear whole or not at all, on a local or shared file system."""

import os
import shutil
import tempfile
import time
from pathlib import Path

ABANDONED_AFTER_S = 86_400
"""Age at which what another machine left unfinished counts as abandoned; here it does when its process is gone."""


def temporary_prefix() -> str:
    """How the name of everything begins that this process has not finished."""
    return f".tmp-{os.uname().nodename}-{os.getpid()}-"


def is_temporary(path: Path) -> bool:
    return path.name.startswith(".tmp-")


def temporary_folder(beside: Path) -> Path:
    """A new hidden folder in `beside`, which is made if it is not there."""
    beside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=beside, prefix=temporary_prefix()))
    folder.chmod(0o755)
    return folder


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, to the disk, and give it its name last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=temporary_prefix(), delete=False) as tmp:
        tmp.write(data)
        tmp.flush()
        os.fsync(tmp.fileno())
    os.chmod(tmp.name, 0o644)
    os.replace(tmp.name, path)


def flush_to_disk(path: Path) -> None:
    """Wait until a finished file would survive a loss of power."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sweep(folder: Path, pattern: str) -> None:
    """Remove what matches the pattern and was left unfinished by a process that is gone."""
    for path in folder.glob(pattern):
        if is_temporary(path) and _is_abandoned(path):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    host, _, pid = path.name.removeprefix(".tmp-").rpartition("-")[0].rpartition("-")
    if host == os.uname().nodename and pid.isdigit():
        return not Path(f"/proc/{pid}").exists()
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_AFTER_S
    except FileNotFoundError:
        return False
