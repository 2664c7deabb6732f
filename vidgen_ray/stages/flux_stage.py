"""Base class of the FLUX stages: shared model, active LoRAs and identity conditioning."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from PIL import Image as PILImage

from vidgen_ray.errors import StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import REFERENCE_PIXELS, Image, Item, Stage, StageParams, noise_generator, to_uint8
from vidgen_ray.stages.flux_model import DEFAULT_STEPS, FluxModel, FluxParams
from vidgen_ray.stages.identity import INJECTORS, injector_class, shared_injector
from vidgen_ray.stages.identity.base import FluxInjector, FluxPipelines
from vidgen_ray.stages.identity.pose import pose_image
from vidgen_ray.stages.progress import diffusers_step_callback

DEFAULT_GUIDANCE = 3.5


class FluxFamilyStage(Stage[FluxParams]):
    """A stage that generates images with FLUX. `load` also loads the injectors whose weights are on this machine."""

    actor: ClassVar[str] = "flux"
    identity_fields: ClassVar[tuple[str, ...]] = (
        "flux_identity",
        "identity_strength",
        "identity_start",
        "identity_end",
        "pose",
    )
    identity_inputs: ClassVar[tuple[str, ...]] = ("face",)
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    weight_attributes: ClassVar[tuple[str, ...]] = ("model", "injectors")
    Params: ClassVar[type[StageParams]] = FluxParams

    @staticmethod
    def uses_identity(shot: Shot) -> bool:
        return shot.flux_identity is not None

    @classmethod
    def extra_weights(cls) -> Collection[str]:
        return INJECTORS

    @classmethod
    def used_extra_weights(cls, shot: Shot) -> Collection[str]:
        return () if shot.flux_identity is None else (shot.flux_identity,)

    @classmethod
    def weight_files(cls, params: FluxParams, shot: Shot) -> tuple[Path, ...]:
        injector = () if shot.flux_identity is None else (params.extra_weights_at(shot.flux_identity),)
        return (params.weights, *injector, *(Path(lora.path) for lora in cls.active_loras(shot)))

    def load(self) -> None:
        self.model = FluxModel.shared(self.params)
        self.injectors = {name: self._injector(name) for name in INJECTORS if name in self.params.extra_weights}

    def move(self, device: str) -> None:
        self.model.move(device)
        for injector in self.injectors.values():
            injector.move(device)

    @property
    def adapter_loads(self) -> int:
        return self.model.adapters.loads

    def _injector(self, name: str) -> FluxInjector:
        """Return the injector, loaded on first use. Raises MissingWeights, or SetupError for weights of another kind."""
        return shared_injector(name, self.model, self.params.extra_weights_at(name))

    @contextmanager
    def conditioned_pipelines(self, item: Item) -> Iterator[FluxPipelines]:
        """Yield the FLUX pipelines with the shot's LoRAs active and conditioned on its face."""
        shot = item.shot
        with self.model.loras_active(self.active_loras(shot)):
            self.notes += self.model.adapters.take_notes()
            if shot.flux_identity is None:
                yield self.model
                return
            if "face" not in item.artefacts:
                raise StageError(
                    "face: got none, must be the face features of the shot's photos; use `vidgen shot`, which computes them, "
                    "or set `identity: none`"
                )
            face = item.artefacts["face"]
            injector = self.injectors.get(shot.flux_identity) or self._injector(shot.flux_identity)
            with injector.inject(
                face.embedding(injector.embedding),
                pose_image(face, shot),
                shot,
                self.name,
                start=shot.identity_start,
                end=shot.identity_end,
            ) as pipelines:
                yield pipelines

    def image_to_image(self, item: Item, *, strength: float, steps: int | None, guidance: float | None) -> Image:
        """Redraw the item's `image` with the last int(steps * strength) steps of the schedule. 0 returns it unchanged.

        Raises StageError for less than one step.
        Source: Meng et al. 2021, SDEdit, arXiv:2108.01073; diffusers `FluxImg2ImgPipeline`.
        """
        shot, image = item.shot, item.artefacts["image"]
        if strength == 0:
            return image
        steps = steps or self.model.default_steps
        if int(steps * strength) < 1:
            raise StageError(
                f"{self.name}_strength: got {strength} of {steps} steps, which is less than one step; "
                f"must be at least {1 / steps:.3f}"
            )
        with self.conditioned_pipelines(item) as pipelines:
            (redrawn,) = pipelines.image_to_image(
                **self.model.call_arguments(shot, self.params),
                image=PILImage.fromarray(image),
                strength=strength,
                num_inference_steps=steps,
                guidance_scale=DEFAULT_GUIDANCE if guidance is None else guidance,
                generator=noise_generator(self.generator_seed(shot)),
                **diffusers_step_callback(self.name),
            ).images
        return to_uint8(redrawn)


def relative_flux_cost(shot: Shot, steps: int | None) -> float:
    """Return the cost of the whole schedule relative to the reference shot, which has no face.

    A negative prompt adds a second pass per step. An injector adds its `passes_per_step` in the steps that it conditions.
    """
    passes = 2.0 if shot.negative_prompt else 1.0
    if shot.flux_identity is not None:
        passes += injector_class(shot.flux_identity).passes_per_step * (shot.identity_end - shot.identity_start)
    return shot.width * shot.height / REFERENCE_PIXELS * (steps or DEFAULT_STEPS) / DEFAULT_STEPS * passes
