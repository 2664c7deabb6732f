"""Parts of a careful script around rendering: reading lines, a lock, and which finished clips still fit their line."""

from __future__ import annotations

import fcntl
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Line = dict[str, Any]
IN_USE = 4
"""Exit code of a command whose output folder another one uses."""


def parsed(text: str) -> Line:
    """Return a line of a script: `id`, `prompt`, `image` (path or ""), `error`, and `digest` of what its clip depends on."""
    try:
        line = json.loads(text)
        name, prompt, image = line["id"], line["prompt"], line.get("image") or ""
    except (ValueError, KeyError) as error:
        return {"id": "", "prompt": text, "image": "", "error": f"not a line of a script: {error}", "digest": ""}
    line = {"id": name, "prompt": prompt, "image": image, "error": ""}
    return {**line, "digest": hashlib.sha256(prompt.encode() + b"\0" + content_of(line)).hexdigest()}


def content_of(line: Line) -> bytes:
    """Return what the clip of a line shows: its start image, or its prompt."""
    return Path(line["image"]).read_bytes() if line["image"] else str(line["prompt"]).encode()


def is_finished(line: Line, out: Path, digests: dict[str, str]) -> bool:
    """Return whether the clip of a line exists and was made from this line, by the digests of finished rows."""
    return not line["error"] and digests.get(line["id"]) == line["digest"] and (out / f"{line['id']}.mp4").exists()


def digests_of(rows: Iterable[Line]) -> dict[str, str]:
    """Return id -> digest of the lines that are done, from rows in their order."""
    return {row["id"]: row["digest"] for row in rows if row["status"] == "done"}


@contextmanager
def locked(out: Path) -> Iterator[bool]:
    """Hold the lock of an output folder during the block. Yields False if another command holds it."""
    out.mkdir(exist_ok=True)
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write(f"{out} is in use by another command\n")
            yield False
            return
        yield True


def run_as_command(main: Callable[[], int], script: Path, out: Path) -> int:
    """Call `main` under the lock. If there are files in `next`, move them over the inputs and call it again."""
    with locked(out) as is_ours:
        if not is_ours:
            return IN_USE
        code = main()
        if changed := sorted((script.parent / "next").glob("*")):
            for file in changed:
                file.replace(script.parent / "inputs" / file.name)
            code = main()
        return code
