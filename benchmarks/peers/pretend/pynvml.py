"""Fake of NVIDIA's pynvml that reports PRETEND_GPUS simulated GPUs.

cosmos-xenna counts GPUs with NVML instead of Ray. This module is on the search path of its benchmark only.
"""

import os
import uuid


class NVMLError(Exception):
    """Never raised by this fake."""


def nvmlInit() -> None:
    """Do nothing."""


def nvmlShutdown() -> None:
    """Do nothing."""


def nvmlDeviceGetCount() -> int:
    return int(os.environ["PRETEND_GPUS"])


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return index


def nvmlDeviceGetName(handle: int) -> str:
    return f"simulated GPU {handle}"


def nvmlDeviceGetUUID(handle: int) -> str:
    return f"GPU-{uuid.UUID(int=handle + 1)}"


def nvmlDeviceGetComputeRunningProcesses(handle: int) -> list[object]:
    return []
