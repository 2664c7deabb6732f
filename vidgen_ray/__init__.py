"""Batch and online video generation on Ray, with one recognisable person across every clip."""

from typing import TYPE_CHECKING, Any

from vidgen_ray.version import __version__

if TYPE_CHECKING:
    from vidgen_ray.pipeline import GeneratedVideo, VideoGenerationPipeline
    from vidgen_ray.shot import Shot

__all__ = ["GeneratedVideo", "Shot", "VideoGenerationPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported lazily: `vidgen validate` needs no torch.
    if name == "Shot":
        from vidgen_ray.shot import Shot

        return Shot
    if name == "GeneratedVideo":
        from vidgen_ray.pipeline import GeneratedVideo

        return GeneratedVideo
    if name == "VideoGenerationPipeline":
        from vidgen_ray.pipeline import VideoGenerationPipeline

        return VideoGenerationPipeline
    raise AttributeError(f"module 'vidgen_ray' has no attribute {name!r}")
