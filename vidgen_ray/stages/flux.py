"""The FLUX stages: the base image, the image with the shot's LoRAs, and the refinement of SDXL's image."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from vidgen_ray.errors import StageError
from vidgen_ray.shot import INSTANTID_SDXL, Shot
from vidgen_ray.stages.base import (
    PROMPT_FIELDS,
    Artefacts,
    Image,
    Item,
    ReadText,
    Stage,
    StageParams,
    diffusers_step_callback,
    noise_generator,
    pixels_to_uint8,
)
from vidgen_ray.stages.context_parallel import ATTENTION_BACKENDS, begin_call
from vidgen_ray.stages.first_block_cache import cached_bytes, computed_share
from vidgen_ray.stages.flux_model import CACHED_PROMPTS, DEFAULT_STEPS, T5_CHANNELS, FluxModel, FluxParams
from vidgen_ray.stages.identity import INJECTORS, FluxInjector, FluxPipelines, injector_class, pose_image, shared_injector
from vidgen_ray.stages.loading import with_smaller_tiles
from vidgen_ray.stages.lora import FEW_STEP_LORA
from vidgen_ray.stages.memory_table import (
    FP8,
    RESULT_COPIES,
    ShotWork,
    StageMemory,
    Workload,
    activation_bytes,
    network_work,
    weight_bytes,
)

_LARGE_CACHES = (
    *("L40S", "RTX 6000 Ada", "RTX 4060 Ti", "RTX 4080", "RTX 4090 D", "RTX 4090"),
    *("RTX 5060 Ti", "RTX 5070 Ti", "RTX 5080", "RTX 5090"),
)
_CARD_FACTORS: Mapping[str, float] = dict.fromkeys(_LARGE_CACHES, 0.78)
"""`card_factors` of FLUX: their caches hold more of what the steps move. From images of 1024x1024 with 28 steps: TheStage AI's
Elastic-FLUX.1-dev (L40S 16 s) and FLUX.1-dev-fp8-flumina (RTX 6000 Ada 1.74 steps a second, RTX 4090 1.7)."""
_COMPUTED_SHARES = {0.05: 0.77, 0.1: 0.56, 0.2: 0.36}
"""Threshold of `first_block_cache` -> seconds relative to those without. From diffusers #11180. ParaAttention on an L20: 0.65
at 0.08, 0.52 at 0.12."""
CHANNELS = 3072
"""Channels of a token in FLUX's transformer."""
PIXELS_PER_TOKEN = 16 * 16
STEP_LAUNCH_S = {False: 0.15, True: 0.058}
"""Compiled or not -> seconds that a step takes at least. From xDiT on four H100 (4.24 s for 28 steps, compiled 1.63) and
Elastic-FLUX.1-dev on a B200 (4.4 s)."""
COMPILED_BYTES = 0.1
"""Part of the bytes that compiled kernels move: xDiT's 6.71 s for 28 steps on an H100 become 4.30, and 4.2 are computing."""


