"""Rules of LoRA trainers: which part of a clip each one trains on, at which speed and size. Facts of their code, without files.

Configurations have a bucket for each number of frames, so that no clip is dropped for want of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, repeat
from typing import NamedTuple

FOR = "for:"
"""Start of a value of `num_frames` that names a trainer and a model."""
MAX_SPEED_ERROR = 0.05
"""Share by which motion may be faster or slower in training: that of 25 instead of 24 fps, not of 24 instead of 16."""


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """Clips that a model was made for, as a trainer takes them."""

    fps: int
    frames: int
    """Most frames. Longer clips are cut."""
    frame_step: int
    """Clips have `frame_step * k + 1` frames, k >= 1."""
    side_step_px: int
    """Width and height are multiples of this."""
    pixels: int
    """Most pixels of a frame. Larger clips are scaled down."""


_MODELS: Mapping[str, TrainedModel] = {
    "wan21-14b": TrainedModel(16, 81, 4, 16, 1280 * 720),
    "wan22-14b": TrainedModel(16, 81, 4, 16, 1280 * 720),
    "wan22-5b": TrainedModel(24, 121, 4, 32, 1280 * 704),
    "hunyuan": TrainedModel(24, 129, 4, 16, 1280 * 720),
    "ltx-video": TrainedModel(25, 121, 8, 32, 1216 * 704),
    "ltx2": TrainedModel(24, 121, 8, 32, 1280 * 704),
}


def _frames(number: int) -> str:
    return "1 frame" if number == 1 else f"{number} frames"


class SourceClip(NamedTuple):
    """A clip as it lies on the disk."""

    num_frames: int
    fps: float
    width: int
    height: int

    def __str__(self) -> str:
        return f"{_frames(self.num_frames)} at {self.fps:g} fps, {self.width}x{self.height}"


class Use(NamedTuple):
    """What a trainer does with a clip."""

    seen: int
    """Frames after the trainer has changed the rate."""
    frames: int
    """Frames that are trained on: the first ones of those."""
    width: int
    height: int
    speed: float
    """Speed of motion in training as a factor of that of the clip."""
    problem: str | None

    @property
    def status(self) -> str:
        return "dropped" if self.problem else "cut" if self.frames < self.seen else "used"


# Frames and rate of a clip -> frames that the trainer sees of it, and the speed of motion.


def whole_frames(frames: int, model: TrainedModel) -> int:
    """Return the largest number of frames up to this one that the model takes, 1 if there is none."""
    return max(min(frames, model.frames) - 1, 0) // model.frame_step * model.frame_step + 1


def _repeats_or_skips(frames: int, fps: float, model: TrainedModel) -> tuple[int, float]:
    return int(frames * model.fps / fps), 1.0


def _skips(frames: int, fps: float, model: TrainedModel) -> tuple[int, float]:
    # The trainer adds up the same floats.
    delta = model.fps / fps
    return len({int(position) for position in accumulate(repeat(delta, frames - 1), initial=0.0)}), max(1.0, delta)


def _ignores_rate(frames: int, fps: float, model: TrainedModel) -> tuple[int, float]:
    return frames, model.fps / fps


def _spreads(frames: int, fps: float, model: TrainedModel) -> tuple[int, float]:
    # Of a longer clip, evenly spaced frames are taken, the last one included. The bucket decides how many.
    taken = whole_frames(min(frames, round(frames * model.fps / fps)), model)
    return taken, frames / fps / (taken / model.fps)


def _diffsynth(frames: int, fps: float, model: TrainedModel) -> tuple[int, float]:
    if model.frame_step == 4:
        return _ignores_rate(frames, fps, model)
    # The script for LTX takes frames by their time. FFmpeg's text gives the duration in hundredths of a second.
    return math.floor(int(frames / fps * 100 + 0.5) / 100 * model.fps), 1.0


# Width and height in pixels -> those in training, with the configuration that is written.


def bucket_size(width: int, height: int, model: TrainedModel) -> tuple[int, int]:
    """Return the largest size up to that of the clip that the model takes. Sides are 0 if they are too short."""
    scale = max(1.0, math.sqrt(width * height / model.pixels))
    step = model.side_step_px
    return int(width / scale) // step * step, int(height / scale) // step * step


def _nearest_ratio(width: int, height: int, model: TrainedModel) -> tuple[int, int]:
    """Return the size whose ratio is nearest to the clip's, of those with about the area of the bucket."""
    step, area = model.side_step_px, math.prod(bucket_size(width, height, model))
    side = math.isqrt(area)
    short = range(max(step, side // 2 // step * step), side + step, step)
    pairs = [(one, area // one // step * step) for one in short] if area else []
    sizes = sorted({size for one, other in pairs for size in ((one, other), (other, one)) if other})
    return min(sizes, key=lambda size: abs(size[0] / size[1] - width / height), default=(0, 0))


def _short_side(width: int, height: int, model: TrainedModel) -> tuple[int, int]:
    """Return the size of a configured short side, with a ratio of two decimals and rounded sides."""
    short, ratio, step = min(bucket_size(width, height, model)), round(width / height, 2), model.side_step_px
    other = round(int(short / ratio if width < height else short * ratio) / step) * step
    return (short, other) if width < height else (other, short)


def _by_script(width: int, height: int, model: TrainedModel) -> tuple[int, int]:
    """Return the size in DiffSynth's scripts. That for Wan rounds to 16 pixels, also for models that need 32."""
    width, height = bucket_size(width, height, replace(model, side_step_px=16) if model.frame_step == 4 else model)
    return (0, 0) if width % model.side_step_px or height % model.side_step_px else (width, height)


@dataclass(frozen=True, eq=False)
class Trainer:
    """Rule of a trainer."""

    source: str
    """Repository or package, version, date, and the files that have the rule."""
    frame_rule: Callable[[int, float, TrainedModel], tuple[int, float]]
    rate: str
    """What it does with a frame rate that is not the model's."""
    cache: str
    """What to do before it is started after an update, since names of files do not tell its caches what has changed."""
    models: Mapping[str, TrainedModel]
    size_rule: Callable[[int, int, TrainedModel], tuple[int, int]] = bucket_size
    is_globbing: bool = False
    """It takes the path of its cache as a pattern, in which `[`, `*` and `?` have a meaning."""


def _models(*names: str, **changes: int) -> dict[str, TrainedModel]:
    return {name: replace(_MODELS[name], **changes) for name in names}


TRAINERS: Mapping[str, Trainer] = {
    "diffusion-pipe": Trainer(
        "tdrussell/diffusion-pipe 8f83dbf, 2026-08-20: utils/dataset.py, models/base.py, models/wan/wan.py",
        _repeats_or_skips,
        "repeats or skips frames",
        "start it without --trust_cache",
        _MODELS,
    ),
    "musubi": Trainer(
        "kohya-ss/musubi-tuner 30c658c, 2026-06-24: dataset/image_video_dataset.py, media_utils.py, bucket.py",
        _skips,
        "skips frames, but repeats none",
        "run both of its cache scripts again, without --keep_cache",
        _models("wan21-14b", "wan22-14b", "hunyuan"),
        _nearest_ratio,
        is_globbing=True,
    ),
    "simpletuner": Trainer(
        "simpletuner 4.10.1, 2026-10: metadata/backends/discovery.py, multiaspect/image.py, models/*/model.py",
        _ignores_rate,
        "ignores frame rates",
        "start it without preserve_data_backend_cache, skip_file_discovery and --ignore_missing_files",
        _models("wan21-14b", "wan22-14b", frame_step=8, side_step_px=32)
        | _models("wan22-5b", frame_step=8, side_step_px=64)
        | _models("hunyuan", "ltx-video", "ltx2", side_step_px=64),
        _short_side,
    ),
    "finetrainers": Trainer(
        "finetrainers 0.2.0, 2025-04: data/dataset.py, functional/video.py",
        _spreads,
        "ignores frame rates and takes evenly spaced frames",
        "start it without --precomputation_reuse",
        _models("wan21-14b", "hunyuan", "ltx-video"),
    ),
    "diffsynth": Trainer(
        "diffsynth 2.1.12, 2026-10: core/data/operators.py; examples/wanvideo and examples/ltx2: train.py",
        _diffsynth,
        "ignores frame rates",
        "run sft:data_process again, into an empty folder, if you train in two stages",
        _models("wan21-14b", "wan22-14b", "wan22-5b", "ltx2"),
        _by_script,
    ),
}
TARGETS = tuple(f"{name}:{model}" for name, trainer in TRAINERS.items() for model in trainer.models)


class TrainerTarget(NamedTuple):
    """A trainer and a model that it trains."""

    trainer: Trainer
    model: TrainedModel

    def use(self, clip: SourceClip) -> Use:
        """Return what the trainer does with a clip, if its group has the configuration of the export."""
        model = self.model
        seen, speed = self.trainer.frame_rule(clip.num_frames, clip.fps, model)
        width, height = self.trainer.size_rule(clip.width, clip.height, model)
        frames, least, problem = whole_frames(seen, model), model.frame_step + 1, None
        if frames < least:
            problem = f"too short: {_frames(seen)} at {model.fps} fps, at least {least} are needed"
        elif not width or not height:
            problem = f"{clip.width}x{clip.height} has no size in multiples of {model.side_step_px} pixels"
        elif abs(speed - 1) > MAX_SPEED_ERROR:
            problem = f"would be trained at {speed:.3g} times its speed: the trainer {self.trainer.rate}"
        return Use(seen, frames, width, height, speed, problem)

    def fitted(self, clip: SourceClip) -> SourceClip | None:
        """Return the clip that is used as a whole, at its speed, with the number of frames that is nearest to its duration.

        `None` if more of it is not used than of this clip.
        """
        use, model, step = self.use(clip), self.model, self.model.frame_step
        if not use.problem and use.speed == 1 and use.frames in (use.seen, model.frames):
            return None
        shown = clip.num_frames * model.fps / clip.fps
        wanted = min(max(1, math.ceil((shown - 1) / step - 0.5)) * step + 1, model.frames)
        sizes = (rule(clip.width, clip.height, model) for rule in (self.trainer.size_rule, bucket_size))
        sides = [max(side, model.side_step_px) for side in next(filter(all, sizes), (0, 0))]
        # DiffSynth counts a clip of 121 frames as one of 120.
        clips = [SourceClip(frames, model.fps, *sides) for frames in range(wanted, wanted + step)]
        return next(each for each in clips if self.use(each).frames == wanted)


def parse_target(text: str) -> TrainerTarget:
    """Return the trainer and model of `TRAINER:MODEL`. Raises ValueError, which names those that are known."""
    name, _, model = text.partition(":")
    trainer = TRAINERS.get(name)
    if trainer is None or model not in trainer.models:
        known = [target for target in TARGETS if trainer is None or target.startswith(f"{name}:")]
        raise ValueError(f"must be TRAINER:MODEL, one of {', '.join(known)}")
    return TrainerTarget(trainer, trainer.models[model])


def shown_frames(frames: int, fps: float | Fraction, clip: SourceClip) -> list[int]:
    """Return the frames of a clip that another clip of it shows: at each time, the one that is shown then."""
    return [min(int(number * Fraction(fps) / Fraction(clip.fps)), frames - 1) for number in range(clip.num_frames)]


def fit_cost(clip: SourceClip, fitted: SourceClip) -> str:
    """Return in words what is lost if a clip is encoded again as another one."""
    shown = len(set(shown_frames(clip.num_frames, clip.fps, fitted)))
    return f"encoded again as {fitted}, frames repeated: {fitted.num_frames - shown}, left out: {clip.num_frames - shown}"


def use_text(clip: SourceClip, target: TrainerTarget) -> str:
    """Return in words what happens to a clip."""
    use, fps = target.use(clip), target.model.fps
    if use.problem:
        return f"dropped: {use.problem}"
    changed = [f"the first {use.frames} of {use.seen} frames" if use.status == "cut" else f"all {use.frames} frames"]
    if abs(use.speed - 1) > 1e-9:
        changed.append(f"at {use.speed:.3g} times its speed")
    elif clip.fps != fps:
        changed.append(f"{clip.fps:g} to {fps} fps by {'repeating' if clip.fps < fps else 'leaving out'} frames")
    if (use.width, use.height) != clip[2:]:
        changed.append(f"as {use.width}x{use.height}")
    return f"{use.status}: {', '.join(changed)}"
