"""A disk that can be full."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


class SmallDisk:
    """A disk of a few megabytes that can be filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """Take all free space."""
        with self._ballast.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def make_room(self) -> None:
        self._ballast.unlink(missing_ok=True)


@contextmanager
def mounted_disk(
    folder: Path, options: str = "size=16m", source: str | Path = "tmpfs", kind: str | None = "tmpfs"
) -> Iterator[SmallDisk]:
    """Mount a disk of 16 MB, or another one. Skips the test if this process may not mount file systems."""
    folder.mkdir(exist_ok=True)
    kinds = [] if kind is None else ["-t", kind]
    mounted = subprocess.run(["mount", *kinds, "-o", options, source, folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a disk: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        # Lazily: the processes of a failed test may still have files open.
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def ext4_disk(folder: Path) -> Iterator[SmallDisk]:
    """Mount a disk that can be frozen."""
    image = folder.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    with mounted_disk(folder, "loop", image, "ext4") as disk:
        yield disk


@contextmanager
def frozen(folder: Path) -> Iterator[None]:
    """Let every write to a disk hang in the kernel during the block."""
    subprocess.run(["fsfreeze", "--freeze", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", folder], check=True)
