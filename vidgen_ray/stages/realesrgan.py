"""RealESRGAN: upscales every frame of a clip 2, 3 or 4 times, each frame on its own."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from vidgen_ray.errors import SetupError, StageError, short_reason
from vidgen_ray.nets.deferred_imports import deferred_packages
from vidgen_ray.nets.weight_files import NOT_FINITE, require_finite_weights
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import ChunkedStage, Frames, StageParams, torch_dtype
from vidgen_ray.stages.loading import move_networks, require_device
from vidgen_ray.stages.memory_table import ShotWork, StageMemory, activation_bytes, load_table, network_work, weight_bytes
from vidgen_ray.stages.speed import cpu_has_bfloat16, cudnn_benchmark, missing_compiler

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from spandrel import ImageModelDescriptor

    from vidgen_ray.nets.dense_blocks import DenseTrunk

ENDINGS = (".safetensors", ".pth")
"""File endings of weights. The first one wins if both exist."""
LARGEST_UPSCALER = "x4plus"
"""Network whose memory and work are assumed for networks that are not in the table."""
NETWORK_SCALE = 4
"""Scale of the networks in the memory table."""
UNCLAMPED = ("Compact", "ESRGAN")
"""Architectures of Real-ESRGAN: any image size, and a resize to the shot's scale sees values outside 0..1, as in ncnn."""
LARGEST_TILE_PX, SMALLEST_TILE_PX = 512, 128
"""Range of tile sizes for the OOM fallback, halved on each attempt."""


class RealESRGANParams(StageParams):
    """`weights` is a folder; a shot's `upscaler` names a file in it, without the ending .safetensors or .pth."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # type: ignore[assignment]  # one choice more
    """`auto`: float16 on a GPU, bfloat16 on a CPU that has it, otherwise float32."""
    frames_per_call: int = Field(default=4, ge=1)
    """Frames in one call of the network. Clips are cut by this number only."""
    tile_px: int | None = Field(default=None, ge=16, multiple_of=4)
    """Side of the square tiles that bound memory. `None` processes whole frames."""
    cudnn_benchmark: bool = False
    """Let cuDNN choose its convolutions by timing them, for each size. Its choice may change the last bits of a result."""
    dense_kernel: bool = False
    """Run the dense blocks of networks like x4plus in a Triton kernel, on a GPU. It moves about a third of the memory."""
    tile_overlap_px: int = Field(default=32, ge=0, multiple_of=4)
    """Pixels that a tile sees of its neighbours on each side. The receptive field of animevideov3 is 18 pixels, so from 20 on
    tiling changes nothing. RRDBNet's is larger: x4plus-anime differs by up to 9 of 255 levels at 32 and by 1 at 48."""

    def resolved(self) -> Self:
        """Return a copy with `auto` replaced by the dtype that it means on this machine."""
        if self.dtype != "auto":
            return self
        on_cpu = "bfloat16" if cpu_has_bfloat16() else "float32"
        return self.model_copy(update={"dtype": on_cpu if self.device == "cpu" else "float16"})


def _traced(upscaler: str) -> str:
    """Return the network of the table that stands for this one."""
    return upscaler if f"realesrgan/{upscaler}" in load_table().weights else LARGEST_UPSCALER


