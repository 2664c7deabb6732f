"""A pretence, not NVIDIA's library: it reports PRETEND_GPUS cards that do not exist.

cosmos-xenna counts the cards of a machine through NVML and will not believe Ray. On the search path of its benchmark
alone, this answers the calls that it makes, so that it can run on simulated cards like the others.
"""

import os
import uuid


class NVMLError(Exception):
    """Never raised here."""


def nvmlInit() -> None:
    """Nothing to do."""


def nvmlShutdown() -> None:
    """Nothing to do."""


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
