"""Trials of speed options: what is used, what is left out and why, and that content keys stay."""

import re

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

from tests.fake_stages import with_actor
from vidgen_ray.engine.trials import run_trials
from vidgen_ray.planner import speed_trials
from vidgen_ray.planner.cluster import Cluster, Node, parse_gpus, profile_for
from vidgen_ray.planner.loss import DEFAULT_LIMIT, EQUAL_DB, LIMITS, Loss, limit_of, loss_of
from vidgen_ray.planner.speed_trials import (
    Trial,
    TrialResult,
    accepted_losses,
    as_recorded,
    keep,
    open_trials,
    run_once,
    settled,
    try_option,
)
from vidgen_ray.profile import builtin_profiles, load_profile
from vidgen_ray.stages.flux import FluxLoRAStage

FAST = TrialResult(speedup=1.3, difference=0.005)
MACHINE = Cluster((Node((), 2, None),))


pytestmark = pytest.mark.usefixtures("own_cache")


def trying(profile, **options):
    """Return the profile with options to try. `options`: actor -> options."""
    for name, tried in options.items():
        profile = with_actor(profile, name, trial_options=tried)
    return profile


def of_option(profile, actor, option):
    """Return the trial of an option that the profile names."""
    return next(Trial(profile, actor, *each) for each in profile.tried_options(actor) if each[0] == option)


def keep_all(profile, card, results):
    """Store the results of the options of an actor, in order."""
    for actor, option, result in results:
        profile = settled(profile, [card])
        keep(of_option(profile, actor, option), card, result)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (FAST, ""),
        (TrialResult(speedup=1.01, difference=0.005), r"is not faster \(1.01 times\)"),
        (
            TrialResult(speedup=3, difference=0.2),
            r"changes a call of the network by 0.2 \(relative L2\), at most 0.03 is allowed",
        ),
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
    profile = load_profile("gpu-24gb-lossy")
    keep_all(profile, "RTX 4090", [("flux", "quantize", FAST)])
    assert profile.actors["flux"].options["quantize"] == "fp8_storage"
    assert settled(profile, ["RTX 4090"]).actors["flux"].options["quantize"] == "fp8"
    assert profile_for("gpu-24gb-lossy", lambda: parse_gpus("1xRTX4090")).actors["flux"].options["quantize"] == "fp8"
    for cards in (["RTX 3090"], ["RTX 4090", "RTX 3090"], []):
        assert settled(profile, cards) == profile
    own = with_actor(profile, "flux", weights="hub:other/weights")
    assert settled(own, ["RTX 4090"]).actors["flux"].options["quantize"] == "fp8_storage"


@pytest.mark.parametrize("package", ["torch", "diffusers", "torchao", "triton", "sageattention"])
def test_results_of_other_versions_of_libraries_are_not_used(monkeypatch, package):
    profile, versions = load_profile("gpu-24gb-lossy"), dict.fromkeys(speed_trials._PACKAGES, "2.0")
    monkeypatch.setattr(speed_trials, "version", versions.__getitem__)
    keep_all(profile, "RTX 4090", [("flux", "quantize", FAST)])
    fast = settled(profile, ["RTX 4090"])
    assert fast != profile
    versions[package] = "2.1"
    assert settled(profile, ["RTX 4090"]) == profile
    assert "quantize" in [trial.option for trial, _ in open_trials(profile, "flux", ["RTX 4090"])]
    versions[package] = "2.0"
    assert settled(profile, ["RTX 4090"]) == fast


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"RTX 4090": {"flux quantize 0": {"speedup": 2, "field_of_a_later_version": 1}}}']
)
def test_unreadable_results_are_tried_again(content):
    profile = load_profile("gpu-24gb-lossy")
    speed_trials._results.path.parent.mkdir(parents=True, exist_ok=True)
    speed_trials._results.path.write_text(content)
    assert settled(profile, ["RTX 4090"]) == profile
    keep_all(profile, "RTX 4090", [("flux", "quantize", FAST)])
    assert settled(profile, ["RTX 4090"]) != profile


