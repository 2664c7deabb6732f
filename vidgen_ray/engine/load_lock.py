"""Lock that lets one process of a machine load weights at a time: weights pass through host memory on their way to the GPU."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def load_lock(folder: Path | None = None) -> Iterator[None]:
    """Hold the lock of this user on this machine while the block runs. Waits for other processes.

    `folder`: folder of the lock file, on a local disk. Default: that for temporary files. The kernel releases the lock of a
    process that crashes. Raises OSError if the file cannot be opened.
    """
    path = (folder or Path(tempfile.gettempdir())) / f"vidgen-load-{os.getuid()}.lock"
    # In a shared folder, another user could have placed a link under this name.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
