"""Choose what the models draw for the size that a client asks for. Pure functions, without HTTP.

`size` is the size of the delivered file. Models draw multiples of 64 (clips) or 16 (images) pixels; the file is upscaled and
cropped to exactly what was asked for.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple, TypeAlias, get_args

from vidgen_ray.graph import clip_growth
from vidgen_ray.limits import MAX_SIDE_PX, MIN_SIDE_PX
from vidgen_ray.online.api_error import invalid
from vidgen_ray.online.store.jobs import Job
from vidgen_ray.shot import Shot

CLIP_MULTIPLE_PX, IMAGE_MULTIPLE_PX = 64, 16
AREA_TOLERANCE = 1.1
"""Factor by which a clip may exceed the area of the profile's default size before it is drawn smaller and upscaled."""
SCALES: tuple[int, ...] = get_args(Shot.model_fields["scale"].annotation)
"""Upscaling factors, in ascending order."""

_ShotFields: TypeAlias = dict[str, int | bool]


class SizeRules(NamedTuple):
    """Sizes that a server can draw."""

    default_width: int
    """Width in pixels that the profile draws by default."""
    default_height: int
    can_upscale: bool
    """An upscaler is served."""
    default_clip: tuple[int, int]
    """Width and height in pixels of the finished clip of that size. A server without video models has the drawn size here."""


def clip_fields(width: int, height: int, rules: SizeRules, may_upscale: bool = True) -> _ShotFields:
    """Return the fields of a shot whose finished clip has this width and height in pixels.

    The smallest upscaling factor is chosen with which the models draw about the profile's default area or less. Without
    upscaling, they draw the full size. Raises ApiError 400 for a size that cannot be reached.
    """
    factors = (1, *SCALES) if may_upscale and rules.can_upscale else (1,)
    _check(width, height, MAX_SIDE_PX * factors[-1])
    reachable = [factor for factor in factors if max(width, height) <= MAX_SIDE_PX * factor]
    allowed = AREA_TOLERANCE * rules.default_width * rules.default_height
    drawn = {factor: (_ceil(width / factor), _ceil(height / factor)) for factor in reachable}
    factor = next((factor for factor, (w, h) in drawn.items() if w * h <= allowed), reachable[-1])
    upscaling: _ShotFields = {"upscale_video": False} if factor == 1 else {"upscale_video": True, "scale": factor}
    return {**upscaling, **_cropped(drawn[factor], (width, height), factor)}


def clip_fields_with_hd(width: int, height: int, scale: int) -> _ShotFields:
    """Return the fields of a shot whose original clip has this size in pixels, and whose upscaled clip is `scale` times larger.

    Raises ApiError 400 for a size that the models cannot draw.
    """
    _check(width, height, MAX_SIDE_PX)
    fields = _cropped((_ceil(width), _ceil(height)), (width * scale, height * scale), scale)
    return {"upscale_video": True, "scale": scale, **fields}


def image_size_fields(width: int, height: int) -> _ShotFields:
    """Return the fields of a shot whose image has this width and height in pixels. Raises ApiError 400."""
    _check(width, height, MAX_SIDE_PX)
    drawn = _ceil(width, IMAGE_MULTIPLE_PX), _ceil(height, IMAGE_MULTIPLE_PX)
    return _cropped(drawn, (width, height), 1)


def nearest_image_side(side: float) -> int:
    """Return the width or height in pixels that images can be drawn with and that is closest to `side`."""
    return round(min(MAX_SIDE_PX, max(MIN_SIDE_PX, side)) / IMAGE_MULTIPLE_PX) * IMAGE_MULTIPLE_PX


def delivered_artefact(shot: Shot, hd_beside: bool) -> str:
    """Return the artefact that a job's main file is written from: `image`, or a clip of `clip_growth`.

    It is the finished one, except if the client asked for a larger clip beside the main file.
    """
    clips = list(clip_growth(shot))
    if not clips:
        return "image"
    return clips[0] if hd_beside else clips[-1]


def delivered_artefact_of(job: Job) -> str:
    """Return the artefact that the main file of a job is written from."""
    return delivered_artefact(job.shot, hd_beside=bool(job.request.get("hd")))


def _ceil(side: float, multiple: int = CLIP_MULTIPLE_PX) -> int:
    return ceil(side / multiple) * multiple


def _cropped(drawn: tuple[int, int], finished: tuple[int, int], factor: int) -> _ShotFields:
    """Return the sizes, with a crop where the drawn size times the factor is not the finished one."""
    fields: _ShotFields = dict(zip(("width", "height"), drawn, strict=True))
    crops = zip(("crop_width", "crop_height"), drawn, finished, strict=True)
    return fields | {name: side for name, whole, side in crops if whole * factor != side}


def _check(width: int, height: int, max_px: int) -> None:
    """Raise ApiError 400, with the nearest allowed size, for sides that are odd, too small or too large."""
    nearest = [min(max_px, max(MIN_SIDE_PX, round(side / 2) * 2)) for side in (width, height)]
    if [width, height] != nearest:
        must = f"width and height must be even numbers from {MIN_SIDE_PX} to {max_px}"
        message = f"got {width}x{height}, {must} (nearest: {'x'.join(map(str, nearest))})"
        raise invalid("size", message, "invalid_size")
