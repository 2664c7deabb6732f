"""FLUX text to image: the base picture of a shot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, Image, Item, Stage, StageParams, noise_generator, to_uint8
from vidgen_ray.stages.flux_model import FluxModel, FluxParams, flux_work

DEFAULT_GUIDANCE = 3.5


class FluxStage(Stage[FluxParams]):
    """Prompt -> `image` (height, width, 3); width and height multiples of 16.

    In mode fast the shot's LoRAs act in this one pass. FLUX.1-dev takes `guidance.flux` (embedded, 3.5) and 28 steps,
    FLUX.1-schnell no guidance and 4 steps; which of them the weights are is read from their configuration.
    Noise comes from a CPU generator seeded by the shot, so the result does not depend on neighbours in a batch.
    Source: Black Forest Labs 2024, FLUX.1; diffusers `FluxPipeline`.
    """

    name: ClassVar[str] = "flux"
    version: ClassVar[int] = 1
    actor: ClassVar[str] = "flux"
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
    takes: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[tuple[str, ...]] = ("image",)
    keeps: ClassVar[str | None] = "base.png"
    Params: ClassVar[type[StageParams]] = FluxParams

    @staticmethod
    def applies(shot: Shot) -> bool:
        return shot.image is None

    @classmethod
    def weight_files(cls, params: FluxParams, shot: Shot) -> tuple[Path, ...]:
        return (params.weights, *(Path(lora.path) for lora in shot.fast_lora))

    @classmethod
    def work(cls, shot: Shot) -> float:
        return flux_work(shot, shot.steps.flux)

    def load(self) -> None:
        self.model = FluxModel.shared(self.params)

    def move(self, device: str) -> None:
        self.model.move(device)

    @property
    def adapter_loads(self) -> int:
        return self.model.adapter_loads

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [{"image": self._picture(item.shot)} for item in items]

    def _picture(self, shot: Shot) -> Image:
        with self.model.wearing(shot.fast_lora):
            (picture,) = self.model.text_to_image(
                **self.model.call_arguments(shot, self.params),
                num_inference_steps=shot.steps.flux or self.model.default_steps,
                guidance_scale=DEFAULT_GUIDANCE if shot.guidance.flux is None else shot.guidance.flux,
                generator=noise_generator(shot, self.name),
            ).images
        return to_uint8(picture)
