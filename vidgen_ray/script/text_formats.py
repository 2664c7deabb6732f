"""Read .jsonl scripts, with a JSON object per line, and .txt scripts, with a prompt per line."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from vidgen_ray.errors import FieldError
from vidgen_ray.invalid_fields import shortened
from vidgen_ray.script.lines import NO_HEADER, Header, Line, Lines, UnreadableLine, text_lines


class _DuplicateField(Exception):
    """A JSON object contains a field twice."""

    def __init__(self, field: str) -> None:
        self.field = field


def read_jsonl(path: Path) -> tuple[Header, Lines]:
    texts = text_lines(path)

    def lines() -> Lines:
        for number, text in enumerate(texts, start=1):
            if text.strip():
                yield number, _json_line(path, number, text.removesuffix("\n"))

    return NO_HEADER, lines()


def _json_line(path: Path, number: int, text: str) -> Line | UnreadableLine:
    try:
        value = json.loads(text, object_pairs_hook=_reject_duplicates)
    except _DuplicateField as duplicate:
        return UnreadableLine(text, FieldError(path.name, number, duplicate.field, "the field twice", "must appear only once"))
    except (ValueError, RecursionError) as error:
        allowed = f"must be a JSON object on one line ({error})"
        return UnreadableLine(text, FieldError(path.name, number, None, shortened(text), allowed))
    if not isinstance(value, dict):
        allowed = "must be a JSON object with at least a prompt"
        return UnreadableLine(text, FieldError(path.name, number, None, shortened(value), allowed))
    return Line(number, value, strict=True)


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _DuplicateField(next(name for name, count in counts.items() if count > 1))
    return out


def read_txt(path: Path) -> tuple[Header, Lines]:
    texts = text_lines(path)

    def lines() -> Lines:
        for number, text in enumerate(texts, start=1):
            if text.strip() and not text.lstrip().startswith("#"):
                yield number, Line(number, {"prompt": text.strip()}, strict=False)

    return NO_HEADER, lines()
