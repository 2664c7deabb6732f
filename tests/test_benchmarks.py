"""Benchmarks: a run on simulated GPUs, and the simulated stages."""

from inspect import getattr_static

import pytest

from benchmarks import noop_stages, simulated_stages
from benchmarks.runs import Case, run_once
from vidgen_ray.graph import STAGE_BY_NAME


@pytest.mark.slow
def test_vidgen_renders_the_simulated_shots():
    run = run_once(Case("vidgen", "auto with cache", 1, 80.0, 2), limit_s=300, stall_s=120, keep=None)
    assert run.measurement is not None, run.reason


def test_benchmark_stages_have_the_declarations_of_the_real_stages():
    for stage in (*simulated_stages.STAGES.values(), *noop_stages.STAGES.values()):
        for declared in ("name", "actor", "reads", "takes", "writes", "Params", "chosen_by"):
            assert getattr_static(stage, declared) is getattr_static(STAGE_BY_NAME[stage.name], declared), (stage, declared)
