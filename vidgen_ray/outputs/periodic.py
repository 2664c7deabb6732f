"""Run a function periodically in a background thread."""

import threading
from collections.abc import Callable
from contextlib import suppress


class PeriodicTask:
    """Calls `action` every `interval_s` seconds in a daemon thread until `stop`.

    The first call comes after one interval. An OSError of `action` is ignored: the next call tries again.
    """

    def __init__(self, interval_s: float, action: Callable[[], object]) -> None:
        self._interval_s = interval_s
        self._action = action
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the calls. Waits for a call in progress; no further call starts."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval_s):
            with suppress(OSError):
                self._action()
