"""Batch and online video generation on Ray, with one recognisable person across every clip."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vidgen_ray.version import __version__

if TYPE_CHECKING:
    from vidgen_ray.data import build_processor
    from vidgen_ray.outputs.manifest import read_manifest
    from vidgen_ray.pipeline import GeneratedVideo, VideoGenerationPipeline
    from vidgen_ray.shot import Shot

__all__ = ["GeneratedVideo", "Shot", "VideoGenerationPipeline", "__version__", "build_processor", "read_manifest"]

# MKL, with which torch multiplies matrices on a CPU, otherwise sums in an order that depends on the addresses of the operands.
# It reads this once, at its first use in a process.
os.environ.setdefault("MKL_CBWR", "AUTO")
# From 5.25 on, transformers otherwise replaces layers by kernels that it downloads. A run downloads nothing, and its bytes
# depend on the installed versions alone.
os.environ.setdefault("USE_HUB_KERNELS", "NO")

_MODULES = {
    "GeneratedVideo": "pipeline",
    "Shot": "shot",
    "VideoGenerationPipeline": "pipeline",
    "build_processor": "data",
    "read_manifest": "outputs.manifest",
}


def __getattr__(name: str) -> Any:
    # Imported lazily: `vidgen validate` needs no torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"vidgen_ray.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
