"""Expected seconds and timeouts of calls."""

import math

import pytest

from vidgen_ray.engine.calls import FACTOR, FLOOR_S, RECENT_CALLS, Durations, call_timeout_s
from vidgen_ray.outputs.records import StepRecord


def record(stage, seconds, cached=False):
    return StepRecord(stage=stage, key="", weights=(), seconds=seconds, gpu_seconds=seconds, cached=cached)


def test_expected_seconds_follow_the_cost_of_the_shot(make_shot):
    durations, small = Durations(), make_shot(num_frames=8, width=128, height=128)
    assert durations.expected_s(small, ["flux"]) == math.inf
    durations.add(small, [record("flux", 2.0), record("svd", 5.0), record("realesrgan", 1.0, cached=True)])
    assert durations.expected_s(small, ["flux", "svd"]) == pytest.approx(7.0)
    assert durations.expected_s(small, ["svd", "realesrgan"]) == math.inf, "a cached result shows nothing"
    assert durations.expected_s(make_shot(num_frames=8, width=256, height=256), ["flux"]) > 2.5


def test_chunks_have_their_share_of_the_clip(make_shot):
    durations, shot = Durations(), make_shot(num_frames=8)
    durations.add(shot, [record("realesrgan", 1.0)], share=0.25)
    assert durations.expected_s(shot, ["realesrgan"]) == pytest.approx(4.0)
    assert durations.expected_s(shot, ["realesrgan"], share=0.5) == pytest.approx(2.0)


def test_calls_of_a_slow_worker_are_not_usual_and_old_ones_are_forgotten(make_shot):
    durations, shot = Durations(), make_shot()
    for number in range(RECENT_CALLS):
        durations.add(shot, [record("flux", 100.0 if number % 5 == 0 else 1.0)])
    assert durations.expected_s(shot, ["flux"]) == pytest.approx(1.0)
    for _ in range(RECENT_CALLS):
        durations.add(shot, [record("flux", 3.0)])
    assert durations.expected_s(shot, ["flux"]) == pytest.approx(3.0)


def test_timeout_follows_the_expected_seconds_within_its_limits():
    assert call_timeout_s(1800, math.inf) == 1800
    assert call_timeout_s(1800, 1) == FLOOR_S
    assert call_timeout_s(1800, 100) == 100 * FACTOR
    assert call_timeout_s(60, 1) == 60
