"""The corpus of hostile input: every case, and the table of it in docs/bad-input.md."""

from collections.abc import Iterator

from tests.hostile.case import Case
from tests.hostile.images import IMAGES
from tests.hostile.requests import ELSEWHERE, REQUESTS
from tests.hostile.scripts import LINES, PROFILES, SCRIPTS
from tests.hostile.videos import VIDEOS
from tests.hostile.weights import WEIGHTS

CORPUS: list[Case] = [*LINES, *SCRIPTS, *PROFILES, *IMAGES, *VIDEOS, *WEIGHTS, *REQUESTS]
DOORS = {
    "line": "script line",
    "script": "script file",
    "profile": "profile",
    "image": "photo, start image, upload",
    "video": "video",
    "lora": "LoRA",
    "upscaler": "upscaler weights",
    "request": "HTTP request",
}


def outcome(case: Case) -> str:
    """Return what happens to the input, as a cell of the table."""
    if case.outcome == "used":
        return "used"
    place = f" ({case.field})" if case.field else ""
    said = f": {case.message}" if case.message else ""
    return f"{f'status {case.status}' if case.status else 'refused'}{place}{said}"


def corpus_rows() -> Iterator[str]:
    """Yield the rows of the table."""
    yield "| door | input | outcome |"
    yield "| --- | --- | --- |"
    for case in CORPUS:
        cells = (DOORS[case.door], case.name, outcome(case))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|').replace('<', '&lt;') for cell in cells)} |"
    for name, test in ELSEWHERE.items():
        yield f"| | {name} | `{test}` |"
