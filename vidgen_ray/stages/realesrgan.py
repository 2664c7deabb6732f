"""RealESRGAN: every frame of a clip, 2, 3 or 4 times as wide and high. Frames know nothing of each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from pydantic import Field

from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import (
    REFERENCE_FRAMES,
    REFERENCE_PIXELS,
    Artefacts,
    Frames,
    Item,
    Stage,
    StageParams,
    torch_dtype,
    torch_threads,
)
from vidgen_ray.stages.loading import require_device
from vidgen_ray.stages.progress import report

if TYPE_CHECKING:
    import torch

ENDINGS = (".safetensors", ".pth")
"""Of weights files; the first wins where a name has both."""
ARCHITECTURES = {"Compact": "SRVGGNetCompact", "ESRGAN": "RRDBNet"}
"""spandrel's name -> Real-ESRGAN's. Both take pictures of any size."""
RELATIVE_COST = {"animevideov3": 1.0, "x4plus-anime": 10.0, "x4plus": 23.0}
"""Seconds of a frame by the built-in networks, in those of the default one; measured on a CPU in float32."""
LARGEST_TILE_PX, SMALLEST_TILE_PX = 512, 128
"""Tried in turn, halved, where a card's memory does not suffice."""
CPUINFO = Path("/proc/cpuinfo")


class RealESRGANParams(StageParams):
    """`weights` is a folder; a shot's `upscaler` names a file in it, without the ending .safetensors or .pth."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"  # type: ignore[assignment]  # one choice more
    """auto: float16 on a GPU, bfloat16 on a CPU that multiplies it in hardware (twice as fast), float32 elsewhere."""
    frames_per_call: int = Field(4, ge=1)
    """Frames in one call of the network. Clips are cut by this number and by nothing else."""
    tile_px: int | None = Field(None, ge=16, multiple_of=4)
    """Side of the squares in which a frame passes the network, to bound memory; none: whole frames."""
    tile_overlap_px: int = Field(32, ge=0, multiple_of=4)
    """What a tile sees of its neighbours on each side. animevideov3 sees 18 pixels far, so from 20 on tiles change
    nothing. RRDBNet sees further: with x4plus-anime single pixels change by up to 9 levels of 255 at 32, 1 at 48."""

    def resolved(self) -> Self:
        """The same with `auto` replaced by the dtype that it means on this machine."""
        if self.dtype != "auto":
            return self
        if self.device != "cpu":
            return self.model_copy(update={"dtype": "float16"})
        return self.model_copy(update={"dtype": "bfloat16" if _cpu_multiplies_bfloat16() else "float32"})


class RealESRGANStage(Stage[RealESRGANParams]):
    """`frames` uint8 (T, H, W, 3) -> `hd_frames` uint8 (T, scale * H, scale * W, 3).

    A network has a scale of its own, 4 for all that are built in. For another one its result is resized by bicubic
    interpolation before it is rounded, as in Real-ESRGAN's ncnn models of x2 and x3.
    A clip is cut by `frame_chunks`; whoever upscales the chunks, here or in other processes, gets the same bytes.
    Source: Wang et al. 2021, arXiv:2107.10833; xinntao/Real-ESRGAN `realesrgan/utils.py`.
    """

    name: ClassVar[str] = "realesrgan"
    version: ClassVar[int] = 1
    actor: ClassVar[str] = "realesrgan"
    reads: ClassVar[tuple[str, ...]] = ("scale", "upscaler")
    takes: ClassVar[tuple[str, ...]] = ("frames",)
    writes: ClassVar[tuple[str, ...]] = ("hd_frames",)
    Params: ClassVar[type[StageParams]] = RealESRGANParams

    @staticmethod
    def applies(shot: Shot) -> bool:
        return shot.generate_video and shot.upscale_video

    @classmethod
    def weight_files(cls, params: RealESRGANParams, shot: Shot) -> tuple[Path, ...]:
        return (weights_file(params.weights, shot.upscaler),)

    @classmethod
    def relative_cost(cls, shot: Shot) -> float:
        pixels, frames = shot.width * shot.height / REFERENCE_PIXELS, shot.num_frames / REFERENCE_FRAMES
        return pixels * frames * RELATIVE_COST.get(shot.upscaler, 1.0)

    @classmethod
    def lower_memory(cls, params: RealESRGANParams) -> RealESRGANParams | None:
        """One frame at a time, then tiles of 512, 256 and 128 pixels."""
        if params.frames_per_call > 1:
            return params.model_copy(update={"frames_per_call": 1})
        smaller = LARGEST_TILE_PX if params.tile_px is None else params.tile_px // 2
        return params.model_copy(update={"tile_px": smaller}) if smaller >= SMALLEST_TILE_PX else None

    def load(self) -> None:
        """Check the folder. The networks come with the first shot that names them, and stay."""
        if not self.params.weights.is_dir():
            raise SetupError(
                f"realesrgan: got weights {str(self.params.weights)!r}, must be a folder of .safetensors or .pth files"
            )
        require_device(self.params.device)
        self._dtype = torch_dtype(self.params.resolved().dtype)
        self._networks: dict[str, Any] = {}

    def move(self, device: str) -> None:
        for network in self._networks.values():
            network.model.to(device)

    def run(self, items: Sequence[Item]) -> list[Artefacts]:
        return [{"hd_frames": self.upscale(item.artefacts["frames"], item.shot.scale, item.shot.upscaler)} for item in items]

    def upscale(self, frames: Frames, scale: int, upscaler: str) -> Frames:
        """uint8 (T, H, W, 3) -> uint8 (T, scale * H, scale * W, 3), of a whole clip or of one of its chunks."""
        import torch

        n_frames, height, width, _ = frames.shape
        upscaled = np.empty((n_frames, height * scale, width * scale, 3), np.uint8)
        with torch.inference_mode(), torch_threads(self.params.threads):
            for chunk in frame_chunks(n_frames, self.params.frames_per_call):
                upscaled[chunk] = _to_frames(self._one_call(frames[chunk], scale, upscaler))
                report(self.name, chunk.stop, n_frames)
        return upscaled

    def upscale_float(self, frames: Frames, scale: int, upscaler: str) -> NDArray[np.float32]:
        """What `upscale` clamps and rounds, all frames in one call: (T, scale * H, scale * W, 3), about 0 to 1."""
        import torch

        with torch.inference_mode(), torch_threads(self.params.threads):
            pixels = self._one_call(frames, scale, upscaler)
            upscaled: NDArray[np.float32] = rearrange(pixels, "t c h w -> t h w c").cpu().numpy()
        return upscaled

    def _one_call(self, frames: Frames, scale: int, upscaler: str) -> torch.Tensor:
        """uint8 (T, H, W, 3) -> fp32 (T, 3, scale * H, scale * W), in the memory format channels_last."""
        import torch

        network = self._network(upscaler)
        height, width = frames.shape[1:3]
        # A copy: frames that other processes share are read-only.
        pixels = rearrange(torch.tensor(frames, device=self.params.device), "t h w c -> t c h w")
        pixels = (pixels.float() / 255).to(self._dtype, memory_format=torch.channels_last)
        if self.params.tile_px is None:
            pixels = network.model(pixels).float()
        else:
            pixels = _in_tiles(network.model, network.scale, pixels, self.params.tile_px, self.params.tile_overlap_px)
        if network.scale == scale:
            return pixels
        return torch.nn.functional.interpolate(
            pixels, size=(height * scale, width * scale), mode="bicubic", align_corners=False
        )

    def _network(self, upscaler: str) -> Any:
        """spandrel's descriptor of the network, loaded if it is not there."""
        import torch

        if upscaler not in self._networks:
            network = load_network(weights_file(self.params.weights, upscaler))
            network.model.to(self.params.device, self._dtype, memory_format=torch.channels_last)
            self._networks[upscaler] = network
        return self._networks[upscaler]


