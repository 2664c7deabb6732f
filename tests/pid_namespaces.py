"""Run code in another PID namespace of this machine, as in another container."""

import functools
import subprocess
import sys

import pytest

UNSHARE = ("unshare", "--map-root-user", "--pid", "--fork")


@functools.cache
def _why_not() -> str | None:
    try:
        probe = subprocess.run([*UNSHARE, "--mount-proc", "true"], capture_output=True, text=True)
    except FileNotFoundError as error:
        return str(error)
    return probe.stderr if probe.returncode else None


def run_in_pid_namespace(code: str, *arguments: str, mount_proc: bool = True) -> str:
    """Run Python code in a new PID namespace and return its output. Skips the test if this machine does not allow that."""
    if reason := _why_not():
        pytest.skip(f"cannot create a PID namespace: {reason}")
    command = [*UNSHARE, *(["--mount-proc"] if mount_proc else []), sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
