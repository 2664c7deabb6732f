"""Stages without models, in milliseconds and without torch, that break when the prompt says so. Their declarations are those
of the real ones, and so are all of the batch engine's code paths round them."""

import os
import time
from pathlib import Path

import numpy as np

from vidgen_ray.stages.base import FaceFeatures, Likeness
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux_lora import FluxLoRAStage
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.likeness import ClipLikenessStage, ImageLikenessStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage


def obey(prompt):
    """`die`, `hang`, `raise`, `wedge`, `full`; with `once PATH` behind only the first time, of all processes. `until PATH`
    takes as long as there is no such file."""
    what, _, when = prompt.partition(" ")
    if when.startswith("once "):
        marker = Path(when.removeprefix("once "))
        if marker.exists():
            return
        marker.touch()
    if what == "die":
        os._exit(1)
    while what == "until" and not Path(when).exists():
        time.sleep(0.01)  # the file system tells nobody; the condition is the loop's
    if what == "hang":
        time.sleep(3600)
    if what == "raise":
        raise RuntimeError("a transient fault")
    if what == "wedge":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if what == "full":
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")


class EndsItsReader:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


class FakeStage:
    """Comes before the real stage among the bases of each."""

    device = "cuda"

    def load(self):
        self.loaded = True

    def move(self, device):
        self.device = device

    adapter_loads = 0

    def __call__(self, items):
        assert self.device != "cpu" or self.params.device == "cpu", "not on the GPU when it works"
        return [self.one(item.shot, item.artefacts) for item in items]


class FakeInstantID(FakeStage, InstantIDStage):
    def one(self, shot, artefacts):
        return {"face": FaceFeatures({}, np.zeros((5, 2), np.float32), (0, 0, 1, 1), 1.0, 1, (1, 1), "")}


class FakeFlux(FakeStage, FluxStage):
    def one(self, shot, artefacts):
        obey(shot.prompt)
        if shot.prompt == "end the encoder":
            # Of a picture alone, which nobody else looks into.
            return {"image": EndsItsReader()}
        noise = np.random.default_rng(shot.generator_seed(self.name))
        return {"image": noise.integers(0, 256, (shot.height, shot.width, 3), np.uint8)}


class FakeLoRA(FakeStage, FluxLoRAStage):
    def one(self, shot, artefacts):
        for lora in shot.lora:
            with Path(lora.path).with_name("worn").open("a") as worn:
                worn.write(Path(lora.path).stem)
        return {"image": artefacts["image"][::-1]}


def fake_likeness(seed):
    """0 to 0.99, by the seed."""
    return seed % 100 / 100


class FakeImageLikeness(FakeStage, ImageLikenessStage):
    def one(self, shot, artefacts):
        return {"image_likeness": Likeness((fake_likeness(shot.seed),))}


class FakeSVD(FakeStage, SVDStage):
    def one(self, shot, artefacts):
        if shot.prompt == "lean" and self.params.decode_chunk_frames > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return {"frames": np.stack([np.roll(artefacts["image"], n, 1) for n in range(shot.num_frames)])}


class FakeClipLikeness(FakeStage, ClipLikenessStage):
    def one(self, shot, artefacts):
        return {"clip_likeness": Likeness((0.75, None, 0.5))}


class FakeRealESRGAN(FakeStage, RealESRGANStage):
    def run_chunk(self, shot, frames, lookahead=None):
        return frames.repeat(shot.scale, 1).repeat(shot.scale, 2)


FAKES = {
    stage.name: stage
    for stage in (
        FakeInstantID,
        FakeFlux,
        FakeLoRA,
        FakeImageLikeness,
        FakeSVD,
        FakeClipLikeness,
        FakeRealESRGAN,
    )
}
