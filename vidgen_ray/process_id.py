"""Identity of a process across machines, containers and restarts, for files that name the process that owns them.

Host name and PID are not enough: containers can share a host name, and two PID namespaces use the same PIDs.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

UNKNOWN = "unknown"
PATTERN = re.compile(rf"([0-9a-f]{{16}}|{UNKNOWN})-(\d{{1,7}})-(\d{{1,19}})")


class ProcessId(NamedTuple):
    """Identity of a process. `str()` of it is part of file names; `parse` reads it."""

    namespace: str
    """Hash of the machine's boot id and the PID namespace, or "unknown"."""
    pid: int
    started: int
    """Start time in clock ticks since the boot. Distinguishes processes that get the same PID one after another."""

    def __str__(self) -> str:
        return f"{self.namespace}-{self.pid}-{self.started}"

    @classmethod
    def parse(cls, text: str) -> ProcessId | None:
        """Return the process id in `text`, or `None` if it contains something else."""
        match = PATTERN.fullmatch(text)
        return cls(match[1], int(match[2]), int(match[3])) if match else None

    def is_running(self) -> bool | None:
        """Return whether the process is running. `None` if it is in another PID namespace or of another boot."""
        if self.namespace == UNKNOWN or self.namespace != this_process().namespace:
            return None
        try:
            # Not the existence of /proc/PID: some machines hide the processes of other users there.
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it exists and belongs to another user
        try:
            state, started = _state_and_start(str(self.pid))
        except OSError:
            return True
        return state not in "ZX" and started == self.started


def this_process() -> ProcessId:
    """Return the identity of this process. The namespace is unknown without a Linux /proc of the own PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        # A /proc of another PID namespace shows other processes under the same PIDs.
        if os.readlink("/proc/self") == str(os.getpid()):
            hashed = hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:16]
            return ProcessId(hashed, os.getpid(), _state_and_start("self")[1])
    except OSError:
        pass
    return ProcessId(UNKNOWN, os.getpid(), 0)


def _state_and_start(pid: str) -> tuple[str, int]:
    """Return the state letter of a process and its start time in clock ticks since the boot. Raises OSError."""
    # The second field is the program's name in parentheses, which may contain spaces and parentheses.
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])
