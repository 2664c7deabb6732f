"""Ray Data with one worker per stage on every GPU. GPU shares do not ensure this placement, so workers claim their GPU."""

from pathlib import Path

from benchmarks.local_ray import local_ray
from benchmarks.peers.ray_data import drain, fixed_pool, one_block_per_shot, tune
from benchmarks.peers.sizes import ALL_GB, FACE, FLUX, SVD, UPSCALE, Pool
from benchmarks.simulated import DoesNotFit

SHARES = {FACE: 0.1, FLUX: 0.4, SVD: 0.4, UPSCALE: 0.1}


def run(gpus: int, gpu_memory_gb: float, shots: int, run_folder: Path) -> None:
    if gpu_memory_gb < ALL_GB:
        raise DoesNotFit(f"the models need {ALL_GB:g} GB, a GPU has {gpu_memory_gb:g}")
    with local_ray(gpus):
        tune()
        dataset = one_block_per_shot(shots)
        for stages, share in SHARES.items():
            dataset = fixed_pool(dataset, Pool(stages, gpus, share), run_folder, pinned=True)
        drain(dataset)
