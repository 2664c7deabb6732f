"""Super-resolution networks by name or path, and how one runs on frames: uint8 or uint16 pixels in, larger pixels of the
same type out.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from vidgen_ray.errors import SetupError, StageError, UsageError
from vidgen_ray.nets.weight_files import NOT_FINITE, require_finite_weights
from vidgen_ray.stages.base import torch_dtype, torch_threads
from vidgen_ray.stages.loading import require_device
from vidgen_ray.stages.realesrgan import ENDINGS, forward, in_tiles, load_network
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.upscale.frames import Pixels
from vidgen_ray.weights import resolve

if TYPE_CHECKING:
    import torch
    from spandrel import ImageModelDescriptor


DEFAULT_MODEL = "animevideov3"
BUILTIN_MODELS: Mapping[str, str] = {
    "animevideov3": "drawn and filmed video, fast",
    "x4plus-anime": "drawn images, ten times slower",
    "x4plus": "photos and film, about twenty times slower",
}
GENERAL, DENOISING = "general-x4v3", "general-wdn-x4v3"
"""Parts of the file names of the two weights that `denoise` mixes."""


@dataclass(frozen=True)
class UpscaleModel:
    """A network in a file, or the mixture of two files with the same layout."""

    name: str
    file: Path
    denoising_file: Path | None = None
    denoise: float = 1.0
    """Share of `file` in the weights, 0 to 1. The rest is that of `denoising_file`."""

    @cached_property
    def key(self) -> str:
        """Return the digest of the weights."""
        if self.denoising_file is None:
            return digest(self.file)
        parts = f"{digest(self.file)} {digest(self.denoising_file)} {self.denoise}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def load(self) -> ImageModelDescriptor[Any]:
        """Load the network in float32. Raises StageError if a file does not hold one, or two files do not fit together."""
        network = load_network(self.file)
        if self.denoising_file is not None:
            other = load_network(self.denoising_file).model.state_dict()
            own = network.model.state_dict()
            if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in other.items()}:
                raise StageError(f"{self.file.name} and {self.denoising_file.name} have different layouts, cannot be mixed")
            network.model.load_state_dict({name: tensor.lerp(other[name], 1 - self.denoise) for name, tensor in own.items()})
        try:
            require_finite_weights({self.name: network.model})
        except ValueError as error:
            raise StageError(str(error)) from None
        return network


def find_model(name: str, denoise: float | None = None) -> UpscaleModel:
    """Return the model with this name, or in this file.

    `denoise`, 0 to 1, needs weights named like realesr-general-x4v3 and, beside them, realesr-general-wdn-x4v3. As in
    Real-ESRGAN, 0 keeps noise, 1 removes it.
    Raises UsageError for an unknown name, and for `denoise` with other weights.
    """
    if name in BUILTIN_MODELS:
        file = next(path for ending in ENDINGS if (path := resolve("builtin:realesrgan") / f"{name}{ending}").is_file())
    else:
        file = Path(name).expanduser()
        if not file.is_file():
            allowed = f"must be one of {', '.join(BUILTIN_MODELS)}, or the path of a {' or '.join(ENDINGS)} file"
            raise UsageError(f"--model: got {name!r}, {allowed}")
        if file.suffix not in ENDINGS:
            raise UsageError(f"--model: got {name!r}, must end in {' or '.join(ENDINGS)}")
    if denoise is None:
        return UpscaleModel(file.stem, file)
    if not 0 <= denoise <= 1:
        raise UsageError(f"--denoise: got {denoise:g}, must be from 0 to 1")
    partner = file.with_name(file.name.replace(GENERAL, DENOISING))
    if GENERAL not in file.name:
        raise UsageError(f"--denoise: got weights {file.name}, must be those of realesr-{GENERAL}, by path with --model")
    if not partner.is_file():
        raise SetupError(f"--denoise: needs {partner}, which does not exist; put it beside {file.name}")
    return UpscaleModel(f"{file.stem} (denoise {denoise:g})", file, partner, denoise)


Size = tuple[int, int]
"""Width and height in pixels."""


class EngineSettings(BaseModel):
    """Settings with which a network runs. Every field can change the last bits of a result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = Field(1, ge=1)
    """CPU threads of one worker."""
    parallel_calls: int = Field(1, ge=1)
    """Calls that a worker runs at the same time, each with an equal share of its threads."""
    tile_px: int | None = None
    """Side of square tiles. `None` processes whole frames."""
    overlap_px: int = 0
    """Pixels that a tile sees of its neighbours on each side."""

    def __str__(self) -> str:
        tiles = f", tiles of {self.tile_px} px with {self.overlap_px} px overlap" if self.tile_px else ""
        calls = f"{self.parallel_calls} call{'s' if self.parallel_calls > 1 else ''} at a time on {self.threads} threads"
        return f"{self.dtype}, {calls}{tiles}"

    @property
    def threads_per_call(self) -> int:
        return max(1, self.threads // self.parallel_calls)


class UpscaleNetwork:
    """A loaded network for one output size. `settings.parallel_calls` threads may call it at the same time."""

    def __init__(self, model: UpscaleModel, settings: EngineSettings, out_size: Size | None = None) -> None:
        """Load the weights. `out_size`: size of the results in pixels. `None`: that of the network.

        Raises StageError for weights that cannot be loaded, SetupError if the device is missing.
        """
        import torch

        require_device(settings.device)
        self.settings = settings
        self.out_size = out_size
        self.network = model.load()
        dtype = torch_dtype(settings.dtype)
        supported = {torch.float16: self.network.supports_half, torch.bfloat16: self.network.supports_bfloat16}
        if not supported.get(dtype, True):
            raise StageError(f"{model.name}: {self.network.architecture.name} does not support {settings.dtype}")
        self._dtype = dtype
        self.network.model.to(settings.device, dtype, memory_format=torch.channels_last)

    @property
    def scale(self) -> int:
        """Return the network's own factor."""
        return int(self.network.scale)

    def __call__(self, frames: Sequence[Pixels]) -> list[Pixels]:
        """Upscale frames (H, W, 3) of one size. Raises StageError for NaN and infinity."""
        import torch

        # A stack owns its pixels; torch has few operations for uint16.
        stacked = np.stack(frames)
        kind = stacked.dtype
        pixels = torch.from_numpy(stacked if kind == np.uint8 else stacked.astype(np.int32)).to(self.settings.device)
        with torch.inference_mode(), torch_threads(self.settings.threads_per_call):
            levels, total = self._upscaled(pixels)
            if not total.isfinite():
                raise StageError(NOT_FINITE)
            return list(levels.cpu().numpy().astype(kind, copy=False))

    def _upscaled(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return levels (T, H, W, 3) of the type of `frames`, and the sum of the pixels, which is finite only if all are."""
        import torch

        levels = 255 if frames.dtype == torch.uint8 else 65535
        # The permuted view is in the memory format channels_last.
        pixels = (frames.permute(0, 3, 1, 2).float() / levels).to(self._dtype)
        run = partial(forward, self.network)
        if self.settings.tile_px is None:
            pixels = run(pixels)
        else:
            pixels = in_tiles(run, self.scale, pixels, self.settings.tile_px, self.settings.overlap_px)
        pixels = pixels.float()
        if self.out_size is not None and self.out_size != (pixels.shape[3], pixels.shape[2]):
            width, height = self.out_size
            pixels = torch.nn.functional.interpolate(
                pixels, size=(height, width), mode="bicubic", align_corners=False, antialias=True
            )
        total = pixels.sum()
        rounded = pixels.clamp_(0, 1).mul_(levels).round_().to(frames.dtype)
        return rounded.permute(0, 2, 3, 1).contiguous(), total


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use: those of its affinity and of the quota of its cgroup."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        if quota != "max":
            count = min(count, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(1, count)
