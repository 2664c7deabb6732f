"""FLUX.2 klein: the base image of a shot from its prompt, and from photos of a person as reference images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from vidgen_ray.shot import REFERENCE, Shot
from vidgen_ray.stages.base import (
    NOT_IN_KEY,
    PROMPT_FIELDS,
    Artefacts,
    Item,
    ReadText,
    StageParams,
    diffusers_step_callback,
    noise_generator,
    pixels_to_uint8,
)
from vidgen_ray.stages.loading import (
    ImageParams,
    ImageStage,
    autoencoder_peaks,
    diffusers_classes,
    load_pipeline,
    set_vae_tiles,
    speed_up_transformers,
)
from vidgen_ray.stages.lora import LoraAdapters
from vidgen_ray.stages.memory_table import (
    RESULT_COPIES,
    Phase,
    ShotWork,
    StageMemory,
    activation_bytes,
    memory_of_phases,
    network_work,
    offload_work,
    weight_bytes,
)
from vidgen_ray.stages.schedules import SCHEDULES, ScheduleParams

DISTILLED_STEPS, BASE_STEPS = SCHEDULES["flux.2-klein"].steps, 50
"""Default steps of the distilled weights and of the base weights."""
_DEFAULT_GUIDANCE = 4.0
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""Text around a prompt, for the text encoder."""
PHOTO_PIXELS = 1024 * 1024
"""Pixels to which the pipeline scales larger photos down."""
_TEXT_ENCODER, _TRANSFORMER, _VAE = "klein/text_encoder", "klein/transformer", "klein/vae"
OTHER_SIZE = re.compile(r"klein(-base)?-9b", re.IGNORECASE)
"""Weights of another size than those of the memory table."""


class Flux2KleinParams(ImageParams, ScheduleParams):
    schedule_actor: ClassVar[str] = "klein"

    text_tokens: int = Field(default=512, ge=1, le=512)
    """Tokens of the prompt that the text encoder reads, the chat template included. Longer prompts are cut."""
    text_layers: tuple[int, int, int] = (9, 18, 27)
    """Layers of the text encoder that the transformer was trained with."""
    adapters_kept: Annotated[int, NOT_IN_KEY] = Field(default=4, ge=1)
    """LoRAs that stay loaded, and the maximum per shot. The least recently used one is unloaded first."""


