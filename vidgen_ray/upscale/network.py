"""Super-resolution networks by name or path, the settings with which one runs on this machine, and how it runs on frames:
uint8 or uint16 pixels in, larger pixels of the same type out.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple
from weakref import finalize

import numpy as np
from pydantic import Field

from vidgen_ray.errors import SetupError, StageError, StrictModel, UsageError, install_command
from vidgen_ray.nets.deferred_imports import deferred_packages
from vidgen_ray.nets.weight_files import require_finite_weights
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import torch_dtype, torch_threads
from vidgen_ray.stages.loading import require_device
from vidgen_ray.stages.realesrgan import ENDINGS, UNCLAMPED, RealESRGANParams, RealESRGANStage, forward, load_network
from vidgen_ray.stages.speed import cpu_has_bfloat16
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.system.free_memory import free_bytes
from vidgen_ray.upscale.frames import Pixels
from vidgen_ray.upscale.source import VideoSource
from vidgen_ray.weights import resolve

if TYPE_CHECKING:
    import torch
    from spandrel import ImageModelDescriptor


DEFAULT_NETWORK = "animevideov3"
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
    is_builtin: bool = False
    """True for the networks that come with vidgen, not for a file of the same name."""

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
        require_finite_weights({self.name: network.model}, StageError)
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
        # Tasks of a cluster have other working directories.
        file = Path(name).expanduser().absolute()
        if not file.is_file():
            allowed = f"must be one of {', '.join(BUILTIN_MODELS)}, or the path of a {' or '.join(ENDINGS)} file"
            raise UsageError(f"--model: got {name!r}, {allowed}")
        if file.suffix not in ENDINGS:
            raise UsageError(f"--model: got {name!r}, must end in {' or '.join(ENDINGS)}")
    if denoise is None:
        return UpscaleModel(file.stem, file, is_builtin=name in BUILTIN_MODELS)
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


class EngineSettings(StrictModel):
    """Settings with which a network runs. Every field can change the last bits of a result."""

    engine: Literal["torch", "openvino"] = "torch"
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    threads: int = Field(default=1, ge=1)
    """CPU threads of one worker."""
    parallel_calls: int = Field(default=1, ge=1)
    """Calls that a worker runs at the same time, each with an equal share of its threads."""
    tile_px: int | None = None
    """Side of square tiles. `None` processes whole frames."""
    overlap_px: int = 0
    """Pixels that a tile sees of its neighbours on each side."""

    def __str__(self) -> str:
        tiles = f", tiles of {self.tile_px} px with {self.overlap_px} px overlap" if self.tile_px else ""
        calls = f"{self.parallel_calls} call{'s' if self.parallel_calls > 1 else ''} at a time on {self.threads} threads"
        return f"{self.engine} {self.dtype}, {calls}{tiles}"

    @property
    def threads_per_call(self) -> int:
        return max(1, self.threads // self.parallel_calls)


DEFAULT_SHOT = Shot(prompt="-")
"""Fields of the stage for a video that is not part of a shot."""


class UpscaleNetwork(RealESRGANStage):
    """The stage with one network, for frames of one video: also of 16 bits and for any output size.

    `settings.parallel_calls` threads may call it at the same time.
    """

    antialias: ClassVar[bool] = True

    def __init__(
        self, model: UpscaleModel, settings: EngineSettings, out_size: Size | None = None, shot: Shot = DEFAULT_SHOT
    ) -> None:
        """Load the weights. `out_size`: size of the results in pixels. `None`: that of the network. `shot`: see `DEFAULT_SHOT`.

        Raises StageError for weights that cannot be loaded, SetupError if the device or OpenVINO is missing.
        """
        import torch

        super().__init__(
            RealESRGANParams(
                weights=model.file.parent,
                device=settings.device,
                dtype=settings.dtype,
                threads=settings.threads_per_call,
                frames_per_call=1,
                tile_px=settings.tile_px,
                tile_overlap_px=settings.overlap_px,
            )
        )
        require_device(settings.device)
        self.settings = settings
        self.out_size = out_size
        self._shot = shot
        self.network = model.load()
        dtype = torch_dtype(settings.dtype)
        supported = {torch.float16: self.network.supports_half, torch.bfloat16: self.network.supports_bfloat16}
        if not supported.get(dtype, True):
            raise StageError(f"{model.name}: {self.network.architecture.name} does not support {settings.dtype}")
        if settings.engine == "openvino":
            self._run = openvino_forward(self.network, settings)
        else:
            self.network.model.to(settings.device, dtype, memory_format=torch.channels_last)
            self._run = super()._forward(self.network)

    def __call__(self, frame: Pixels) -> Pixels:  # type: ignore[override]  # a frame, not an item
        """Upscale a frame (H, W, 3). Raises StageError for NaN and infinity."""
        import torch

        with torch.inference_mode(), torch_threads(self.params.threads):
            frames = self.process_chunk(self._shot, np.ascontiguousarray(frame)[None], slice(0, 1))
        return np.ascontiguousarray(frames[0])

    def _network(self, upscaler: str) -> ImageModelDescriptor[Any]:
        return self.network

    def _forward(self, network: ImageModelDescriptor[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
        return self._run

    def _out_size(self, width: int, height: int, scale: int) -> Size:
        return self.out_size or (width * self.network.scale, height * self.network.scale)


EXAMPLE_SHAPE = (1, 3, 8, 8)
PADDED_EXAMPLE_PX = 48
"""Side of an example for networks that accept some sizes only."""


def openvino_forward(network: ImageModelDescriptor[Any], settings: EngineSettings) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that runs the network in OpenVINO in float32, compiled for each new shape. Raises SetupError.

    The network must accept any size.
    """
    import torch

    if not has_openvino():
        raise SetupError(f"engine openvino: the package is not installed; {install_command('openvino')}")
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": settings.threads,
        "NUM_STREAMS": settings.parallel_calls,
    }
    lock = threading.Lock()

    # The conversion runs the network on its example: a frame would take longer than some clips.
    graph = openvino.convert_model(network.model, example_input=torch.zeros(EXAMPLE_SHAPE), input=[-1, 3, -1, -1])

    @cache
    def compiled(shape: tuple[int, ...]) -> Any:
        graph.reshape(list(shape))
        return core.compile_model(graph, "CPU", options)

    def run(pixels: torch.Tensor) -> torch.Tensor:
        with lock:
            network_of_shape = compiled(tuple(pixels.shape))
        # A request serves one call at a time.
        request = network_of_shape.create_infer_request()
        result = request.infer([pixels.contiguous().numpy()], share_outputs=False)
        return torch.from_numpy(next(iter(result.values())))

    return run


