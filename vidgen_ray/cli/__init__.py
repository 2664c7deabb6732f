"""Command line interface. No other package imports it, except those with commands of their own."""

import sys
from collections.abc import Sequence

from vidgen_ray.version import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Errors that a user can fix are printed without a traceback."""
    if list(sys.argv[1:] if argv is None else argv) == ["--version"]:
        sys.stdout.write(f"{__version__}\n")
        return 0
    # Commands of other packages import parts of this one, and not all commands.
    from vidgen_ray.cli.app import run_command

    return run_command(argv)
