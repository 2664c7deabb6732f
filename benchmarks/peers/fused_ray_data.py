"""Ray Data with one actor a card that runs the whole chain; FLUX and SVD take turns on a card that cannot hold both."""

from pathlib import Path

from benchmarks.local_ray import local_ray
from benchmarks.peers.ray_data import drain, fixed_pool, one_block_a_shot, tune
from benchmarks.peers.sizes import ALL_GB, BESIDE_FLUX_GB, Pool
from benchmarks.simulated import CHAIN, DoesNotFit

SHOTS_PER_TURN = 2
"""More means fewer swaps, and a coarser end: for some 25 shots a card two is the best."""


def run(gpus: int, gpu_memory_gb: float, shots: int, run_folder: Path) -> None:
    if gpu_memory_gb < BESIDE_FLUX_GB:
        raise DoesNotFit(f"FLUX and what is small need {BESIDE_FLUX_GB:g} GB together")
    with local_ray(gpus):
        tune()
        turns = SHOTS_PER_TURN if gpu_memory_gb < ALL_GB else 0
        chain = Pool(CHAIN, gpus, 1.0)
        drain(fixed_pool(one_block_a_shot(shots), chain, run_folder, shots_per_turn=turns))
