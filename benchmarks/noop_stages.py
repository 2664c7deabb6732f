"""Stages of vidgen without work, on a CPU, to measure the overhead of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.fake_weights import write_fake_weights
from benchmarks.simulated import gradient
from vidgen_ray.profile import ActorProfile, Profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, Frames, Item, Stage
from vidgen_ray.stages.flux import FluxLoRAStage, FluxRefineStage, FluxStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage

SIDE_PX = 64
FRAMES = 2


class NoOp(Stage[Any]):
    """Mixin without work. Must come before the real stage in the bases."""

    @property
    def adapter_loads(self) -> int:
        return 0

    def load(self) -> None:
        """Do nothing: there are no weights."""

    def __call__(self, item: Item) -> Artefacts:
        """Run without torch."""
        return self.run(item)


class NoOpFlux(NoOp, FluxStage):
    def run(self, item: Item) -> Artefacts:
        return {"image": gradient((SIDE_PX, SIDE_PX, 3), 1)}


class NoOpSVD(NoOp, SVDStage):
    def run(self, item: Item) -> Artefacts:
        return {"frames": gradient((FRAMES, SIDE_PX, SIDE_PX, 3), 1)}


class NoOpRealESRGAN(NoOp, RealESRGANStage):
    def run(self, item: Item) -> Artefacts:
        return {"hd_frames": self.run_chunk(item.shot, item.artefacts["frames"])}

    def run_chunk(self, shot: Shot, frames: Frames, chunk: slice | None = None) -> Frames:
        return gradient((len(frames), shot.scale * SIDE_PX, shot.scale * SIDE_PX, 3), 1)


STAGES: dict[str, type[Stage[Any]]] = {stage.name: stage for stage in (NoOpFlux, NoOpSVD, NoOpRealESRGAN)}


def line(number: int) -> dict[str, Any]:
    """Return a script line that uses all of `STAGES`."""
    return {
        "id": f"shot-{number:07d}",
        "prompt": f"nothing, number {number}",
        "seed": number,
        "width": SIDE_PX,
        "height": SIDE_PX,
        "num_frames": FRAMES,
        "scale": 2,
    }


def noop_profile(folder: Path, cpu_workers: int) -> Profile:
    """Return a profile for `STAGES`. Writes fake weights into the folder."""
    weights = write_fake_weights(folder / "weights", STAGES.values())
    actors = {actor: ActorProfile(weights=str(path), cpus=0.5) for actor, path in weights.items()}
    return Profile(name="no-op", about="does nothing", cpu_workers=cpu_workers, actors=actors)


class NoOpLoRA(NoOp, FluxLoRAStage):
    def run(self, item: Item) -> Artefacts:
        return {"image": item.artefacts["image"]}


class NoOpRefine(NoOp, FluxRefineStage):
    def run(self, item: Item) -> Artefacts:
        return {"image": item.artefacts["image"]}


ON_THESE_ACTORS: dict[str, type[Stage[Any]]] = {**STAGES, **{stage.name: stage for stage in (NoOpLoRA, NoOpRefine)}}
"""All stages of the actors of `STAGES`. A server loads all of them, since it does not know the shots in advance."""