class RealESRGANStage(ChunkedStage[RealESRGANParams]):
    """`frames` uint8 (T, H, W, 3) -> `hd_frames` uint8 (T, scale * H, scale * W, 3).

    Runs any single-image super-resolution network that spandrel loads. If the network's own scale differs from the shot's, its
    output is resized bicubically before rounding, as Real-ESRGAN's ncnn models x2 and x3 do.
    Source: Wang et al. 2021, arXiv:2107.10833; xinntao/Real-ESRGAN `realesrgan/utils.py`.
    """

    name: ClassVar[str] = "realesrgan"
    label: ClassVar[str] = "Upscale"
    activity: ClassVar[str] = "Upscaling"
    chosen_by: ClassVar[str] = "upscale_video"
    # Convolutions with few channels.
    compute_share: ClassVar[float] = 0.2
    reads: ClassVar[tuple[str, ...]] = ("scale", "upscaler")
    clip_only_fields: ClassVar[tuple[str, ...]] = ("upscale_video", "scale", "upscaler")
    switch_off: ClassVar[Mapping[str, Any]] = {"upscale_video": False}
    weight_fields: ClassVar[tuple[str, ...]] = ("upscaler",)
    takes: ClassVar[tuple[str, ...]] = ("frames",)
    writes: ClassVar[tuple[str, ...]] = ("hd_frames",)
    Params: ClassVar[type[StageParams]] = RealESRGANParams
    _transfers: Transfers | None = None
    """Copies of frames from and to a GPU. `None` on a CPU."""
    antialias: ClassVar[bool] = False
    """Average pixels where the network's output is made smaller. Real-ESRGAN's ncnn models do not."""

    @classmethod
    def weight_files(cls, params: RealESRGANParams, shot: Shot) -> tuple[Path, ...]:
        return (weights_file(params.weights, shot.upscaler),)

    @classmethod
    def work(cls, params: RealESRGANParams, shot: Shot) -> ShotWork:
        network = network_work(f"realesrgan/{_traced(shot.upscaler)}", shot.width * shot.height)
        return ShotWork(network.times(shot.clip_frames))

    @classmethod
    def variant(cls, shot: Shot) -> str:
        return shot.upscaler

    @classmethod
    def lower_memory(cls, params: RealESRGANParams) -> RealESRGANParams | None:
        """Return one frame per call, then tiles of 512, 256 and 128 pixels."""
        if params.frames_per_call > 1:
            return params.model_copy(update={"frames_per_call": 1})
        smaller = LARGEST_TILE_PX if params.tile_px is None else params.tile_px // 2
        return params.model_copy(update={"tile_px": smaller}) if smaller >= SMALLEST_TILE_PX else None

    @classmethod
    def memory(cls, params: RealESRGANParams, shot: Shot) -> StageMemory | None:
        dtype = params.resolved().dtype
        known = _traced(shot.upscaler)
        pixels, frames = shot.width * shot.height, min(params.frames_per_call, shot.clip_frames)
        # Upscaled pixels of a call in float32 and uint8.
        call_bytes = pixels * frames * shot.scale**2 * 3 * (4 + 1)
        if params.tile_px is None:
            peak = activation_bytes(f"realesrgan/{known}", pixels * frames, dtype)
        else:
            tile = min(pixels, (params.tile_px + 2 * params.tile_overlap_px) ** 2)
            peak = activation_bytes(f"realesrgan/{known}:network", tile * frames, dtype) + pixels * frames * 16 * 3 * (4 + 1)
        if shot.scale != NETWORK_SCALE:
            peak += call_bytes
        # One result is on its way to the host while the next one is computed.
        frame_bytes, result_bytes = pixels * frames * 3, pixels * frames * shot.scale**2 * 3
        peak += result_bytes
        host = 2 * (frame_bytes + result_bytes)
        return StageMemory({f"realesrgan/{shot.upscaler}": weight_bytes(f"realesrgan/{known}", dtype)}, peak, host)

    @classmethod
    def chunk_frames(cls, params: RealESRGANParams) -> int:
        return params.frames_per_call

    @staticmethod
    def scale_factor(shot: Shot) -> int:
        return shot.scale

    @classmethod
    def check_weights(cls, params: RealESRGANParams) -> None:
        if not any(file for ending in ENDINGS for file in params.weights.glob(f"*{ending}")):
            raise SetupError(f"realesrgan: got weights {str(params.weights)!r}, must be a folder of .safetensors or .pth files")

    def load(self) -> None:
        """Check the folder. A network is loaded with the first shot that names it, and stays loaded."""
        self.check_weights(self.params)
        require_device(self.params.device)
        if self.params.dense_kernel:
            missing = missing_compiler(self.params.device) if self.params.device.startswith("cuda") else "an NVIDIA GPU"
            if missing is not None:
                raise SetupError(f"dense_kernel: needs {missing}, or set `dense_kernel: false`")
        self._trunks: dict[int, DenseTrunk] = {}
        self._dtype = torch_dtype(self.params.resolved().dtype)
        self._networks: dict[str, ImageModelDescriptor[Any]] = {}
        self._transfers = Transfers(self.params.device) if self.params.device.startswith("cuda") else None

    def move(self, device: str) -> None:
        move_networks((network.model for network in self._networks.values()), device)

    def process_chunk(self, shot: Shot, frames: Frames, chunk: slice) -> Frames:
        return _to_frames(self._upscale(frames, shot.scale, shot.upscaler), frames.dtype)

    def start_chunk(self, shot: Shot, frames: Frames, chunk: slice, output: Frames) -> Callable[[], None]:
        if self._transfers is None:
            return super().start_chunk(shot, frames, chunk, output)
        on_gpu = self._transfers.to_gpu(frames)
        pixels = self._upscale(on_gpu, shot.scale, shot.upscaler)
        return self._transfers.to_host(*_levels(pixels, 255), output)

    def _upscale(self, frames: NDArray[Any] | torch.Tensor, scale: int, upscaler: str) -> torch.Tensor:
        """Upscale (T, H, W, 3), uint8 or uint16, to fp32 (T, 3, height, width) of `_out_size`, about 0 to 1.

        `frames` may be uint8 on the device. The memory format is channels_last.
        """
        import numpy as np
        import torch

        network = self._network(upscaler)
        size = self._out_size(frames.shape[2], frames.shape[1], scale)
        if isinstance(frames, torch.Tensor):
            owned, levels = frames, 255
        else:
            levels = np.iinfo(frames.dtype).max
            # A copy: frames shared between processes are read-only. torch has few operations for uint16.
            owned = torch.tensor(frames if levels == 255 else frames.astype(np.int32), device=self.params.device)
        pixels = owned.permute(0, 3, 1, 2)  # (frames, channels, height, width)
        pixels = (pixels.float() / levels).to(network.dtype, memory_format=torch.channels_last)
        run = self._forward(network)
        with cudnn_benchmark(self.params.cudnn_benchmark):
            if self.params.tile_px is None:
                pixels = run(pixels).float()
            else:
                pixels = in_tiles(run, network.scale, pixels, self.params.tile_px, self.params.tile_overlap_px)
        if size == (pixels.shape[3], pixels.shape[2]):
            return pixels
        return torch.nn.functional.interpolate(
            pixels, size=size[::-1], mode="bicubic", align_corners=False, antialias=self.antialias
        )

    def _out_size(self, width: int, height: int, scale: int) -> tuple[int, int]:
        """Return width and height in pixels of the result for frames of this size."""
        return width * scale, height * scale

    def _forward(self, network: ImageModelDescriptor[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function that runs the network: (T, 3, H, W) -> (T, 3, own scale * H, own scale * W)."""
        run: Callable[[torch.Tensor], torch.Tensor] = partial(forward, network)
        if not self.params.dense_kernel:
            is_serial = self.params.device == "cpu" and self.params.threads == 1 and network.architecture.id in UNCLAMPED
            return partial(in_two_threads, run) if is_serial else run
        from vidgen_ray.nets.dense_blocks import DenseTrunk, supports

        if id(network) not in self._trunks and supports(network.model):
            self._trunks[id(network)] = DenseTrunk(network.model)
        return self._trunks.get(id(network), run)

    def _network(self, upscaler: str) -> ImageModelDescriptor[Any]:
        """Return the network, loaded on first use. It stays in float32 if it does not support the stage's dtype."""
        import torch

        if upscaler not in self._networks:
            # Weights that are made in inference mode, in which stages run, cannot be moved outside of it.
            with torch.inference_mode(False):
                network = load_network(weights_file(self.params.weights, upscaler))
                supported = {torch.float16: network.supports_half, torch.bfloat16: network.supports_bfloat16}
                dtype = self._dtype if supported.get(self._dtype, True) else torch.float32
                network.model.to(self.params.device, dtype, memory_format=torch.channels_last)
            require_finite_weights({f"upscaler {upscaler}": network.model}, StageError)
            self._networks[upscaler] = network
        return self._networks[upscaler]


def weights_file(folder: Path, upscaler: str) -> Path:
    """Return the weights file of that name. Raises StageError with the names that exist."""
    for ending in ENDINGS:
        if (file := folder / f"{upscaler}{ending}").is_file():
            return file
    names = sorted({file.stem for ending in ENDINGS for file in folder.glob(f"*{ending}")})
    allowed = f"must be one of {', '.join(names)}" if names else "but there is no .safetensors or .pth file"
    raise StageError(f"upscaler: got {upscaler!r}, {allowed} in {folder}")


def load_network(file: Path) -> ImageModelDescriptor[Any]:
    """Load a super-resolution network of any architecture that spandrel knows, in float32.

    `.safetensors` holds a state dict; `.pth` may hold it under `params_ema`, which is preferred, or `params`.
    Raises StageError for other files and for networks that do not map one RGB image to a larger one.
    """
    from safetensors.torch import load_file

    if "spandrel" not in sys.modules:
        # torchvision, which some of its architectures need, imports torch's compiler.
        with deferred_packages():
            import spandrel  # noqa: F401
    from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError

    from vidgen_ray.nets.weight_files import NotTensors, load_torch_file

    try:
        safe = file.suffix == ".safetensors"
        state = load_file(file) if safe else load_torch_file(file)
        network = ModelLoader().load_from_state_dict(state)
    except UnsupportedModelError as error:
        raise StageError(f"upscaler {file.name}: no architecture of spandrel has these weights") from error
    except NotTensors as error:
        advice = "copy the file again, or save its state dict as .safetensors"
        raise StageError(f"upscaler {file.name}: {error}; {advice}") from None
    # Damaged files and near misses of an architecture raise errors of any class.
    except Exception as error:
        reason = short_reason(error)
        raise StageError(f"upscaler {file.name}: cannot be loaded: {reason}") from error
    channels = network.input_channels, network.output_channels
    if not isinstance(network, ImageModelDescriptor) or network.purpose != "SR" or channels != (3, 3):
        raise StageError(
            f"upscaler {file.name}: got {network.architecture.id} with purpose {network.purpose} from "
            f"{channels[0]} to {channels[1]} channels, must be a super-resolution network (purpose SR) from RGB to RGB"
        )
    network.model.eval().requires_grad_(False)
    return network


def forward(network: ImageModelDescriptor[Any], pixels: torch.Tensor) -> torch.Tensor:
    """Run the network: (T, 3, H, W) -> (T, 3, scale * H, scale * W)."""
    import torch

    if network.architecture.id == "Compact":
        return _forward_compact(network.model, pixels)
    if network.architecture.id in UNCLAMPED:
        output: torch.Tensor = network.model(pixels)
        return output
    # spandrel's call takes one image. It pads it to a size that the network accepts and clamps the output to 0..1.
    return torch.cat([network(image[None]) for image in pixels])


def in_two_threads(run: Callable[[torch.Tensor], torch.Tensor], frames: torch.Tensor) -> torch.Tensor:
    """Return `run(frames)`, half of the frames from each of two threads. Two threads of torch could change the last bits."""
    import torch

    def run_half(half: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return run(half)

    if len(frames) == 1:
        return run(frames)
    # A new thread would start with as many threads of torch as there are cores.
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return torch.cat([*pool.map(run_half, frames.tensor_split(2))])


def _forward_compact(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Return bit for bit what SRVGGNetCompact returns, without enlarging its input.

    The input is added to the channels that become the pixels around it.
    """
    residual = pixels
    for layer in model.body:
        residual = layer(residual)
    shares = residual.shape[1] // pixels.shape[1]
    repeated = pixels.permute(0, 2, 3, 1)[..., None].expand(-1, -1, -1, -1, shares).flatten(3)
    # To add the pixels without repeating them takes torch seven times as long in bfloat16 on a CPU.
    residual.add_(repeated.permute(0, 3, 1, 2))
    output: torch.Tensor = model.upsampler(residual)
    return output


def in_tiles(
    model: Callable[[torch.Tensor], torch.Tensor], scale: int, pixels: torch.Tensor, tile_px: int, overlap_px: int
) -> torch.Tensor:
    """Compute `model(pixels)` in float32, one tile at a time: (T, 3, H, W) -> (T, 3, scale * H, scale * W).

    A tile is cut with the overlap around it, less at the image border, and cropped again. Every output pixel comes from one
    tile, so nothing is blended.
    """
    import torch

    n_frames, channels, height, width = pixels.shape
    joined = torch.empty(
        (n_frames, channels, height * scale, width * scale), device=pixels.device, memory_format=torch.channels_last
    )
    for top in range(0, height, tile_px):
        for left in range(0, width, tile_px):
            bottom, right = min(top + tile_px, height), min(left + tile_px, width)
            seen_top, seen_left = max(top - overlap_px, 0), max(left - overlap_px, 0)
            tile = model(pixels[..., seen_top : bottom + overlap_px, seen_left : right + overlap_px])
            joined[..., top * scale : bottom * scale, left * scale : right * scale] = tile[
                ...,
                (top - seen_top) * scale : (bottom - seen_top) * scale,
                (left - seen_left) * scale : (right - seen_left) * scale,
            ]
    return joined


def _to_frames(pixels: torch.Tensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Convert (T, 3, H, W), about 0 to 1, in place to uint8 or uint16 (T, H, W, 3), clamped and rounded as RealESRGANer does.

    Raises StageError for NaN and infinity.
    """
    import numpy as np

    largest = np.iinfo(dtype).max
    levels, is_finite = _levels(pixels, largest)
    if not is_finite:
        raise StageError(NOT_FINITE)
    frames: NDArray[Any] = levels.cpu().numpy()
    return frames.astype(dtype, copy=False)


def _levels(pixels: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the levels (T, H, W, 3) of pixels (T, 3, H, W), made in place, and whether all pixels are finite."""
    import torch

    # The sum is finite only if all pixels are. It needs no tensor of its own.
    is_finite = pixels.sum(dtype=torch.float64).isfinite()
    levels = pixels.clamp_(0, 1).mul_(largest).round_().to(torch.uint8 if largest == 255 else torch.int32)
    return levels.permute(0, 2, 3, 1), is_finite


class Transfers:
    """Copies frames to a GPU, and results to the host while the GPU computes the next ones.

    Two sets of pinned buffers take turns, so a result must be on the host before the next but one is started.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._buffers: tuple[dict[str, torch.Tensor], ...] = ({}, {})

    def to_gpu(self, frames: Frames) -> torch.Tensor:
        """Start to copy frames to the GPU, with the next set of buffers."""
        import torch

        self._buffers = self._buffers[::-1]
        buffer = self._buffer("frames", frames.shape, torch.uint8)
        buffer.numpy()[:] = frames
        return buffer.to(self._device, non_blocking=True)

    def to_host(self, levels: torch.Tensor, is_finite: torch.Tensor, output: Frames) -> Callable[[], None]:
        """Start to copy a result. Return a function that waits for it, and writes it into `output`.

        The function raises StageError if it is not finite.
        """
        import torch

        levels = levels.contiguous()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        on_host = []
        with torch.cuda.stream(self._stream):
            for name, tensor in (("levels", levels), ("is_finite", is_finite)):
                on_host.append(self._buffer(name, tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True))
                # Its memory is not used again before it is copied.
                tensor.record_stream(self._stream)
        copied = self._stream.record_event()

        def finish() -> None:
            copied.synchronize()
            if not on_host[1]:
                raise StageError(NOT_FINITE)
            output[:] = on_host[0].numpy()

        return finish

    def _buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return this buffer of the current set. It grows to the largest shape, because pinning memory waits for the GPU."""
        buffers, numbers = self._buffers[0], math.prod(shape)
        if name not in buffers or len(buffers[name]) < numbers:
            buffers[name] = pinned_memory(numbers, dtype)
        return buffers[name][:numbers].view(tuple(shape))


def pinned_memory(numbers: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    return torch.empty(numbers, dtype=dtype, pin_memory=True)
