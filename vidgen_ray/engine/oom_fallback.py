"""Where a GPU's memory does not hold everything: stages take turns in it, and work that ran out is tried smaller."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from vidgen_ray.errors import StageError
from vidgen_ray.stages.base import Stage, StageParams

R = TypeVar("R")

MEMORY_FREED = "memory freed"
"""How a step survived that ran again, unchanged, after unused memory was given back."""
OUT_OF_MEMORY = ("out of memory", "Failed to allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In the words of torch and the CUDA driver, of onnxruntime and of cuBLAS."""


def run_with_oom_fallback(stage: Stage[Any], work: Callable[[], R]) -> tuple[R, str | None]:
    """`work()`, tried again where the GPU's memory ran out: after freeing, then with ever leaner parameters of the stage.

    The second value says what helped, none where nothing had to. A result of leaner parameters may differ in its bytes from
    that of the stage's own. Raises StageError where the leanest do not suffice; other errors pass.
    """
    try:
        return work(), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = str(error)
    # Only now, after the error with its references to the tensors is gone, can their memory be freed.
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
                said = str(error)
            params = stage.lower_memory(params)
    finally:
        stage.params = own
    raise StageError(f"out of GPU memory, with the leanest settings of {stage.name}, too: {said.splitlines()[0]}")


def changes(before: StageParams, after: StageParams) -> str:
    """`decode_chunk_frames=2`: what the second parameters have otherwise."""
    other = after.model_dump(mode="json")
    return ", ".join(f"{name}={other[name]}" for name, value in before.model_dump(mode="json").items() if other[name] != value)


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )


def free_gpu_memory() -> None:
    """Give unused GPU memory back to the driver."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
