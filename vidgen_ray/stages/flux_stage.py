"""What the stages on FLUX's weights have in common: one model a process, LoRAs that are worn, a person who steers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from PIL import Image as PILImage

from vidgen_ray.errors import StageError
from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages.base import REFERENCE_PIXELS, Image, Item, Stage, StageParams, noise_generator, to_uint8
from vidgen_ray.stages.flux_model import DEFAULT_STEPS, FluxModel, FluxParams
from vidgen_ray.stages.identity import INJECTORS, injector_class, shared_injector
from vidgen_ray.stages.identity.base import FluxInjector, FluxPipelines
from vidgen_ray.stages.identity.pose import pose_image
from vidgen_ray.stages.progress import diffusers_step_callback

DEFAULT_GUIDANCE = 3.5


class FluxFamilyStage(Stage[FluxParams]):
    """A stage that draws by FLUX. The networks of an injector are loaded with the model, where they are on this machine."""

    actor: ClassVar[str] = "flux"
    identity_fields: ClassVar[tuple[str, ...]] = (
        "flux_identity",
        "identity_strength",
        "identity_start",
        "identity_end",
        "pose",
    )
    identity_inputs: ClassVar[tuple[str, ...]] = ("face",)
    Params: ClassVar[type[StageParams]] = FluxParams

    @staticmethod
    def uses_identity(shot: Shot) -> bool:
        return shot.flux_identity is not None

    @classmethod
    def extra_weights(cls) -> Collection[str]:
        return INJECTORS

    @staticmethod
    def active_loras(shot: Shot) -> tuple[LoraRef, ...]:
        """The LoRAs that act in this stage."""
        return ()

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
        return self.model.adapter_loads

    def _injector(self, name: str) -> FluxInjector:
        """Raises MissingWeights, or SetupError where they are of another kind."""
        return shared_injector(name, self.model, self.params.extra_weights_at(name))

    @contextmanager
    def drawing(self, item: Item) -> Iterator[FluxPipelines]:
        """Run a block in which FLUX wears the shot's LoRAs and draws its person."""
        shot = item.shot
        with self.model.loras_active(self.active_loras(shot)):
            if shot.flux_identity is None:
                yield self.model
                return
            if "face" not in item.artefacts:
                raise StageError(
                    "face: the shot has a person and came without features of the face; render it with `vidgen shot`, which "
                    "looks at the photo first, or set `identity: none`"
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
            ) as calls:
                yield calls

    def image_to_image(self, item: Item, *, strength: float, steps: int | None, guidance: float | None) -> Image:
        """The item's `image` drawn again over the share `strength` of the schedule, int(steps * strength) steps; 0: as it is.

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
                f"use at least {1 / steps:.3f}"
            )
        with self.drawing(item) as calls:
            (picture,) = calls.image_to_image(
                **self.model.call_arguments(shot, self.params),
                image=PILImage.fromarray(image),
                strength=strength,
                num_inference_steps=steps,
                guidance_scale=DEFAULT_GUIDANCE if guidance is None else guidance,
                generator=noise_generator(shot, self.name),
                **diffusers_step_callback(self.name),
            ).images
        return to_uint8(picture)


def flux_work(shot: Shot, steps: int | None) -> float:
    """A pass over the whole schedule, in those of the reference shot, which has no face.

    A negative prompt costs a second pass a step, an injector a part of one, in the steps in which the face has a say.
    """
    passes = 2.0 if shot.negative_prompt else 1.0
    if shot.flux_identity is not None:
        passes += injector_class(shot.flux_identity).passes * (shot.identity_end - shot.identity_start)
    return shot.width * shot.height / REFERENCE_PIXELS * (steps or DEFAULT_STEPS) / DEFAULT_STEPS * passes