class FluxFamilyStage(Stage[FluxParams]):
    """A stage that generates images with FLUX. An injector is loaded with the first shot that uses it, and stays loaded."""

    actor: ClassVar[str] = "flux"
    extra_weights: ClassVar[tuple[str, ...]] = (*INJECTORS, FEW_STEP_LORA)
    identity_field: ClassVar[str] = "flux_identity"
    identity_fields: ClassVar[tuple[str, ...]] = (
        "flux_identity",
        "identity_strength",
        "identity_start",
        "identity_end",
        "pose",
    )
    identity_inputs: ClassVar[tuple[str, ...]] = ("face",)
    writes: ClassVar[tuple[str, ...]] = ("image",)
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    card_factors: ClassVar[Mapping[str, float]] = _CARD_FACTORS
    Params: ClassVar[type[StageParams]] = FluxParams

    @classmethod
    def texts(cls, params: FluxParams, shot: Shot) -> Iterator[ReadText]:
        # CLIP reads 77 tokens, only for the pooled embedding.
        yield ReadText(shot.prompt, params.weights / "tokenizer_2", params.text_tokens)

    @classmethod
    def used_extra_weights(cls, shot: Shot) -> Collection[str]:
        identity = () if shot.flux_identity is None else (shot.flux_identity,)
        return (*identity, FEW_STEP_LORA)

    @classmethod
    def weight_files(cls, params: FluxParams, shot: Shot) -> tuple[Path, ...]:
        injector = () if shot.flux_identity is None else (params.extra_weights_at(shot.flux_identity),)
        merged = (params.extra_weights_at(FEW_STEP_LORA),) if params.names_extra_weights(FEW_STEP_LORA) else ()
        return (params.weights, *merged, *injector, *(Path(lora.path) for lora in cls.active_loras(shot)))

    @classmethod
    def memory(cls, params: FluxParams, shot: Shot) -> StageMemory | None:
        pixels, dtype = shot.width * shot.height, params.dtype
        # The weights of both kinds of fp8 take as much memory.
        stored = "" if params.quantize == "none" else f":{FP8}"
        transformer = weight_bytes(f"flux/transformer{stored}", dtype)
        t5 = weight_bytes("flux/text_encoder_2", dtype)
        number_bytes = 4 if dtype == "float32" else 2
        weights = {
            "flux/transformer": transformer,
            "flux/text_encoder": weight_bytes("flux/text_encoder", dtype),
            "flux/vae": weight_bytes("flux/vae", dtype),
            "flux/prompts": CACHED_PROMPTS * params.text_tokens * T5_CHANNELS * number_bytes,
        }
        encode_text = activation_bytes("flux/text", 0, dtype)
        host_weights = {}
        if params.text_encoder == "gpu":
            weights["flux/text_encoder_2"] = t5
        elif params.text_encoder == "swapped":
            encode_text = max(0, encode_text + t5 - transformer)
            host_weights = {"flux/text_encoder_2": t5, "flux/transformer": transformer}
        else:
            encode_text, host_weights = 0, {"flux/text_encoder_2": t5}
        step = "flux/step"
        if shot.flux_identity is not None:
            injector = injector_class(shot.flux_identity)
            weights |= {network: weight_bytes(network, dtype) for network in injector.networks}
            step = injector.step_curve
        if cls.active_loras(shot):
            weights["flux/lora"] = params.adapters_kept * weight_bytes("flux/lora", dtype)
        tiles = f":tile{params.vae_tile_px}" if params.vae_tile_px else ""
        curves = [f"{step}{stored}", f"flux/decode{tiles}", *(() if tiles else ("flux/encode",))]
        activations = max(activation_bytes(curve, pixels, dtype) for curve in curves)
        passes = 2 if params.uses_negative_prompt(shot) else 1
        activations += passes * cached_bytes(params, pixels // PIXELS_PER_TOKEN + params.text_tokens, CHANNELS)
        return StageMemory(weights, max(encode_text, activations), pixels * 3 * RESULT_COPIES, host_weights)

    @classmethod
    def divided(cls, params: FluxParams) -> FluxParams | None:
        can_divide = params.attention_backend in ATTENTION_BACKENDS and not params.first_block_cache
        return params if can_divide else None

    @classmethod
    def work_with_steps(cls, params: FluxParams, shot: Shot, steps: float, *, is_new_prompt: bool) -> ShotWork:
        """Return the work of an image with this number of steps, and of the text encoder for a new prompt."""
        pixels = shot.width * shot.height
        plain = network_work("flux/step", pixels)
        step = plain._replace(launch_s=STEP_LAUNCH_S[params.compile])
        stored = "" if params.quantize == "none" else f":{FP8}"
        if params.quantize == FP8:
            step += Workload(moved_bytes=FP8_CAST_BYTES * weight_bytes(f"flux/transformer:{FP8}", params.dtype))
        prompts = 2 if params.uses_negative_prompt(shot) else 1
        step = step.times(prompts)
        fixed = network_work("flux/decode", pixels)
        if shot.flux_identity is not None:
            injector = injector_class(shot.flux_identity)
            # Once per step, whatever the number of prompts.
            own = network_work(injector.step_curve, pixels) + plain.times(-1)
            step += own.times(shot.identity_end - shot.identity_start)
            fixed += network_work("flux/encode", pixels)
        if params.compile:
            step = step._replace(moved_bytes=step.moved_bytes * COMPILED_BYTES)
        if is_new_prompt:
            fixed += network_work("flux/text").times(prompts)
            if params.text_encoder == "swapped":
                t5 = weight_bytes("flux/text_encoder_2", params.dtype)
                fixed += Workload(linked_bytes=t5 + weight_bytes(f"flux/transformer{stored}", params.dtype))
        return ShotWork(step.times(steps * computed_share(params, steps, _COMPUTED_SHARES)), fixed)

    @classmethod
    def lower_memory(cls, params: FluxParams) -> FluxParams | None:
        """Return smaller tiles of the autoencoder, then T5 taking turns with the transformer."""
        if (smaller := with_smaller_tiles(params)) is not None:
            return smaller
        return params.model_copy(update={"text_encoder": "swapped"}) if params.text_encoder == "gpu" else None

    def load(self) -> None:
        self.model = FluxModel.shared(self.params)
        self.injectors: dict[str, FluxInjector] = {}

    def move(self, device: str) -> None:
        self.model.move(device)
        for injector in self.injectors.values():
            injector.move(device)

    @property
    def adapter_loads(self) -> int:
        return self.model.adapters.loads

    def _injector(self, name: str) -> FluxInjector:
        """Return the injector, loaded on first use. Raises MissingWeights, or SetupError for weights of another kind."""
        if name not in self.injectors:
            self.injectors[name] = shared_injector(name, self.model, self.params.extra_weights_at(name))
        return self.injectors[name]

    @contextmanager
    def conditioned_pipelines(self, item: Item) -> Iterator[FluxPipelines]:
        """Yield the FLUX pipelines with the shot's LoRAs active and conditioned on its face."""
        shot = item.shot
        with self.model.loras_active(self.active_loras(shot)):
            self.note(*self.model.adapters.take_notes())
            if shot.flux_identity is None:
                yield FluxPipelines(self.model.text_to_image, self.model.image_to_image)
                return
            if "face" not in item.artefacts:
                raise StageError(
                    "face: got none, must be the face features of the shot's photos; use `vidgen shot`, which computes them, "
                    "or set `identity: none`"
                )
            face = item.face
            injector = self._injector(shot.flux_identity)
            with injector.inject(face.embedding(injector.embedding), pose_image(face, shot), shot, self.name) as pipelines:
                yield pipelines

    def steps(self, shot: Shot) -> int:
        """Return the number of steps of the whole schedule."""
        return getattr(shot.steps, self.name) or self.model.default_steps

    def generate(self, item: Item, pipeline: str, **arguments: Any) -> Image:
        """Call one of the `FluxPipelines`, with these arguments beside those that both have in common."""
        shot = item.shot
        with self.model.prepared(self.params), self.conditioned_pipelines(item) as pipelines:
            arguments |= self.model.call_arguments(shot, self.params, getattr(shot.guidance, self.name))
            guided = arguments.get("true_cfg_scale", 1) > 1
            begin_call(guided=guided)
            with self.model.cache.steps(guided=guided) if self.model.cache else nullcontext():
                (image,) = getattr(pipelines, pipeline)(
                    **arguments,
                    num_inference_steps=self.steps(shot),
                    generator=noise_generator(self.generator_seed(shot)),
                    **diffusers_step_callback(self.name),
                ).images
        return pixels_to_uint8(image)


FP8_CAST_BYTES = 6
"""Bytes per weight that a step moves to convert it from 8 bits to 16 and back."""


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
    common_settings: ClassVar[tuple[str, ...]] = ("steps", "guidance")
    uses_shot_seed: ClassVar[bool] = True
    chosen_by: ClassVar[str] = "image_by"
    reads: ClassVar[tuple[str, ...]] = (*PROMPT_FIELDS, "steps.flux", "guidance.flux", "fast_lora")
    lora_field: ClassVar[str] = "fast_lora"
    weight_fields: ClassVar[tuple[str, ...]] = ("flux_identity", "fast_lora")
    takes: ClassVar[tuple[str, ...]] = ()
    debug_file: ClassVar[str | None] = "base.png"

    @classmethod
    def work(cls, params: FluxParams, shot: Shot) -> ShotWork:
        return cls.work_with_steps(params, shot, shot.steps.flux or DEFAULT_STEPS, is_new_prompt=True)

    def run(self, item: Item) -> Artefacts:
        return {"image": self.generate(item, "text_to_image")}


class FluxRedrawStage(FluxFamilyStage):
    """`image` (H, W, 3) -> `image` of the same size, redrawn with the last steps * strength steps of the schedule, rounded
    up.

    The strength is that of the shot's field `NAME_strength`. 0 returns the image unchanged.
    Source: Meng et al. 2021, SDEdit, arXiv:2108.01073; diffusers `FluxImg2ImgPipeline`.
    """

    chosen_by: ClassVar[str] = "redrawn_by"
    takes: ClassVar[tuple[str, ...]] = ("image",)

    @classmethod
    def strength(cls, shot: Shot) -> float:
        """Return the fraction of the schedule that is run."""
        strength: float = getattr(shot, f"{cls.name}_strength")
        return strength

    @classmethod
    def work(cls, params: FluxParams, shot: Shot) -> ShotWork:
        strength = cls.strength(shot)
        steps = (getattr(shot.steps, cls.name) or DEFAULT_STEPS) * strength
        # The prompt of a shot whose image is FLUX's is still in the cache.
        steps_part, fixed, _ = cls.work_with_steps(params, shot, steps, is_new_prompt=shot.image_by != "flux")
        return ShotWork(steps_part, (fixed + network_work("flux/encode", shot.width * shot.height)).times(strength > 0))

    def run(self, item: Item) -> Artefacts:
        """Redraw the item's `image`. Raises StageError for less than one step."""

        from PIL import Image as PILImage

        shot, image = item.shot, item.image
        strength = self.strength(shot)
        if strength == 0:
            return {"image": image}
        steps = self.steps(shot)
        if int(steps * strength) < 1:
            raise StageError(
                f"{self.name}_strength: got {strength} of {steps} steps, which is less than one step; "
                f"must be at least {1 / steps:.3f}"
            )
        return {"image": self.generate(item, "image_to_image", image=PILImage.fromarray(image), strength=strength)}


class FluxLoRAStage(FluxRedrawStage):
    """`image` (H, W, 3) -> `image` of the same size, redrawn with the shot's LoRAs and conditioned on its `face`, if any.

    The stage shares its actor and weights with FLUX. Its LoRAs are active in this stage only.
    Source: Hu et al. 2021, LoRA, arXiv:2106.09685.
    """

    name: ClassVar[str] = "lora"
    label: ClassVar[str] = "LoRA"
    activity: ClassVar[str] = "Redrawing with the LoRA"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"lora": "style.safetensors"},
        {"lora": "style.safetensors", "face_image": ("photo.jpg",)},
    )
    reads: ClassVar[tuple[str, ...]] = (*PROMPT_FIELDS, "lora", "lora_strength", "steps.lora", "guidance.lora")
    lora_field: ClassVar[str] = "lora"
    weight_fields: ClassVar[tuple[str, ...]] = ("flux_identity", "lora")
    debug_file: ClassVar[str | None] = "lora.png"

    def run(self, item: Item) -> Artefacts:
        if not item.shot.lora:
            raise StageError("lora: got none, must be at least one")
        return super().run(item)


class FluxRefineStage(FluxRedrawStage):
    """`image` (H, W, 3) by SDXL -> `image` of the same size, with FLUX's light and detail and a similar face.

    In shots with LoRAs, FluxLoRAStage replaces this stage.
    """

    name: ClassVar[str] = "refine"
    label: ClassVar[str] = "Refinement"
    activity: ClassVar[str] = "Refining the image"
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"face_image": ("photo.jpg",), "identity": INSTANTID_SDXL},)
    reads: ClassVar[tuple[str, ...]] = (*PROMPT_FIELDS, "refine_strength", "steps.refine", "guidance.refine")
    weight_fields: ClassVar[tuple[str, ...]] = ("flux_identity",)
    debug_file: ClassVar[str | None] = "refine.png"
