"""Prompt embeddings on disk, so that text encoders run once per prompt and need not stay in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen_ray.system.files import PREFIX, write_atomically

if TYPE_CHECKING:
    import torch

SUFFIX = ".safetensors"


class PromptCache:
    """Tensors in safetensors files, named by the sha256 of what they depend on. Processes may share the folder.

    If the files exceed `max_bytes`, the least recently used ones are deleted.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def get(self, key: Sequence[Any]) -> tuple[torch.Tensor, ...] | None:
        """Return the tensors of a key, in host memory. `None` if there are none. `key` is any JSON value."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self._file(key)
        try:
            tensors = load_file(file)
            os.utime(file)
        # Another process may delete the file at any time. A damaged one is replaced.
        except (OSError, SafetensorError):
            return None
        return tuple(tensors[str(index)] for index in range(len(tensors)))

    def put(self, key: Sequence[Any], tensors: Sequence[torch.Tensor]) -> None:
        """Store the tensors of a key. The cache is optional, so errors of the disk are ignored."""
        from safetensors.torch import save

        content = save({str(index): tensor.cpu().contiguous() for index, tensor in enumerate(tensors)})
        with suppress(OSError):
            write_atomically(self._file(key), content)
            self._delete_oldest()

    def _file(self, key: Sequence[Any]) -> Path:
        return self._folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}{SUFFIX}"

    def _delete_oldest(self) -> None:
        files = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(SUFFIX) and not entry.name.startswith(PREFIX):
                    with suppress(FileNotFoundError):
                        stat = entry.stat()
                        files.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= size