@pytest.mark.parametrize(("card", "is_tried"), [("H100", False), ("L40S", True), ("A100 80 GB", False)])
def test_cudnn_attention_is_tried_where_torch_does_not_prefer_it(card, is_tried):
    options = [trial.option for trial, _ in open_trials(load_profile("gpu-80gb"), "wan", [card])]
    assert options == [*(["attention_backend"] if is_tried else []), "compile"]
    in_fp8 = [
        trial.option for trial, _ in open_trials(load_profile("gpu-48gb-lossy"), "wan", [card]) if trial.option == "quantize"
    ]
    assert bool(in_fp8) == (not card.startswith("A100"))


@pytest.mark.parametrize(
    ("card", "is_tried"),
    [
        ("RTX 3090", True),
        ("RTX 4090 D", True),
        ("RTX 5070 Ti", True),
        ("RTX PRO 6000", False),
        ("A6000", False),
        ("H100", False),
    ],
)
def test_attention_in_8_bits_is_tried_on_geforce_cards(card, is_tried):
    def tried(name, actor):
        return ("attention_backend", "sage") in [
            (trial.option, trial.value) for trial, _ in open_trials(load_profile(name), actor, [card])
        ]

    for actor in ("flux", "klein", "wan"):
        assert tried("gpu-20gb-lossy", actor) == is_tried, actor
        assert not tried("gpu-20gb", actor), actor
    assert limit_of("attention_backend", "sage") == LIMITS["attention_backend"]
    assert limit_of("attention_backend", "_native_cudnn") is None


def test_attention_in_8_bits_without_its_package_is_left_out_before_anything_runs(tiny, make_shot, monkeypatch):
    monkeypatch.setattr(speed_trials, "run_once", None)
    trial = Trial(tiny, "flux", "attention_backend", "sage")
    result = try_option(trial, [("flux", make_shot())])
    assert result.rejected.startswith("attention_backend: sage needs the package sageattention 2.1.1 or later")
    assert result.limit == LIMITS["attention_backend"]


def test_folder_keeps_the_options_of_its_first_run():
    profile = load_profile("gpu-24gb-lossy")
    recorded = profile.model_dump(mode="json")
    keep_all(profile, "RTX 4090", [("flux", "quantize", FAST), ("realesrgan", "cudnn_benchmark", FAST)])
    fast = settled(profile, ["RTX 4090"])
    assert fast != profile
    assert as_recorded(fast, recorded) == profile
    assert as_recorded(profile, fast.model_dump(mode="json")) == fast
    assert as_recorded(fast, {**recorded, "name": "another"}) is fast


LOSS = Loss(psnr_db=31, ssim=0.95, likeness=0.01)


def test_lossy_options_are_off_unless_the_profile_allows_loss():
    profile, lossy = load_profile("gpu-80gb"), load_profile("gpu-80gb-lossy")
    assert (profile.allow_loss, lossy.allow_loss, lossy.name) == (False, True, "gpu-80gb-lossy")
    result = TrialResult(speedup=1.2, loss=LOSS, limit=DEFAULT_LIMIT)
    keep_all(lossy, "H100", [("svd", "guidance_interval", result)])
    assert settled(lossy, ["H100"]).actors["svd"].options["guidance_interval"] == [0, 0.6]
    assert [*accepted_losses(settled(lossy, ["H100"]), ["H100"])] == [f"svd: guidance_interval=[0, 0.6], {LOSS}"]
    assert settled(profile, ["H100"]) == profile
    assert settled(lossy, ["A100 80 GB"]) == lossy, "not tried"
    assert "guidance_interval" not in [trial.option for trial, _ in open_trials(profile, "svd", ["H100"])]
    cluster = parse_gpus("1xH100")
    assert profile_for("auto-lossy", lambda: cluster).actors["svd"].options["guidance_interval"] == [0, 0.6]
    assert not profile_for("auto", lambda: cluster).allow_loss
    assert [trial.option for trial, _ in open_trials(lossy, "svd", ["L4"])] == [
        *("guidance_interval", "channels_last", "attention_backend", "compile"),
    ]


def test_builtin_profiles_name_lossy_options_as_such():
    for name in (*builtin_profiles(), "gpu-20gb"):
        for actor in load_profile(name).actors.values():
            assert not [each for each in actor.trial_options.items() if limit_of(*each)], name
            assert all(limit_of(*each) for each in actor.lossy_trial_options.items()), name