def frame_chunks(n_frames: int, frames_per_call: int) -> list[slice]:
    """How a clip is cut for the network: half-open ranges of frames, in order."""
    return [slice(begin, min(begin + frames_per_call, n_frames)) for begin in range(0, n_frames, frames_per_call)]


def weights_file(folder: Path, upscaler: str) -> Path:
    """The file of that name in the folder. Raises StageError with the names that are there."""
    for ending in ENDINGS:
        if (file := folder / f"{upscaler}{ending}").is_file():
            return file
    there = sorted({file.stem for ending in ENDINGS for file in folder.glob(f"*{ending}")})
    allowed = f"must be one of {', '.join(there)}" if there else "but there is no .safetensors or .pth file"
    raise StageError(f"upscaler: got {upscaler!r}, {allowed} in {folder}")


def load_network(file: Path) -> Any:
    """spandrel's descriptor of a Real-ESRGAN network in fp32: `model` and its `scale`.

    `.safetensors` holds a state dict; `.pth` may hold it under `params_ema`, which is preferred, or `params`.
    """
    import torch
    from safetensors.torch import load_file
    from spandrel import ModelLoader, UnsupportedModelError

    try:
        safe = file.suffix == ".safetensors"
        state = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        network = ModelLoader().load_from_state_dict(state)
    except UnsupportedModelError as error:
        raise StageError(f"upscaler {file.name}: no architecture of spandrel has these weights") from error
    # Damaged files and near misses of an architecture raise whatever their reader stumbles over.
    except Exception as error:
        raise StageError(f"upscaler {file.name}: cannot be loaded: {error}") from error
    if network.architecture.id not in ARCHITECTURES or (network.input_channels, network.output_channels) != (3, 3):
        raise StageError(
            f"upscaler {file.name}: got {network.architecture.id} from {network.input_channels} to "
            f"{network.output_channels} channels, must be {' or '.join(ARCHITECTURES.values())} from RGB to RGB"
        )
    network.model.eval().requires_grad_(False)
    return network


def _in_tiles(
    model: Callable[[torch.Tensor], torch.Tensor], scale: int, pixels: torch.Tensor, tile_px: int, overlap_px: int
) -> torch.Tensor:
    """`model(pixels)` in fp32, one square at a time: (T, 3, H, W) -> (T, 3, scale * H, scale * W).

    A tile is cut with the overlap around it, less where the picture ends, and loses it again: every output pixel comes
    from one tile, so there is nothing to blend.
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


def _to_frames(pixels: torch.Tensor) -> Frames:
    """(T, 3, H, W), 0 to 1, changed in place -> uint8 (T, H, W, 3), clamped and rounded as RealESRGANer does."""
    import torch

    levels = pixels.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    frames: Frames = rearrange(levels, "t c h w -> t h w c").cpu().numpy()
    return frames


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has AVX512-BF16 or AMX. Only Linux tells; elsewhere the answer is no."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags[1].split())
