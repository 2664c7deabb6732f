"""Trials of speed options: what is used, what is left out and why, and that content keys stay."""

import re

import pytest

from tests.fake_stages import with_actor
from vidgen_ray.engine.trials import run_trials
from vidgen_ray.planner import Cluster, Node, parse_gpus, profile_for, speed_trials
from vidgen_ray.planner.speed_trials import Trial, TrialResult, as_recorded, keep, settled, try_option
from vidgen_ray.profile import load_profile

FAST = TrialResult(speedup=1.3, levels=0.5)
MACHINE = Cluster((Node((), 2, None),))


pytestmark = pytest.mark.usefixtures("own_cache")


def trying(profile, **options):
    """Return the profile with options to try. `options`: actor -> options."""
    for name, tried in options.items():
        profile = with_actor(profile, name, trial_options=tried)
    return profile


def keep_all(profile, card, results):
    """Store the results of the options of an actor, in order."""
    for actor, option, result in results:
        profile = settled(profile, [card])
        keep(Trial(profile, actor, option, profile.actors[actor].trial_options[option]), card, result)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (FAST, ""),
        (TrialResult(speedup=1.01, levels=0.5), r"is not faster \(1.01 times\)"),
        (TrialResult(speedup=3, levels=20), "changes the result by 20.0 levels of 255, at most 3 are allowed"),
        (TrialResult(error="RuntimeError: no kernel"), "RuntimeError: no kernel"),
    ],
)
def test_option_that_raises_differs_or_is_slow_is_left_out(result, reason):
    profile = load_profile("gpu-80gb")
    keep_all(profile, "H100", [("svd", "channels_last", FAST), ("svd", "attention_backend", result), ("svd", "compile", FAST)])
    assert re.match(reason or "$", result.rejected)
    options = settled(profile, ["H100"]).actors["svd"].options
    assert options["channels_last"] is options["compile"] is True
    assert options.get("attention_backend") == (None if reason else "_native_cudnn")
    assert settled(settled(profile, ["H100"]), ["H100"]) == settled(profile, ["H100"])


def test_option_is_used_on_the_kinds_of_gpus_that_have_accepted_it_with_the_same_weights():
    profile = load_profile("gpu-24gb")
    keep_all(profile, "RTX 4090", [("flux", "quantize", FAST)])
    assert profile.actors["flux"].options["quantize"] == "fp8_storage"
    assert settled(profile, ["RTX 4090"]).actors["flux"].options["quantize"] == "fp8"
    assert profile_for("gpu-24gb", lambda: parse_gpus("1xRTX4090")).actors["flux"].options["quantize"] == "fp8"
    for cards in (["RTX 3090"], ["RTX 4090", "RTX 3090"], []):
        assert settled(profile, cards) == profile
    own = with_actor(profile, "flux", weights="hub:other/weights")
    assert settled(own, ["RTX 4090"]).actors["flux"].options["quantize"] == "fp8_storage"


def test_folder_keeps_the_options_of_its_first_run():
    profile = load_profile("gpu-24gb")
    recorded = profile.model_dump(mode="json")
    keep_all(profile, "RTX 4090", [("flux", "quantize", FAST), ("realesrgan", "cudnn_benchmark", FAST)])
    fast = settled(profile, ["RTX 4090"])
    assert fast != profile
    assert as_recorded(fast, recorded) == profile
    assert as_recorded(profile, fast.model_dump(mode="json")) == fast
    assert as_recorded(fast, {**recorded, "name": "another"}) is fast


@pytest.mark.slow
def test_trial_runs_the_shot_with_and_without_the_option(tiny, make_shot):
    clip, draft = make_shot(num_frames=2), make_shot(mode="fast", steps={"flux": 4})
    same = try_option(Trial(tiny, "realesrgan", "cudnn_benchmark", True), [("realesrgan", clip)])
    assert same.speedup > 0 == same.levels
    other = try_option(Trial(tiny, "flux", "step_cache_threshold", 10.0), [("flux", draft)])
    assert other.levels > 0.1
    # Their inputs are a face and photos.
    for stage, fields in (
        ("flux", {"face_image": "x.jpg"}),
        ("klein", {"image_model": "klein", "identity": "reference", "face_image": "x.jpg"}),
    ):
        shot = make_shot(**fields, steps={stage: 2})
        assert try_option(Trial(tiny, stage, "compile", False), [(stage, shot)]).levels == 0


@pytest.mark.slow
def test_options_are_tried_on_the_cluster_once(local_ray, tiny, make_shot, monkeypatch):
    monkeypatch.setattr(speed_trials, "MIN_SPEEDUP", 0.0)
    monkeypatch.setattr(speed_trials, "MAX_LEVELS", 0.05)
    profile = trying(tiny, flux={"step_cache_threshold": 10.0}, svd={"attention_backend": "sage", "decode_chunk_frames": 4})
    shots, messages = [make_shot(mode="fast", num_frames=2, steps={"flux": 6, "svd": 1})], []
    fast = run_trials(profile, shots, None, MACHINE, messages.append)
    assert fast.actors["svd"].options["decode_chunk_frames"] == 4
    assert "attention_backend" not in fast.actors["svd"].options
    assert fast.actors["flux"].options == tiny.actors["flux"].options
    outcomes = "\n".join(messages)
    assert "svd: attention_backend=sage on cpu: left out: SetupError: attention_backend" in outcomes
    assert "flux: step_cache_threshold=10.0 on cpu: left out: changes the result by" in outcomes
    assert "svd: decode_chunk_frames=4 on cpu: used" in outcomes
    messages.clear()
    assert run_trials(profile, shots, None, MACHINE, messages.append) == fast
    assert messages == []
    broken = trying(tiny.with_options({"svd": {"attention_backend": "sage"}}), svd={"decode_chunk_frames": 2})
    assert run_trials(broken, shots, None, MACHINE, messages.append) == broken
    assert messages[-1] == "svd: decode_chunk_frames=2 on cpu: could not be tried"
