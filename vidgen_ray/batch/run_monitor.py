"""Driver thread that reports the status of a run and stops the run on request."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from vidgen_ray.batch.run_progress import ProgressListener
from vidgen_ray.batch.run_state import RunStateHandle

POLL_S = 1.0
"""Seconds between two status reports."""


@contextmanager
def monitor_run(run_state: RunStateHandle, listener: ProgressListener, stop: threading.Event, grace_s: float) -> Iterator[None]:
    """Report the status to the listener about every second while the block runs.

    When `stop` is set, no more shots start. `grace_s` seconds later the block is interrupted.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_monitor, args=(run_state, listener, stop, grace_s, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _monitor(
    run_state: RunStateHandle, listener: ProgressListener, stop: threading.Event, grace_s: float, ended: threading.Event
) -> None:
    deadline: float | None = None
    while not ended.wait(POLL_S):
        try:
            if stop.is_set() and deadline is None:
                ray.get(run_state.stop.remote())
                deadline = time.monotonic() + grace_s
            snapshot = ray.get(run_state.snapshot.remote())
        except ray.exceptions.RayError:
            # The result stream fails as well, with a better message.
            return
        if snapshot is not None:
            listener.on_status(snapshot)
        if deadline is not None and time.monotonic() > deadline and not ended.is_set():
            _thread.interrupt_main()
            return
