"""`vidgen render` on simulated GPUs, as a command: the same options, lease, retries and exit code."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from benchmarks.local_ray import CPUS, local_ray
from benchmarks.ours import HOST_GB, StatusCounter, profile
from benchmarks.simulated import IMAGE_SHAPE, two_coloured
from benchmarks.simulated_stages import STAGES, SimulatedFlux
from vidgen_ray.batch.render_script import render
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.errors import VidgenError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner import Cluster, Node
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.stages.base import Artefacts, Item


def colour_of(prompt: str) -> int:
    """Return the level of all pixels of a clip."""
    return 20 + 5 * (hashlib.sha256(prompt.encode()).digest()[0] % 40)


class PromptFlux(SimulatedFlux):
    def run(self, item: Item) -> Artefacts:
        super().run(item)
        # The next stage adds 1.
        return {"image": two_coloured(IMAGE_SHAPE, colour_of(item.shot.prompt) - 1)}


class Messages(StatusCounter):
    def on_message(self, message: str) -> None:
        sys.stderr.write(f"{message}\n")


def main(run_folder: Path, script: Path, out: Path, gpus: int, gpu_gb: float) -> int:
    try:
        with local_ray(gpus):
            options = RenderOptions(
                cluster=Cluster((Node((gpu_gb,) * gpus, CPUS, HOST_GB),)), stages={**STAGES, PromptFlux.name: PromptFlux}
            )
            settings = ScriptSettings(script)
            report = render(settings, profile(run_folder, "auto"), OutputFolder(out), options, listener=Messages())
    except VidgenError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 4
    sys.stderr.write(f"{report}\n")
    if (failures := out / "failures.jsonl").exists():
        sys.stderr.write(failures.read_text())
    return 1 if report.failed else 0


if __name__ == "__main__":
    raise SystemExit(main(*map(Path, sys.argv[1:4]), int(sys.argv[4]), float(sys.argv[5])))
