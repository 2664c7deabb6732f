"""OOM fallback: lower-memory settings of a stage for work that does not fit, or did not fit before, into GPU memory."""

from __future__ import annotations

import ctypes
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from vidgen_ray.errors import OutOfMemory
from vidgen_ray.nets.torch_private import set_allocator_settings
from vidgen_ray.planner.cluster import GB, WSL_DEVICE
from vidgen_ray.planner.gpu_memory import changed_options, too_large_text
from vidgen_ray.planner.layout import CONTEXT_GB
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage, StageParams
from vidgen_ray.system.free_memory import free_gpu_bytes, free_gpu_memory, is_out_of_memory, pins_exact_sizes

_R = TypeVar("_R")

EXPANDABLE_SEGMENTS = "expandable_segments:True"
"""Wastes less GPU memory on fragmentation. Fails on WSL2."""
EXACT_PINNED_BLOCKS = "pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1"
"""Blocks of pinned host memory above 1 MB are not rounded up to a power of two, which would take half as much again for the
weights of FLUX. They are not cached either: torch 2.13 would give a freed block to a larger tensor (pytorch #192722)."""
MEMORY_FREED = "memory freed"
"""Recorded for a step that succeeded with unchanged settings after unused memory was freed."""
SizeKey = tuple[object, ...]
"""Stage and the fields of a shot that decide how much memory it needs."""


class OomFallback:
    """Runs work of the stages of one process, with lower-memory settings where they are needed.

    Settings that were needed are used from the start for later work of the same stage and size.
    """

    def __init__(self, free_bytes: Callable[[], float] = free_gpu_bytes) -> None:
        """`free_bytes` returns the GPU memory that this process can still take, infinite without a GPU."""
        self._free_bytes = free_bytes
        self._needed: dict[SizeKey, StageParams] = {}

    def run(
        self, stage: Stage[Any], shot: Shot, work: Callable[[], _R], prepare: Callable[[], None] = lambda: None
    ) -> tuple[_R, str | None]:
        """Return `work()`, retried if it runs out of memory: after freeing memory, then with lower-memory settings.

        The first attempt uses the settings with which the shot is planned to fit. The second value tells what differs from the
        stage's own settings or what helped, `None` if nothing was needed. Lower-memory settings may change the bytes.
        `prepare` is called first, and once more if it runs out of memory. It moves weights, whose size settings do not change.
        Raises OutOfMemory if even the lowest settings do not fit. Other errors are raised unchanged.
        """
        prepared_twice = self._prepare(prepare)
        own: StageParams = stage.params
        key = _size_key(stage, shot)
        first = self._needed.get(key) or self._planned(stage, shot)
        params: StageParams | None = first
        lower = islice(stage.lower_memory_steps(first, shot), 1, None)
        freed = False
        while params is not None:
            try:
                with _settings(stage, params):
                    result = work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error)
            else:
                if params is not own:
                    self._needed[key] = params
                    return result, changed_options(own, params)
                return result, MEMORY_FREED if freed or prepared_twice else None
            # The error references tensors, so memory can be freed only after its block ends.
            free_gpu_memory()
            params = params if not freed else next(lower, None)
            freed = True
        raise OutOfMemory(_exhausted(stage, shot, message))

    @staticmethod
    def _prepare(prepare: Callable[[], None]) -> bool:
        """Call `prepare`, once more after freeing memory if it runs out of memory. Return whether it did."""
        try:
            prepare()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return False
        # The error references tensors, so memory can be freed only after its block ends.
        free_gpu_memory()
        prepare()
        return True

    def _planned(self, stage: Stage[Any], shot: Shot) -> StageParams:
        """Return the first settings with which the shot should fit into the free memory; the lowest ones if none do."""
        params: StageParams = stage.params
        free = math.inf if params.device == "cpu" else self._free_bytes()
        own = None if math.isinf(free) else stage.memory(params, shot)
        if own is None:
            return params
        held = sum(own.weights.values())
        for params in stage.lower_memory_steps(stage.params, shot):
            memory = stage.memory(params, shot)
            if memory is None or memory.total - held <= free:
                break
        return params


@contextmanager
def _settings(stage: Stage[Any], params: StageParams) -> Iterator[None]:
    """Run a block with other settings of a stage, if they are not its own."""
    own: StageParams = stage.params
    if params is own:
        yield
        return
    stage.params = params
    try:
        yield
    finally:
        stage.params = own


def _size_key(stage: Stage[Any], shot: Shot) -> SizeKey:
    size = (shot.width, shot.height, shot.num_frames, shot.scale)
    return stage.name, *size, shot.upscaler, shot.identity, len(shot.face_image), len(shot.lora)


def _exhausted(stage: Stage[Any], shot: Shot, message: str) -> str:
    """Return the error for work that does not fit in any way, with a size that should fit."""
    gpu_gb = None if stage.params.device == "cpu" else total_gpu_gb()
    hint = ""
    if gpu_gb is not None and stage.memory(stage.params, shot) is not None:
        hint = f"; {too_large_text(type(stage), stage.params, shot, gpu_gb)}"
    return f"out of GPU memory, also with the lowest-memory settings of {stage.name}: {message.splitlines()[0]}{hint}"


def total_gpu_gb() -> float | None:
    """Return the memory of this process's GPU in GB. `None` without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(0).total_memory / GB)


def prepare_gpu(share: float, gpu_gb: float = 0.0) -> None:
    """Set up torch's allocators for this process, which holds `share` of a GPU. Does nothing without a GPU.

    Warns if torch does not know the settings: then the process needs more memory. A process that shares a GPU is limited to its
    share, so that it runs out of memory before it takes that of the others. Its CUDA context is part of the share, and does not
    count for torch. If GPU and host have the same memory, the limit is `gpu_gb`, unless that is 0.
    """
    if not has_cuda_driver():
        return
    import torch

    if not torch.cuda.is_available():
        return
    if settings := allocator_settings():
        try:
            set_allocator_settings(settings)
        except Exception as error:
            warnings.warn(f"torch {torch.__version__} does not accept the allocator settings {settings}: {error}", stacklevel=2)
    properties = torch.cuda.get_device_properties(0)
    total_gb = properties.total_memory / GB
    if properties.is_integrated and gpu_gb:
        share = gpu_gb / total_gb
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(max(0.0, share - CONTEXT_GB / total_gb))


def allocator_settings() -> str:
    """Return the settings of torch's allocators for this machine and version of torch, in torch's notation."""
    expandable = () if WSL_DEVICE.exists() else (EXPANDABLE_SEGMENTS,)
    return ",".join((*expandable, EXACT_PINNED_BLOCKS) if pins_exact_sizes() else expandable)


def has_cuda_driver() -> bool:
    """Return whether NVIDIA's driver is installed. Without it torch finds no GPU, and importing torch takes seconds."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
