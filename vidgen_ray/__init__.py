"""Batch and online video generation on Ray, with one recognisable person across every clip."""

import os
from typing import TYPE_CHECKING

from vidgen_ray.system.lazy_names import lazy_names
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

# Imported lazily: `vidgen validate` needs no torch.
__getattr__ = lazy_names(
    __name__,
    {
        "GeneratedVideo": "pipeline",
        "Shot": "shot",
        "VideoGenerationPipeline": "pipeline",
        "build_processor": "data",
        "read_manifest": "outputs.manifest",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
