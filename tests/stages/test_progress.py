"""Stages say how far they are, and end between two steps when they are told to."""

import numpy as np
import pytest

from tests.conftest import ASTRONAUT
from vidgen_ray.content_keys import ShotPlanner, params_of
from vidgen_ray.engine.step_runner import StepRunner
from vidgen_ray.errors import Cancelled
from vidgen_ray.graph import stages_of
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.progress import progress_callback, report_progress
from vidgen_ray.stages.realesrgan import RealESRGANStage


@pytest.fixture(scope="module")
def chain(tiny):
    """A shot through every stage that denoises but SDXL, and a runner with them loaded."""
    from vidgen_ray.shot import Shot

    shot = Shot(
        **{**tiny.defaults, "num_frames": 5},
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


UP_TO_THE_CLIP = ("instantid", "flux", "lora", "hunyuan", "image_likeness", "svd")


def test_every_denoising_step_and_every_frame_is_reported_in_order_and_changes_no_byte(chain):
    plan, runner = chain
    told = []
    with progress_callback(lambda *progress: told.append(progress)):
        item, _ = runner.run(plan, Item(plan.shot), UP_TO_THE_CLIP)
        upscaled, _ = runner.run_chunk(plan, ["realesrgan"], slice(0, 5), item.artefacts)
    assert told == [
        ("instantid", 0, 0),
        ("flux", 0, 0), ("flux", 1, 2), ("flux", 2, 2),
        # Of 4 steps those that strength 0.6 runs, and 0.5.
        ("lora", 0, 0), ("lora", 1, 3), ("lora", 2, 3), ("lora", 3, 3),
        ("hunyuan", 0, 0), ("hunyuan", 1, 2), ("hunyuan", 2, 2),
        ("image_likeness", 0, 0),
        ("svd", 0, 0), ("svd", 1, 2), ("svd", 2, 2),
        ("realesrgan", 4, 5), ("realesrgan", 5, 5),
    ]  # fmt: skip
    unheard, _ = runner.run(plan, Item(plan.shot), UP_TO_THE_CLIP)
    assert np.array_equal(unheard.artefacts["frames"], item.artefacts["frames"])
    again, _ = runner.run_chunk(plan, ["realesrgan"], slice(0, 5), item.artefacts)
    assert np.array_equal(again["hd_frames"], upscaled["hd_frames"])


@pytest.mark.parametrize("stage", ["flux", "lora", "hunyuan", "svd"])
def test_work_ends_after_the_step_in_which_it_was_cancelled_and_leaves_the_weights_as_they_were(chain, stage):
    plan, runner = chain
    before, _ = runner.run(plan, Item(plan.shot), UP_TO_THE_CLIP)
    told = []

    def cancel_after_one_step(*progress):
        told.append(progress)
        if progress[:2] == (stage, 1):
            raise Cancelled

    with progress_callback(cancel_after_one_step), pytest.raises(Cancelled):
        runner.run(plan, Item(plan.shot), UP_TO_THE_CLIP)
    assert told[-1][:2] == (stage, 1)
    after, _ = runner.run(plan, Item(plan.shot), UP_TO_THE_CLIP)
    assert np.array_equal(after.artefacts["frames"], before.artefacts["frames"])


def test_sdxl_reports_its_steps(tiny, make_shot):
    shot = make_shot(face_image=(str(ASTRONAUT),), identity="instantid-sdxl", generate_video=False)
    stages = [stage for stage in stages_of(shot) if stage.name in ("instantid", "instantid_sdxl")]
    plan = ShotPlanner(params_of(tiny, stages_of(shot)), tiny.encode)(shot)
    runner = StepRunner([stage(tiny.params(stage)) for stage in stages], 0.0, None)
    runner.load()
    told = []
    with progress_callback(lambda *progress: told.append(progress)):
        runner.run(plan, Item(shot), runner.stages)
    assert told == [("instantid", 0, 0), ("instantid_sdxl", 0, 0), ("instantid_sdxl", 1, 2), ("instantid_sdxl", 2, 2)]


def test_cancel_ends_upscaling_after_the_current_chunk(tiny, make_shot):
    stage = RealESRGANStage(tiny.params(RealESRGANStage))
    stage.load()
    told = []

    def cancel(*progress):
        told.append(progress)
        raise Cancelled

    with progress_callback(cancel), pytest.raises(Cancelled):
        stage.run_chunk(make_shot(scale=2), np.zeros((9, 16, 16, 3), np.uint8))
    assert told == [("realesrgan", 4, 9)]


def test_outside_of_a_listening_block_nobody_is_told():
    told = []
    with progress_callback(lambda *progress: told.append(progress)):
        report_progress("flux", 1, 2)
    report_progress("flux", 2, 2)
    assert told == [("flux", 1, 2)]
