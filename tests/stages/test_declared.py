"""The generic stage: the same bytes as the stages written for one model, with the declarations that ship."""

import numpy as np
import pytest

from tests.stages.test_parity import gradient_image, loaded
from vidgen_ray.declared.declaration import shipped
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.stages.base import Item, progress_callback
from vidgen_ray.stages.declared import stage_of
from vidgen_ray.weights import resolve

IMAGE = gradient_image(64, 64)
LAST = IMAGE[::-1, ::-1].copy()
CLIP = {"width": 64, "height": 64, "num_frames": 9, "fps": 8, "motion_prompt": "he walks", "negative_prompt": "blurred"}
REFERENCE = {"face_image": "x.jpg", "identity": "reference"}
QWEN = {"use_hunyuan_style": True, "style_model": "qwen-edit", "style_prompt": "ink"}
KLEIN_LORA = str(resolve("builtin:tiny/klein-lora.safetensors"))


def declared(name, of, **changes):
    """Return the stage of a shipped declaration under the name of another stage, whose settings shots have."""
    return stage_of(shipped()[name].model_copy(update={"name": of, **changes}))


@pytest.mark.parametrize(
    ("name", "of", "weights", "fields", "chosen"),
    [
        ("wan_a14b", "wan", "wan", {**CLIP, "guidance": {"wan": 2.0}, "extend": 1}, {}),
        ("wan_a14b", "wan", "wan", {**CLIP, "last_image": "last.png"}, {}),
        ("wan_a14b", "wan", "wan", {**CLIP, "guidance": {"wan": 1.0}}, {}),
        ("wan_ti2v", "wan", "wan-ti2v", {**CLIP, "guidance": {"wan": 2.0}}, {}),
        ("ltx_video", "ltx", "ltx", {**CLIP, "guidance": {"ltx": 2.0}}, {}),
        ("ltx_video", "ltx", "ltx-distilled", {**CLIP, "guidance": {"ltx": 2.0}}, {}),
        ("flux_2_klein", "klein", "klein", {"image_model": "klein"}, {}),
        ("flux_2_klein", "klein", "klein", REFERENCE, {}),
        ("qwen_image_edit", "qwen_edit", "qwen-edit", QWEN, {}),
        ("qwen_image_edit", "qwen_edit", "qwen-edit", {**QWEN, "steps": {"qwen_edit": 5}}, {"first_block_cache": 0.9}),
        ("wan_a14b", "wan", "wan", {**CLIP, "steps": {"wan": 5}}, {"first_block_cache": 0.9}),
        ("ltx_video", "ltx", "ltx", {**CLIP, "steps": {"ltx": 5}}, {"first_block_cache": 0.9}),
        ("wan_a14b", "wan", "wan", CLIP, {"schedule": "wan2.2-i2v-a14b"}),
        ("qwen_image_edit", "qwen_edit", "qwen-edit", {**QWEN, **REFERENCE, "guidance": {"qwen_edit": 2.0}}, {}),
    ],
)
def test_same_bytes_as_the_stage_of_the_model(tiny, make_shot, photo, name, of, weights, fields, chosen):
    written = loaded(STAGE_BY_NAME[of], tiny, weights=resolve(f"builtin:tiny/{weights}"), **chosen)
    changes = {"constants": {"text_encoder_out_layers": [1, 2, 3]}} if of == "klein" else {}
    stage_class = declared(name, of, **changes)
    kept = {"cpu_offload", "compile", "weights", "dtype", "device", "threads", "text_tokens", *chosen}
    options = {key: value for key, value in written.params.model_dump().items() if key in kept}
    stage = stage_class(stage_class.Params(**options))
    stage.load()
    video = {"video_model": of, "generate_video": True} if of in ("wan", "ltx") else {}
    shot = make_shot(**{"width": 64, "height": 64, "seed": 3, **video, **fields})
    item = Item(shot, {"image": IMAGE, "last_image": LAST, "photos": (photo[:256, :256], photo[100:228, 100:356])})
    reports = [], []
    made = []
    for each, seen in zip((written, stage), reports, strict=True):
        with progress_callback(lambda *report, seen=seen: seen.append(report)):
            (result,) = each(item).values()
        made.append(result)
    assert np.array_equal(*made)
    assert reports[0] == reports[1] != []
