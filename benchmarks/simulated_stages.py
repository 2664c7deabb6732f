"""Stages of vidgen with simulated models: real declarations and parameters, work of `benchmarks.simulated`, no torch.

`STAGES` maps stage names to classes for the batch engine. `write_inputs` creates the files that the shots need. The weights
of every actor are the folder `weights` of the run folder, through which stages find the simulated GPUs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import save_file

from benchmarks import simulated
from benchmarks.fake_weights import write_fake_weights
from benchmarks.simulated import (
    FRAMES,
    FRAMES_SHAPE,
    IMAGE_SHAPE,
    SimulatedGPU,
    SimulatedModel,
    assigned_gpu,
    gradient,
    shot_ids,
)
from vidgen_ray.media.images import write_png
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, FaceFeatures, Frames, Item, Likeness, Stage
from vidgen_ray.stages.flux import FluxLoRAStage, FluxStage
from vidgen_ray.stages.instantid import ClipLikenessStage, ImageLikenessStage, InstantIDStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage

WEIGHTS, INPUTS = "weights", "inputs"
PHOTO_PX = 64
ENCODED_PX = 64
"""Side of what encoders keep of upscaled frames; of images and generated clips, the same share. The files are small, because
the other systems do not encode, and encoding is not compared."""


class SimulatedStage(Stage[Any]):
    """Mixin with the simulated work. Must come before the real stage in the bases."""

    _loaded: ClassVar[dict[str, SimulatedModel]] = {}
    """Models of this process. Stages of one actor share a model."""

    @classmethod
    def lower_memory(cls, params: Any) -> None:
        """Return `None`: simulated models have no lower-memory settings."""

    def load(self) -> None:
        name = self._model_name()
        if name not in self._loaded:
            self._loaded[name] = SimulatedModel(name, SimulatedGPU(self.params.weights.parent.parent, assigned_gpu()))
        self._model = self._loaded[name]

    def _model_name(self) -> str:
        # All stages of an actor use one model.
        return self.actor

    def move(self, device: str) -> None:
        if device == "cpu":
            self._model.to_host()
        else:
            self._model.to_gpu()

    def close(self) -> None:
        self._loaded.pop(self._model_name(), None)
        if hasattr(self, "_model"):
            self._model.close()
        super().close()

    @property
    def adapter_loads(self) -> int:
        return 0

    def __call__(self, item: Item) -> Artefacts:
        """Run without torch, whose import would take most of the start-up time of a worker."""
        return self.run(item)

    def run(self, item: Item) -> Artefacts:
        self._model.work(self.name, item.shot.id or "", simulated.STAGES[self.name].seconds)
        return self._result(item.artefacts)

    def _result(self, artefacts: Artefacts) -> Artefacts:
        raise NotImplementedError


class SimulatedInstantID(SimulatedStage, InstantIDStage):
    def _result(self, artefacts: Artefacts) -> Artefacts:
        height, width = artefacts["photos"][0].shape[:2]
        face = FaceFeatures(
            embeddings={"antelopev2": np.full(512, 0.5, np.float32)},
            keypoints=np.zeros((5, 2), np.float32),
            box=(0.0, 0.0, float(width), float(height)),
            score=1.0,
            faces_found=1,
            photo_size=(width, height),
            digest="",
        )
        return {"face": face}


class SimulatedFlux(SimulatedStage, FluxStage):
    def _result(self, artefacts: Artefacts) -> Artefacts:
        return {"image": gradient(IMAGE_SHAPE, 100)}


class SimulatedLoRA(SimulatedStage, FluxLoRAStage):
    def _result(self, artefacts: Artefacts) -> Artefacts:
        return {"image": artefacts["image"] + np.uint8(1)}


class SimulatedImageLikeness(SimulatedStage, ImageLikenessStage):
    def run(self, item: Item) -> Artefacts:
        """Do not use the GPU: the other systems have no likeness checks."""
        return {"image_likeness": Likeness((1.0,))}


class SimulatedClipLikeness(SimulatedStage, ClipLikenessStage):
    def run(self, item: Item) -> Artefacts:
        return {"clip_likeness": Likeness((1.0,))}


class SimulatedSVD(SimulatedStage, SVDStage):
    def _result(self, artefacts: Artefacts) -> Artefacts:
        return {"frames": gradient(FRAMES_SHAPE, artefacts["image"].flat[0])}


class SimulatedRealESRGAN(SimulatedStage, RealESRGANStage):
    def run(self, item: Item) -> Artefacts:
        return {"hd_frames": self.run_chunk(item.shot, item.artefacts["frames"])}

    def run_chunk(self, shot: Shot, frames: Frames, chunk: slice | None = None) -> Frames:
        self._model.work(self.name, "", len(frames) * simulated.SECONDS_PER_FRAME)
        return gradient((len(frames), frames.shape[1] * shot.scale, frames.shape[2] * shot.scale, 3), frames.flat[0])


STAGES: dict[str, type[Stage[Any]]] = {
    stage.name: stage
    for stage in (
        SimulatedInstantID,
        SimulatedFlux,
        SimulatedLoRA,
        SimulatedImageLikeness,
        SimulatedSVD,
        SimulatedClipLikeness,
        SimulatedRealESRGAN,
    )
}


def write_inputs(run_folder: Path, shots: int) -> list[dict[str, Any]]:
    """Write weights, photos and a LoRA, and return script lines whose shots use all stages and these files.

    Each shot has its own photo: vidgen computes face features once per photo, and the other systems once per shot.
    """
    write_fake_weights(run_folder / WEIGHTS, STAGES.values())
    inputs = run_folder / INPUTS
    inputs.mkdir()
    lora = inputs / "adapter.safetensors"
    save_file({f"simulated.{part}.weight": np.zeros((1, 1), np.float32) for part in ("lora_A", "lora_B")}, lora)
    lines = []
    for number, shot in enumerate(shot_ids(shots)):
        photo = inputs / f"{shot}.png"
        write_png(photo, np.full((PHOTO_PX, PHOTO_PX, 3), (number % 256, number // 256 % 256, 0), np.uint8))
        lines.append(
            {
                "id": shot,
                "prompt": f"simulated shot {number}",
                "seed": number,
                "face_image": str(photo),
                "consent": {"subject": "a plain colour", "basis": "synthetic"},
                # Identity injection into FLUX is not simulated, and would need weights.
                "identity": "none",
                "lora": str(lora),
                "num_frames": FRAMES,
                "width": FRAMES_SHAPE[2],
                "height": FRAMES_SHAPE[1],
                "scale": simulated.SCALE,
                "crop_width": ENCODED_PX,
                "crop_height": ENCODED_PX,
            }
        )
    return lines
