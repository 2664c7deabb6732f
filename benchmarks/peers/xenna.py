"""cosmos-xenna, with workers sized by hand and with its own autoscaling.

It counts GPUs with NVML instead of Ray and does its own accounting of shares, so `pretend/pynvml.py` reports the simulated
GPUs. It monitors its actors through Ray's dashboard, so the dashboard must run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from benchmarks.local_ray import local_ray
from benchmarks.peers.sizes import by_hand, untuned
from benchmarks.simulated import TIME_SCALE, Models, Payload, shot_ids

if TYPE_CHECKING:
    from cosmos_xenna.pipelines import v1

PRETEND = Path(__file__).parent / "pretend"
AUTOSCALE_SECONDS = 180 / TIME_SCALE
"""Its default interval and window, scaled to simulated time. Otherwise a run would end before the first scaling."""
LOG_SECONDS = 10


def run_by_hand(gpus: int, gpu_memory_gb: float, shots: int, run_folder: Path) -> None:
    pools = by_hand(gpus, gpu_memory_gb)
    _run([(pool.stages, pool.share, pool.workers) for pool in pools], gpus, shots, run_folder)


def run_autoscaled(gpus: int, gpu_memory_gb: float, shots: int, run_folder: Path) -> None:
    shares = untuned(gpus, gpu_memory_gb)
    _run([((stage,), share, None) for stage, share in shares.items()], gpus, shots, run_folder)


def _run(pools: Sequence[tuple[tuple[str, ...], float, int | None]], gpus: int, shots: int, run_folder: Path) -> None:
    os.environ["PRETEND_GPUS"] = str(gpus)
    # xenna sets these when it starts Ray itself: it assigns GPUs on its own, and requests long lists.
    os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    os.environ["RAY_MAX_LIMIT_FROM_API_SERVER"] = os.environ["RAY_MAX_LIMIT_FROM_DATA_SOURCE"] = "40000"
    os.environ["PYTHONPATH"] = f"{PRETEND}{os.pathsep}{os.environ['PYTHONPATH']}"
    sys.path.insert(0, str(PRETEND))
    from cosmos_xenna.pipelines import v1

    with local_ray(gpus, dashboard=True):
        # Otherwise it may query another Ray instance on this machine.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        v1.run_pipeline(
            v1.PipelineSpec(
                input_data=[(shot, Payload()) for shot in shot_ids(shots)],
                stages=[v1.StageSpec(_stage(run_folder, stages, share), num_workers=n) for stages, share, n in pools],
                config=v1.PipelineConfig(
                    execution_mode=v1.ExecutionMode.STREAMING,
                    logging_interval_s=LOG_SECONDS,
                    mode_specific=v1.StreamingSpecificSpec(
                        autoscale_interval_s=AUTOSCALE_SECONDS,
                        autoscale_speed_estimation_window_duration_s=AUTOSCALE_SECONDS,
                    ),
                ),
            )
        )


def _stage(run_folder: Path, stages: tuple[str, ...], share: float) -> v1.Stage[Any, Any]:
    """Return an instance of a new class: xenna distinguishes stages by their class names."""
    from cosmos_xenna.pipelines import v1

    class XennaStage(v1.Stage):
        @property
        def stage_batch_size(self) -> int:
            return 1

        @property
        def required_resources(self) -> v1.Resources:
            return v1.Resources(cpus=0.25, gpus=share)

        def setup(self, worker_metadata: v1.WorkerMetadata) -> None:
            self._models = Models(run_folder, stages)

        def process_data(self, in_data: list[tuple[str, Payload]]) -> list[tuple[str, Payload]]:
            return [self._run_stages(shot, payload) for shot, payload in in_data]

        def _run_stages(self, shot: str, payload: Payload) -> tuple[str, Payload]:
            for stage in stages:
                payload = self._models.run(stage, shot, payload)
            return shot, payload

    XennaStage.__name__ = "-".join(stages)
    return XennaStage()
