"""GPU memory of the actors of a profile, for the largest shots of a demand, on GPU slots or in a single process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import ge
from typing import Any

from pydantic import JsonValue

from vidgen_ray.errors import ProfileError, SetupError, StageError
from vidgen_ray.graph import stages_of
from vidgen_ray.planner.cluster import GB, Node
from vidgen_ray.planner.layout import CONTEXT_GB, Actor, Assignment, needed_gb, with_swapping
from vidgen_ray.profile import Profile
from vidgen_ray.shot import INSTANTID_SDXL, Shot
from vidgen_ray.stages.base import Stage, StageParams
from vidgen_ray.stages.memory_table import StageMemory, file_bytes
from vidgen_ray.video_models import VIDEO_MODELS

STEP_PX = 64
"""Sides of clips are multiples of it."""
_MIN_FRAMES = 8
"""Fewest frames that are suggested for a clip that is too large."""
MAX_SIZES = 50
"""Sizes of shots of one kind that are kept."""


@dataclass
class ShotSizes:
    """Keeps one shot of each kind and size: stages and networks, pixels, frames, scale and reference photos.

    Of a kind with more than `MAX_SIZES`, only shots that no other one exceeds in every respect.
    """

    _kinds: dict[tuple[object, ...], dict[tuple[int, ...], Shot]] = field(default_factory=dict, init=False)

    def add(self, shot: Shot) -> None:
        kind = (stages_of(shot), shot.upscaler, shot.flux_identity, bool(shot.fast_lora))
        photos = len(shot.face_image) if shot.uses_reference_photos else 0
        size = (shot.width * shot.height, shot.num_frames, shot.clip_frames, shot.scale, photos)
        kept = self._kinds.setdefault(kind, {})
        if size in kept:
            return
        kept[size] = shot
        if len(kept) > MAX_SIZES:
            for other in [a for a in kept if any(a != b and all(map(ge, b, a)) for b in kept)]:
                del kept[other]

    @property
    def shots(self) -> tuple[Shot, ...]:
        return tuple(shot for kept in self._kinds.values() for shot in kept.values())


@dataclass(frozen=True, slots=True)
class ActorMemory:
    """Memory of an actor in GB."""

    weights_gb: float
    """GPU memory all the time. 0 for an actor on the CPU."""
    peak_gb: float
    """Further GPU memory during the largest call."""
    host_gb: float
    copied_gb: float = 0.0
    """Part of `weights_gb` of which `host_gb` includes a copy."""
    files_gb: float = 0.0
    """Files from which the weights are read."""
    lowered: tuple[str, ...] = ()
    """Options that some shots need lower than the profile has them, such as `svd: decode_chunk_frames=1`."""
    refused: tuple[str, ...] = ()
    """Why some shots fit in no way. They will fail, and are not part of the sizes."""
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    """Options of the actor with which its weights must be loaded, where they differ from the profile's: lowered ones that
    decide which weights stay on the GPU."""


def actor_memory(profile: Profile, stages: Sequence[type[Stage[Any]]], shots: Iterable[Shot], gpu_gb: float) -> ActorMemory:
    """Return the memory of the actor that runs these stages. `gpu_gb`: memory that each of its calls may take.

    Shots that do not fit with the options of the profile count with the first lower-memory settings with which they do, as
    workers run them. `memory_gb` of the profile replaces the table of the published weights.
    Raises SetupError if none of a stage's shots fits in any way, with the size that would fit, and ProfileError if the memory
    is unknown.
    """
    section = profile.actor_of(stages[0])
    if section.device == "cpu":
        return ActorMemory(0.0, 0.0, section.memory_gb, files_gb=section.memory_gb)
    if section.memory_gb:
        return ActorMemory(section.memory_gb, 0.0, 0.0, files_gb=section.memory_gb)
    weights: dict[str, int] = {}
    host_weights: dict[str, int] = {}
    peak = results = 0
    fitting_stages: set[str] = set()
    lowered: dict[str, None] = {}
    refused: dict[str, str] = {}
    options: dict[str, JsonValue] = {}
    for stage, params, shot in _calls(profile, stages, shots):
        fitting = fitting_params(stage, params, shot, gpu_gb)
        if fitting is None:
            refused[too_large_text(stage, params, shot, gpu_gb)] = stage.name
            continue
        fitting_stages.add(stage.name)
        memory = stage_memory(profile, stage, fitting, shot)
        for parts, held in ((weights, memory.weights), (host_weights, memory.host_weights)):
            for part, size in held.items():
                parts[part] = max(size, parts.get(part, 0))
        peak, results = max(peak, memory.peak), max(results, memory.results)
        if fitting != params:
            lowered[f"{stage.name}: {changed_options(params, fitting)}"] = None
            options |= _options_at_load(stage, params, fitting, shot)
    for message, name in refused.items():
        if name not in fitting_stages:
            raise SetupError(message)
    host = results + sum(host_weights.values())
    copied = sum(size for part, size in host_weights.items() if part in weights)
    files = sum(file_bytes(part, held) for part, held in (host_weights | weights).items())
    return ActorMemory(
        weights_gb=sum(weights.values()) / GB,
        peak_gb=peak / GB,
        host_gb=host / GB,
        copied_gb=copied / GB,
        lowered=tuple(lowered),
        refused=tuple(refused),
        options=options,
        files_gb=files / GB,
    )


def actors_of(
    profile: Profile,
    stages: Sequence[type[Stage[Any]]],
    shots: Sequence[Shot],
    gpu_gb: float,
    seconds: Mapping[str, float] | None = None,
) -> tuple[tuple[Actor, ...], tuple[ActorMemory, ...]]:
    """Return the actors that run the stages, and their memory.

    `seconds`: stage -> mean seconds per shot, for estimates of the duration. Raises what `actor_memory` raises.
    """
    by_name: dict[str, list[type[Stage[Any]]]] = {}
    for stage in stages:
        by_name.setdefault(stage.actor, []).append(stage)
    memories = [actor_memory(profile, members, shots, gpu_gb) for members in by_name.values()]
    actors = [
        Actor(
            name=name,
            stages=tuple(stage.name for stage in members),
            position=position,
            seconds=sum(seconds[stage.name] for stage in members) if seconds else 0.0,
            gpu_gb=memory.weights_gb,
            host_gb=memory.host_gb,
            cpus=profile.actor_of(members[0]).cpus,
            swappable=all(stage.move is not Stage.move for stage in members),
            peak_gb=memory.peak_gb,
            copied_gb=memory.copied_gb,
            files_gb=memory.files_gb,
        )
        for position, ((name, members), memory) in enumerate(zip(by_name.items(), memories, strict=True))
    ]
    return tuple(actors), tuple(memories)


def memory_limits(
    profile: Profile, stages: Sequence[type[Stage[Any]]], shots: Sequence[Shot], gpu_gb: float
) -> tuple[float, ...]:
    """Return the limits of the memory of a call, largest first, that lead to different settings of the stages.

    All shots that fit on a GPU of `gpu_gb` fit into the smallest of them.
    """
    totals: set[float] = set()
    smallest = 0.0
    for stage, params, shot in _calls(profile, stages, shots):
        section = profile.actor_of(stage)
        if section.device == "cpu" or section.memory_gb:
            continue
        steps = [stage_memory(profile, stage, step, shot) for step in stage.lower_memory_steps(params, shot)]
        fitting = {total for memory in steps if (total := memory.total / GB + CONTEXT_GB) <= gpu_gb}
        totals |= fitting
        smallest = max(smallest, min(fitting, default=0.0))
    return gpu_gb, *sorted((total for total in totals if smallest <= total < gpu_gb), reverse=True)


def _calls(
    profile: Profile, stages: Iterable[type[Stage[Any]]], shots: Iterable[Shot]
) -> Iterator[tuple[type[Stage[Any]], StageParams, Shot]]:
    shots = tuple(shots)
    for stage in stages:
        params = profile.options_of(stage)
        for shot in [shot for shot in shots if stage.applies(shot)] or reference_shots(profile)[:1]:
            yield stage, params, shot


def reference_shots(profile: Profile) -> tuple[Shot, ...]:
    """Return shots of the reference size that use all stages, for a demand that was not made from shots."""
    upscaler = profile.defaults.get("upscaler", Shot.model_fields["upscaler"].default)
    common = {"prompt": "reference", "upscaler": upscaler, "lora": "reference.safetensors", "use_hunyuan_style": True}
    by_flux = Shot.model_validate({**common, "face_image": "reference.png"})
    by_sdxl = Shot.model_validate({**common, "face_image": "reference.png", "identity": INSTANTID_SDXL})
    refined = by_sdxl.model_copy(update={"lora": ()})
    return by_flux, by_sdxl, refined


def stage_memory(profile: Profile, stage: type[Stage[Any]], params: StageParams, shot: Shot) -> StageMemory:
    """Return the memory of a stage for a shot. Raises ProfileError if it is unknown."""
    memory = stage.memory(params, shot)
    if memory is None:
        raise ProfileError(
            f"profile {profile.name}, actors.{stage.actor}: device cuda requires memory_gb, since the memory of {stage.name} "
            "is unknown"
        )
    return memory


def fitting_params(stage: type[Stage[Any]], params: StageParams, shot: Shot, gpu_gb: float) -> StageParams | None:
    """Return the first of the stage's lower-memory settings with which the shot fits on a GPU. `None` if it never does."""
    steps: Iterator[StageParams] = stage.lower_memory_steps(params, shot)
    for lower in steps:
        memory = stage.memory(lower, shot)
        if memory is None or memory.total / GB + CONTEXT_GB <= gpu_gb:
            return lower
    return None


