"""Something that is done again and again while a process does other work."""

import threading
from collections.abc import Callable
from contextlib import suppress


class PeriodicTask:
    """Calls `action` each `seconds` in a thread of its own until it is stopped. An OSError is left to the next call."""

    def __init__(self, seconds: float, action: Callable[[], object]) -> None:
        self._seconds = seconds
        self._action = action
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No call is under way or begins after this."""
        self._stopped.set()
        self._thread.join()

    def _tick(self) -> None:
        while not self._stopped.wait(self._seconds):
            with suppress(OSError):
                self._action()
