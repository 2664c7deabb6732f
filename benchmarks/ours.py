"""vidgen's own batch engine on simulated GPUs: the same chain, the same seconds and the same cards as the peers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import simulated
from benchmarks.local_ray import CPUS as CPUS_OF_RAY
from benchmarks.local_ray import local_ray
from benchmarks.simulated import COMMIT, FRAMES, FRAMES_SHAPE, DoesNotFit, Event, record
from benchmarks.simulated_stages import STAGES, WEIGHTS, write_inputs
from vidgen_ray.batch.render import render
from vidgen_ray.batch.run_progress import Snapshot
from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.media import Mp4Settings
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.planner import Cluster, Node
from vidgen_ray.profile import ActorProfile, Profile
from vidgen_ray.script.reader import CheckedLine, RejectedLine, iter_script
from vidgen_ray.shot import Shot

CPUS = 0.25
"""Of each worker, as the peers have them."""
NO_SECONDS = 1e-6
ENCODE = Mp4Settings(preset="ultrafast", threads=1)
"""The peers encode nothing, and it is not encoding that is compared."""
SHOT = Shot(prompt="simulated", num_frames=FRAMES, width=FRAMES_SHAPE[2], height=FRAMES_SHAPE[1], scale=2)
SHOT_WORK = {name: stage.work(SHOT) for name, stage in STAGES.items()}
"""Of a profile the seconds are those of the reference shot, which is larger than the simulation's."""


class Silent:
    """A watcher that says nothing, and knows how many lines ended how."""

    def __init__(self) -> None:
        self.ends: dict[str, int] = {}

    def on_rejected(self, row: ManifestRow) -> None: ...

    def on_planned(self, total: int, done_before: int, refused: int) -> None: ...

    def on_finished(self, row: ManifestRow) -> None:
        self.ends[row.status] = self.ends.get(row.status, 0) + 1

    def on_status(self, snapshot: Snapshot) -> None: ...


def run(layout_name: str, gpus: int, gpu_memory_gb: float, shots: int, run_folder: Path) -> None:
    """Render `shots` shots on a Ray of its own with simulated cards, and record each commit.

    `layout_name` is one of efficiency.VIDGEN_LAYOUTS.
    Raises simulated.DoesNotFit where the layout has no packing on these cards.
    """
    watcher, out = Silent(), run_folder / "out"
    try:
        with local_ray(gpus):
            report = render(
                lines(run_folder, shots),
                profile(run_folder, layout_name),
                OutputFolder(out),
                source="script.jsonl",
                watcher=watcher,
                cluster=Cluster((Node((gpu_memory_gb,) * gpus, CPUS_OF_RAY, None),)),
                # The peers keep no results of single stages.
                use_cache=False,
                stages=STAGES,
            )
    except (SetupError, ProfileError) as error:
        raise DoesNotFit(str(error)) from error
    if report.failed:
        raise RuntimeError(f"{report.failed} shots failed: {(out / 'failures.jsonl').read_text()[:500]}")
    (run_folder / "layout.txt").write_text(report.layout or "nothing to do")
    record_commits(run_folder, out)


def lines(run_folder: Path, shots: int) -> Iterator[CheckedLine | RejectedLine]:
    """The script of a run, written into its folder and read as any script is."""
    script = run_folder / "script.jsonl"
    script.write_text("".join(json.dumps(line) + "\n" for line in write_inputs(run_folder, shots)))
    return iter_script(script)


def profile(run_folder: Path, layout: Any) -> Profile:
    """A profile of the simulated models; `layout` is one that profiles know."""
    actors: dict[str, ActorProfile] = {}
    for actor in dict.fromkeys(stage.actor for stage in STAGES.values()):
        held = [name for name, stage in STAGES.items() if stage.actor == actor]
        actors[actor] = ActorProfile(
            weights=str(run_folder / WEIGHTS),
            device="cuda",
            cpus=CPUS,
            memory_gb=simulated.MODEL_GB[actor],
            seconds={name: _seconds(name) / SHOT_WORK[name] for name in held},
        )
    return Profile(
        name="simulated",
        about="sleeps on simulated cards",
        layout=layout,
        actors=actors,
        encode=ENCODE,
        swap_gb_per_s=simulated.SWAP_GB_PER_SECOND,
    )


def _seconds(stage: str) -> float:
    """Of the card, of a shot; nothing of those stages that only look at what was made."""
    return simulated.STAGES[stage].seconds if stage in simulated.STAGES else NO_SECONDS


def record_commits(run_folder: Path, out: Path) -> None:
    """Enter each shot's commit, which is when its `shot.json` appeared."""
    for file in out.glob("shots/*/shot.json"):
        at = file.stat().st_mtime
        record(run_folder, Event(COMMIT, file.parent.name, -1, at, at, os.getpid(), 0.0))
