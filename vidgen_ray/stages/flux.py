"""FLUX text to image: the base image of a shot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages.base import Artefacts, Image, Item, noise_generator
from vidgen_ray.stages.flux_stage import FluxFamilyStage, relative_flux_cost
from vidgen_ray.stages.pixels import pixels_to_uint8
from vidgen_ray.stages.progress import diffusers_step_callback


class FluxStage(FluxFamilyStage):
    """Prompt -> `image` (height, width, 3); width and height multiples of 16.

    The image is conditioned on `face` if the shot has a FLUX identity. In mode fast the shot's LoRAs are active here.
    FLUX.1-dev uses `guidance.flux` (embedded, default 3.5) and 28 steps, FLUX.1-schnell no guidance and 4 steps. The model is
    detected from the configuration of the weights.
    Noise comes from a CPU generator seeded by the shot, so the result does not depend on other shots in the batch.
    Source: Black Forest Labs 2024, FLUX.1; diffusers `FluxPipeline`.
    """

    name: ClassVar[str] = "flux"
    label: ClassVar[str] = "Base image"
    activity: ClassVar[str] = "Generating the base image"
    reference_s: ClassVar[float] = 3.8
    common_settings: ClassVar[tuple[str, ...]] = ("steps", "guidance")
    version: ClassVar[int] = 1
    uses_shot_seed: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "width",
        "height",
        "steps.flux",
        "guidance.flux",
        "fast_lora",
        "seed",
    )
    weight_fields: ClassVar[tuple[str, ...]] = (
        "flux_identity",
        "fast_lora",
    )
    takes: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ("image",)
    debug_file: ClassVar[str | None] = "base.png"

    @staticmethod
    def applies(shot: Shot) -> bool:
        return not shot.has_start_image and not shot.uses_sdxl_base and not shot.uses_klein_base

    @staticmethod
    def active_loras(shot: Shot) -> tuple[LoraRef, ...]:
        return shot.fast_lora

    @classmethod
    def relative_cost(cls, shot: Shot) -> float:
        return relative_flux_cost(shot, shot.steps.flux)

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [{"image": self._generate(item)} for item in items]

    def _generate(self, item: Item) -> Image:
        shot = item.shot
        steps = shot.steps.flux or self.model.default_steps
        with self.conditioned_pipelines(item) as pipelines:
            arguments = self.model.call_arguments(shot, self.params, shot.guidance.flux)
            with self.model.step_cache_running(shot, arguments, steps, steps):
                (image,) = pipelines.text_to_image(
                    **arguments,
                    num_inference_steps=steps,
                    generator=noise_generator(self.generator_seed(shot)),
                    **diffusers_step_callback(self.name),
                ).images
        return pixels_to_uint8(image)
