"""Canary checks with fake workers in simulated time, and the difference between images."""

import asyncio
from collections import Counter

import numpy as np
import pytest

from benchmarks.fake_actors import FakeActorClient, run_in_simulated_time
from benchmarks.simulated_director import plan_of
from tests.engine.test_worker_pool import pool_of
from vidgen_ray.engine import worker_checks
from vidgen_ray.engine.calls import CallResult
from vidgen_ray.engine.scheduler import Work
from vidgen_ray.engine.worker_checks import CANARY, MAX_DIFFERENCE, difference
from vidgen_ray.outputs.records import StepRecord

FIRST_CALLS, CHECK_CALLS = 8, 50


@pytest.fixture(autouse=True)
def frequent_checks(monkeypatch):
    monkeypatch.setattr(worker_checks, "FIRST_CALLS", FIRST_CALLS)
    monkeypatch.setattr(worker_checks, "CHECK_CALLS", CHECK_CALLS)


class Painter(FakeActorClient):
    """Worker for FLUX whose images all have one colour. `restarts`: further colours, of the processes after a restart."""

    def __init__(self, name, colour="right", restarts=()):
        super().__init__(name, lambda *_: 1.0, self.respond)
        self.colours, self.calls = [colour, *restarts], Counter()

    def respond(self, method, number, plan, names, inputs, *others):
        self.calls[method] += 1
        record = StepRecord(stage="flux", key=plan.steps[0].key, weights=(), seconds=1, gpu_seconds=1, cached=False)
        differences = tuple(0.0 if other == self.colours[0] else MAX_DIFFERENCE + 1 for other in others)
        return CallResult((record,), differences=differences), self.colours[0]

    def restart(self, *, blame_running=False):
        self.colours.append(self.colours.pop(0))


def render(painters, shots):
    """Run a call for each shot. Return the quarantined workers, and the outcomes of the checks."""

    async def main():
        pool = pool_of(painters, 2 * len(painters))
        calls = (pool.call(Work("flux", n), 1800, "run", plan_of(n), ["flux"], ("flux",), None) for n in range(shots))
        await asyncio.gather(*calls)
        pool.close()
        return pool._observer

    observer, _ = run_in_simulated_time(main())
    quarantined = [call.args[0].split()[0] for call in observer.quarantined.call_args_list]
    attempts = (call.args[0] for call in observer.attempt_ended.call_args_list)
    return quarantined, Counter(attempt.outcome for attempt in attempts if attempt.stage == CANARY)


def test_worker_with_other_images_is_restarted_and_used_again():
    painters = [Painter("sick", "wrong", restarts=["right"]), Painter("a"), Painter("b")]
    quarantined, _ = render(painters, 10 * CHECK_CALLS)
    assert quarantined == ["sick"]
    assert painters[0].calls["run"] > 2 * CHECK_CALLS


def test_worker_that_makes_other_images_after_its_restart_is_given_up():
    painters = [Painter("sick", "wrong", restarts=["wrong"]), Painter("a"), Painter("b")]
    quarantined, _ = render(painters, 10 * CHECK_CALLS)
    assert quarantined == ["sick", "sick"]
    assert painters[0].calls["run"] < CHECK_CALLS


@pytest.mark.parametrize("colours", [("one", "other"), ("one", "other", "third")])
def test_workers_that_all_differ_stay_in_use(colours):
    quarantined, checks = render([Painter(colour, colour) for colour in colours], 10 * CHECK_CALLS)
    assert quarantined == []
    assert checks["differs"] > 3


@pytest.mark.parametrize(("shots", "fewest", "most"), [(3 * FIRST_CALLS - 3, 0, 0), (30 * CHECK_CALLS, 15, 36)])
def test_long_runs_check_at_their_interval_and_short_ones_not_at_all(shots, fewest, most):
    quarantined, checks = render([Painter(name) for name in "abc"], shots)
    assert quarantined == []
    assert set(checks) <= {"done"}
    assert fewest <= checks.total() <= most


def test_difference_finds_a_damaged_block_and_allows_rounding():
    rng = np.random.default_rng(0)
    clip = rng.integers(10, 245, (3, 72, 100, 3), np.uint8)
    rounded = clip + rng.integers(0, 5, clip.shape, np.uint8)
    damaged = clip.copy()
    damaged[1, 64:, 96:] = rng.integers(0, 256, (8, 4, 3), np.uint8)
    assert difference({"frames": clip}, {"frames": clip}) == 0
    assert 1 < difference({"frames": rounded}, {"frames": clip}) < 4
    assert difference({"frames": damaged}, {"frames": clip}) > MAX_DIFFERENCE
    assert difference({"image": clip[0]}, {"image": clip[1]}) > MAX_DIFFERENCE
