"""The version of this package, where everything else can read it."""

__version__ = "0.1.0"
