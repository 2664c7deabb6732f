"""FLUX + LoRA: image to image on the base picture with the shot's adapters on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from PIL import Image as PILImage

from vidgen_ray.errors import StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, Image, Item, Stage, StageParams, noise_generator, to_uint8
from vidgen_ray.stages.flux import DEFAULT_GUIDANCE
from vidgen_ray.stages.flux_model import FluxModel, FluxParams, flux_work

REFERENCE_STRENGTH = 0.6
"""The `lora_strength` of a shot that names none."""


class FluxLoRAStage(Stage[FluxParams]):
    """`image` (H, W, 3) -> `image` of the same size, refined towards the LoRA's person or style.

    `lora_strength` s is the share of the schedule that is run again, int(steps * s) steps, at least one; 0 gives the image
    back. The stage shares its actor, and its weights, with FLUX: outside of this stage no adapter acts.
    Source: Hu et al. 2021, LoRA, arXiv:2106.09685; Meng et al. 2021, SDEdit, arXiv:2108.01073; diffusers
    `FluxImg2ImgPipeline`.
    """

    name: ClassVar[str] = "lora"
    version: ClassVar[int] = 1
    actor: ClassVar[str] = "flux"
    reads: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "width",
        "height",
        "lora",
        "lora_strength",
        "steps.lora",
        "guidance.lora",
        "seed",
    )
    takes: ClassVar[tuple[str, ...]] = ("image",)
    writes: ClassVar[tuple[str, ...]] = ("image",)
    keeps: ClassVar[str | None] = "lora.png"
    Params: ClassVar[type[StageParams]] = FluxParams

    @staticmethod
    def applies(shot: Shot) -> bool:
        # A fast shot wears its LoRA in the one FLUX pass, unless it starts from a picture and has no such pass.
        return bool(shot.lora) and (shot.mode == "quality" or shot.image is not None)

    @classmethod
    def weight_files(cls, params: FluxParams, shot: Shot) -> tuple[Path, ...]:
        return (params.weights, *(Path(lora.path) for lora in shot.lora))

    @classmethod
    def work(cls, shot: Shot) -> float:
        return flux_work(shot, shot.steps.lora) * shot.lora_strength / REFERENCE_STRENGTH

    def load(self) -> None:
        self.model = FluxModel.shared(self.params)

    def move(self, device: str) -> None:
        self.model.move(device)

    @property
    def adapter_loads(self) -> int:
        return self.model.adapter_loads

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [{"image": self._refined(item)} for item in items]

    def _refined(self, item: Item) -> Image:
        shot, image = item.shot, item.artefacts["image"]
        if not shot.lora:
            raise StageError("lora: got none, this stage needs at least one")
        if shot.lora_strength == 0:
            return image
        steps = shot.steps.lora or self.model.default_steps
        if int(steps * shot.lora_strength) < 1:
            raise StageError(
                f"lora_strength: got {shot.lora_strength} of {steps} steps, which is less than one step; "
                f"use at least {1 / steps:.3f}"
            )
        with self.model.wearing(shot.lora):
            (picture,) = self.model.image_to_image(
                **self.model.call_arguments(shot, self.params),
                image=PILImage.fromarray(image),
                strength=shot.lora_strength,
                num_inference_steps=steps,
                guidance_scale=DEFAULT_GUIDANCE if shot.guidance.lora is None else shot.guidance.lora,
                generator=noise_generator(shot, self.name),
            ).images
        return to_uint8(picture)
