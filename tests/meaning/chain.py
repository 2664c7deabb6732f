"""The stages of the profile `demo` in this process, one after another, with what each made; and inputs taken from them.

Knows shots and stages; what their pictures mean it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from training.cast import portrait
from vidgen_ray.content_keys import ShotPlanner, params_of, with_local_loras
from vidgen_ray.engine.step_runner import with_pictures
from vidgen_ray.graph import stages_of
from vidgen_ray.profile import load_profile
from vidgen_ray.script.reader import check_shot
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, Item, Stage
from vidgen_ray.stages.instantid import InstantIDStage


@dataclass
class Chain:
    """What a stage made is kept by its content key, so that checks which share a picture draw it once."""

    folder: Path
    """Gets the portraits of the cast."""
    _stages: dict[str, Stage[Any]] = field(default_factory=dict)
    _made: dict[str, Artefacts] = field(default_factory=dict)

    @cached_property
    def profile(self) -> Any:
        return load_profile("demo")

    def photo(self, name: str, x: float = 0.0) -> str:
        """A portrait of somebody of the cast, as a file; `x` as `portrait` has it."""
        file = self.folder / f"{name}{x:+.2f}.png"
        if not file.exists():
            PILImage.fromarray(portrait(name, x=x)).save(file)
        return str(file)

    def make(self, *, disconnected: Mapping[str, Mapping[str, Any]] | None = None, **fields: Any) -> Artefacts:
        """All that the stages make of a shot up to its clip, not enlarged.

        `disconnected` is stage -> field or artefact -> what the stage sees in its place, as if it dropped the input.
        """
        shot = check_shot(
            {"upscale_video": False, "generate_video": False, **fields}, "checks of meaning", self.profile.defaults
        )
        plan = ShotPlanner(params_of(self.profile, stages_of(shot)), self.profile.encode)(shot)
        item, gone = Item(plan.shot), disconnected or {}
        broken = ""
        for step in plan.steps:
            cut = gone.get(step.stage, {})
            # Whatever comes after a cut is another thing than what has that key.
            broken += repr(sorted(cut.items())) if cut else ""
            key = step.key + broken
            if key not in self._made:
                self._made[key] = self._run(step.stage, item, cut)
            item = Item(item.shot, {**item.artefacts, **self._made[key]})
        return with_pictures(item, ("image",)).artefacts

    def shot(self, **fields: Any) -> Shot:
        told = {"upscale_video": False, "generate_video": False, **fields}
        return check_shot(told, "checks of meaning", self.profile.defaults)

    def _run(self, name: str, item: Item, cut: Mapping[str, Any]) -> Artefacts:
        stage = self.stage(name, item.shot)
        ready = with_pictures(item, stage.takes)
        artefacts = {key: value for key, value in cut.items() if key in stage.takes}
        fields = {key: value for key, value in cut.items() if key not in artefacts}
        shot = with_local_loras(item.shot.model_copy(update=fields))
        (made,) = stage([Item(shot, {**ready.artefacts, **artefacts})])
        return made

    def stage(self, name: str, shot: Shot) -> Stage[Any]:
        if name not in self._stages:
            (stage_class,) = [one for one in stages_of(shot) if one.name == name]
            stage = stage_class(self.profile.params(stage_class))
            stage.load()
            self._stages[name] = stage
        return self._stages[name]

    @cached_property
    def faces(self) -> InstantIDStage:
        """The stage that looks at faces, for pictures that are no shot's photo."""
        stage = InstantIDStage(self.profile.params(InstantIDStage))
        stage.load()
        return stage
