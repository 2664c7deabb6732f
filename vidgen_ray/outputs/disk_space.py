"""Recognise a full disk: by the message of an error, and by the free space of a folder."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

MIN_FREE_BYTES, MIN_FREE_SHARE = 10**9, 0.05
"""A disk is almost full when less than both of these is free."""
FULL_DISK_TEXTS = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "database or disk is full")
"""Texts of the errors of the system and of SQLite. FFmpeg and Pillow use those of the system."""


def is_disk_full(message: str) -> bool:
    """Return whether the message of an error says that a disk or a quota is full."""
    return any(text in message for text in FULL_DISK_TEXTS)


def low_space(folder: Path) -> str | None:
    """Return how much of the disk of a folder is free if it is almost full, else `None`. Raises OSError."""
    disk = shutil.disk_usage(folder)
    if disk.free >= min(MIN_FREE_BYTES, MIN_FREE_SHARE * disk.total):
        return None
    return f"{disk.free / 1e9:.3f} of {disk.total / 1e9:.3f} GB are free"
