"""The command line. Nothing imports it."""

from vidgen_ray.cli.app import main

__all__ = ["main"]
