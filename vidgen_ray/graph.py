"""Which stages a shot passes, in which order, and the content key of each result.

Same key, same bytes on the same kind of machine: a key is the sha256 of the stage and its version, the fields of the shot
that the stage reads, its options, the digests of its weights and the key before it.
"""

from typing import Any

from vidgen_ray.errors import ProfileError
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage
from vidgen_ray.stages.face_models import RECOGNISER
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux_lora import FluxLoRAStage
from vidgen_ray.stages.flux_refine import FluxRefineStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.identity import injector_class
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.instantid_sdxl import InstantIDSDXLStage
from vidgen_ray.stages.likeness import ClipLikenessStage, ImageLikenessStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage

STAGES: tuple[type[Stage[Any]], ...] = (
    InstantIDStage,
    InstantIDSDXLStage,
    FluxStage,
    FluxRefineStage,
    FluxLoRAStage,
    HunyuanDiTStage,
    ImageLikenessStage,
    SVDStage,
    ClipLikenessStage,
    RealESRGANStage,
)
"""In the order in which a shot passes them. A new stage is one new file and one line here."""

STAGE_BY_NAME = {stage.name: stage for stage in STAGES}


def stages_of(shot: Shot) -> tuple[type[Stage[Any]], ...]:
    return tuple(stage for stage in STAGES if stage.applies(shot))


def check_profile(profile: Profile) -> None:
    """Raises ProfileError for an actor that no stage lives on, and for further weights that are of no use."""
    known = list(dict.fromkeys(stage.actor for stage in STAGES))
    for name, actor in profile.actors.items():
        if name not in known:
            raise ProfileError(f"profile {profile.name}, actors.{name}: must be one of {', '.join(known)}")
        allowed = list(
            dict.fromkeys(extra_weights for stage in STAGES if stage.actor == name for extra_weights in stage.extra_weights())
        )
        for extra_weights in actor.extra_weights:
            if extra_weights not in allowed:
                must = f"must be one of {', '.join(allowed)}" if allowed else "this actor has no further weights"
                raise ProfileError(f"profile {profile.name}, actors.{name}.extra_weights: got {extra_weights!r}, {must}")
    _check_recognisers(profile)


def _check_recognisers(profile: Profile) -> None:
    """Raises ProfileError for an injector whose embedding the face stage does not make."""
    flux, faces = (profile.actors.get(stage.actor) for stage in (FluxStage, InstantIDStage))
    if flux is None or faces is None:
        return
    for name in flux.extra_weights:
        needed = injector_class(name).embedding
        if needed not in (RECOGNISER, *faces.extra_weights):
            raise ProfileError(
                f"profile {profile.name}, actors.{FluxStage.actor}.extra_weights: {name} is told a face by {needed}; "
                f"add `extra_weights: {{{needed}: ...}}` to actors.{InstantIDStage.actor}"
            )
