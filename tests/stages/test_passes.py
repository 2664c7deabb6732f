"""Several passes of a video model: parity with plain diffusers calls, bitwise in fp32; progress and cancel."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from tests.stages.test_parity import as_uint8, gradient_image, loaded, plain
from vidgen_ray.errors import Cancelled
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Item, progress_callback
from vidgen_ray.stages.ltx import LTXStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.video import shots_of_passes
from vidgen_ray.stages.wan import WanStage

COMMON = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "output_type": "np"}
PROMPTED = {**COMMON, "prompt": "a photo of a man", "max_sequence_length": 64}
MODELS = {
    "svd": (
        SVDStage,
        diffusers.StableVideoDiffusionPipeline,
        {**COMMON, "fps": 25, "motion_bucket_id": 127, "noise_aug_strength": 0.02, "decode_chunk_size": 5},
    ),
    "wan": (WanStage, diffusers.WanImageToVideoPipeline, {**PROMPTED, "guidance_scale": 3.5}),
    "ltx": (LTXStage, diffusers.LTXImageToVideoPipeline, {**PROMPTED, "guidance_scale": 3.0, "frame_rate": 25}),
}
IMAGE = gradient_image(64, 64)
LAST = IMAGE[::-1, ::-1].copy()


@pytest.mark.parametrize("model", MODELS)
def test_passes_equal_calls_of_diffusers_that_start_from_the_last_frame(tiny, make_shot, model):
    stage_class, pipeline, arguments = MODELS[model]
    ends_with_image = model == "wan"
    fields = {"last_image": "last.png"} if ends_with_image else {}
    shot = make_shot(video_model=model, num_frames=9, fps=25, motion_bucket_id=127, extend=2, **fields)
    reports = []
    with progress_callback(lambda *report: reports.append(report)):
        clip = loaded(stage_class, tiny)(Item(shot, {"image": IMAGE, "last_image": LAST}))["frames"]

    pipe, image, passes = plain(pipeline, f"tiny/{model}"), IMAGE, []
    for number in range(3):
        seed = shot.derived_seed(f"pass {number}") if number else shot.seed
        noise = torch.Generator("cpu").manual_seed(Shot(prompt="-", seed=seed).derived_seed(model))
        last = {"last_image": Image.fromarray(LAST)} if ends_with_image and number == 2 else {}
        passes.append(as_uint8(pipe(image=Image.fromarray(image), generator=noise, **arguments, **last).frames[0]))
        image = passes[-1][-1]
    assert len(clip) == shot.clip_frames == 9 + 8 + 8
    assert np.array_equal(clip, np.concatenate([passes[0], passes[1][1:], passes[2][1:]]))
    assert reports == [(model, done, 6) for done in range(1, 7)]


def test_first_pass_is_the_shot_without_extend(make_shot):
    shot = make_shot(extend=2)
    first, second, third = shots_of_passes(shot)
    assert first == make_shot()
    assert len({first.seed, second.seed, third.seed}) == 3
    assert shots_of_passes(first) == [first]


def test_cancel_stops_in_a_further_pass_and_keeps_the_weights(tiny, make_shot):
    stage = loaded(LTXStage, tiny)
    item = Item(make_shot(video_model="ltx", num_frames=9, extend=1), {"image": IMAGE})
    before = stage(item)["frames"]
    reports = []

    def cancel_in_the_second_pass(*report):
        reports.append(report)
        if report[1] == 3:
            raise Cancelled

    with progress_callback(cancel_in_the_second_pass), pytest.raises(Cancelled):
        stage(item)
    assert reports[-1] == ("ltx", 3, 4)
    assert np.array_equal(stage(item)["frames"], before)


def test_clip_that_is_too_long_is_refused_with_what_is_allowed():
    assert Shot(prompt="a", num_frames=121, video_model="ltx", extend=7).clip_frames == 961
    with pytest.raises(ValidationError, match="clip of 1081 frames, at most 1024 are allowed; set extend to at most 7 with"):
        Shot(prompt="a", num_frames=121, video_model="ltx", extend=8)
    assert Shot(prompt="a", num_frames=256, extend=15, generate_video=False).extend == 15