@pytest.mark.parametrize(
    ("lost", "reason"),
    [
        ({}, ""),
        ({"psnr_db": 27.9}, r"loses too much: PSNR 27.9 dB, at least 28"),
        ({"psnr_db": float("nan")}, "loses too much: PSNR"),
        ({"ssim": 0.8}, r"loses too much: SSIM 0.80, at least 0.85"),
        ({"likeness": 0.05}, r"loses too much: likeness -0.050, a loss of at most 0.03"),
        ({"likeness": None}, ""),
    ],
)
def test_option_that_loses_more_than_its_limit_is_left_out(lost, reason):
    result = TrialResult(speedup=1.5, loss=LOSS.model_copy(update=lost), limit=DEFAULT_LIMIT)
    assert re.match(reason or "$", result.rejected)
    assert str(LOSS) in str(result) or lost


def test_loss_is_that_of_the_worst_shot():
    """A face that gets lost counts as no likeness, and faces of others do not count."""
    random = np.random.default_rng(0)
    plain = [random.integers(50, 200, (3, 32, 32, 3), np.uint8) for _ in range(3)]
    same = loss_of(plain, plain)
    assert (same.psnr_db, same.ssim, same.likeness) == (EQUAL_DB, 1.0, None)
    tried = [plain[0], plain[1] + 10, plain[2]]
    assert loss_of(plain, tried).psnr_db == pytest.approx(20 * np.log10(255 / 10), abs=0.01)
    likeness = [0.7, 0.6, 0.1, 0.69, None, None]
    assert loss_of(plain, tried, likeness).likeness == 0.6
    assert loss_of(plain, tried, [0.7, None, 0.1, 0.69, 0.9, 0.2]).likeness == pytest.approx(0.01)


def test_lossy_trial_compares_the_clips_of_three_shots(tiny, make_shot, monkeypatch):
    rendered = []

    def record(stage, item):
        rendered.append((item.shot, item.image))
        return run_once(stage, item)

    monkeypatch.setattr(speed_trials, "run_once", record)
    shot = make_shot(num_frames=2, steps={"svd": 5})
    trial = Trial(tiny, "svd", "guidance_interval", [0, 0.6])
    result = try_option(trial, [("svd", shot)])
    assert [(one.seed, one.steps.svd) for one, _ in rendered] == [(0, 5), (1, 5), (2, 5)] * 2
    assert len({image.tobytes() for _, image in rendered}) == 3
    assert result.limit == LIMITS["guidance_interval"]
    assert 10 < result.loss.psnr_db < EQUAL_DB
    assert result.speedup > 0
    same = try_option(Trial(tiny, "svd", "guidance_interval", [0, 1]), [("svd", shot)])
    assert (same.loss.psnr_db, same.loss.ssim) == (EQUAL_DB, 1.0)
    broken = try_option(Trial(tiny, "svd", "guidance_interval", [1, 0]), [("svd", shot)])
    assert broken.rejected.startswith("ProfileError: profile")


@pytest.mark.slow
def test_trial_runs_the_shot_with_and_without_the_option(tiny, make_shot):
    clip, draft = make_shot(num_frames=2), make_shot(mode="fast", steps={"flux": 4})
    same = try_option(Trial(tiny, "realesrgan", "cudnn_benchmark", True), [("realesrgan", clip)])
    assert same.speedup > 0 == same.difference
    other = try_option(Trial(tiny, "flux", "quantize", "fp8_storage"), [("flux", draft)])
    assert (other.difference, other.loss.psnr_db) == (0, pytest.approx(53, abs=5))
    # Their inputs are a face and photos.
    for stage, fields in (
        ("flux", {"face_image": "x.jpg"}),
        ("klein", {"image_model": "klein", "identity": "reference", "face_image": "x.jpg"}),
    ):
        shot = make_shot(**fields, steps={stage: 2})
        assert try_option(Trial(tiny, stage, "compile", False), [(stage, shot)]).difference == 0


