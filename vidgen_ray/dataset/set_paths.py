"""Set the paths in the configuration of a trainer, after its data set was moved or copied: python3 set_paths.py

Lies in each data set that `vidgen export --for` has written, and needs only Python.
"""

import json
import shlex
import sys
from glob import has_magic
from pathlib import Path


def set_paths(folder: Path) -> list[str]:
    """Replace the folder of the export by `folder` in the configuration of each split. Return the names of changed files.

    What else was changed in these files stays. Raises ValueError if the trainer cannot use a folder of this name.
    """
    about = folder / "used.json"
    used = json.loads(about.read_text("utf-8"))
    old, new = used["folder"], str(folder)
    if used["for"].startswith("musubi:") and has_magic(new):
        raise ValueError(f"{new}: must have none of [ * ? in its path, which musubi takes as a pattern")
    changed = []
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".toml", ".json", ".args") or file == about:
            continue
        before = file.read_text("utf-8")
        after = _moved_words(before, old, new) if file.suffix == ".args" else _moved_strings(before, old, new)
        if after != before:
            file.write_text(after, "utf-8")
            changed.append(file.name)
    text = about.read_text("utf-8").replace(_in_json(old), _in_json(new), 1)
    about.write_text(text, "utf-8")
    return changed


def _in_json(text: str) -> str:
    """Return a string as JSON and TOML have it, without the last quote."""
    return json.dumps(text, ensure_ascii=False)[:-1]


def _moved_strings(text: str, old: str, new: str) -> str:
    return text.replace(f"{_in_json(old)}/", f"{_in_json(new)}/")


def _moved_words(text: str, old: str, new: str) -> str:
    words = shlex.split(text)
    moved = [new + word[len(old) :] if word == old or word.startswith(f"{old}/") else word for word in words]
    return " ".join(map(shlex.quote, moved)) + "\n"


if __name__ == "__main__":
    try:
        print(f"changed: {', '.join(set_paths(Path(__file__).resolve().parent)) or 'nothing'}")  # noqa: T201
    except (OSError, ValueError) as error:
        sys.exit(str(error))
