"""Tests of the benchmarks: simulated GPUs, the efficiency measurement and the simulated stages."""

import json
import subprocess
import sys
from inspect import getattr_static
from pathlib import Path

import numpy as np
import pytest

from benchmarks import noop_stages, ours, simulated, simulated_stages
from benchmarks.measure import efficiency
from benchmarks.runs import Case, run_once
from benchmarks.simulated import (
    COMMIT,
    READY,
    SWAP,
    Event,
)
from vidgen_ray.batch.line_planner import LinePlanner
from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.graph import STAGE_BY_NAME, stages_of
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.script.check import LineChecker
from vidgen_ray.script.lines import Line
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Item

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run_folder(tmp_path) -> Path:
    simulated.prepare(tmp_path, gpus=2, memory_gb=48)
    return tmp_path


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
def test_a_changed_prompt_leaves_a_stale_clip_of_a_script_and_none_of_vidgen(tmp_path):
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


def test_simulated_stages_run_a_shot(run_folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (line,) = simulated_stages.write_inputs(run_folder, 1)
    shot = Shot(**line)
    assert [stage.name for stage in stages_of(shot) if "likeness" not in stage.name] == list(simulated.CHAIN)
    artefacts = {"photos": (np.zeros((64, 64, 3), np.uint8),)}
    for stage_class in simulated_stages.STAGES.values():
        params = stage_class.Params(weights=run_folder / simulated_stages.WEIGHTS / stage_class.actor)
        assert all(file.exists() for file in stage_class.weight_files(params, shot))
        with stage_class(params) as stage:
            (result,) = stage([Item(shot, artefacts)])
            stage.move("cpu")
        assert set(result) == set(stage_class.writes)
        artefacts |= result
    work = [event for event in simulated.events(run_folder) if event.stage not in (SWAP, READY)]
    assert [event.stage for event in work] == list(simulated.CHAIN)
    assert {event.gpu for event in work} == {1}
    assert sum(event.seconds for event in work) == pytest.approx(simulated.SECONDS_PER_SHOT)


def test_profiles_of_the_benchmarks_have_weights_that_a_run_accepts(tmp_path):
    script = ours.write_script(tmp_path, 1)
    simulated_line = json.loads(script.read_text())
    for profile, line in (
        (ours.profile(tmp_path, "auto"), simulated_line),
        (noop_stages.noop_profile(tmp_path / "no-op", cpu_workers=1), noop_stages.line(0)),
    ):
        checker = LineChecker("s.jsonl", tmp_path, profile.defaults)
        (planned,) = LinePlanner(checker, profile, OutputFolder(tmp_path / "out"), replace=True, fresh=True).plan(
            [Line(1, line)]
        )
        assert isinstance(planned.result, ShotPlan)
