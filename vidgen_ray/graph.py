"""The graph: the stages, and those that a shot passes, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from importlib.metadata import entry_points
from itertools import takewhile
from operator import attrgetter
from typing import Any, NamedTuple

from cachetools import cached

from vidgen_ray.errors import ProfileError
from vidgen_ray.profile import Profile
from vidgen_ray.remote.stages import RemoteImageStage, RemoteVideoStage
from vidgen_ray.remote.video_server import unusable_servers
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import ChunkedStage, Stage, frames_after
from vidgen_ray.stages.flux import FluxLoRAStage, FluxRefineStage, FluxStage
from vidgen_ray.stages.flux2_klein import Flux2KleinStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.identity import INJECTORS
from vidgen_ray.stages.instantid import RECOGNISER, ClipLikenessStage, ImageLikenessStage, InstantIDStage
from vidgen_ray.stages.instantid_sdxl import InstantIDSDXLStage
from vidgen_ray.stages.ltx import LTXStage
from vidgen_ray.stages.qwen_edit import QwenEditStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.rife import RifeStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.weights import NO_WEIGHTS

BUILT_IN: tuple[type[Stage[Any]], ...] = (
    InstantIDStage,
    InstantIDSDXLStage,
    FluxStage,
    Flux2KleinStage,
    RemoteImageStage,
    FluxRefineStage,
    FluxLoRAStage,
    HunyuanDiTStage,
    QwenEditStage,
    ImageLikenessStage,
    SVDStage,
    WanStage,
    LTXStage,
    RemoteVideoStage,
    ClipLikenessStage,
    RifeStage,
    RealESRGANStage,
)
"""The stages of this package, in the order in which a shot passes them. A new stage is one new file and one line here."""
ENTRY_POINTS = "vidgen.stages"
"""Group of entry points by which other packages add stages."""


def _with_other_packages(built_in: Sequence[type[Stage[Any]]]) -> tuple[type[Stage[Any]], ...]:
    """Return the stages with those of other packages, each behind the stage that it `follows`.

    Raises TypeError for a stage whose name is taken, or that follows none of the stages.
    """
    stages = list(built_in)
    for entry in sorted(entry_points(group=ENTRY_POINTS)):
        stage = entry.load()
        names = [each.name for each in stages]
        if stage.name in names:
            raise TypeError(f"{entry.value}: the name {stage.name!r} is taken by another stage")
        if stage.follows not in names:
            raise TypeError(f"{entry.value}: follows is {stage.follows!r}, must be one of {', '.join(names)}")
        stages.insert(names.index(stage.follows) + 1, stage)
    return tuple(stages)


STAGES = _with_other_packages(BUILT_IN)
"""All stages, in the order in which a shot passes them."""


def _check_order(stages: Sequence[type[Stage[Any]]]) -> None:
    """Raises TypeError if chunked stages are not last or no chain, or if one makes its own frames without being first."""
    chunked = [stage for stage in stages if issubclass(stage, ChunkedStage)]
    if tuple(stages[len(stages) - len(chunked) :]) != tuple(chunked):
        raise TypeError("STAGES: chunked stages must come last")
    clips = {"frames"}
    for stage in chunked:
        if len(stage.takes) != 1 or len(stage.writes) != 1 or stage.takes[0] not in clips:
            raise TypeError(f"STAGES: {stage.name} must take one clip of an earlier stage, and write one")
        own_frames = (stage.frame_factor, stage.source_frames) != (ChunkedStage.frame_factor, ChunkedStage.source_frames)
        if own_frames and stage is not chunked[0]:
            raise TypeError(f"STAGES: {stage.name} makes frames of its own, so it must be the first chunked stage")
        clips.add(stage.writes[0])


_check_order(STAGES)

CHUNKED_STAGES = tuple(stage for stage in STAGES if issubclass(stage, ChunkedStage))
STAGE_BY_NAME = {stage.name: stage for stage in STAGES}
BASE_IMAGE_STAGES = tuple(stage.name for stage in STAGES if "image" in stage.writes and "image" not in stage.takes)
"""Names of the stages that generate an image from a prompt."""
CLIP_ONLY_FIELDS = tuple(dict.fromkeys(field for stage in STAGES for field in stage.clip_only_fields))
"""Shot fields that have no meaning for a still image."""
WITHOUT_CLIP: Mapping[str, Any] = {"generate_video": False}
"""Fields of a shot that is an image only."""
WITHOUT_UPSCALING = RealESRGANStage.switch_off
"""Fields of a shot whose clip is not upscaled."""
WITHOUT_CHUNKED_STAGES: Mapping[str, Any] = {
    field: value for stage in CHUNKED_STAGES for field, value in stage.switch_off.items()
}
"""Fields of a shot whose clip stays as it was generated."""


def max_loras(profile: Profile) -> int:
    """Return how many LoRAs a model of the profile keeps loaded, at most. 0 if no model takes LoRAs."""
    return max(
        (
            int(actor.options.get("adapters_kept", stage.Params.model_fields["adapters_kept"].default))
            for stage in STAGES
            if stage.lora_field and (actor := profile.actors.get(stage.actor)) is not None
        ),
        default=0,
    )


@cache
def _choices_of(stages: tuple[type[Stage[Any]], ...]) -> Callable[[Shot], tuple[Any, ...]]:
    """Return what gets from a shot all that decides which of these stages it passes."""
    default = vars(Stage)["applies"].__func__
    own = [stage for stage in stages if getattr(stage.applies, "__func__", None) is not default]
    fields = attrgetter("generate_video", *sorted({stage.chosen_by for stage in stages if stage not in own}))
    return lambda shot: (fields(shot), *[stage.applies(shot) for stage in own])


@cached({}, key=lambda shot: (STAGES, *_choices_of(STAGES)(shot)))
def stages_of(shot: Shot) -> tuple[type[Stage[Any]], ...]:
    """Return the stages that the shot passes, in order."""
    return tuple([stage for stage in STAGES if stage.applies(shot)])


def chunked_stages_of(shot: Shot) -> tuple[type[ChunkedStage[Any]], ...]:
    """Return the chunked stages at the end of the shot's chain, in order."""
    return tuple([stage for stage in CHUNKED_STAGES if stage.applies(shot)])


