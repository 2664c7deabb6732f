"""`vidgen render` on simulated GPUs, as a command: the same lease, retries and exit code. Or a data set, executed twice."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import ray
from numpy.typing import NDArray

from benchmarks.local_ray import CPUS, OBJECT_STORE_BYTES
from benchmarks.ours import HOST_GB, StatusCounter, profile
from benchmarks.peers.lines import run_as_command
from benchmarks.simulated import FRAMES, IMAGE_SHAPE, SCALE
from benchmarks.simulated_stages import ENCODED_PX, STAGES, SimulatedFlux, SimulatedRealESRGAN, SimulatedSVD
from vidgen_ray.batch.render_script import render_shots
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.data import build_processor
from vidgen_ray.engine.ray_cluster import AGENT_DELAY_S, init_local_ray
from vidgen_ray.errors import VidgenError
from vidgen_ray.outputs.cleanup import prune_shots
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.cluster import Cluster, Node
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, Frames, Item

SIDE = 16
"""A clip shows the 256 bits of a sha256 as 16 x 16 squares."""
LEVELS = (40, 200)


def image_of(content: bytes) -> NDArray[np.uint8]:
    """Return an image (H, W, 3) that shows a prompt or a start image in the part that encoders keep."""
    bits = np.unpackbits(np.frombuffer(hashlib.sha256(content).digest(), np.uint8)).reshape(SIDE, SIDE)
    squares = np.kron(np.where(bits, LEVELS[1], LEVELS[0]), np.ones((ENCODED_PX // SCALE // SIDE,) * 2)).astype(np.uint8)
    image = np.full(IMAGE_SHAPE, LEVELS[0], np.uint8)
    top, left = ((size - len(squares)) // 2 for size in IMAGE_SHAPE[:2])
    image[top : top + len(squares), left : left + len(squares)] = squares[..., None]
    return image


def digests_shown(frames: NDArray[np.uint8]) -> set[bytes]:
    """Return the digests that frames (T, 64, 64, 3) show: one if they all show the same."""
    size = ENCODED_PX // SIDE
    squares = frames.mean(axis=3).reshape(-1, SIDE, size, SIDE, size).mean(axis=(2, 4))
    return {np.packbits(frame > np.mean(LEVELS)).tobytes() for frame in squares}


class PromptFlux(SimulatedFlux):
    def run(self, item: Item) -> Artefacts:
        super().run(item)
        return {"image": image_of(item.shot.prompt.encode())}


class StillSVD(SimulatedSVD):
    def _result(self, artefacts: Artefacts) -> Artefacts:
        return {"frames": np.repeat(artefacts["image"][None], FRAMES, axis=0)}


class NearestRealESRGAN(SimulatedRealESRGAN):
    def run_chunk(self, shot: Shot, frames: Frames, chunk: slice | None = None) -> Frames:
        super().run_chunk(shot, frames, chunk)
        return frames.repeat(shot.scale, axis=1).repeat(shot.scale, axis=2)


class Messages(StatusCounter):
    def on_message(self, message: str) -> None:
        sys.stderr.write(f"{message}\n")


@contextmanager
def ray_of_a_run(gpus: int) -> Iterator[None]:
    """Run Ray during the block, started as `vidgen render` starts it, with simulated GPUs."""
    sizes = {"num_cpus": CPUS, "num_gpus": gpus, "object_store_memory": OBJECT_STORE_BYTES}
    init_local_ray(agent_delay_s=AGENT_DELAY_S, log_to_driver=False, **sizes)
    try:
        yield
    finally:
        ray.shutdown()


def main(run_folder: Path, script: Path, out: Path, gpus: int, gpu_gb: float, *, then_prune: bool = False) -> int:
    stages = {**STAGES, **{stage.name: stage for stage in (PromptFlux, StillSVD, NearestRealESRGAN)}}
    options = RenderOptions(cluster=Cluster((Node((gpu_gb,) * gpus, CPUS, HOST_GB),)), stages=stages)
    simulated, outputs = profile(run_folder, "auto"), OutputFolder(out)

    def execute() -> int:
        lines = [json.loads(text) for text in script.read_text().splitlines()]
        results = build_processor(simulated, out, name=script.stem, options=options)(ray.data.from_items(lines)).take_all()
        counts = Counter(row["status"] for row in results)
        sys.stderr.write(f"{counts}\n")
        return 1 if counts["failed"] else 0

    try:
        with ray_of_a_run(gpus):
            if (run_folder / "next").exists():
                return run_as_command(execute, script, out)
            report = render_shots(ScriptSettings(script), simulated, outputs, options, listener=Messages())
            if then_prune:
                prune_shots(outputs)
    except VidgenError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 4
    sys.stderr.write(f"{report}\n")
    if (failures := out / "failures.jsonl").exists():
        sys.stderr.write(failures.read_text())
    return 1 if report.failed else 0


if __name__ == "__main__":
    folder, script, out, gpus, gpu_gb, *flags = sys.argv[1:]
    code = main(Path(folder), Path(script), Path(out), int(gpus), float(gpu_gb), then_prune=flags == ["--prune"])
    sys.stderr.flush()
    # As the command ends.
    os._exit(code)
