"""Small images made on request: previews of unfinished jobs, thumbnails and sprite sheets of finished ones."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
from cachetools import LRUCache, cached
from PIL import Image as PILImage

from vidgen_ray.errors import MediaError, VidgenError
from vidgen_ray.graph import STAGE_BY_NAME, stages_of
from vidgen_ray.media import cover_crop, open_video, read_image
from vidgen_ray.online.job_service import plan_job
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.stage_cache import StageCache
from vidgen_ray.stages.base import Frames, Image

MAX_SIDE_PX = 512
QUALITY = 85
MAX_FRAMES = 24
"""Frames of an animated preview, evenly spaced over the clip."""
TILE_PX = 160
"""Width of a frame in a sprite sheet."""
MAX_TILES = 25
"""Frames in a sprite sheet, evenly spaced over the clip."""
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
                frames = _sampled_frames(clip, MAX_FRAMES)
                return _encode_webp(list(frames), round(1000 * duration_s / len(frames)))
            return encode_thumbnail(read_image(entry / "image.png"))
        except MediaError:
            return None


@cached(LRUCache(CACHED_BYTES, getsizeof=len), key=lambda outputs, path, variant, digest: (variant, digest), lock=Lock())
def encode_preview(outputs: OutputFolder, path: str, variant: str, digest: str) -> bytes:
    """Encode a thumbnail of an image, or a sprite sheet of a clip or an image. Raises FileNotFoundError."""
    with outputs.storage.local_copy(path) as file:
        if variant != "spritesheet":
            return encode_thumbnail(read_image(file))
        return _spritesheet(_sampled_frames(file, MAX_TILES) if path.endswith(".mp4") else read_image(file)[None])


def encode_thumbnail(image: Image) -> bytes:
    """Encode an image (H, W, 3) as a WebP of at most `MAX_SIDE_PX`."""
    return _encode_webp([image], 0)


def _sampled_frames(clip: Path, most: int) -> Frames:
    """Return at most this many frames (T, H, W, 3), evenly spaced over a clip."""
    with open_video(clip) as video:
        count = min(most, video.frame_count)
        return video.frames_at([round(i * (video.frame_count - 1) / max(1, count - 1)) for i in range(count)])


def _encode_webp(images: Sequence[Image], frame_ms: int) -> bytes:
    """Encode images (H, W, 3) as one WebP, animated if there are several."""
    first, *others = [PILImage.fromarray(image) for image in images]
    for image in (first, *others):
        image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), PILImage.Resampling.LANCZOS)
    animation = {"save_all": True, "append_images": others, "duration": frame_ms, "loop": 0} if others else {}
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", quality=QUALITY, **animation)
    return buffer.getvalue()


def _spritesheet(frames: Frames) -> bytes:
    """Encode a JPEG with the frames in a grid of about as many columns as rows."""
    height, width = frames.shape[1:3]
    tile = TILE_PX, max(1, round(TILE_PX * height / width))
    columns = ceil(len(frames) ** 0.5)
    sheet = PILImage.new("RGB", (columns * tile[0], ceil(len(frames) / columns) * tile[1]))
    for number, frame in enumerate(frames):
        position = number % columns * tile[0], number // columns * tile[1]
        sheet.paste(PILImage.fromarray(cover_crop(np.ascontiguousarray(frame), *tile)), position)
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
