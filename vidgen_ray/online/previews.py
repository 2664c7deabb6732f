"""Small images made on request: previews of unfinished jobs, thumbnails and sprite sheets of finished ones."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from threading import BoundedSemaphore, Condition
from typing import NamedTuple

import numpy as np
from cachetools import LRUCache, cached
from PIL import Image as PILImage

from vidgen_ray.errors import MediaError, VidgenError
from vidgen_ray.graph import STAGE_BY_NAME, stages_of
from vidgen_ray.media.decode import open_video
from vidgen_ray.media.images import cover_crop, read_image
from vidgen_ray.online.job_service import plan_job
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.jobs import Job
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.stage_cache import StageCache
from vidgen_ray.stages.base import Image

_MAX_SIDE_PX = 512
_QUALITY = 85
_MAX_FRAMES = 24
"""Frames of an animated preview, evenly spaced over the clip."""
_TILE_PX = 160
"""Width of a frame in a sprite sheet."""
MAX_TILES = 25
"""Frames in a sprite sheet, evenly spaced over the clip."""
CACHED_BYTES = 16 << 20
_encoding = BoundedSemaphore(2)
"""Limits the previews that are made at once: each has a frame of full size, up to 40 MB, and a decoder in memory."""
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


@cached(
    LRUCache(CACHED_BYTES, getsizeof=lambda webp: len(webp or b"")),
    key=lambda cache, key, duration_s: key,
    condition=Condition(),
)
def _encode_entry(cache: StageCache, key: str, duration_s: float) -> bytes | None:
    """Encode the clip or image of a cache entry. Returns `None` if it is damaged or was deleted."""
    with _encoding, cache.local_entry(key) as entry:
        if entry is None:
            return None
        try:
            if (clip := entry / "frames.mkv").exists():
                frames = _sampled_frames(clip, _MAX_FRAMES, _thumbnail)
                return _encode_webp(frames, round(1000 * duration_s / len(frames)))
            return encode_thumbnail(read_image(entry / "image.png"))
        except MediaError:
            return None


@cached(
    LRUCache(CACHED_BYTES, getsizeof=len), key=lambda outputs, path, variant, digest: (variant, digest), condition=Condition()
)
def encode_preview(outputs: OutputFolder, path: str, variant: str, digest: str) -> bytes:
    """Encode a thumbnail of an image, or a sprite sheet of a clip or an image. Raises FileNotFoundError."""
    with _encoding, outputs.storage.local_copy(path) as file:
        if variant != "spritesheet":
            return encode_thumbnail(read_image(file))
        return _spritesheet(_sampled_frames(file, MAX_TILES, _tile) if path.endswith(".mp4") else [_tile(read_image(file))])


def encode_thumbnail(image: Image) -> bytes:
    """Encode an image (H, W, 3) as a WebP of at most `_MAX_SIDE_PX`."""
    return _encode_webp([_thumbnail(image)], 0)


def _sampled_frames(clip: Path, most: int, shrunk: Callable[[Image], PILImage.Image]) -> list[PILImage.Image]:
    """Return at most this many frames, evenly spaced over a clip. Each one is shrunk before the next one is decoded."""
    with open_video(clip) as video:
        count = min(most, video.frame_count)
        indices = [round(i * (video.frame_count - 1) / max(1, count - 1)) for i in range(count)]
        return [shrunk(video.frames_at([index])[0]) for index in indices]


def _thumbnail(image: Image) -> PILImage.Image:
    thumbnail = PILImage.fromarray(image)
    thumbnail.thumbnail((_MAX_SIDE_PX, _MAX_SIDE_PX), PILImage.Resampling.LANCZOS)
    return thumbnail


def _tile(image: Image) -> PILImage.Image:
    height, width = image.shape[:2]
    tile = cover_crop(np.ascontiguousarray(image), _TILE_PX, max(1, round(_TILE_PX * height / width)))
    return PILImage.fromarray(tile)


def _encode_webp(images: Sequence[PILImage.Image], frame_ms: int) -> bytes:
    """Encode images as one WebP, animated if there are several."""
    first, *others = images
    animation = {"save_all": True, "append_images": others, "duration": frame_ms, "loop": 0} if others else {}
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", quality=_QUALITY, **animation)
    return buffer.getvalue()


def _spritesheet(tiles: Sequence[PILImage.Image]) -> bytes:
    """Encode a JPEG with images of one size in a grid of about as many columns as rows."""
    width, height = tiles[0].size
    columns = ceil(len(tiles) ** 0.5)
    sheet = PILImage.new("RGB", (columns * width, ceil(len(tiles) / columns) * height))
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width, number // columns * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()
