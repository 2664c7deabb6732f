"""Video models that a shot can choose: their numbers of frames, frame rates and sizes. Independent of weights and stages."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from vidgen_ray.limits import MAX_FRAMES, MIN_FRAMES
from vidgen_ray.trainers import FOR, SourceClip, TrainerTarget, parse_target

_ENTRY_POINTS = "vidgen.video_models"
"""Group of entry points by which other packages add a `VideoModel`, under the name of its stage."""
DEFAULT_MODEL = "svd"
AUTO_FRAMES = "auto"
"""Value of `num_frames` that chooses the model's usual duration."""
AUTO_S = 5.0
"""Seconds of a clip with `num_frames: auto`."""
MODEL_DEFAULTS = ("num_frames", "fps")
"""Fields whose default depends on the video model. Defaults can give a value per model: {svd: 25, wan: 49}."""


@dataclass(frozen=True, slots=True)
class VideoModel:
    """Clips that a video model generates."""

    fps: int
    """Default frames per second. Wan and LTX were trained with it."""
    frame_step: int
    """The model generates `frame_step * k + 1` frames, k >= 1: the temporal compression of its autoencoder."""
    most_auto_frames: int
    """Most frames that `num_frames: auto` chooses: about as many as the model was trained with."""
    size_multiple_px: int
    """Width and height are multiples of this. Some weights need larger multiples, see the stage."""
    reads_prompt: bool = True
    has_loras: bool = True
    min_guidance: float = 0
    """Lowest guidance scale."""

    def allows(self, num_frames: int) -> bool:
        """Return whether the model generates clips of this length."""
        return MIN_FRAMES <= num_frames <= MAX_FRAMES and (num_frames - 1) % self.frame_step == 0

    def nearest_frames(self, num_frames: float) -> int:
        """Return the allowed number of frames that is closest, the lower one of two."""
        steps = math.ceil((num_frames - 1) / self.frame_step - 0.5)
        return min(max(steps, 1), (MAX_FRAMES - 1) // self.frame_step) * self.frame_step + 1

    def auto_frames(self, fps: float) -> int:
        """Return the number of frames with `num_frames: auto`."""
        return self.nearest_frames(min(AUTO_S * fps, self.most_auto_frames))

    def allowed_instead_of(self, num_frames: int) -> str:
        """Return what is allowed instead of a number of frames, with the nearest values."""
        below = self.nearest_frames(num_frames - self.frame_step / 2)
        values = sorted({below, self.nearest_frames(below + self.frame_step)})
        return f"must be {self.frame_step}k + 1 for this video model (nearest: {', '.join(map(str, values))})"


VIDEO_MODELS: Mapping[str, VideoModel] = {
    "svd": VideoModel(
        fps=5, frame_step=1, most_auto_frames=25, size_multiple_px=64, reads_prompt=False, has_loras=False, min_guidance=1
    ),
    "wan": VideoModel(fps=16, frame_step=4, most_auto_frames=121, size_multiple_px=16),
    "ltx": VideoModel(fps=25, frame_step=8, most_auto_frames=161, size_multiple_px=32),
    "remote": VideoModel(fps=24, frame_step=1, most_auto_frames=121, size_multiple_px=16, has_loras=False),
    **{entry.name: entry.load() for entry in entry_points(group=_ENTRY_POINTS)},
}
"""Value of `video_model`, which is the name of a stage -> its clips. Shots have steps and guidance for each."""
if TYPE_CHECKING:
    VideoModelName = str
else:
    VideoModelName = Literal[*VIDEO_MODELS]


def frames_of_passes(num_frames: int, extend: int) -> int:
    """Return the number of frames of a clip of `extend` further passes. A further pass adds all its frames but the first."""
    return num_frames + extend * (num_frames - 1)


def model_of(fields: Mapping[str, Any]) -> VideoModel:
    """Return the video model that unvalidated fields of a shot name; the default one for a wrong name."""
    return VIDEO_MODELS[_name_of(fields)]


def is_per_model(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a default of one of `MODEL_DEFAULTS` gives a value per video model."""
    return isinstance(value, Mapping) and bool(value) and set(value) <= set(VIDEO_MODELS)


def per_model(fields: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """Return the values per video model of one of `MODEL_DEFAULTS`. A single value is that of the model of the fields."""
    value = fields[field]
    return value if is_per_model(value) else {_name_of(fields): value}


def of_model(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return unvalidated fields of a shot. Of values per video model, that of the shot's model is kept, if there is one."""
    name = _name_of(fields)
    chosen = dict(fields)
    for field in MODEL_DEFAULTS:
        if is_per_model(values := chosen.get(field)):
            del chosen[field]
            chosen |= {field: values[name]} if name in values else {}
    return chosen


def _name_of(fields: Mapping[str, Any]) -> str:
    name = fields.get("video_model")
    return name if isinstance(name, str) and name in VIDEO_MODELS else DEFAULT_MODEL


def with_model_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return unvalidated fields of a shot with the defaults of its video model, and with a number for `num_frames: auto`."""
    model, fields = model_of(fields), of_model(fields)
    own_default = model is not VIDEO_MODELS[DEFAULT_MODEL]
    if own_default and fields.get("fps") is None:
        fields["fps"] = model.fps
    frames, fps = fields.get("num_frames"), fields.get("fps", model.fps)
    if isinstance(frames, str) and frames.startswith(FOR):
        try:
            return {**fields, **fields_for(parse_target(frames.removeprefix(FOR)), fields)}
        except ValueError as error:
            raise ValueError(f"num_frames {frames}: {error}") from None
    if (frames == AUTO_FRAMES or (own_default and frames is None)) and isinstance(fps, int | float):
        fields["num_frames"] = model.auto_frames(fps)
    return fields


def fields_for(target: TrainerTarget, fields: Mapping[str, Any]) -> Mapping[str, int]:
    """Return `num_frames`, and perhaps `fps_out`, of the longest clip that a trainer uses as a whole, at its frame rate.

    `fields`: unvalidated fields of a shot, of which `interpolation` and `fps_out` are kept. If each clip loses frames, the one
    that loses the fewest is chosen. Raises ValueError if all are dropped.
    """
    model = model_of(fields)
    # Tables have text. Wrong values are errors of their fields.
    values = [str(fields.get(name)) for name in ("fps", "interpolation", "fps_out", "extend")]
    return _fields_for(target, model, *(int(each) if re.fullmatch("[1-9][0-9]{0,3}", each) else None for each in values))


@lru_cache
def _fields_for(
    target: TrainerTarget, model: VideoModel, fps: int | None, factor: int | None, fps_out: int | None, extend: int | None
) -> Mapping[str, int]:
    fps, side = fps or model.fps, target.model.side_step_px * 8
    given = fps_out or fps * (factor or 1)
    rates = {given} if fps_out or factor not in (None, 1) else {given, max(target.model.fps, fps)}
    found = []
    for rate in rates:
        for frames in filter(model.allows, range(model.most_auto_frames + 1)):
            length = math.ceil(frames_of_passes(frames, extend or 0) * Fraction(rate, fps))
            if not (use := target.use(SourceClip(length, rate, side, side))).problem:
                found.append((rate != target.model.fps, use.seen - use.frames, -use.frames, frames, rate))
    if not found:
        raise ValueError(f"clips at {max(rates)} frames per second are dropped; set fps or fps_out to {target.model.fps}")
    *_, frames, rate = min(found)
    return {"num_frames": frames} if rate == given else {"num_frames": frames, "fps_out": rate}


def without_other_models_defaults(defaults: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults for fields that are set over them. `num_frames` and `fps` of another video model are left out."""
    if "video_model" in fields and model_of(fields) is not model_of(defaults):
        return {name: value for name, value in defaults.items() if name not in MODEL_DEFAULTS or is_per_model(value)}
    return dict(defaults)
