"""InstantID as it was published, on SDXL: the base picture of a shot with a face, drawn by other weights than FLUX."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image as PILImage
from pydantic import Field

from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.shot import INSTANTID_SDXL, Shot
from vidgen_ray.stages.base import (
    REFERENCE_PIXELS,
    Artefacts,
    FaceFeatures,
    Image,
    Item,
    Stage,
    StageParams,
    noise_generator,
    to_uint8,
    torch_dtype,
)
from vidgen_ray.stages.identity.pose import pose_image
from vidgen_ray.stages.loading import load_pipeline
from vidgen_ray.stages.progress import diffusers_step_callback

if TYPE_CHECKING:
    import torch

EMBEDDING = "antelopev2"
"""The recogniser that the weights were trained with; with any other's numbers they draw another person, unnoticed."""
INSTANTID = "instantid"
"""Under which name the profile's `extra_weights` has a folder with `ControlNetModel/` and `ip-adapter.bin`."""
NET_FOLDER, ADAPTER_FILE = "ControlNetModel", "ip-adapter.bin"
"""As published in `InstantX/InstantID`."""
PROJECTION, ATTENTION = "image_proj", "ip_adapter"
"""The parts of the adapter's file."""
MUST_AGREE = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type")
"""Of IdentityNet's configuration with the UNet's."""


class InstantIDSDXLParams(StageParams):
    """`weights` is a diffusers folder of SDXL base, `also.instantid` the folder that InstantID is published as."""

    steps: int = Field(30, ge=1, le=200)
    guidance: float = Field(5.0, gt=1, le=30)
    """Classifier-free, against the negative prompt and nobody's face."""
    adapter_scale: float = Field(0.8, ge=0, le=2)
    """How strongly the face acts through the UNet's attention where `identity_strength` is 1."""
    net_scale: float = Field(0.8, ge=0, le=2)
    """How strongly face and keypoints act through IdentityNet where `identity_strength` is 1."""


class InstantIDSDXLStage(Stage[InstantIDSDXLParams]):
    """Prompt and `face` -> `image` (height, width, 3); width and height multiples of 16.

    The face's embedding becomes 16 tokens, to which the UNet attends beside the prompt and IdentityNet in place of it;
    IdentityNet sees the keypoints, too. `identity_strength` 0 is SDXL without a face.
    Source: Wang et al. 2024, InstantID, arXiv:2401.07519; diffusers `StableDiffusionXLControlNetPipeline`, whose IP-Adapter
    Plus has the very layers of InstantID's adapter.
    """

    name: ClassVar[str] = "instantid_sdxl"
    label: ClassVar[str] = "Base image"
    activity: ClassVar[str] = "Generating the base image"
    reference_s: ClassVar[float] = 3.0
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"face_image": ("photo.jpg",), "identity": INSTANTID_SDXL},)
    version: ClassVar[int] = 1
    actor: ClassVar[str] = "instantid_sdxl"
    reads: ClassVar[tuple[str, ...]] = (
        "prompt",
        "negative_prompt",
        "width",
        "height",
        "identity_strength",
        "pose",
        "seed",
    )
    takes: ClassVar[tuple[str, ...]] = ("face",)
    writes: ClassVar[tuple[str, ...]] = ("image",)
    debug_file: ClassVar[str | None] = "base.png"
    Params: ClassVar[type[StageParams]] = InstantIDSDXLParams

    @staticmethod
    def applies(shot: Shot) -> bool:
        return shot.drawn_by_sdxl

    @classmethod
    def extra_weights(cls) -> Collection[str]:
        return (INSTANTID,)

    @classmethod
    def weight_files(cls, params: InstantIDSDXLParams, shot: Shot) -> tuple[Path, ...]:
        return (params.weights, params.extra_weights_at(INSTANTID))

    @classmethod
    def relative_cost(cls, shot: Shot) -> float:
        return shot.width * shot.height / REFERENCE_PIXELS

    def load(self) -> None:
        from diffusers import StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline

        from vidgen_ray.nets.face_resampler import build_resampler, read_parts
        from vidgen_ray.nets.identitynet import IdentityNet
        from vidgen_ray.nets.model_folder import load_model, require_same

        folder, dtype = self.params.extra_weights_at(INSTANTID), torch_dtype(self.params.dtype)
        if not folder.is_dir():
            raise SetupError(f"{folder}: no such folder; copy {NET_FOLDER}/ and {ADAPTER_FILE} of InstantX/InstantID there")
        net = load_model(IdentityNet, "ControlNetModel", folder / NET_FOLDER, dtype)
        file = folder / ADAPTER_FILE
        adapter = read_parts(file, PROJECTION, ATTENTION)
        resampler = build_resampler(adapter[PROJECTION], file)
        base = load_pipeline(StableDiffusionXLPipeline, self.params)
        require_same(net.config, base.unet.config, MUST_AGREE, folder / NET_FOLDER, "SDXL")
        if resampler.sizes.output != base.unet.config.cross_attention_dim:
            raise SetupError(
                f"{file}: gives tokens of {resampler.sizes.output} numbers, the UNet of {self.params.weights} takes "
                f"{base.unet.config.cross_attention_dim}; use SDXL base and the InstantID made for it"
            )
        self.pipe = StableDiffusionXLControlNetPipeline(
            **base.components,
            controlnet=net.to(self.params.device),
            force_zeros_for_empty_prompt=base.config.force_zeros_for_empty_prompt,
            # By default pictures get a watermark where a certain package happens to be installed.
            add_watermarker=False,
        )
        self.pipe.set_progress_bar_config(disable=True)
        try:
            self.pipe.load_ip_adapter(adapter, subfolder="", weight_name=ADAPTER_FILE, image_encoder_folder=None)
        # Foreign tensors raise whatever diffusers stumbles over.
        except Exception as error:
            raise SetupError(f"{file}: {ATTENTION} does not fit the UNet of {self.params.weights}: {error}") from error
        self.resampler = resampler.to(self.params.device, dtype)

    def move(self, device: str) -> None:
        self.pipe.to(device)
        self.resampler.to(device)

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [{"image": self._picture(item)} for item in items]

    def _picture(self, item: Item) -> Image:
        shot, face = item.shot, item.artefacts["face"]
        faces = self._nobody_and_face(face)
        self.pipe.set_ip_adapter_scale(self.params.adapter_scale * shot.identity_strength)
        with self.pipe.controlnet.identity(self.resampler(faces)):
            (picture,) = self.pipe(
                shot.prompt,
                negative_prompt=shot.negative_prompt,
                width=shot.width,
                height=shot.height,
                image=PILImage.fromarray(pose_image(face, shot)),
                # (2, 1 picture, 1 token, 512)
                ip_adapter_image_embeds=[faces[:, None, None]],
                controlnet_conditioning_scale=self.params.net_scale * shot.identity_strength,
                num_inference_steps=self.params.steps,
                guidance_scale=self.params.guidance,
                generator=noise_generator(shot, self.name),
                output_type="np",
                **diffusers_step_callback(self.name),
            ).images
        return to_uint8(picture)

    def _nobody_and_face(self, face: FaceFeatures) -> torch.Tensor:
        """Embeddings (2, 512), for the passes of classifier-free guidance without and with the person; not normalised."""
        import torch

        size, embedding = self.resampler.sizes.embedding, face.embedding(EMBEDDING)
        if embedding.shape != (size,):
            raise StageError(f"face: got an embedding of shape {embedding.shape}, {self.name} takes {size} numbers")
        person = torch.tensor(embedding, device=self.resampler.latents.device, dtype=self.resampler.latents.dtype)
        return torch.stack([torch.zeros_like(person), person])
