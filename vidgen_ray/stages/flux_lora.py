"""FLUX + LoRA: image to image on the base image with the shot's LoRAs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from vidgen_ray.errors import StageError
from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages.base import Artefacts, Image, Item
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux_stage import FluxFamilyStage, relative_flux_cost

REFERENCE_STRENGTH = 0.6
"""Default `lora_strength` of a shot."""


class FluxLoRAStage(FluxFamilyStage):
    """`image` (H, W, 3) -> `image` of the same size, redrawn with the shot's LoRAs and conditioned on its `face`, if any.

    `lora_strength` is the fraction of the schedule that is run: int(steps * lora_strength) steps, at least one. 0 returns the
    image unchanged. The stage shares its actor and weights with FLUX. Its LoRAs are active in this stage only.
    Source: Hu et al. 2021, LoRA, arXiv:2106.09685.
    """

    name: ClassVar[str] = "lora"
    label: ClassVar[str] = "LoRA"
    activity: ClassVar[str] = "Redrawing with the LoRA"
    reference_s: ClassVar[float] = 2.3
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"lora": "style.safetensors"},
        {"lora": "style.safetensors", "face_image": ("photo.jpg",)},
    )
    version: ClassVar[int] = 1
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
    weight_fields: ClassVar[tuple[str, ...]] = (
        "flux_identity",
        "lora",
    )
    takes: ClassVar[tuple[str, ...]] = ("image",)
    writes: ClassVar[tuple[str, ...]] = ("image",)
    debug_file: ClassVar[str | None] = "lora.png"

    @staticmethod
    def applies(shot: Shot) -> bool:
        # In mode fast the LoRAs are active in the FLUX stage, if the shot has it.
        own_image = shot.image_model == "flux" and shot.continue_from is None
        return bool(shot.lora) and own_image and (shot.mode == "quality" or not FluxStage.applies(shot))

    @staticmethod
    def active_loras(shot: Shot) -> tuple[LoraRef, ...]:
        return shot.lora

    @classmethod
    def relative_cost(cls, shot: Shot) -> float:
        return relative_flux_cost(shot, shot.steps.lora) * shot.lora_strength / REFERENCE_STRENGTH

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [{"image": self._refine(item)} for item in items]

    def _refine(self, item: Item) -> Image:
        shot = item.shot
        if not shot.lora:
            raise StageError("lora: got none, must be at least one")
        return self.image_to_image(item, strength=shot.lora_strength, steps=shot.steps.lora, guidance=shot.guidance.lora)
