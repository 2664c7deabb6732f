"""FLUX image to image on a picture that another model drew, so that what follows sees a picture of FLUX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from vidgen_ray.shot import INSTANTID_SDXL, Shot
from vidgen_ray.stages.base import Artefacts, Image, Item
from vidgen_ray.stages.flux_stage import FluxFamilyStage, flux_work

REFERENCE_STRENGTH = 0.35
"""The `refine_strength` of a shot that names none."""


class FluxRefineStage(FluxFamilyStage):
    """`image` (H, W, 3) of SDXL -> `image` of the same size with the light and detail of FLUX, and much the same face.

    `refine_strength` s is the share of the schedule that is run, int(steps * s) steps, at least one; 0 gives the image
    back. A shot with LoRAs has their stage in place of this one.
    """

    name: ClassVar[str] = "refine"
    label: ClassVar[str] = "Refinement"
    activity: ClassVar[str] = "Refining the image"
    reference_s: ClassVar[float] = 2.4
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"face_image": ("photo.jpg",), "identity": INSTANTID_SDXL},)
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "width",
        "height",
        "refine_strength",
        "steps.refine",
        "guidance.refine",
        "seed",
    )
    weight_fields: ClassVar[tuple[str, ...]] = ("flux_identity",)
    takes: ClassVar[tuple[str, ...]] = ("image",)
    writes: ClassVar[tuple[str, ...]] = ("image",)
    debug_file: ClassVar[str | None] = "refine.png"

    @staticmethod
    def applies(shot: Shot) -> bool:
        return shot.uses_sdxl_base and not shot.lora

    @classmethod
    def relative_cost(cls, shot: Shot) -> float:
        return flux_work(shot, shot.steps.refine) * shot.refine_strength / REFERENCE_STRENGTH

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [{"image": self._refined(item)} for item in items]

    def _refined(self, item: Item) -> Image:
        shot = item.shot
        return self.image_to_image(item, strength=shot.refine_strength, steps=shot.steps.refine, guidance=shot.guidance.refine)
