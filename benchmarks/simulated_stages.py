"""vidgen's own stages with simulated models: the same declarations and parameters, the work of `simulated`, no torch.

`STAGES` maps names to classes as the batch engine takes them; `write_inputs` makes the files that its shots name. The weights
of each actor are the folder `weights` of the run folder, which tells the stages where their cards are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks import simulated
from benchmarks.simulated import FRAMES, FRAMES_SHAPE, IMAGE_SHAPE, SimulatedGPU, SimulatedModel, assigned_gpu, shot_ids
from vidgen_ray.media import write_png
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, FaceFeatures, Frames, Item, Likeness, Stage
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux_lora import FluxLoRAStage
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.likeness import ClipLikenessStage, ImageLikenessStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage

WEIGHTS, INPUTS = "weights", "inputs"
PHOTO_PX = 64
ENLARGED_PX = 64
"""Side of upscaled frames. They are small, for the peers encode nothing, and it is not encoding that is compared."""


class SimulatedStage(Stage[Any]):
    """What the simulated stages share. Comes before the real stage among the bases of each."""

    _loaded: ClassVar[dict[str, SimulatedModel]] = {}
    """Models of this process: stages of one actor share theirs."""

    @classmethod
    def lower_memory(cls, params: Any) -> None:
        """None: a card that is too small for a simulated model is so for good."""

    def load(self) -> None:
        name = self._model_name()
        if name not in self._loaded:
            self._loaded[name] = SimulatedModel(name, SimulatedGPU(self.params.weights.parent, assigned_gpu()))
        self._model = self._loaded[name]

    def _model_name(self) -> str:
        # An actor's weights are one model.
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

    def __call__(self, items: Sequence[Item]) -> list[Artefacts]:
        """Without torch, whose import would be most of a worker's start."""
        return self.run(items)

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> Artefacts:
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
        return {"image": np.full(IMAGE_SHAPE, 100, np.uint8)}


class SimulatedLoRA(SimulatedStage, FluxLoRAStage):
    def _result(self, artefacts: Artefacts) -> Artefacts:
        return {"image": artefacts["image"] + np.uint8(1)}


class SimulatedImageLikeness(SimulatedStage, ImageLikenessStage):
    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        """No work of the card: the peers do not look whom their pictures show."""
        return [{"image_likeness": Likeness((1.0,))} for _ in items]


class SimulatedClipLikeness(SimulatedStage, ClipLikenessStage):
    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [{"clip_likeness": Likeness((1.0,))} for _ in items]


class SimulatedSVD(SimulatedStage, SVDStage):
    def _result(self, artefacts: Artefacts) -> Artefacts:
        return {"frames": np.full(FRAMES_SHAPE, artefacts["image"].flat[0], np.uint8)}


class SimulatedRealESRGAN(SimulatedStage, RealESRGANStage):
    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [{"hd_frames": self.run_chunk(item.shot, item.artefacts["frames"])} for item in items]

    def run_chunk(self, shot: Shot, frames: Frames, lookahead: Frames | None = None) -> Frames:
        self._model.work(self.name, "", len(frames) * simulated.SECONDS_PER_FRAME)
        return frames[:, :ENLARGED_PX, :ENLARGED_PX].copy()


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
    """The lines of a script in which every shot passes every stage, and the weights, photos and LoRA that they need.

    Every shot is of the simulation's own size. Every photo is another one: features are computed once per photo, and the
    peers compute them for every shot.
    """
    weights, inputs = run_folder / WEIGHTS, run_folder / INPUTS
    weights.mkdir()
    inputs.mkdir()
    (weights / f"{Shot.model_fields['upscaler'].default}.safetensors").write_bytes(b"simulated")
    lora = inputs / "adapter.safetensors"
    lora.write_bytes(b"simulated")
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
                # What steers FLUX costs nothing here, and would need weights.
                "identity": "none",
                "lora": str(lora),
                "num_frames": FRAMES,
                "width": FRAMES_SHAPE[2],
                "height": FRAMES_SHAPE[1],
                "scale": 2,
            }
        )
    return lines
