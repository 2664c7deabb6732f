"""Private Ray instance with simulated GPUs, configured identically for all systems of a comparison."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CPUS = 32
"""CPUs that Ray assumes, as on a machine with that many GPUs. Stages sleep, so fewer real ones suffice."""
OBJECT_STORE_BYTES = int(os.environ.get("VIDGEN_BENCHMARK_STORE_BYTES", 4 * 2**30))
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # The first run compiles the packages, as an installation does.
    "PYTHONDONTWRITEBYTECODE": "",
    # By default, Ray lowers the priority of its workers.
    "RAY_worker_niceness": "0",
    # By default, Ray starts one process per CPU.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
}
"""Environment variables that the process that starts Ray must have from its start."""


@contextmanager
def local_ray(gpus: int, *, dashboard: bool = False) -> Iterator[None]:
    """Run Ray during the block. Its folder has a short path, because socket paths are limited to 107 bytes."""
    import ray

    folder = tempfile.mkdtemp(prefix="vb", dir="/tmp")
    options: dict[str, Any] = {"include_dashboard": dashboard, "log_to_driver": False, "_temp_dir": folder}
    ray.init(address="local", num_gpus=gpus, num_cpus=CPUS, object_store_memory=OBJECT_STORE_BYTES, **options)
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
