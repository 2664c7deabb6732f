"""Files that appear whole or not at all, on a local or shared file system."""

import os
import tempfile
from pathlib import Path

TEMPORARY = ".tmp-"
"""How the name of everything begins that is not finished."""


def write_atomically(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=TEMPORARY, delete=False, encoding="utf-8") as tmp:
        tmp.write(content)
        tmp.flush()
        os.fsync(tmp.fileno())
    os.chmod(tmp.name, 0o644)
    os.replace(tmp.name, path)
