"""Stages report their progress and stop between two steps when the callback raises Cancelled."""

import numpy as np
import pytest

from tests.conftest import ASTRONAUT
from vidgen_ray.content_keys import ShotPlanner, params_of
from vidgen_ray.engine.step_runner import StepRunner
from vidgen_ray.errors import Cancelled
from vidgen_ray.graph import stages_of
from vidgen_ray.stages.base import Item, progress_callback
from vidgen_ray.stages.realesrgan import RealESRGANStage


@pytest.fixture(scope="module")
def chain(tiny):
    """A shot that uses every denoising stage except SDXL, and a runner with these stages loaded."""
    from vidgen_ray.shot import Shot

    shot = Shot(
        **{**tiny.defaults, "num_frames": 5, "width": 64},
        id="s",
        prompt="a photo of a man",
        seed=7,
        face_image=(str(ASTRONAUT),),
        lora="builtin:tiny/lora.safetensors",
        use_hunyuan_style=True,
        style_prompt="watercolour",
    )
    stages = stages_of(shot)
    plan = ShotPlanner(params_of(tiny, stages), tiny.encode)(shot)
    runner = StepRunner([stage(tiny.params(stage)) for stage in stages], 0.0, None)
    runner.load()
    return plan, runner


STAGES_TO_CLIP = ("instantid", "flux", "lora", "hunyuan", "image_likeness", "svd")


def test_progress_is_reported_and_a_cancel_stops_after_the_current_step(chain):
    plan, runner = chain
    reports = []
    with progress_callback(lambda *progress: reports.append(progress)):
        item, _ = runner.run(plan, Item(plan.shot), STAGES_TO_CLIP)
        upscaled, _ = runner.run_chunk(plan, ["realesrgan"], slice(0, 5), item.artefacts)
    assert reports == [
        ("instantid", 0, 0),
        ("flux", 0, 0), ("flux", 1, 2), ("flux", 2, 2),
        # Of 4 steps, strength 0.6 runs 3 and strength 0.5 runs 2.
        ("lora", 0, 0), ("lora", 1, 3), ("lora", 2, 3), ("lora", 3, 3),
        ("hunyuan", 0, 0), ("hunyuan", 1, 2), ("hunyuan", 2, 2),
        ("image_likeness", 0, 0),
        ("svd", 0, 0), ("svd", 1, 2), ("svd", 2, 2),
        ("realesrgan", 4, 5), ("realesrgan", 5, 5),
    ]  # fmt: skip
    again, _ = runner.run_chunk(plan, ["realesrgan"], slice(0, 5), item.artefacts)
    assert np.array_equal(again["hd_frames"], upscaled["hd_frames"])
    # A run that is cancelled changes no weights, and neither do reports.
    for stage in ("lora", "svd"):
        reports.clear()

        def cancel_after_one_step(*progress, stage=stage):
            reports.append(progress)
            if progress[:2] == (stage, 1):
                raise Cancelled

        with progress_callback(cancel_after_one_step), pytest.raises(Cancelled):
            runner.run(plan, Item(plan.shot), STAGES_TO_CLIP)
        assert reports[-1][:2] == (stage, 1)
    after, _ = runner.run(plan, Item(plan.shot), STAGES_TO_CLIP)
    assert np.array_equal(after.artefacts["frames"], item.artefacts["frames"])


def test_sdxl_reports_its_steps(tiny, make_shot):
    shot = make_shot(face_image=(str(ASTRONAUT),), identity="instantid-sdxl", generate_video=False)
    stages = [stage for stage in stages_of(shot) if stage.name in ("instantid", "instantid_sdxl")]
    plan = ShotPlanner(params_of(tiny, stages_of(shot)), tiny.encode)(shot)
    runner = StepRunner([stage(tiny.params(stage)) for stage in stages], 0.0, None)
    runner.load()
    reports = []
    with progress_callback(lambda *progress: reports.append(progress)):
        runner.run(plan, Item(shot), runner.stages)
    assert reports == [("instantid", 0, 0), ("instantid_sdxl", 0, 0), ("instantid_sdxl", 1, 2), ("instantid_sdxl", 2, 2)]


def test_cancel_stops_upscaling_after_the_current_chunk(tiny, make_shot):
    stage = RealESRGANStage(tiny.params(RealESRGANStage))
    stage.load()
    reports = []

    def cancel(*progress):
        reports.append(progress)
        raise Cancelled

    with progress_callback(cancel), pytest.raises(Cancelled):
        stage.run_chunk(make_shot(scale=2), np.zeros((9, 16, 16, 3), np.uint8))
    assert reports == [("realesrgan", 4, 9)]