class Flux2KleinStage(ImageStage[Flux2KleinParams]):
    """Prompt and, with `identity: reference`, `photos` -> `image` (height, width, 3); width and height multiples of 16.

    All photos of the shot are reference images: the model sees their pixels, not a face embedding. The model has no strength
    for them; `identity_strength` 0 leaves them out. With `image_model: klein` the shot's LoRAs are active here.
    Distilled weights take 4 steps without guidance; base weights use `guidance.klein` and the negative prompt.
    Source: Black Forest Labs 2026, FLUX.2 klein; diffusers `Flux2KleinPipeline`.
    """

    name: ClassVar[str] = "klein"
    label: ClassVar[str] = "FLUX.2 klein"
    activity: ClassVar[str] = "Generating the base image"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"image_model": "klein", "identity": "none"},
        {"image_model": "klein", "face_image": ("photo.jpg",), "identity": REFERENCE},
    )
    common_settings: ClassVar[tuple[str, ...]] = ("steps", "guidance")
    chosen_by: ClassVar[str] = "image_by"
    pipelines: ClassVar[tuple[str, ...]] = ("Flux2KleinPipeline",)
    uses_shot_seed: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = (*PROMPT_FIELDS, "steps.klein", "guidance.klein", "klein_lora")
    lora_field: ClassVar[str] = "klein_lora"
    weight_fields: ClassVar[tuple[str, ...]] = ("klein_lora",)
    takes: ClassVar[tuple[str, ...]] = ()
    debug_file: ClassVar[str | None] = "base.png"
    Params: ClassVar[type[StageParams]] = Flux2KleinParams

    @classmethod
    def texts(cls, params: Flux2KleinParams, shot: Shot) -> Iterator[ReadText]:
        yield ReadText(CHAT.format(shot.prompt), params.weights / "tokenizer", params.text_tokens)

    @classmethod
    def work(cls, params: Flux2KleinParams, shot: Shot) -> ShotWork:
        # Photos are further tokens of the transformer's sequence.
        pixels, photos = shot.width * shot.height, len(shot.face_image) if shot.uses_reference_photos else 0
        step = network_work("klein/step", pixels + photos * PHOTO_PIXELS)
        coding = network_work("klein/encode", PHOTO_PIXELS).times(photos) + network_work("klein/decode", pixels)
        copies = offload_work((_TEXT_ENCODER, _VAE, _TRANSFORMER, _VAE), params.dtype, cpu_offload=params.cpu_offload)
        return ShotWork(step.times(shot.steps.klein or DISTILLED_STEPS), network_work("klein/text") + coding + copies)

    @classmethod
    def memory(cls, params: Flux2KleinParams, shot: Shot) -> StageMemory | None:
        if OTHER_SIZE.search(str(params.weights)):
            return None
        dtype, pixels = params.dtype, shot.width * shot.height
        photos = len(shot.face_image) if shot.uses_reference_photos else 0
        weights = {network: weight_bytes(network, dtype) for network in (_TEXT_ENCODER, _TRANSFORMER, _VAE)}
        if shot.klein_lora:
            weights[_TRANSFORMER] += params.adapters_kept * weight_bytes("klein/lora", dtype)
        encode, decode = autoencoder_peaks("klein", params, pixels, PHOTO_PIXELS)
        phases = (
            Phase(_TEXT_ENCODER, activation_bytes("klein/text", 0, dtype)),
            Phase(_VAE, encode if photos else 0),
            Phase(_TRANSFORMER, activation_bytes("klein/step", pixels + photos * PHOTO_PIXELS, dtype)),
            Phase(_VAE, decode),
        )
        return memory_of_phases(weights, phases, cpu_offload=params.cpu_offload, results=pixels * 3 * RESULT_COPIES)

    def load(self) -> None:
        (Flux2KleinPipeline,) = diffusers_classes(self.params, "Flux2KleinPipeline")

        self.pipe = load_pipeline(Flux2KleinPipeline, self.params, cpu_offload=self.params.cpu_offload)
        speed_up_transformers(self.pipe, self.params)
        self.adapters = LoraAdapters(self.pipe, self.params.adapters_kept, "FLUX.2 klein", is_compiled=self.params.compile)

    @property
    def adapter_loads(self) -> int:
        return self.adapters.loads

    def run(self, item: Item) -> Artefacts:
        from PIL import Image as PILImage

        shot = item.shot
        photos = item.photos if self.uses_identity(shot) else ()
        steps = DISTILLED_STEPS if self.pipe.config.is_distilled else BASE_STEPS
        set_vae_tiles(self.pipe.vae, self.params.vae_tile_px)
        with self.adapters.active(shot.klein_lora):
            self.note(*self.adapters.take_notes())
            (image,) = self.pipe(
                image=[PILImage.fromarray(photo) for photo in photos] or None,
                prompt=shot.prompt,
                negative_prompt_embeds=self._negative_embeds(shot),
                width=shot.width,
                height=shot.height,
                num_inference_steps=shot.steps.klein or steps,
                guidance_scale=_DEFAULT_GUIDANCE if shot.guidance.klein is None else shot.guidance.klein,
                generator=noise_generator(self.generator_seed(shot)),
                output_type="pt",
                **self._text_arguments,
                **diffusers_step_callback(self.name),
            ).images
        return {"image": pixels_to_uint8(image)}

    @property
    def _text_arguments(self) -> Mapping[str, Any]:
        return {"max_sequence_length": self.params.text_tokens, "text_encoder_out_layers": self.params.text_layers}

    def _negative_embeds(self, shot: Shot) -> Any:
        """Return the embeddings of the negative prompt. `None` for distilled weights, which have no guidance."""
        if not shot.negative_prompt or self.pipe.config.is_distilled:
            return None
        return self.pipe.encode_prompt(prompt=shot.negative_prompt, **self._text_arguments)[0]
