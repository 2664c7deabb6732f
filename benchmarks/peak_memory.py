"""Run a module and write the peak memory of its process in MB: `python -m benchmarks.peak_memory FILE MODULE ARGUMENTS`.

The peak that the parent gets from the system (`ru_maxrss`) counts the memory of the parent at the start of the process.
"""

from __future__ import annotations

import atexit
import runpy
import sys
from pathlib import Path


def write_at_exit(file: Path) -> None:
    """Write the peak memory of this process in MB to a file when it ends."""
    atexit.register(lambda: file.write_text(str(_peak_mb())))


def _peak_mb() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    write_at_exit(Path(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
