"""FLUX + LoRA: image to image on the base picture with the shot's adapters on the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from vidgen_ray.errors import StageError
from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages.base import Artefacts, Image, Item
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux_stage import FluxFamilyStage, flux_work

REFERENCE_STRENGTH = 0.6
"""The `lora_strength` of a shot that names none."""


class FluxLoRAStage(FluxFamilyStage):
    """`image` (H, W, 3) -> `image` of the same size, refined towards the LoRA's person or style, and the `face` that steers.

    `lora_strength` s is the share of the schedule that is run again, int(steps * s) steps, at least one; 0 gives the image
    back. The stage shares its actor, and its weights, with FLUX: outside of this stage no adapter acts.
    Source: Hu et al. 2021, LoRA, arXiv:2106.09685.
    """

    name: ClassVar[str] = "lora"
    label: ClassVar[str] = "LoRA"
    activity: ClassVar[str] = "Redrawing with the LoRA"
    reference_s: ClassVar[float] = 4.0
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
        # A fast shot wears its LoRA in the one FLUX pass, unless it has no such pass.
        return bool(shot.lora) and (shot.mode == "quality" or not FluxStage.applies(shot))

    @staticmethod
    def active_loras(shot: Shot) -> tuple[LoraRef, ...]:
        return shot.lora

    @classmethod
    def relative_cost(cls, shot: Shot) -> float:
        return flux_work(shot, shot.steps.lora) * shot.lora_strength / REFERENCE_STRENGTH

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [{"image": self._refined(item)} for item in items]

    def _refined(self, item: Item) -> Image:
        shot = item.shot
        if not shot.lora:
            raise StageError("lora: got none, this stage needs at least one")
        return self.image_to_image(item, strength=shot.lora_strength, steps=shot.steps.lora, guidance=shot.guidance.lora)
