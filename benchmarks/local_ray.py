"""A Ray of a benchmark's own, with pretended GPUs, the same for every system that is compared."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CPUS = 32
"""Pretended as well: a machine with so many GPUs has them. Stages sleep, so a smaller one serves."""
OBJECT_STORE_BYTES = 4 * 2**30
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's workers would else yield to everything else on the machine.
    "RAY_worker_niceness": "0",
    # Ray would else start a process for each of the pretended CPUs.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
}
"""For the process that starts Ray, from its beginning."""


@contextmanager
def local_ray(gpus: int, *, dashboard: bool = False) -> Iterator[None]:
    """Ray while the block runs. Its folder has a short path, for the path of a socket may have 107 bytes only."""
    import ray

    folder = tempfile.mkdtemp(prefix="vb", dir="/tmp")
    options: dict[str, Any] = {"include_dashboard": dashboard, "log_to_driver": False, "_temp_dir": folder}
    ray.init(address="local", num_gpus=gpus, num_cpus=CPUS, object_store_memory=OBJECT_STORE_BYTES, **options)
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
