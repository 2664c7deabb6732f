"""Licences of the weights behind a shot. Works from the references of a profile, so it needs no weights on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from typing import Any, Literal

from pydantic import Field

from vidgen_ray.errors import LicenceError, StrictModel
from vidgen_ray.graph import STAGE_BY_NAME, stages_of
from vidgen_ray.profile import Profile
from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages.base import Stage
from vidgen_ray.weights.ledger import WeightLicence, licence_of

CommercialUse = Literal["yes", "conditional", "no", "unknown"]
Requirement = Literal["commercial", "unconditional"]
ALLOWED: dict[Requirement, tuple[CommercialUse, ...]] = {"commercial": ("yes", "conditional"), "unconditional": ("yes",)}
"""Requirement -> commercial use of the weights that meet it."""
WORST_FIRST: tuple[CommercialUse, ...] = ("no", "unknown", "conditional", "yes")


class UsedWeights(StrictModel):
    """Weights that a shot was made with, and their licence. A summary for people, not the licence itself."""

    weights: str = Field(description="Reference of the weights in the profile, or file name of a LoRA.")
    licence: str | None = Field(description="SPDX identifier, or the licence's own name. Null if it is unknown.")
    commercial_use: CommercialUse = Field(description="Whether the weights may be used commercially.")
    condition: str | None = Field(default=None, description="Condition of commercial use.")
    url: str | None = Field(default=None, description="Text of the licence.")

    @staticmethod
    def of(reference: str, licence: WeightLicence | None) -> UsedWeights:
        copied = {"licence", "commercial_use", "condition", "url"}
        known = {"licence": None, "commercial_use": "unknown"} if licence is None else licence.model_dump(include=copied)
        return UsedWeights(weights=reference, **known)


_Loaded = tuple[tuple[type[Stage[Any]], tuple[str, ...], tuple[LoraRef, ...]], ...]
"""Stages of a shot, each with the names of its extra weights and its LoRAs."""


def _loaded(shot: Shot, stages: Iterable[type[Stage[Any]]] | None = None) -> _Loaded:
    passed = stages_of(shot) if stages is None else stages
    return tuple([(stage, tuple(stage.used_extra_weights(shot)), stage.active_loras(shot)) for stage in passed])


class ShotLicences:
    """Finds the weights behind the shots of a profile."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._of = cache(self._licence)
        self._used = lru_cache(lambda loaded: tuple(map(self._of, self._references(loaded))))

    def __call__(self, shot: Shot, stages: Iterable[type[Stage[Any]]] | None = None) -> tuple[UsedWeights, ...]:
        """Return the weights that the shot passes, in order, each once. Stages without an actor have none.

        `stages`: those of the shot, if they are known.
        """
        return self._used(_loaded(shot, stages))

    def references(self, shot: Shot) -> tuple[str, ...]:
        """Return the references of the weights that the shot passes, in order, each once."""
        return self._references(_loaded(shot))

    def of_stage(self, stage: type[Stage[Any]]) -> tuple[UsedWeights, ...]:
        """Return the weights that every shot of the stage passes."""
        return tuple(map(self._of, self._own_references(stage)))

    def _references(self, loaded: _Loaded) -> tuple[str, ...]:
        found: list[str] = []
        for stage, extra_names, loras in loaded:
            actor = self._profile.actors.get(stage.actor)
            extra = {} if actor is None else actor.extra_weights
            found += (*self._own_references(stage), *(extra[name] for name in extra_names if name in extra))
            found += [lora.path for lora in loras]
        return tuple(dict.fromkeys(found))

    def _own_references(self, stage: type[Stage[Any]]) -> Iterator[str]:
        if (actor := self._profile.actors.get(stage.actor)) is not None:
            if stage.has_weights:
                yield actor.weights
            yield from stage.packaged_weights(actor.options)

    def _licence(self, reference: str) -> UsedWeights:
        is_file = not reference.startswith(("hub:", "builtin:", "package:", "remote:"))
        # A path may reveal how a machine is set up.
        name = reference.rpartition("/")[2] if is_file else reference
        return UsedWeights.of(name, licence_of(reference, self._profile.licences))


def worst_use(uses: Iterable[str]) -> CommercialUse:
    """Return whether everything may be used commercially: the worst of the weights. `yes` without weights."""
    found = set(uses)
    return next((use for use in WORST_FIRST if use in found), "yes")


def require_licence(required: Requirement | None, used: Iterable[UsedWeights]) -> None:
    """Raise LicenceError that names the weights which do not meet the requirement. `None` requires nothing."""
    if required is None:
        return
    wrong = [each for each in used if each.commercial_use not in ALLOWED[required]]
    if wrong:
        raise LicenceError(required, [f"{each.weights} ({_why_not(each)})" for each in wrong])


def _why_not(used: UsedWeights) -> str:
    if used.licence is None:
        return "unknown licence; add it to `licences` of the profile"
    return f"{used.licence}: {used.condition or 'no commercial use'}"


def stages_breaking(required: Requirement | None, profile: Profile) -> dict[str, str]:
    """Return stage -> reason for each stage of the profile whose own weights do not meet the requirement."""
    licences, reasons = ShotLicences(profile), dict[str, str]()
    for stage in STAGE_BY_NAME.values():
        if stage.actor not in profile.actors:
            continue
        try:
            require_licence(required, licences.of_stage(stage))
        except LicenceError as error:
            reasons[stage.name] = str(error)
    return reasons
