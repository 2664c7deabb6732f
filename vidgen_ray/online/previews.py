"""Previews of a job: small images of its intermediate results, and of other images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

from cachetools import LRUCache, cached
from PIL import Image as PILImage

from vidgen_ray.errors import MediaError, VidgenError
from vidgen_ray.graph import STAGE_BY_NAME, stages_of
from vidgen_ray.media import open_video, read_image
from vidgen_ray.online.job_service import plan_job
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job
from vidgen_ray.outputs.stage_cache import StageCache
from vidgen_ray.stages.base import Image

MAX_SIDE_PX = 512
QUALITY = 80
MAX_FRAMES = 24
"""Frames of an animated preview, evenly spaced over the clip."""
CACHED_BYTES = 16 << 20
VISIBLE = ("image", "frames")
"""Artefacts that a preview can show."""


class Preview(NamedTuple):
    """Preview of a job. `key` is the content key of the result that it shows."""

    key: str
    webp: bytes


def newest_preview(server: ServerContext, job: Job) -> Preview | None:
    """Return a WebP of the newest result of a job's finished stages: an image, or the clip before upscaling, animated.

    Returns `None` before the first one.
    """
    try:
        plan = plan_job(job, server.serving_profile, server.settings)
    except VidgenError:  # for example a deleted photo; the job itself reports it
        return None
    duration_s = job.shot.clip_frames / job.shot.fps
    for step in reversed(plan.steps):
        if _is_visible(step.stage) and server.outputs.stage_cache.has(step.key):
            webp = _encode_entry(server.outputs.stage_cache, step.key, duration_s)
            if webp is not None:
                return Preview(step.key, webp)
    return None


def previewed_stage(job: Job) -> str | None:
    """Return the newest finished stage of a running job whose result a preview shows, or `None`."""
    names = [stage.name for stage in stages_of(job.shot)]
    finished = names[: names.index(job.stage)] if job.stage in names else names if job.stage else []
    return next((name for name in reversed(finished) if _is_visible(name)), None)


def encode_thumbnail(image: Image) -> bytes:
    """Encode an image (H, W, 3) as a WebP of at most `MAX_SIDE_PX`."""
    return _encode([image], 0)


def _is_visible(stage: str) -> bool:
    return any(artefact in VISIBLE for artefact in STAGE_BY_NAME[stage].writes)


@cached(LRUCache(CACHED_BYTES, getsizeof=lambda webp: len(webp or b"")), key=lambda cache, key, duration_s: key, lock=Lock())
def _encode_entry(cache: StageCache, key: str, duration_s: float) -> bytes | None:
    """Encode the clip or image of a cache entry. Returns `None` if it is damaged or was deleted."""
    with cache.local_entry(key) as entry:
        if entry is None:
            return None
        try:
            if (clip := entry / "frames.mkv").exists():
                with open_video(clip) as video:
                    count = min(MAX_FRAMES, video.frame_count)
                    frames = video.frames_at([round(i * (video.frame_count - 1) / max(1, count - 1)) for i in range(count)])
                return _encode(list(frames), round(1000 * duration_s / count))
            return _encode([read_image(entry / "image.png")], 0)
        except MediaError:
            return None


def _encode(images: Sequence[Image], frame_ms: int) -> bytes:
    """Encode images (H, W, 3) as one WebP, animated if there are several."""
    first, *others = [PILImage.fromarray(image) for image in images]
    for image in (first, *others):
        image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), PILImage.Resampling.LANCZOS)
    buffer = io.BytesIO()
    animation = {"save_all": True, "append_images": others, "duration": frame_ms, "loop": 0} if others else {}
    first.save(buffer, "WEBP", quality=QUALITY, **animation)
    return buffer.getvalue()
