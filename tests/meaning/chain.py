"""Run the stages of the profile `demo` in this process, optionally with inputs disconnected.

Does not interpret the results; see checks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from tests.conftest import SYNTHETIC
from training.cast import CAST, portrait
from vidgen_ray.content_keys import ShotPlanner, params_of, with_local_loras
from vidgen_ray.graph import stages_of
from vidgen_ray.profile import load_profile
from vidgen_ray.render.step_runner import with_images
from vidgen_ray.script.check import check_shot
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, Item, Stage
from vidgen_ray.stages.instantid import RECOGNISER, InstantIDStage


@dataclass
class Chain:
    """Runs shots and caches stage results by content key, so that checks share images."""

    folder: Path
    """Folder for the portraits of the cast."""
    _stages: dict[str, Stage[Any]] = field(default_factory=dict)
    _results: dict[str, Artefacts] = field(default_factory=dict)

    @cached_property
    def profile(self) -> Any:
        return load_profile("demo")

    def photo(self, name: str, x: float = 0.0) -> str:
        """Return the path of a portrait of a cast member. `x`: horizontal position, see `portrait`."""
        file = self.folder / f"{name}{x:+.2f}.png"
        if not file.exists():
            PILImage.fromarray(portrait(name, x=x)).save(file)
        return str(file)

    def make(self, *, disconnected: Mapping[str, Mapping[str, Any]] | None = None, **fields: Any) -> Artefacts:
        """Return all artefacts of a shot, up to its clip before upscaling.

        `disconnected`: stage -> field or artefact -> replacement value, to simulate a stage that ignores this input.
        """
        shot = self.shot(**fields)
        plan = ShotPlanner(params_of(self.profile, stages_of(shot)), self.profile.encode)(shot)
        item = Item(plan.shot)
        key_suffix = ""
        for step in plan.steps:
            cut = (disconnected or {}).get(step.stage, {})
            # The results of this and all later stages differ from those of the content key.
            key_suffix += repr(sorted(cut.items())) if cut else ""
            key = step.key + key_suffix
            if key not in self._results:
                self._results[key] = self._run(step.stage, item, cut)
            item = Item(item.shot, {**item.artefacts, **self._results[key]})
        return with_images(item, ("image",)).artefacts

    def shot(self, **fields: Any) -> Shot:
        """Return a checked shot. By default it has no clip and no upscaling."""
        values = {"upscale_video": False, "generate_video": False, "consent": SYNTHETIC, **fields}
        return check_shot(values, "tests/meaning", self.profile.defaults)

    def _run(self, name: str, item: Item, cut: Mapping[str, Any]) -> Artefacts:
        stage = self.stage(name, item.shot)
        inputs = with_images(item, stage.takes)
        artefacts = {key: value for key, value in cut.items() if key in stage.takes}
        fields = {key: value for key, value in cut.items() if key not in artefacts}
        shot = with_local_loras(item.shot.model_copy(update=fields))
        return stage(Item(shot, {**inputs.artefacts, **artefacts}))

    def stage(self, name: str, shot: Shot) -> Stage[Any]:
        """Return the loaded stage of this name that the shot uses."""
        if name not in self._stages:
            (stage_class,) = [stage for stage in stages_of(shot) if stage.name == name]
            stage = stage_class(self.profile.params(stage_class))
            stage.load()
            self._stages[name] = stage
        return self._stages[name]

    @cached_property
    def faces(self) -> InstantIDStage:
        """InstantID stage, for detecting faces in generated images."""
        stage = InstantIDStage(self.profile.params(InstantIDStage))
        stage.load()
        return stage

    @cached_property
    def cast_embeddings(self) -> dict[str, NDArray[np.float32]]:
        """Embedding of each cast member."""
        return {name: self.faces.features([portrait(name)], recognisers=[RECOGNISER]).embedding(RECOGNISER) for name in CAST}