def has_openvino() -> bool:
    return find_spec("openvino") is not None


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


CPUS_PER_WORKER = 8
"""A worker has one encoder, which keeps up with a network on this many CPUs."""
PARALLEL_CALLS = 2
"""Calls at the same time in one worker on CPUs: one computes while threads of the other wait for each other."""
OVERLAP_PX = {"Compact": 20, "ESRGAN": 64}
"""Architecture -> pixels around a tile that it must see to have the untiled result, within a quarter of a level."""
OTHER_OVERLAP_PX = 128
_MULTIPLE_PX = 4
MIN_TILE_PX = 64
MEMORY_SHARE = 0.5
"""Share of the free memory that the workers may take together."""
WORKSPACE = 1.6
"""Memory of a call relative to the tensors that are alive at once: convolutions take scratch memory beside them."""


def default_workers(device: str) -> int:
    """Return how many segments this machine makes at the same time."""
    return 1 if device.startswith("cuda") else max(1, usable_cpus() // CPUS_PER_WORKER)


def choose_settings(model: UpscaleModel | None, device: str, workers: int) -> EngineSettings:
    """Return the settings with which each of so many workers of this machine runs a network, or only draws frames between.

    Half precision is chosen only where its difference from float32 is known (`benchmarks/upscale_quality.py`): float16 on GPUs,
    bfloat16 for the builtin networks on CPUs that have it. In float32 on CPUs, OpenVINO takes 0.7 of the time of torch, and
    1.5 s to convert the network: as long as it saves in one frame of 640x360. So nothing is measured at the start.
    """
    threads = max(1, usable_cpus() // workers)
    if model is None:
        return EngineSettings(device=device, threads=threads)
    network = _traits(model)  # raises for weights that do not hold a network
    if device.startswith("cuda"):
        return EngineSettings(device=device, dtype="float16" if network.supports_half else "float32")
    use_bfloat16 = model.is_builtin and cpu_has_bfloat16()
    # OpenVINO runs the bare network. Others need spandrel's padding around it.
    use_openvino = not use_bfloat16 and has_openvino() and network.architecture in UNCLAMPED
    return EngineSettings(
        engine="openvino" if use_openvino else "torch",
        device=device,
        dtype="bfloat16" if use_bfloat16 else "float32",
        threads=threads,
        parallel_calls=min(PARALLEL_CALLS, threads),
    )


def settings_for(source: VideoSource, model: UpscaleModel | None, settings: EngineSettings, workers: int) -> EngineSettings:
    """Return the settings with fewer calls at the same time, or with tiles, if a video does not fit into free memory."""
    if model is None:
        return settings
    free = MEMORY_SHARE * free_bytes(settings.device) / workers
    one_call = settings.model_copy(update={"parallel_calls": 1})
    for fewer in (settings, one_call):
        if fewer.parallel_calls * call_bytes(model, source.width, source.height) <= free:
            return fewer
    tile_px, overlap_px = choose_tile(model, source.width, source.height, free)
    return one_call.model_copy(update={"tile_px": tile_px, "overlap_px": overlap_px})


def call_bytes(model: UpscaleModel, width: int, height: int) -> float:
    """Return the estimated bytes of a call of the network with a frame of this size, in float32."""
    network = _traits(model)
    return width * height * (network.bytes_per_pixel + network.result_bytes)


def choose_tile(model: UpscaleModel, width: int, height: int, free_bytes: float) -> tuple[int, int]:
    """Return side and overlap in pixels of the largest tiles of a frame whose processing takes at most `free_bytes`.

    Raises SetupError if not even the smallest tiles fit, or if the network sees the whole frame, so that tiles would show.
    """
    overlap = tile_overlap_px(model)
    needed = f"{model.name}: a frame of {width}x{height} pixels needs {call_bytes(model, width, height) / 1e9:.1f} GB"
    if overlap is None:
        raise SetupError(
            f"{needed}, {free_bytes / 1e9:.1f} GB are free, and the network sees whole frames, so tiles would show"
        )
    # The result of the whole frame is kept beside the tiles.
    per_pixel, of_result = _traits(model).bytes_per_pixel, _traits(model).result_bytes
    result = width * height * of_result
    side = int(max(0.0, (free_bytes - result) / per_pixel) ** 0.5)
    tile = (side - 2 * overlap) // _MULTIPLE_PX * _MULTIPLE_PX
    if tile < MIN_TILE_PX:
        smallest = (MIN_TILE_PX + 2 * overlap) ** 2 * per_pixel + result
        raise SetupError(f"{needed}, in the smallest tiles {smallest / 1e9:.1f} GB; {free_bytes / 1e9:.1f} GB are free")
    return tile, overlap


class _Traits(NamedTuple):
    """Properties of a network by which its settings are chosen."""

    architecture: str
    supports_half: bool
    bytes_per_pixel: float
    """Bytes of memory of a call per pixel of its input, without the result."""
    result_bytes: int
    """Bytes of the result per pixel of the input."""
    overlap_px: int | None
    """See `tile_overlap_px`."""


@lru_cache(maxsize=1)
def _traits(model: UpscaleModel) -> _Traits:
    network = model.load()  # imports spandrel without torch's compiler
    from spandrel import ModelTiling

    architecture = network.architecture.id
    # spandrel pads small frames for the other architectures.
    example_px = EXAMPLE_SHAPE[-1] if architecture in UNCLAMPED else PADDED_EXAMPLE_PX
    is_local = network.tiling is ModelTiling.SUPPORTED
    return _Traits(
        architecture,
        network.supports_half,
        bytes_per_pixel(network, example_px) * WORKSPACE,
        # The upscaled frame and its rounded copy, in float32.
        2 * 3 * 4 * int(network.scale) ** 2,
        OVERLAP_PX.get(architecture, OTHER_OVERLAP_PX) if is_local else None,
    )


def bytes_per_pixel(network: ImageModelDescriptor[Any], size_px: int) -> float:
    """Return the bytes of float32 tensors that are alive at once in a call, per pixel of the input.

    Counts the tensors of a call with a small frame on the CPU.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    live = peak = 0

    def remove(size: int) -> None:
        nonlocal live
        live -= size

    class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # a base class without types
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal live, peak
            result = func(*args, **(kwargs or {}))
            results = result if isinstance(result, tuple | list) else (result,)
            # Views and results of operations in place have no memory of their own.
            for tensor, declared in zip(results, func._schema.returns, strict=False):
                if isinstance(tensor, torch.Tensor) and declared.alias_info is None:
                    live += tensor.nbytes
                    finalize(tensor, remove, tensor.nbytes)
            peak = max(peak, live)
            return result

    # torch imports its compiler to exclude the counter from compiled functions.
    with deferred_packages(), torch.inference_mode(), Counter():  # type: ignore[no-untyped-call]
        forward(network, torch.zeros(1, 3, size_px, size_px))
    return peak / size_px**2


def tile_overlap_px(model: UpscaleModel) -> int | None:
    """Return the pixels that a tile must see of its neighbours. `None`: the network sees the whole frame."""
    return _traits(model).overlap_px
