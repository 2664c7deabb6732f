"""Expected seconds and timeouts of calls."""

import math

import pytest

from tests.render.test_chunks import record
from vidgen_ray import graph
from vidgen_ray.engine.calls import FACTOR, FLOOR_S, RECENT_CALLS, Durations, call_timeout_s


def test_expected_seconds_follow_the_cost_of_the_shot_and_its_share(make_shot):
    seconds, small = Durations(), make_shot(num_frames=8, width=128, height=128)
    costs = graph.durations(small, ["flux", "svd", "realesrgan"])
    chunk, flux, clip = ({name: costs[name] for name in names} for names in (["realesrgan"], ["flux"], ["flux", "svd"]))
    assert seconds.expected_s(flux) == math.inf
    seconds.add(costs, [record("flux", 2.0), record("svd", 5.0), record("realesrgan", 1.0, cached=True)])
    assert seconds.expected_s(clip) == pytest.approx(7.0)
    assert seconds.expected_s(costs) == math.inf, "a cached result shows nothing"
    assert seconds.expected_s(graph.durations(make_shot(num_frames=8, width=256, height=256), ["flux"])) > 2.5
    seconds.add(chunk, [record("realesrgan", 1.0)], share=0.25)
    assert seconds.expected_s(chunk, share=0.5) == pytest.approx(2.0)


def test_calls_of_a_slow_worker_are_not_usual_and_old_ones_are_forgotten():
    seconds, costs = Durations(), {"flux": 1.0}
    for number in range(RECENT_CALLS):
        seconds.add(costs, [record("flux", 100.0 if number % 5 == 0 else 1.0)])
    assert seconds.expected_s(costs) == pytest.approx(1.0)
    for _ in range(RECENT_CALLS):
        seconds.add(costs, [record("flux", 3.0)])
    assert seconds.expected_s(costs) == pytest.approx(3.0)


def test_timeout_follows_the_expected_seconds_within_its_limits():
    timeouts = [call_timeout_s(1800, math.inf), call_timeout_s(1800, 1), call_timeout_s(1800, 100), call_timeout_s(60, 1)]
    assert timeouts == [1800, FLOOR_S, 100 * FACTOR, 60]
