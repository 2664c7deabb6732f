"""Ray Data with one actor per GPU that runs all stages. FLUX and SVD take turns on a GPU that cannot hold both."""

from pathlib import Path

from benchmarks.local_ray import local_ray
from benchmarks.peers.ray_data import drain, fixed_pool, one_block_per_shot, tune
from benchmarks.peers.sizes import ALL_GB, FLUX_AND_SMALL_GB, Pool
from benchmarks.simulated import CHAIN, DoesNotFit

SHOTS_PER_TURN = 2
"""More shots per turn need fewer swaps but end less evenly. Two is best for about 25 shots per GPU."""


def run(gpus: int, gpu_memory_gb: float, shots: int, run_folder: Path) -> None:
    if gpu_memory_gb < FLUX_AND_SMALL_GB:
        raise DoesNotFit(f"FLUX and the small models need {FLUX_AND_SMALL_GB:g} GB together")
    with local_ray(gpus):
        tune()
        turns = SHOTS_PER_TURN if gpu_memory_gb < ALL_GB else 0
        chain = Pool(CHAIN, gpus, 1.0)
        drain(fixed_pool(one_block_per_shot(shots), chain, run_folder, shots_per_turn=turns))
