"""`vidgen bench` at tiny size: what it measures, stores and reports."""

import json

import pytest

from tests.fake_stages import with_actor
from vidgen_ray.bench import bench_command, published_models
from vidgen_ray.bench.bench_command import BenchOptions, bench_stages
from vidgen_ray.bench.published_models import random_model, random_pipeline
from vidgen_ray.cli import main
from vidgen_ray.graph import relative_costs
from vidgen_ray.planner.demand import load_calibration
from vidgen_ray.profile import load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.flux import FluxStage

SMALL = ("--size", "64x64", "--frames", "2")


@pytest.fixture
def cache(own_cache, monkeypatch):
    monkeypatch.setattr(bench_command, "QUICK", BenchOptions(steps=(2, 3), repeats=1))
    return own_cache


def test_quick_bench_measures_every_stage_of_the_chain_and_a_plan_uses_the_results(cache, capsys):
    assert main(["bench", "-p", "tiny", "--quick", "--stage", "instantid", "--no-save", *SMALL]) == 0
    assert load_calibration("tiny", "cpu") == {}
    capsys.readouterr()
    assert main(["bench", "-p", "tiny", "--quick", "--json", *SMALL]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["stage"]: row for row in report["stages"]}
    assert {"instantid", "flux", "lora", "hunyuan", "svd", "realesrgan", "image_likeness"} <= rows.keys()
    assert [row["problem"] for row in report["stages"] if row["problem"]] == []
    assert (report["card"], report["chain"]) == ("cpu", None)
    assert rows["realesrgan"]["variant"] == "animevideov3"
    assert rows["svd"]["size"] == "64x64x2"
    assert rows["instantid"]["step_s"] is None
    calibration = load_calibration("tiny", "cpu")
    assert calibration["svd"].seconds_of_reference == rows["svd"]["seconds_of_reference"]
    assert calibration["realesrgan"].variants == {"animevideov3": rows["realesrgan"]["seconds_of_reference"]}
    script = cache / "s.jsonl"
    script.write_text('{"prompt": "a", "upscale_video": false}\n')
    assert main(["plan", str(script), "-p", "tiny", "-o", str(cache / "out"), "--json"]) == 0
    shot = Shot(prompt="a", **{**load_profile("tiny").defaults, "upscale_video": False})
    svd = calibration["svd"]
    expected = svd.seconds_of_reference * relative_costs(shot)["svd"].mixed(svd.fixed_share)
    planned = json.loads(capsys.readouterr().out)
    assert planned["stage_seconds"]["svd"] == pytest.approx(max(expected, 0.001), rel=0.05)


def test_invalid_options_are_rejected(capsys):
    for option, value, message in (
        ("--stage", "blur", "must be one of instantid"),
        ("--weights", "none", "must be profile or random"),
        ("--size", "large", "must be WIDTHxHEIGHT"),
    ):
        assert main(["bench", "-p", "tiny", option, value]) == 2
        assert f"{option}: got '{value}', {message}" in capsys.readouterr().err


def test_missing_weights_are_reported_with_exit_code_4(capsys):
    assert main(["bench", "-p", "gpu-80gb", "--quick", "--stage", "svd", "--no-save"]) == 4
    assert "svd: not measured: weights 'hub:stabilityai/stable-video-diffusion-img2vid-xt" in capsys.readouterr().err


class SlowStage(FluxStage):
    """Takes 5 s and 2 s per step, and 30 s more in its first call, on the clock of the test."""

    clock = 0.0
    calls: tuple[int, ...] = ()

    def load(self):
        pass

    def close(self):
        pass

    def __call__(self, item):
        steps = item.shot.steps.flux
        SlowStage.clock += 5 + 2 * steps + (0 if SlowStage.calls else 30)
        SlowStage.calls += (steps,)
        return {}


def test_seconds_per_step_and_fixed_seconds_are_separated(tiny, monkeypatch, make_shot):
    monkeypatch.setattr(bench_command, "stages_of", lambda shot: (SlowStage,))
    monkeypatch.setattr(bench_command.time, "perf_counter", lambda: SlowStage.clock)
    monkeypatch.setattr(SlowStage, "calls", ())
    shot = make_shot(face_image=("examples/faces/astronaut.jpg",), identity="none", width=1024, height=576)
    (result,) = bench_stages(tiny, [shot], BenchOptions(steps=(4, 14), repeats=2))
    measured = result.measurement
    assert result.problem is None
    assert (measured.step_s, measured.fixed_s, measured.warmup_s) == (2, 5, 30)
    assert SlowStage.calls == (14, 14, 14, 4, 4, 4)
    long = shot.model_copy(update={"steps": shot.steps.model_copy(update={"flux": 14})})
    assert measured.seconds_of_reference == pytest.approx(
        5 / FluxStage.relative_fixed_cost(long) + 2 * 14 / FluxStage.relative_cost(long)
    )


def test_bench_with_random_weights_needs_no_files_and_marks_the_results(cache, capsys, monkeypatch):
    """The reference is one to weights that are not on this machine. The published networks are replaced by tiny ones."""
    built, networks = [], random_model("builtin:tiny/svd", None).networks
    monkeypatch.setattr(published_models, "NETWORKS", {f"svd/{name}": network for name, network in networks.items()})
    monkeypatch.setattr(bench_command, "profile_for", with_published_weights)
    monkeypatch.setattr(bench_command, "random_pipeline", lambda *args: built.append(random_pipeline(*args)) or built[-1])
    arguments = ["--weights", "random", "--quick", "--json", "--stage", "svd", "--stage", "realesrgan", *SMALL]
    assert main(["bench", "-p", "tiny", *arguments]) == 0
    rows = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["stages"]}
    marked = {name: (row["problem"], row["random_weights"]) for name, row in rows.items()}
    assert marked == {"svd": (None, True), "realesrgan": (None, False)}
    assert [sorted(networks) for networks in built] == [["image_encoder", "unet", "vae"]]
    assert load_calibration("tiny", "cpu")["svd"].measurements[0].random_weights


def test_full_size_that_does_not_fit_is_refused_before_it_is_built(cache, capsys, monkeypatch):
    monkeypatch.setattr(published_models, "free_bytes", lambda device: 2**30)
    monkeypatch.setattr(published_models, "_draw_weights", lambda *args: pytest.fail("allocated"))
    monkeypatch.setattr(bench_command, "profile_for", with_published_weights)
    assert main(["bench", "-p", "tiny", "--weights", "random", "--quick", "--stage", "svd", "--no-save"]) == 4
    assert "svd: not measured: the weights need 8.4 GB of host memory, 1 GB are free" in capsys.readouterr().err


def with_published_weights(name):
    return with_actor(load_profile(name), "svd", weights="hub:stabilityai/stable-video-diffusion-img2vid-xt@main")