class SizeCheck:
    """Finds shots that fit on no GPU of a cluster in any way. `gpu_gb`: memory of the largest GPU."""

    def __init__(self, profile: Profile, gpu_gb: float) -> None:
        self._profile = profile
        self._gpu_gb = gpu_gb
        self._params: dict[type[Stage[Any]], StageParams | None] = {}

    def refused_by(self, shot: Shot) -> tuple[str, str] | None:
        """Return the first stage that the shot does not fit into, and the message with a size that would. `None` if it fits."""
        for stage in stages_of(shot):
            params = self._params_of(stage)
            if params is not None and fitting_params(stage, params, shot, self._gpu_gb) is None:
                return stage.name, too_large_text(stage, params, shot, self._gpu_gb)
        return None

    def _params_of(self, stage: type[Stage[Any]]) -> StageParams | None:
        """Return the parameters of a stage. `None` if it runs on the CPU, or if the profile states its memory for all sizes."""
        if stage not in self._params:
            section = self._profile.actor_of(stage)
            is_computed = section.device == "cuda" and not section.memory_gb
            self._params[stage] = self._profile.options_of(stage) if is_computed else None
        return self._params[stage]


def lowest_memory(stage: type[Stage[Any]], params: StageParams, shot: Shot) -> StageMemory:
    """Return the memory of a shot with the last of the stage's lower-memory settings. The stage must know its memory."""
    *_, lowest = stage.lower_memory_steps(params, shot)
    memory = stage.memory(lowest, shot)
    assert memory is not None
    return memory


