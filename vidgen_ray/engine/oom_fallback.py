"""OOM fallback: retry work that ran out of GPU memory, with lower-memory settings of its stage."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from vidgen_ray.errors import StageError
from vidgen_ray.stages.base import Stage, StageParams

R = TypeVar("R")

MEMORY_FREED = "memory freed"
"""Recorded for a step that succeeded with unchanged settings after unused memory was freed."""
OUT_OF_MEMORY = ("out of memory", "Failed to allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Texts in the errors of torch and the CUDA driver, of onnxruntime and of cuBLAS."""


def run_with_oom_fallback(stage: Stage[Any], work: Callable[[], R]) -> tuple[R, str | None]:
    """Return `work()`, retried if it runs out of memory: after freeing memory, then with `stage.lower_memory` settings.

    The second value tells what helped, `None` if nothing was needed. Lower-memory settings may change the bytes of the result.
    Raises StageError if even the lowest settings do not fit. Other errors are raised unchanged.
    """
    try:
        return work(), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = str(error)
    # The error references tensors, so memory can be freed only after its block ends.
    own: StageParams = stage.params
    params: StageParams | None = own
    try:
        while params is not None:
            free_gpu_memory()
            stage.params = params
            try:
                return work(), MEMORY_FREED if params is own else changes(own, params)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                message = str(error)
            params = stage.lower_memory(params)
    finally:
        stage.params = own
    raise StageError(f"out of GPU memory, also with the lowest-memory settings of {stage.name}: {message.splitlines()[0]}")


def changes(before: StageParams, after: StageParams) -> str:
    """Return what differs in `after`, for example `decode_chunk_frames=2`."""
    other = after.model_dump(mode="json")
    return ", ".join(f"{name}={other[name]}" for name, value in before.model_dump(mode="json").items() if other[name] != value)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that host or GPU memory ran out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def free_gpu_memory() -> None:
    """Give unused GPU memory back to the driver."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
