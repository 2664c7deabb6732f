"""OOM fallback: lower-memory settings of a stage for work that does not fit, or did not fit before, into GPU memory."""

from __future__ import annotations

import ctypes
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from vidgen_ray.errors import OutOfMemory
from vidgen_ray.nets.torch_private import set_allocator_settings
from vidgen_ray.planner.cluster import GB, WSL_DEVICE
from vidgen_ray.planner.gpu_memory import changed_options, fitting_params, lowest_memory, too_large_text
from vidgen_ray.planner.layout import CONTEXT_GB
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage, StageParams
from vidgen_ray.system.free_memory import (
    free_gpu_bytes,
    free_gpu_memory,
    gpu_bytes_of_others,
    is_out_of_memory,
    pins_exact_sizes,
)

_R = TypeVar("_R")

EXPANDABLE_SEGMENTS = "expandable_segments:True"
"""Wastes less GPU memory on fragmentation. Fails on WSL2."""
EXACT_PINNED_BLOCKS = "pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1"
"""Blocks of pinned host memory above 1 MB are not rounded up to a power of two, which would take half as much again for the
weights of FLUX. They are not cached either: torch 2.13 would give a freed block to a larger tensor (pytorch #192722)."""
MEMORY_FREED = "memory freed"
"""Recorded for a step that succeeded with unchanged settings after unused memory was freed."""
GIVEN_BACK_BYTES = GB
"""Memory that is free in addition to that of a failed attempt, from which its settings are tried again. A smaller LoRA frees
less, and it helps no stage."""
SizeKey = tuple[object, ...]
"""Stage and the fields of a shot that decide how much memory it needs."""


class _Needed(NamedTuple):
    """Settings with which work succeeded after it had run out of memory."""

    params: StageParams
    free_bytes: float
    """Free GPU memory after the last attempt that failed."""


class OomFallback:
    """Runs work of the stages of one process, with lower-memory settings where they are needed.

    Settings that were needed are used from the start for later work of the same stage and size, until more memory is free.
    """

    def __init__(self, free_bytes: Callable[[], float] = free_gpu_bytes) -> None:
        """`free_bytes` returns the GPU memory that this process can still take, infinite without a GPU."""
        self._free_bytes = free_bytes
        self._needed: dict[SizeKey, _Needed] = {}

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
        first = self._remembered(key) or self._planned(stage, shot)
        params: StageParams | None = first
        lower = islice(stage.lower_memory_steps(first, shot), 1, None)
        freed = False
        free = math.inf
        while params is not None:
            try:
                with _settings(stage, params):
                    result = work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error)
            else:
                if params is own:
                    return result, MEMORY_FREED if freed or prepared_twice else None
                if freed:
                    self._needed[key] = _Needed(params, free)
                return result, changed_options(own, params)
            # The error references tensors, so memory can be freed only after its block ends.
            free_gpu_memory()
            free = self._free_bytes()
            params = params if not freed else next(lower, None)
            freed = True
        raise OutOfMemory(_exhausted(stage, shot, message))

    def _remembered(self, key: SizeKey) -> StageParams | None:
        """Return the settings that were needed for this size. `None` if none were, or if another program gave memory back."""
        needed = self._needed.get(key)
        if needed is None:
            return None
        is_given_back = self._free_bytes() > needed.free_bytes + GIVEN_BACK_BYTES
        if is_given_back:
            del self._needed[key]
        return None if is_given_back else needed.params

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
        hint = f"; {_reason(type(stage), stage.params, shot, gpu_gb)}"
    return f"out of GPU memory, also with the lowest-memory settings of {stage.name}: {message.splitlines()[0]}{hint}"


def _reason(stage: type[Stage[Any]], params: StageParams, shot: Shot, gpu_gb: float) -> str:
    """Return why a shot does not fit on a GPU of this size: it is too large, or other programs hold the memory."""
    others_gb = gpu_bytes_of_others() / GB - CONTEXT_GB
    if others_gb < OTHERS_GB or fitting_params(stage, params, shot, gpu_gb) is None:
        return too_large_text(stage, params, shot, gpu_gb)
    needed_gb = lowest_memory(stage, params, shot).total / GB + CONTEXT_GB
    held = f"other processes hold {others_gb:.3g} of its {gpu_gb:.4g} GB"
    return f"the shot needs {needed_gb:.3g} GB of this GPU, {held}; end those that are not of this run, or run it again later"


OTHERS_GB = 0.5
"""Memory of other processes from which they are named as a reason. A desktop needs less."""


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
