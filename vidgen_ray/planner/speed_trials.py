"""Results of trials of speed options, by kind of GPU, and the options that follow from them.

A profile names options to try in `trial_options`. One that raises, changes the result too much or is not faster is left out, so
a fast default never makes a clip fail. Options are settled before content keys are planned, and stay settled during a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from pydantic import JsonValue, TypeAdapter

from vidgen_ray.errors import FrozenModel
from vidgen_ray.profile import Profile
from vidgen_ray.system.cache_dir import CacheFile

MAX_LEVELS = 3.0
"""Mean difference of a result, in levels of 255, up to which an option is used. bfloat16 in place of float32 differs by 1."""
MIN_SPEEDUP = 1.03
"""Plain seconds divided by those with the option, from which an option is used."""
CPU = "cpu"
"""Stands for the kind of GPU of a machine without any, and of actors on the CPU."""
PACKAGES = ("torch", "diffusers", "torchao", "triton")
"""Packages whose versions a result is valid for."""


class Trial(NamedTuple):
    """An option of an actor to try."""

    profile: Profile
    """Profile without the option. Those before it are settled."""
    actor: str
    option: str
    value: JsonValue

    @property
    def key(self) -> str:
        """Text that identifies the trial on one kind of GPU."""
        section = self.profile.actors[self.actor]
        options = {name: value for name, value in section.options.items() if name not in section.trial_options}
        known = [section.weights, section.dtype, section.device, options, list(section.trial_options.items()), _versions()]
        return f"{self.actor} {self.option} {hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]}"

    @property
    def with_option(self) -> Profile:
        return self.profile.with_options({self.actor: {self.option: self.value}})


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class TrialResult(FrozenModel):
    """Result of a trial on one kind of GPU."""

    speedup: float = 0.0
    """Plain seconds divided by those with the option. 0 if it raised."""
    levels: float = 0.0
    """Mean difference of the result in levels of 255."""
    error: str = ""
    """Error that the option raised. Empty if it raised none."""

    @property
    def rejected(self) -> str:
        """Reason why the option is left out. Empty if it is used."""
        if self.error:
            return self.error
        if self.levels > MAX_LEVELS:
            return f"changes the result by {self.levels:.1f} levels of 255, at most {MAX_LEVELS:g} are allowed"
        return "" if self.speedup >= MIN_SPEEDUP else f"is not faster ({self.speedup:.2f} times)"

    def __str__(self) -> str:
        return f"left out: {self.rejected}" if self.rejected else f"used, {self.speedup:.2f} times as fast"


_results = CacheFile("trials.json", TypeAdapter(dict[str, dict[str, TrialResult]]))
"""Kind of GPU -> key of the trial -> result."""


def settled(profile: Profile, cards: Sequence[str]) -> Profile:
    """Return the profile with the options that trials on all these kinds of GPUs have accepted."""
    stored = _results.read()
    for actor, section in profile.actors.items():
        for option, value in section.trial_options.items():
            trial = Trial(profile, actor, option, value)
            results = [stored.get(card, {}).get(trial.key) for card in _cards(profile, actor, cards)]
            if results and all(result is not None and not result.rejected for result in results):
                profile = trial.with_option
    return profile


def open_trials(profile: Profile, actor: str, cards: Sequence[str]) -> Iterator[tuple[Trial, str]]:
    """Yield the trials of an actor without a result, each with a kind of GPU to run it on. `keep` the result of each before the
    next one: options that were accepted are part of the next trials."""
    for option, value in profile.actors[actor].trial_options.items():
        for card in _cards(profile, actor, cards):
            trial = Trial(settled(profile, cards), actor, option, value)
            if trial.key not in _results.read().get(card, {}):
                yield trial, card


def _cards(profile: Profile, actor: str, cards: Sequence[str]) -> Sequence[str]:
    return cards if profile.actors[actor].device == "cuda" else (CPU,)


def keep(trial: Trial, card: str, result: TrialResult) -> None:
    """Store the result of a trial for a kind of GPU. Raises OSError if the file cannot be written."""
    with _results.update() as stored:
        stored.setdefault(card, {})[trial.key] = result


def as_recorded(profile: Profile, recorded: Mapping[str, Any]) -> Profile:
    """Return the profile with the tried options that a run has recorded, so that its shots keep their content keys.

    `recorded`: the profile in `run.json`. Without effect for another profile.
    """
    changed = {}
    for name, actor in profile.actors.items():
        other = recorded.get("actors", {}).get(name, {})
        if recorded.get("name") == profile.name and other.get("trial_options") == actor.trial_options:
            options = {option: value for option, value in actor.options.items() if option not in actor.trial_options}
            options |= {option: value for option, value in other["options"].items() if option in actor.trial_options}
            changed[name] = actor.model_copy(update={"options": options})
    return profile.model_copy(update={"actors": {**profile.actors, **changed}}) if changed else profile
