"""Warnings of a server's process, kept until `vidgen serve` fetches them for its own log."""

from __future__ import annotations

import logging
from collections import Counter

from vidgen_ray.errors import first_line
from vidgen_ray.online import REQUEST_ID

LOGGERS = ("vidgen_ray", "ray.serve", "uvicorn.error")
"""Loggers of the project, of code that also runs on Ray Serve, and of the HTTP server."""
MAX_KEPT = 20
"""Different texts between two fetches. More are counted only, so that requests cannot flood the log."""
MAX_LETTERS = 500


class RecentWarnings(logging.Handler):
    """Keeps each text once, with its number, and the id of the request that was the first cause."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._counts = Counter[str]()
        self._requests: dict[str, str] = {}
        self._others = 0

    def install(self) -> None:
        """Receive the warnings of this process."""
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._keep(record)
        # Who logs must not fail because of it.
        except Exception:
            self.handleError(record)

    def _keep(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip()
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            text += f": {type(error).__name__}: {first_line(error)}"
        text = text[:MAX_LETTERS]
        if text not in self._counts and len(self._counts) >= MAX_KEPT:
            self._others += 1
            return
        self._counts[text] += 1
        if request_id := REQUEST_ID.get():
            self._requests.setdefault(text, request_id)

    def take(self) -> list[str]:
        """Return the warnings since the last call."""
        self.acquire()
        try:
            counts, requests, others = self._counts, self._requests, self._others
            self._counts, self._requests, self._others = Counter(), {}, 0
        finally:
            self.release()
        lines = [_line(text, count, requests.get(text)) for text, count in counts.items()]
        return [*lines, f"{others} more warnings"] if others else lines


def _line(text: str, count: int, request_id: str | None) -> str:
    details = [f"{count} times"] if count > 1 else []
    details += [f"request {request_id}"] if request_id else []
    return f"{text} ({', '.join(details)})" if details else text
