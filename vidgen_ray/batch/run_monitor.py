"""The driver's thread beside the stream of results: it passes on how the run stands, and sees to it that a run ends that is
told to stop."""

from __future__ import annotations

import _thread
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from vidgen_ray.batch.run_progress import ProgressListener
from vidgen_ray.batch.run_state import RunStateHandle

LOOK_S = 1.0


@contextmanager
def monitor_run(board: RunStateHandle, watcher: ProgressListener, stop: threading.Event, grace_s: float) -> Iterator[None]:
    """Tell the watcher about every second how the run stands, while the block runs.

    When `stop` is set the run takes no more lines. After `grace_s` seconds more the block is interrupted.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(board, watcher, stop, grace_s, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(
    board: RunStateHandle, watcher: ProgressListener, stop: threading.Event, grace_s: float, ended: threading.Event
) -> None:
    deadline: float | None = None
    while not ended.wait(LOOK_S):
        try:
            if stop.is_set() and deadline is None:
                ray.get(board.stop.remote())
                deadline = time.monotonic() + grace_s
            snapshot = ray.get(board.snapshot.remote())
        except ray.exceptions.RayError:
            # The stream of results hears of it, too, and says more.
            return
        if snapshot is not None:
            watcher.on_status(snapshot)
        if deadline is not None and time.monotonic() > deadline and not ended.is_set():
            _thread.interrupt_main()
            return
