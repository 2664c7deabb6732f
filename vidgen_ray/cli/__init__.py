"""Command line interface. No other package imports it, except those with commands of their own."""

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. Errors that a user can fix are printed without a traceback."""
    # Commands of other packages import parts of this one, and not all commands.
    from vidgen_ray.cli.app import main as run

    return run(argv)