def clip_growth(shot: Shot) -> dict[str, tuple[int, Fraction]]:
    """Return artefact -> (side factor, frame factor) of each clip of the shot, relative to the frames that it generates."""
    if not shot.generate_video:
        return {}
    scale, factor = 1, Fraction(1)
    growth = {"frames": (scale, factor)}
    for stage in chunked_stages_of(shot):
        scale *= stage.scale_factor(shot)
        factor *= stage.frame_factor(shot)
        growth[stage.writes[0]] = scale, factor
    return growth


def clip_length(shot: Shot) -> tuple[int, int]:
    """Return the number of frames, and the frames per second, of all clip files of a shot."""
    factor = next(factor for _, factor in clip_growth(shot).values())
    return frames_after(shot.clip_frames, factor), int(shot.fps * factor)


def file_sizes(shot: Shot) -> dict[str, tuple[int, int]]:
    """Return artefact -> width and height in pixels of the file that is written from it: the image and each clip.

    The last file is the finished one, which `crop_width` and `crop_height` refer to. The others are cut to the same share,
    rounded to even numbers.
    """
    scales = {"image": 1} | {name: scale for name, (scale, _) in clip_growth(shot).items()}
    finished = max(scales.values())

    def side(full: int, crop: int | None, scale: int) -> int:
        return full * scale if crop is None else min(full * scale, max(2, round(crop * scale / finished / 2) * 2))

    return {
        name: (side(shot.width, shot.crop_width, scale), side(shot.height, shot.crop_height, scale))
        for name, scale in scales.items()
    }


def uncropped_size(shot: Shot) -> tuple[int, int]:
    """Return width and height in pixels of the finished file before it is cropped."""
    finished = max((scale for scale, _ in clip_growth(shot).values()), default=1)
    return shot.width * finished, shot.height * finished


class RelativeCost(NamedTuple):
    """Duration of a stage relative to the reference shot, for its two parts."""

    steps: float
    """The part that grows with the number of steps."""
    fixed: float
    """The part that does not, such as text encoding and decoding."""

    def mixed(self, fixed_share: float) -> float:
        """Return the duration of both parts. `fixed_share`: fraction of the fixed part in the reference shot."""
        return (1 - fixed_share) * self.steps + fixed_share * self.fixed

    def plus(self, other: RelativeCost) -> RelativeCost:
        return RelativeCost(self.steps + other.steps, self.fixed + other.fixed)

    def times(self, factor: float) -> RelativeCost:
        return RelativeCost(self.steps * factor, self.fixed * factor)


