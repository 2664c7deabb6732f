"""Driver process for the chaos tests: `python -m tests.chaos.driver SCRIPT OUT ADDRESS` renders a script on a cluster."""

import sys
from pathlib import Path

from tests.batch.test_batch import Events
from tests.chaos.counted_stages import COUNTED
from vidgen_ray.batch.render_script import render
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner import parse_gpus
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.provenance.record import ProvenanceSettings
from vidgen_ray.script.lines import ScriptSettings

GPUS = "2x2x80GB"
"""Two nodes with two simulated GPUs each."""
SIZES_GB = {"instantid": 1, "flux": 34, "hunyuan": 13, "svd": 20, "realesrgan": 6}
UNMARKED = ProvenanceSettings(metadata="off")
"""Marked files name their content key, which depends on the profile."""
ATTEMPTS = 10
"""More than usual: a line may be in progress during several kills that it did not cause."""


def profile() -> Profile:
    """Return the tiny profile with each actor on its own GPU, as far as there are GPUs."""
    tiny = load_profile("tiny")
    actors = {
        name: tiny.actors[name].model_copy(update={"device": "cuda", "memory_gb": gb, "cpus": 0.5, "seconds": {}})
        for name, gb in SIZES_GB.items()
    }
    staged = tiny.model_copy(update={"layout": "staged", "actors": actors, "cpu_workers": None})
    return staged.with_provenance(UNMARKED)


def main(script: str, out: str, address: str) -> int:
    chosen = profile()
    report = render(
        ScriptSettings(Path(script), profile_defaults=chosen.defaults),
        chosen,
        OutputFolder(out),
        RenderOptions(address=address, cluster=parse_gpus(GPUS), stages=COUNTED, attempts=ATTEMPTS),
        listener=Events(),
    )
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
