"""Read published weights that only exist as torch pickles (`.pth`, `.bin`, `.pkl`), without running code from them."""

import pickle
from pathlib import Path
from typing import Any


class NotTensors(ValueError):
    """The file is damaged, or holds other objects than tensors."""


def load_torch_file(file: Path) -> Any:
    """Return the content of the file on the CPU: tensors in dicts and lists.

    Raises NotTensors for other objects, and errors of almost any class for damaged files.
    """
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    # torch's own message says how to run the file's code.
    except (pickle.UnpicklingError, EOFError):
        raise NotTensors("is damaged, or holds other objects than tensors, which could run code") from None