def relative_costs(shot: Shot, stages: Iterable[str] | None = None) -> dict[str, RelativeCost]:
    """Return stage name -> duration of the shot relative to the reference shot. `stages`: some of its stages. Default: all."""
    costs = {}
    for stage in stages_of(shot) if stages is None else [STAGE_BY_NAME[name] for name in stages]:
        parts = stage.relative_work(shot) or (stage.relative_cost(shot), stage.relative_fixed_cost(shot))
        costs[stage.name] = RelativeCost(*parts).times(growth_before(stage, shot))
    return costs


def growth_before(stage: type[Stage[Any]], shot: Shot) -> float:
    """Return the factor by which earlier chunked stages multiply the pixels of the clip that a stage processes."""
    growth = 1.0
    if not issubclass(stage, ChunkedStage):
        return growth
    for earlier in takewhile(lambda each: each is not stage, chunked_stages_of(shot)):
        growth *= float(earlier.frame_factor(shot)) * earlier.scale_factor(shot) ** 2
    return growth


def durations(shot: Shot, stages: Iterable[str]) -> dict[str, float]:
    """Return stage name -> duration of the shot relative to the reference shot, with the fixed part that is assumed."""
    return {name: cost.mixed(STAGE_BY_NAME[name].fixed_share()) for name, cost in relative_costs(shot, stages).items()}


def is_chunked(stage_name: str) -> bool:
    """Return whether a stage processes clips in chunks of frames."""
    return issubclass(STAGE_BY_NAME[stage_name], ChunkedStage)


def stages_with_setting(setting: str) -> tuple[str, ...]:
    """Return the names of the stages whose `setting` ("steps" or "guidance") the API sets without naming a stage."""
    return tuple(stage.name for stage in STAGES if setting in stage.common_settings)


def check_profile(profile: Profile) -> None:
    """Raises ProfileError for an unknown actor, missing weights, and extra weights that no stage of the actor uses.

    Raises SetupError if the safety checker cannot be loaded, unless it may fail.
    """
    known = list(dict.fromkeys(stage.actor for stage in STAGES))
    for name, actor in profile.actors.items():
        if name not in known:
            raise ProfileError(f"profile {profile.name}, actors.{name}: must be one of {', '.join(known)}")
        if actor.weights == NO_WEIGHTS and any(stage.has_weights for stage in STAGES if stage.actor == name):
            raise ProfileError(f"profile {profile.name}, actors.{name}: weights: field required")
        allowed = list(dict.fromkeys(extra for stage in STAGES if stage.actor == name for extra in stage.extra_weights))
        for extra in actor.extra_weights:
            if extra not in allowed:
                must = f"must be one of {', '.join(allowed)}" if allowed else "this actor has no extra weights"
                raise ProfileError(f"profile {profile.name}, actors.{name}.extra_weights: got {extra!r}, {must}")
    _check_recognisers(profile)
    if (checker := profile.checker) is not None:
        checker.load()


def server_problems(profile: Profile) -> list[str]:
    """Return what is wrong with each server of the profile that cannot be used now. The others may still render everything."""
    stages = [stage for stage in (RemoteImageStage, RemoteVideoStage) if stage.actor in profile.actors]
    options = [profile.options_of(stage) for stage in stages]
    problems = [text for each in options for text in unusable_servers(each.model, each.servers, each.key_env)]
    return list(dict.fromkeys(problems))


def _check_recognisers(profile: Profile) -> None:
    """Raises ProfileError for an injector whose embedding the face stage does not compute."""
    flux, faces = (profile.actors.get(stage.actor) for stage in (FluxStage, InstantIDStage))
    if flux is None or faces is None:
        return
    for name in [name for name in flux.extra_weights if name in INJECTORS]:
        needed = INJECTORS[name].embedding
        if needed not in (RECOGNISER, *faces.extra_weights):
            raise ProfileError(
                f"profile {profile.name}, actors.{FluxStage.actor}.extra_weights: {name} needs face embeddings by {needed}; "
                f"add `extra_weights: {{{needed}: ...}}` to actors.{InstantIDStage.actor}"
            )
