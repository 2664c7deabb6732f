"""Benchmark of `overlap_shots`: clips per minute of one worker that always has the next shot waiting, with and without it.

Small random networks on the CPU, one thread each: denoising keeps one core busy and decoding another. On a GPU both use
the same card, so the gain there is smaller and is not known.

    python -m benchmarks.overlap
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine, write_json
from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine.cache_writer import CacheSettings
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.worker import MAX_CONCURRENT_CALLS, Worker
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.layout import WorkerSpec
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.video_models import VIDEO_MODELS

SIDE_PX, FRAMES = 128, 17
STEPS = 4
"""The number for distilled weights, with which encoding and decoding take the largest share."""


def worker_of(model: str, overlap: bool, folder: Path) -> Worker:
    """Return a loaded worker of the profile `tiny` with this video model."""
    content = load_profile("tiny").model_dump(mode="json")
    content["actors"][model]["options"]["overlap_shots"] = overlap
    profile = Profile.model_validate(content)
    config = EngineConfig("benchmark", profile, OutputFolder(folder), {model: STAGE_BY_NAME[model]}, CacheSettings("none"))
    worker = Worker(config, WorkerSpec((model,), cpus=1, gpus=0))
    if (failure := worker.load()) is not None:
        raise SystemExit(f"{model}: {failure.message}")
    return worker


def clips_per_minute(worker: Worker, model: str, clips: int) -> float:
    """Run shots with different prompts, two calls at a time, as the engine does."""
    image = np.tile(np.linspace(0, 255, SIDE_PX, dtype=np.uint8)[None, :, None], (SIDE_PX, 1, 3))

    def render(number: int) -> None:
        shot = Shot(
            id=str(number), prompt=f"ball number {number}", seed=number, width=SIDE_PX, height=SIDE_PX, num_frames=FRAMES,
            fps=8, video_model=model, steps={model: STEPS}, guidance={model: 1},
        )  # fmt: skip
        plan = ShotPlan(shot=shot, steps=(Step(stage=model, key=64 * "0", weights=()),), key=64 * "0")
        result, _ = worker.run(number, plan, (model,), {"image": image})
        if result.failure is not None:
            raise SystemExit(f"{model}: {result.failure.message}")

    begun = time.perf_counter()
    with ThreadPoolExecutor(MAX_CONCURRENT_CALLS) as threads:
        list(threads.map(render, range(clips)))
    return clips * 60 / (time.perf_counter() - begun)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20, help="clips per measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each case, interleaved")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(model, overlap) for model in VIDEO_MODELS for overlap in (False, True)]
    measured: dict[tuple[str, bool], list[float]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        workers = {(model, overlap): worker_of(model, overlap, Path(folder)) for model, overlap in cases}
        for (model, _), worker in workers.items():
            clips_per_minute(worker, model, 2)  # not counted
        for _ in range(args.rounds):
            for (model, overlap), worker in workers.items():
                measured[model, overlap].append(clips_per_minute(worker, model, args.clips))
    about = machine(("torch", "diffusers"))
    table = Table("model", "clips a minute", "with overlap_shots", "gain", title=f"{about['cpu']}, load {about['load_1_min']}")
    for model in VIDEO_MODELS:
        alone, overlapped = median(measured[model, False]), median(measured[model, True])
        table.add_row(model, f"{alone:.1f}", f"{overlapped:.1f}", f"{overlapped / alone - 1:+.0%}")
    Console().print(table)
    if args.json:
        rows = [
            {"model": model, "overlap_shots": overlap, "clips_per_minute": values}
            for (model, overlap), values in measured.items()
        ]
        write_json(args.json, {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
