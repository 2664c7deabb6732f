"""Tests of the benchmarks: simulated GPUs, the efficiency measurement and the simulated stages."""

import json
import subprocess
import sys
from inspect import getattr_static
from pathlib import Path

import pytest

from benchmarks import noop_stages, simulated_stages
from benchmarks.measure import efficiency
from benchmarks.runs import Case, run_once
from benchmarks.simulated import (
    COMMIT,
    READY,
    SWAP,
    Event,
)
from vidgen_ray.graph import STAGE_BY_NAME

ROOT = Path(__file__).parent.parent


def ready(gpu, at, pid=1):
    return Event(READY, "", gpu, at, at, pid, 0.0)


def test_efficiency_is_work_divided_by_gpus_and_wall_time():
    events = [
        ready(0, 8.0),
        ready(0, 9.0),
        ready(1, 9.5, pid=2),
        Event("svd", "a", 0, 10.0, 11.0, 1, 0.9),  # overslept: only 0.9 s of it is work
        Event("flux", "b", 1, 10.5, 10.67, 2, 0.17),
        Event(SWAP, "", 1, 10.7, 10.8, 2, 0.0),
        Event("svd", "b", 1, 11.0, 11.9, 2, 0.9),
        Event(COMMIT, "a", -1, 11.1, 11.1, 1, 0.0),
        Event(COMMIT, "b", -1, 12.0, 12.0, 2, 0.0),
    ]
    measured = efficiency(events, gpus=2)
    assert measured.wall_s == pytest.approx(2.0)
    assert measured.bound_s == pytest.approx((0.9 + 0.17 + 0.9) / 2)
    assert measured.efficiency == pytest.approx((0.9 + 0.17 + 0.9) / (2 * 2.0))
    assert measured.efficiency_since_ready == pytest.approx((0.9 + 0.17 + 0.9) / (3.0 + 2.5))
    assert measured.ramp_s == pytest.approx(0.5)
    assert measured.drain_s == pytest.approx(1.0)
    assert measured.swap_s == pytest.approx(0.1)
    assert (measured.first_start, measured.last_commit) == (10.0, 12.0)


@pytest.mark.slow
def test_vidgen_renders_the_simulated_shots():
    run = run_once(Case("vidgen", "auto with cache", 1, 80.0, 2), limit_s=300, stall_s=120, keep=None)
    assert run.measurement is not None, run.reason


@pytest.mark.slow
def test_changed_prompt_leaves_a_stale_clip_of_a_script_and_none_of_vidgen(tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, "benchmarks/rivals.py", "--quick", "--json", str(results)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    server, vidgen = json.loads(results.read_text())["rows"]
    assert (server["system"], server["stale"], server["wrong_rows"]) == ("video server", 1, 1)
    faults = ("lost", "stale", "truncated", "doubled", "wrong_rows", "stopped")
    assert (vidgen["system"], *(vidgen[name] for name in faults)) == ("vidgen", 0, 0, 0, 0, 0, 0)


def test_benchmark_stages_have_the_declarations_of_the_real_stages():
    for stage in (*simulated_stages.STAGES.values(), *noop_stages.STAGES.values()):
        for declared in ("name", "actor", "reads", "takes", "writes", "Params", "applies"):
            assert getattr_static(stage, declared) is getattr_static(STAGE_BY_NAME[stage.name], declared), (stage, declared)
