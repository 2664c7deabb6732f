"""Command line interface. No other package imports it, except those with commands of their own."""

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from vidgen_ray.version import __version__

__all__ = ["main", "run_process"]

_NEW_OBJECTS = 50_000
"""New objects after which Python looks for garbage. A command imports several times as many, which stay."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Errors that a user can fix are printed without a traceback.

    Default `argv`: that of this process.
    """
    if list(sys.argv[1:] if argv is None else argv) == ["--version"]:
        # What cannot be written is explained by the command below.
        with suppress(OSError):
            sys.stdout.write(f"{__version__}\n")
            sys.stdout.flush()
            return 0
    # Commands of other packages import parts of this one, and not all commands.
    from vidgen_ray.cli.app import run_command

    return run_command(argv)


def run_process() -> int:
    """Run the command of this process, which ends with the returned exit code."""
    # Python has no stream for an input or output that is closed.
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # it stays open
    gc.set_threshold(_NEW_OBJECTS)
    codes: list[int] = []
    # What is registered first is called last. Tools that trace or measure Python may have registered something before.
    if not atexit._ncallbacks():
        atexit.register(_exit, codes)
    codes.append(main())
    return codes[0]


def _exit(codes: Sequence[int]) -> None:
    """End the process if its command has returned. Freeing the objects of all modules takes a second with torch."""
    for code in codes:
        # If the output cannot be written, Python reports that in its own way.
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
