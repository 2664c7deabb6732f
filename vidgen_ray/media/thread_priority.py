"""Priority of the threads of video encoders."""

import os
from contextlib import suppress
from pathlib import Path

THREADS = Path("/proc/self/task")


def end_real_time_priority() -> None:
    """Give the threads of this process that have a real-time priority the normal one.

    As root, SVT-AV1 gives the calling thread and its own threads the highest real-time priority (SCHED_FIFO 99) when it opens.
    Other threads and programs then do not run, and child processes inherit it. Does nothing without Linux's /proc.
    """
    if not THREADS.is_dir():
        return
    for thread in THREADS.iterdir():
        # A thread may have ended.
        with suppress(ProcessLookupError):
            if os.sched_getscheduler(int(thread.name)) in (os.SCHED_FIFO, os.SCHED_RR):
                os.sched_setscheduler(int(thread.name), os.SCHED_OTHER, os.sched_param(0))
