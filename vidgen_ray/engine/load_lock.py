"""Lock that limits how many processes of a machine load weights at once, since weights pass through its memory to the GPU."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def load_lock(processes: int = 1, folder: Path | None = None) -> Iterator[None]:
    """Hold one of the `processes` locks of this user on this machine while the block runs. Waits for other processes.

    `folder`: folder of the lock files, on a local disk. Default: that for temporary files. The kernel releases the lock of a
    process that crashes. Raises OSError if a file cannot be opened.
    """
    descriptors = [_open((folder or Path(tempfile.gettempdir())) / _name(number)) for number in range(processes)]
    try:
        if not any(map(_lock_if_free, descriptors)):
            # The first lock was taken first, so its owner is likely to be done first.
            fcntl.flock(descriptors[0], fcntl.LOCK_EX)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _name(number: int) -> str:
    return f"vidgen-load-{os.getuid()}{f'-{number}' if number else ''}.lock"


def _open(path: Path) -> int:
    # In a shared folder, another user could have placed a link under this name.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _lock_if_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
