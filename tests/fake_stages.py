"""Fake stages: fast, without models or torch. The prompt scripts failures.

They declare the same inputs and outputs as the real stages, so the executors take the same code paths.
"""

import os
import time
from pathlib import Path

import numpy as np

from vidgen_ray.content_keys import ShotPlanner, params_of
from vidgen_ray.graph import stages_of
from vidgen_ray.stages.base import FaceFeatures, Likeness
from vidgen_ray.stages.flux import FluxLoRAStage, FluxStage
from vidgen_ray.stages.instantid import ClipLikenessStage, ImageLikenessStage, InstantIDStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage


def run_scripted_failure(prompt):
    """Fail as the prompt says: `crash`, `hang`, `raise`, `cuda-error` or `oom`.

    With the suffix ` once PATH`, only the first call of all processes fails. `until PATH` waits until the file exists.
    """
    action, _, argument = prompt.partition(" ")
    if argument.startswith("once "):
        marker = Path(argument.removeprefix("once "))
        if marker.exists():
            return
        marker.touch()
    if action == "crash":
        os._exit(1)
    while action == "until" and not Path(argument).exists():
        time.sleep(0.01)  # polls: files do not send events
    if action == "hang":
        time.sleep(3600)
    if action == "raise":
        raise RuntimeError("a transient fault")
    if action == "cuda-error":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if action == "oom":
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")


class FakeStage:
    """Mixin of all fake stages. It comes before the real stage in the base classes."""

    device = "cuda"

    def load(self):
        self.loaded = True

    def move(self, device):
        self.device = device

    adapter_loads = 0

    def __call__(self, item):
        assert self.device != "cpu" or self.params.device == "cpu", "the weights are not on the GPU"
        return self.one(item.shot, item.artefacts)


class FakeInstantID(FakeStage, InstantIDStage):
    def one(self, shot, artefacts):
        return {"face": FaceFeatures({}, np.zeros((5, 2), np.float32), (0, 0, 1, 1), 1.0, 1, (1, 1), "")}


class FakeFlux(FakeStage, FluxStage):
    def one(self, shot, artefacts):
        run_scripted_failure(shot.prompt)
        noise = np.random.default_rng(self.generator_seed(shot))
        return {"image": noise.integers(0, 256, (shot.height, shot.width, 3), np.uint8)}


class FakeLoRA(FakeStage, FluxLoRAStage):
    def one(self, shot, artefacts):
        return {"image": artefacts["image"][::-1]}


class FakeImageLikeness(FakeStage, ImageLikenessStage):
    def one(self, shot, artefacts):
        return {"image_likeness": Likeness((shot.seed % 100 / 100,))}


class FakeSVD(FakeStage, SVDStage):
    def one(self, shot, artefacts):
        if shot.prompt == "decoder-oom" and self.params.decode_chunk_frames > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return {"frames": np.stack([np.roll(artefacts["image"], n, 1) for n in range(shot.clip_frames)])}


class FakeClipLikeness(FakeStage, ClipLikenessStage):
    def one(self, shot, artefacts):
        return {"clip_likeness": Likeness((0.75, None, 0.5))}


class FakeRealESRGAN(FakeStage, RealESRGANStage):
    def run_chunk(self, shot, frames, chunk=None):
        return frames.repeat(shot.scale, 1).repeat(shot.scale, 2)


FAKES = {stage.name: stage for stage in FakeStage.__subclasses__()}


def use_fakes(pipeline, *names):
    """Let a pipeline of the library run the fakes of these stages, by default of all, instead of models."""
    for name in names or FAKES:
        pipeline._loaded[name] = FAKES[name](pipeline.profile.params(FAKES[name]))
    return pipeline


def plan_of(profile, shot):
    """Return the plan of a shot."""
    return ShotPlanner(params_of(profile, stages_of(shot)), profile.encode)(shot)


def with_actor(profile, name, **update):
    """Return the profile with changes to an actor."""
    actor = profile.actors[name].model_copy(update=update)
    return profile.model_copy(update={"actors": {**profile.actors, name: actor}})


FINDS_FACES = {**FAKES, InstantIDStage.name: InstantIDStage}
"""Fakes with the real detector of faces."""

ACTORS_GB = {"instantid": 1, "flux": 34, "hunyuan": 13, "svd": 20, "realesrgan": 6}
"""GPU memory of actors that fit together on a GPU of 80 GB."""


def profile_of_fakes(tiny, actors=tuple(ACTORS_GB), timeout_s=60, **update):
    """Return the profile `tiny` with these actors on a GPU."""
    more = {"device": "cuda", "timeout_s": timeout_s, "cpus": 0.5}
    on_gpu = {name: tiny.actors[name].model_copy(update={"memory_gb": ACTORS_GB[name], **more}) for name in actors}
    # Fake stages take no time, so the planned rate would need tens of encoders with the preset of `tiny`.
    encode = tiny.encode.model_copy(update={"preset": "ultrafast"})
    return tiny.model_copy(update={"name": "fakes", "actors": on_gpu, "cpu_workers": None, "encode": encode, **update})
