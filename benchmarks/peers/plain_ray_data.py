"""Ray Data without tuning: one class per stage, autoscaling pools, default settings."""

from pathlib import Path

import ray.data

from benchmarks.local_ray import local_ray
from benchmarks.peers.ray_data import drain, operator
from benchmarks.peers.sizes import untuned
from benchmarks.simulated import shot_ids


def run(gpus: int, gpu_memory_gb: float, shots: int, run_folder: Path) -> None:
    with local_ray(gpus):
        dataset = ray.data.from_items([{"shot": shot} for shot in shot_ids(shots)])
        for stage, share in untuned(gpus, gpu_memory_gb).items():
            dataset = dataset.map_batches(
                operator((stage,)), batch_size=1, num_gpus=share, fn_constructor_args=(run_folder, (stage,))
            )
        drain(dataset)
