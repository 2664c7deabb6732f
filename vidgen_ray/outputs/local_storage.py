"""Storage of an output folder on a local or shared disk. Files are renamed to their final name when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from vidgen_ray.outputs.storage import Storage, StoredFile
from vidgen_ray.system import files


class LocalStorage(Storage):
    """Storage in a local folder at an absolute path. Temporary files are next to their target, so that renames are atomic."""

    local: Path

    def __init__(self, root: Path) -> None:
        self.local = root
        self.url = str(root)
        self._root = str(root)

    # `read` and `has` are called for every shot of a script. Strings instead of Path objects make them three times as fast.

    def read(self, path: str) -> bytes | None:
        try:
            with open(f"{self._root}/{path}", "rb") as file:
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def has(self, folder: str, sizes: Mapping[str, int]) -> bool:
        try:
            return all(os.stat(f"{self._root}/{folder}/{name}").st_size == size for name, size in sizes.items())
        except (FileNotFoundError, NotADirectoryError):
            return False

    def write(self, path: str, content: str | bytes) -> None:
        files.write_atomically(self.local / path, content)

    def touch(self, path: str) -> None:
        os.utime(self.local / path)

    def conditional_object(self, path: str) -> None:
        return None

    @contextmanager
    def new_file(self, path: str) -> Iterator[Path]:
        with files.new_file(self.local / path) as tmp:
            yield tmp

    @contextmanager
    def local_copy(self, path: str) -> Iterator[Path]:
        if not (self.local / path).is_file():
            raise FileNotFoundError(path)
        yield self.local / path

    def files(self, folder: str) -> dict[str, StoredFile]:
        files = {}
        for entry in self._entries(folder):
            if entry.is_file(follow_symlinks=False):
                stat = entry.stat(follow_symlinks=False)
                files[entry.name] = StoredFile(stat.st_size, stat.st_mtime)
        return files

    def folders(self, folder: str) -> list[str]:
        return [entry.name for entry in self._entries(folder) if entry.is_dir(follow_symlinks=False)]

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.local / folder) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def delete(self, path: str) -> None:
        (self.local / path).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        shutil.rmtree(self.local / folder, ignore_errors=True)

    @contextmanager
    def workspace(self, parent: str) -> Iterator[Path]:
        workspace = files.temporary_folder(self.local / parent)
        try:
            yield workspace
        finally:
            shutil.rmtree(workspace, ignore_errors=True)

    def publish(self, workspace: Path, folder: str, names: Sequence[str]) -> None:
        target = self.local / folder
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            files.flush_to_disk(workspace / name)
            os.replace(workspace / name, target / name)

    def publish_folder(self, workspace: Path, folder: str) -> None:
        target = self.local / folder
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            workspace.rename(target)
        except OSError:
            if not target.is_dir():
                raise

    def has_folder(self, folder: str) -> bool:
        return (self.local / folder).is_dir()

    @contextmanager
    def local_folder(self, folder: str) -> Iterator[Path | None]:
        yield self.local / folder if self.has_folder(folder) else None

    def abandoned(self, folders: Sequence[str]) -> Iterator[Path]:
        for folder in folders:
            yield from files.abandoned(self.local / folder)

    def place(self, path: str) -> Path:
        return self.local / path