def too_large_text(stage: type[Stage[Any]], params: StageParams, shot: Shot, gpu_gb: float) -> str:
    """Return the message for a shot that does not fit on a GPU in any way: what it needs, and what would fit."""
    memory = lowest_memory(stage, params, shot)
    is_clip = "num_frames" in stage.reads
    what = f"{shot.width}x{shot.height}" + (f" with {shot.num_frames} frames" if is_clip else "")
    needed_gb = memory.total / GB + CONTEXT_GB
    needed = f"stage {stage.name}: {what} needs {needed_gb:.3g} GB of GPU memory, the largest GPU has {gpu_gb:.4g}"
    sizes = list(dict.fromkeys(fitting_sizes(stage, params, shot, gpu_gb)))
    if not sizes:
        # Weights that wait in host memory are part of the peak.
        smallest = shot.model_copy(update={"width": STEP_PX, "height": STEP_PX, "num_frames": 1})
        weights_gb = (sum(memory.weights.values()) or lowest_memory(stage, params, smallest).total) / GB
        return f"{needed}; its weights alone need {weights_gb:.3g} GB, see docs/profiles.md for options that need less"
    return f"{needed}; at most {' or '.join(sizes)} fits"


def fitting_sizes(stage: type[Stage[Any]], params: StageParams, shot: Shot, gpu_gb: float) -> Iterator[str]:
    """Yield sizes like that of the shot that fit: with fewer frames, and with smaller sides of the same ratio."""

    def fits(**fields: int) -> bool:
        other = shot.model_copy(update=fields)
        with suppress(StageError):
            stage.check_shot(params, other)
            return fitting_params(stage, params, other, gpu_gb) is not None
        return False

    is_clip = "num_frames" in stage.reads
    if is_clip:
        allowed = (n for n in range(shot.num_frames, _MIN_FRAMES - 1, -1) if VIDEO_MODELS[shot.video_model].allows(n))
        frames = next((n for n in allowed if fits(num_frames=n)), None)
        if frames is not None:
            yield f"{shot.width}x{shot.height} with {frames} frames"
    for width in range(shot.width // STEP_PX * STEP_PX, 0, -STEP_PX):
        height = max(STEP_PX, int(shot.height * width / shot.width) // STEP_PX * STEP_PX)
        if fits(width=width, height=height):
            yield f"{width}x{height}" + (f" with {shot.num_frames} frames" if is_clip else "")
            return


def changed_options(before: StageParams, after: StageParams) -> str:
    """Return what differs in `after`, for example `decode_chunk_frames=2`."""
    return ", ".join(f"{name}={value}" for name, value in _changes(before, after).items())


def _options_at_load(stage: type[Stage[Any]], params: StageParams, fitting: StageParams, shot: Shot) -> dict[str, JsonValue]:
    """Return the lowered options that decide which weights stay on the GPU. Such options change no bytes of results."""

    def weights(with_params: StageParams) -> Mapping[str, int]:
        memory = stage.memory(with_params, shot)
        return memory.weights if memory is not None else {}

    changed = _changes(params, fitting).items()
    return {name: value for name, value in changed if weights(params.model_copy(update={name: value})) != weights(params)}


def _changes(before: StageParams, after: StageParams) -> dict[str, JsonValue]:
    other = after.model_dump(mode="json")
    return {name: other[name] for name, value in before.model_dump(mode="json").items() if other[name] != value}


def swap_groups(
    profile: Profile, stages: Sequence[type[Stage[Any]]], shots: Sequence[Shot], machine: Node
) -> tuple[tuple[str, ...], ...]:
    """Return the groups of stages that take turns on the first GPU. Empty if all fit together, or if there is no GPU.

    Raises SetupError if the stages or one of the shots do not fit.
    """
    if not machine.gpus:
        return ()
    gpu_gb = machine.gpus[0]
    for limit_gb in memory_limits(profile, stages, shots, gpu_gb):
        actors, memories = actors_of(profile, stages, shots, limit_gb)
        if refused := [reason for memory in memories for reason in memory.refused]:
            raise SetupError(refused[0])
        process = with_swapping(actors, gpu_gb)
        if process is not None and not (machine.is_unified and process.swap_groups):
            break
    else:
        needed = needed_gb([actor for actor in actors if actor.on_gpu]) + CONTEXT_GB
        raise SetupError(f"profile {profile.name}: the stages need {needed:.4g} GB of GPU memory, the GPU has {gpu_gb:.4g}")
    host_gb = Assignment((process,), machine.is_unified).host_gb
    if machine.memory_gb is not None and host_gb > machine.memory_gb:
        memory = "memory for GPU and host" if machine.is_unified else "host memory"
        raise SetupError(
            f"profile {profile.name}: needs {host_gb:.4g} GB of {memory}, this machine has {machine.memory_gb:.4g}"
        )
    return tuple(tuple(stage for actor in group for stage in actor.stages) for group in process.swap_groups)
