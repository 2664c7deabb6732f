"""Ray Data, tuned by hand: fixed pools in proportion to measured seconds, one-row blocks, a warm-up."""

from pathlib import Path

from benchmarks.local_ray import local_ray
from benchmarks.peers.ray_data import drain, fixed_pool, one_block_per_shot, tune
from benchmarks.peers.sizes import by_hand


def run(gpus: int, gpu_memory_gb: float, shots: int, run_folder: Path) -> None:
    pools = by_hand(gpus, gpu_memory_gb)
    with local_ray(gpus):
        tune()
        dataset = one_block_per_shot(shots)
        for pool in pools:
            dataset = fixed_pool(dataset, pool, run_folder)
        drain(dataset)
