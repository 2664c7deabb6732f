"""Run the batch engine of vidgen on simulated GPUs, with the same stages and seconds as the other systems."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import simulated
from benchmarks.local_ray import CPUS as CPUS_OF_RAY
from benchmarks.local_ray import local_ray
from benchmarks.simulated import COMMIT, FRAMES, FRAMES_SHAPE, DoesNotFit, Event, record
from benchmarks.simulated_stages import STAGES, WEIGHTS, write_inputs
from vidgen_ray.batch.render_script import render_shots
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.media.encode import Mp4Settings
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.planner.cluster import H100, Cluster, Node
from vidgen_ray.profile import ActorProfile, Profile
from vidgen_ray.render.cache_writer import DEFAULT_CACHE
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.shot import Shot

CPUS = 0.25
"""CPUs per worker, as for the other systems."""
HOST_GB = 2048.0
"""Host memory of a machine with 8 GPUs. The other systems load their models in parallel, too."""
WITH_CACHE = " with cache"
"""Ending of a layout's name: also write the stage cache, as `render_shots` does by default."""
NO_SECONDS = 1e-6
"""Seconds of stages without GPU work."""
ENCODE = Mp4Settings(preset="ultrafast", threads=1)
"""Cheapest settings: the other systems do not encode, and encoding is not compared."""
SHOT = Shot(prompt="simulated", num_frames=FRAMES, width=FRAMES_SHAPE[2], height=FRAMES_SHAPE[1], scale=simulated.SCALE)
RELATIVE_COST = {name: stage.relative_cost(SHOT) for name, stage in STAGES.items()}
"""Stage -> cost relative to the reference shot, which is larger than `SHOT`. Seconds in profiles are for the reference shot."""


class StatusCounter:
    """Progress listener that counts results by status and prints nothing."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def on_rejected(self, row: ManifestRow) -> None: ...

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None: ...

    def on_finished(self, row: ManifestRow) -> None:
        self.counts[row.status] = self.counts.get(row.status, 0) + 1

    def on_status(self, snapshot: Snapshot) -> None: ...

    def on_message(self, message: str) -> None: ...


def run(layout_name: str, gpus: int, gpu_memory_gb: float, shots: int, run_folder: Path) -> None:
    """Render `shots` shots on a private Ray instance with simulated GPUs, and record each commit.

    `layout_name` is one of efficiency.VIDGEN_LAYOUTS. Raises simulated.DoesNotFit if the layout does not fit on the GPUs.
    """
    listener, out = StatusCounter(), run_folder / "out"
    card = replace(H100, link_gb_per_s=simulated.SWAP_GB_PER_SECOND)
    try:
        with local_ray(gpus):
            report = render_shots(
                ScriptSettings(write_script(run_folder, shots)),
                profile(run_folder, layout_name.removesuffix(WITH_CACHE)),
                OutputFolder(out),
                RenderOptions(
                    cluster=Cluster((Node((gpu_memory_gb,) * gpus, CPUS_OF_RAY, HOST_GB, card=card),)),
                    cache=DEFAULT_CACHE if layout_name.endswith(WITH_CACHE) else "none",
                    stages=STAGES,
                ),
                listener=listener,
            )
    except (SetupError, ProfileError) as error:
        raise DoesNotFit(str(error)) from error
    if report.failed:
        raise RuntimeError(f"{report.failed} shots failed: {_first_failure(out)}")
    (run_folder / "layout.txt").write_text(report.layout or "no layout")
    record_commits(run_folder, out)


def write_script(run_folder: Path, shots: int) -> Path:
    """Write the script of a run and its input files to its folder. Return the script."""
    script = run_folder / "script.jsonl"
    script.write_text("".join(json.dumps(line) + "\n" for line in write_inputs(run_folder, shots)))
    return script


def profile(run_folder: Path, layout: Any) -> Profile:
    """Return a profile of the simulated models. `layout` is a layout name of profiles."""
    actors: dict[str, ActorProfile] = {}
    for actor in dict.fromkeys(stage.actor for stage in STAGES.values()):
        names = [name for name, stage in STAGES.items() if stage.actor == actor]
        actors[actor] = ActorProfile(
            weights=str(run_folder / WEIGHTS / actor),
            device="cuda",
            cpus=CPUS,
            memory_gb=simulated.MODEL_GB[actor],
            seconds={name: _seconds(name) / RELATIVE_COST[name] for name in names},
        )
    return Profile(
        name="simulated",
        about="sleeps on simulated GPUs",
        layout=layout,
        actors=actors,
        encode=ENCODE,
    )


def _seconds(stage: str) -> float:
    """Return the GPU seconds of a stage per shot. Likeness stages have none."""
    return simulated.STAGES[stage].seconds if stage in simulated.STAGES else NO_SECONDS


def record_commits(run_folder: Path, out: Path) -> None:
    """Record the commit of each shot: the time when its `shot.json` appeared."""
    for file in out.glob("shots/*/*/shot.json"):
        at = file.stat().st_mtime
        record(run_folder, Event(COMMIT, file.parent.name, -1, at, at, os.getpid(), 0.0))


def _first_failure(out: Path) -> str:
    """Return the message of the first failed shot."""
    first = json.loads((out / "failures.jsonl").read_text().partition("\n")[0])
    return f"{first['failure']['message']}"