@pytest.mark.slow
def test_options_are_tried_on_the_cluster_once(local_ray, tiny, make_shot, monkeypatch):
    monkeypatch.setattr(speed_trials, "MIN_SPEEDUP", 0.0)
    lossy = with_actor(tiny, "flux", lossy_trial_options={"quantize": "fp8_storage"}).allowing_loss()
    profile = trying(lossy, svd={"attention_backend": "flash", "decode_chunk_frames": 4})
    shots, messages = [make_shot(mode="fast", num_frames=2, steps={"flux": 6, "svd": 1})], []
    fast = run_trials(profile, shots, None, MACHINE, messages.append)
    assert fast.actors["svd"].options["decode_chunk_frames"] == 4
    assert "attention_backend" not in fast.actors["svd"].options
    assert fast.actors["flux"].options["quantize"] == "fp8_storage"
    outcomes = "\n".join(messages)
    assert "svd: attention_backend=flash on cpu: left out: SetupError: attention_backend" in outcomes
    assert re.search(r"flux: quantize=fp8_storage on cpu: used, .* as fast, PSNR .* in the worst of 3 shots", outcomes)
    assert "svd: decode_chunk_frames=4 on cpu: used" in outcomes
    messages.clear()
    assert run_trials(profile, shots, None, MACHINE, messages.append) == fast
    assert messages == []
    broken = trying(tiny.with_options({"svd": {"attention_backend": "sage"}}), svd={"decode_chunk_frames": 2})
    assert run_trials(broken, shots, None, MACHINE, messages.append) == broken
    assert messages[-1] == "svd: decode_chunk_frames=2 on cpu: could not be tried"


def test_trial_has_new_prompts_two_sizes_and_loras_whose_ranks_differ(tmp_path, make_shot):
    shot = make_shot(width=1024, height=576, lora="builtin:tiny/lora.safetensors", steps={"lora": 28})
    calls = speed_trials._calls(FluxLoRAStage, shot, tmp_path / "lora")
    shots = [shot for call in calls for shot in call]
    assert len({shot.prompt for shot in shots}) == len(shots) == 2 * (speed_trials.CALLS + 1)
    assert [(one.height, other.height) for one, other in calls] == [(576, 512)] * 3
    ranks = [[len(load_file(shot.lora[0].path)["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"])] for shot in shots]
    # Each size has both ranks, and they fall and rise within a size.
    assert ranks == [[4], [2], [2], [4], [4], [2]]
    assert {shot.steps.lora for shot in shots} == {speed_trials.MAX_STEPS}


@pytest.mark.slow
@pytest.mark.parametrize(("share", "is_accepted"), [(0.02, True), (0.5, False)])
def test_rounding_is_accepted_and_another_result_is_not(tiny, make_shot, monkeypatch, share, is_accepted):
    """A compiled FLUX rounds by 2 percent of a call, which denoising amplifies."""
    timed, forward = speed_trials._timed, FluxTransformer2DModel.forward

    def noisy(self, *args, **kwargs):
        (output,) = forward(self, *args, **kwargs)
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        return (output + share * noise * output.std(),)

    def timed_with_noise(profile, calls):
        monkeypatch.setattr(FluxTransformer2DModel, "forward", forward if profile == tiny else noisy)
        return timed(profile, calls)

    monkeypatch.setattr(speed_trials, "_timed", timed_with_noise)
    monkeypatch.setattr(speed_trials, "MIN_SPEEDUP", 0.0)
    result = try_option(Trial(tiny, "flux", "adapters_kept", 3), [("flux", make_shot(steps={"flux": 4}))])
    assert result.difference == pytest.approx(share, rel=0.5)
    assert (not result.rejected) == is_accepted


def test_fp8_may_differ_more(tiny, monkeypatch):
    monkeypatch.setattr(speed_trials, "_timed", lambda profile, calls: (1.0, [np.ones(1, np.float32)]))
    in_fp8 = tiny.with_options({"flux": {"quantize": "fp8"}})
    trials = (
        Trial(tiny, "flux", "compile", True),
        Trial(in_fp8, "flux", "compile", True),
    )
    assert [try_option(trial, []).in_fp8 for trial in trials] == [False, True]
    assert TrialResult(speedup=2, difference=0.15).rejected
    assert not TrialResult(speedup=2, difference=0.15, in_fp8=True).rejected
    assert TrialResult(speedup=2, difference=float("nan"), in_fp8=True).rejected
