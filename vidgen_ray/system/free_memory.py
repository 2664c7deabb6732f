"""Free memory of GPU and host now, errors that say that there is none, and unused GPU memory given back to the driver."""

import gc
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
OUT_OF_MEMORY = (
    "out of memory",
    "Failed to allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "Unable to find a valid cuDNN algorithm",
)
"""Texts in the errors of torch and the CUDA driver, of onnxruntime, cuBLAS, cuDNN and cuSOLVER. torch reports the last one if
no convolution algorithm finds room for its workspace."""


def free_bytes(device: str) -> float:
    """Return the bytes that this process can still take on a GPU, or on the host for `cpu`. Infinite if unknown."""
    if not device.startswith("cuda"):
        return free_host_bytes()
    import torch  # noqa: F401  # `free_gpu_bytes` does not import it

    return free_gpu_bytes(device)


def free_gpu_bytes(device: str = "cuda") -> float:
    """Return the bytes of GPU memory that this process can still take: free memory and its own unused reserve.

    Infinite without a GPU, or before torch is imported.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return float("inf")
    if torch.cuda.get_device_properties(device).is_integrated:
        # GPU and host have the same memory. The driver counts the page cache as taken, which the kernel gives back.
        free = free_host_bytes()
    else:
        free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def gpu_bytes_of_others(device: str = "cuda") -> float:
    """Return the bytes of GPU memory that other processes hold, with the CUDA context of this one. 0 if unknown."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or torch.cuda.get_device_properties(device).is_integrated:
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return float(total - free - torch.cuda.memory_reserved(device))


def free_host_bytes() -> float:
    """Return the bytes of host memory that can still be taken, within the limit of the control group. Infinite if unknown."""
    limits = [float("inf")]
    with suppress(OSError, ValueError, StopIteration):
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        limits.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text())
        limits.append(limit - int((CGROUP / "memory.current").read_text()))
    return min(limits)


@cache
def pins_exact_sizes() -> bool:
    """Return whether torch can be set to pin host memory in blocks of the size that is asked for: since 2.13.

    Earlier versions round each block up to a power of two. False if the version is unknown.
    """
    with suppress(PackageNotFoundError, ValueError):
        major, minor, *_ = version("torch").split(".")
        return (int(major), int(minor)) >= (2, 13)
    return False


def free_gpu_memory() -> None:
    """Give unused GPU memory back to the driver."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that host or GPU memory ran out."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )
