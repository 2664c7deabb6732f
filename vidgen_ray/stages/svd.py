"""Stable Video Diffusion: generate a clip from an image."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

from pydantic import Field

from vidgen_ray.errors import StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import (
    Frames,
    Item,
    StageParams,
    diffusers_step_callback,
    noise_generator,
    pixels_to_uint8,
)
from vidgen_ray.stages.context_parallel import divide_passes
from vidgen_ray.stages.loading import diffusers_classes, dtypes_kept, load_pipeline, move_networks
from vidgen_ray.stages.memory_table import ShotWork, StageMemory, activation_bytes, network_work, weight_bytes
from vidgen_ray.stages.schedules import SCHEDULES, ScheduleParams
from vidgen_ray.stages.speed import (
    ChannelsLastParams,
    CompileParams,
    GuidanceIntervalParams,
    compile_blocks,
    guided_in,
    has_unguided_steps,
    require_sdpa_backend,
    sdpa_backend,
    use_channels_last,
)
from vidgen_ray.stages.video import VideoStage, clip_host_bytes

_DEFAULT_STEPS = SCHEDULES["svd-xt"].steps
_DEFAULT_GUIDANCE = SCHEDULES["svd-xt"].guidance
ATTENTION_BATCH = 65_535
"""Largest batch of torch's attention kernels on a GPU (pytorch #142228). Attention between the frames has one row per 8x8
pixels and pass."""
_CARD_FACTORS = dict.fromkeys(("H100", "H100 PCIe", "H100 NVL", "GH200", "GH200 144 GB", "H200", "B200", "B300"), 1.3)
"""`card_factors` of SVD: their peak grew more than the rate of torch's kernels for convolutions. Stability AI's SVD-XT takes
22.6 s with TensorRT on an H100 PCIe and 32.2 on an A100. *Assumed:* without TensorRT 1.3 and 1.1 times as long."""
_NETWORKS = ("svd/unet", "svd/vae", "svd/image_encoder")
"""Its networks in the memory table."""
PASSES_GAIN = 1.9
"""Factor by which two GPUs or more compute a step faster, of which each half has one of its two passes. *Assumed.*"""


class SVDParams(CompileParams, ChannelsLastParams, GuidanceIntervalParams, ScheduleParams):
    schedule_actor: ClassVar[str] = "svd"

    decode_chunk_frames: int = Field(default=5, ge=1)
    """Frames that the temporal autoencoder decodes at once. More frames are smoother and need more memory."""
    forward_chunking: bool = False
    """Run feed-forward layers frame by frame, for GPUs whose memory is too small for 25 frames."""


class SVDStage(VideoStage[SVDParams]):
    """`image` (H, W, 3) -> `frames` (clip_frames, H, W, 3). The first frame is close to the image. H and W are multiples of 64.

    The model is conditioned on fps - 1, the motion bucket (1 still to 255 lively) and the noise added to the image, not on a
    prompt. Guidance rises over the frames from 1 to `guidance.svd`.
    Each clip is denoised and decoded separately, because decoding chunks across clips would mix their frames.
    Source: Blattmann et al. 2023, arXiv:2311.15127; diffusers `StableVideoDiffusionPipeline`.
    """

    name: ClassVar[str] = "svd"
    label: ClassVar[str] = "Video"
    clip_only_fields: ClassVar[tuple[str, ...]] = (
        "generate_video",
        *VideoStage.clip_only_fields,
        "motion_bucket_id",
        "noise_aug_strength",
    )
    reads: ClassVar[tuple[str, ...]] = (
        "width",
        "height",
        "num_frames",
        "extend",
        "fps",
        "motion_bucket_id",
        "noise_aug_strength",
        "steps.svd",
        "guidance.svd",
        "seed",
    )
    pipelines: ClassVar[tuple[str, ...]] = ("StableVideoDiffusionPipeline",)
    Params: ClassVar[type[StageParams]] = SVDParams
    card_factors: ClassVar[Mapping[str, float]] = _CARD_FACTORS

    @classmethod
    def check_shot(cls, params: SVDParams, shot: Shot) -> None:
        passes = 2 if _is_guided(shot) else 1
        pixels = ATTENTION_BATCH // passes * 64
        if params.device != "cpu" and shot.width * shot.height > pixels:
            raise StageError(
                f"svd: got {shot.width}x{shot.height}, must be at most {pixels:,} pixels on a GPU, such as 1920x1088; "
                "use a smaller size and `scale`, or another `video_model`"
            )

    @classmethod
    def work(cls, params: SVDParams, shot: Shot) -> ShotWork:
        pixels, frames = shot.width * shot.height, shot.num_frames
        steps = shot.steps.svd or _DEFAULT_STEPS
        guided = len(params.guided_steps(steps)) if _is_guided(shot) else 0
        two_passes = network_work("svd/step", pixels, frames)
        coding = network_work("svd/encode", pixels).in_float32 + network_work("svd/decode", pixels, frames)
        return ShotWork(two_passes.times((steps + guided) / 2), coding).times(cls.passes(shot))

    @classmethod
    def memory(cls, params: SVDParams, shot: Shot) -> StageMemory | None:
        pixels, frames, dtype = shot.width * shot.height, shot.num_frames, params.dtype
        clip = pixels * frames
        number_bytes = 4 if dtype == "float32" else 2
        decode = activation_bytes("svd/decode", pixels * min(params.decode_chunk_frames, frames), dtype)
        decode += clip * 3 * number_bytes
        phases = (
            # In float32 also with float16 weights.
            activation_bytes("svd/encode", pixels, "float16"),
            activation_bytes("svd/step:chunked" if params.forward_chunking else "svd/step", clip, dtype),
            decode,
            activation_bytes("svd/clip", clip, dtype),
        )
        weights = {network: weight_bytes(network, dtype) for network in _NETWORKS}
        # The stage itself copies uint8 to the host.
        return StageMemory(weights, max(phases), clip_host_bytes(shot))

    @classmethod
    def divided(cls, params: SVDParams) -> SVDParams:
        return params

    @classmethod
    def gain(cls, params: SVDParams, gpus: int) -> float:
        """Return the factor. Steps without guidance have one pass, which they do not divide."""
        start, stop = params.guidance_interval
        return PASSES_GAIN * (1 + stop - start) / 2 if gpus > 1 else 1.0

    @classmethod
    def lower_memory(cls, params: SVDParams) -> SVDParams | None:
        """Return parameters with half as many frames decoded at once, down to one, then with forward chunking."""
        if params.decode_chunk_frames > 1:
            return params.model_copy(update={"decode_chunk_frames": params.decode_chunk_frames // 2})
        return None if params.forward_chunking else params.model_copy(update={"forward_chunking": True})

    def load(self) -> None:
        (StableVideoDiffusionPipeline,) = diffusers_classes(self.params, "StableVideoDiffusionPipeline")

        params = self.params
        require_sdpa_backend(params.attention_backend)
        self.pipe = load_pipeline(StableVideoDiffusionPipeline, params)
        unet = self.pipe.unet
        if params.channels_last:
            use_channels_last(unet, self.pipe.vae)
        if params.compile:
            compile_blocks(unet, params.device, (type(unet).__name__,))
        divide_passes(unet)

    def move(self, device: str) -> None:
        move_networks(self.pipe.components.values(), device)

    def generate(self, item: Item) -> Frames:
        from PIL import Image as PILImage

        shot, image = item.shot, item.image
        height, width = image.shape[:2]
        if height % 64 or width % 64:
            raise StageError(f"image: got {width}x{height}, width and height must be multiples of 64")
        _set_forward_chunking(self.pipe.unet, self.params.forward_chunking)
        steps = shot.steps.svd or _DEFAULT_STEPS
        guided = (
            guided_in(self.pipe.unet, self.params.guided_steps(steps)) if has_unguided_steps(self.params) else nullcontext()
        )
        with sdpa_backend(self.params.attention_backend), dtypes_kept(self.pipe.vae), guided:
            pixels = self.pipe(
                PILImage.fromarray(image),
                height=height,
                width=width,
                num_frames=shot.num_frames,
                num_inference_steps=steps,
                max_guidance_scale=shot.guidance.svd or _DEFAULT_GUIDANCE,
                fps=shot.fps,
                motion_bucket_id=shot.motion_bucket_id,
                noise_aug_strength=shot.noise_aug_strength,
                generator=noise_generator(self.generator_seed(shot)),
                decode_chunk_size=min(self.params.decode_chunk_frames, shot.num_frames),
                output_type="pt",
                return_dict=False,
                **diffusers_step_callback(self.name),
            )
        return pixels_to_uint8(pixels[0])


def _is_guided(shot: Shot) -> bool:
    return (shot.guidance.svd or _DEFAULT_GUIDANCE) > 1


def _set_forward_chunking(unet: Any, enabled: bool) -> None:
    """Run the feed-forward layers frame by frame, or all frames at once. diffusers' UNet can only enable it."""
    if enabled:
        unet.enable_forward_chunking()
        return
    for module in unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(None)
