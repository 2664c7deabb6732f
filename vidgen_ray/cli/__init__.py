"""Command line interface. No other package imports it."""

from vidgen_ray.cli.app import main

__all__ = ["main"]
