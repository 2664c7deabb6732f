"""Video models: parity with plain diffusers calls with the same weights and seed; passes; LoRAs; limits.

Parity is bitwise in fp32: the same kernels run in the same order, on tensors of the same shapes.
"""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from tests.stages.test_parity import as_uint8, generator, gradient_image, loaded, plain
from vidgen_ray.errors import StageError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.shot import Shot, VideoLora
from vidgen_ray.stages.base import Item, progress_callback
from vidgen_ray.stages.ltx import LTXStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.weights import resolve

IMAGE = gradient_image(64, 64)
LAST = IMAGE[::-1, ::-1].copy()
SIZE = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "output_type": "np"}
PROMPTED = {**SIZE, "prompt": "a photo of a man", "max_sequence_length": 64}
OWN_PROMPTED = {**PROMPTED, "prompt": "a photo of a man, he walks", "negative_prompt": "blurred", "guidance_scale": 2.0}
WAN_LORA = str(resolve("builtin:tiny/wan-lora.safetensors"))
LTX_LORA = str(resolve("builtin:tiny/ltx-lora.safetensors"))


def item(make_shot, stage, **fields):
    return Item(make_shot(**{"video_model": stage.name, "width": 64, "num_frames": 9, "fps": 25, **fields}), {"image": IMAGE})


def clip_of(stage, item):
    return stage(item)["frames"]


@pytest.fixture(scope="module")
def wan(tiny):
    return loaded(WanStage, tiny)


@pytest.fixture(scope="module")
def small_wan(tiny):
    return loaded(WanStage, tiny, weights=resolve("builtin:tiny/wan-ti2v"))


@pytest.fixture(scope="module")
def ltx(tiny):
    return loaded(LTXStage, tiny)


@pytest.mark.parametrize(
    ("weights", "own", "arguments"),
    [
        (
            "svd",
            {"motion_bucket_id": 90, "noise_aug_strength": 0.1, "guidance": {"svd": 2.5}},
            {**SIZE, "fps": 8, "motion_bucket_id": 90, "noise_aug_strength": 0.1, "max_guidance_scale": 2.5},
        ),
        (
            "wan",
            {"last_image": "last.png", "guidance": {"wan": 2.0, "wan_2": 1.5}},
            {**OWN_PROMPTED, "guidance_scale_2": 1.5},
        ),
        ("wan-ti2v", {"guidance": {"wan": 2.0}}, OWN_PROMPTED),
        ("ltx", {"guidance": {"ltx": 2.0}}, {**OWN_PROMPTED, "frame_rate": 8}),
        (
            "ltx-distilled",
            {"guidance": {"ltx": 2.0}},
            {**OWN_PROMPTED, "frame_rate": 8, "decode_timestep": 0.05, "decode_noise_scale": 0.025},
        ),
    ],
    ids=("svd", "wan", "wan-ti2v", "ltx", "ltx-distilled"),
)
def test_passes_equal_calls_of_diffusers_that_start_from_the_last_frame(tiny, make_shot, weights, own, arguments):
    """With settings that differ from those of the profile and of the weights."""
    stage = loaded(STAGE_BY_NAME[weights.partition("-")[0]], tiny, weights=resolve(f"builtin:tiny/{weights}"))
    texts = {} if stage.name == "svd" else {"motion_prompt": "he walks", "negative_prompt": "blurred"}
    shot = item(make_shot, stage, fps=8, extend=1, **texts, **own).shot
    reports = []
    with progress_callback(lambda *report: reports.append(report)):
        clip = clip_of(stage, Item(shot, {"image": IMAGE, "last_image": LAST}))

    pipe, image, passes = plain(type(stage.pipe), f"tiny/{weights}"), IMAGE, []
    chunks = {"decode_chunk_size": 5} if stage.name == "svd" else {}
    for seed in (shot.seed, shot.derived_seed("pass 1")):
        noise = torch.Generator("cpu").manual_seed(Shot(prompt="-", seed=seed).derived_seed(stage.name))
        last = {"last_image": Image.fromarray(LAST)} if shot.last_image and passes else {}
        passes.append(as_uint8(pipe(image=Image.fromarray(image), generator=noise, **arguments, **last, **chunks).frames[0]))
        image = passes[-1][-1]
    assert len(clip) == shot.clip_frames == 9 + 8
    assert np.array_equal(clip, np.concatenate([passes[0], passes[1][1:]]))
    assert reports == [(stage.name, done, 4) for done in range(1, 5)]


def test_clip_that_is_too_long_is_refused_with_what_is_allowed():
    assert Shot(prompt="a", num_frames=121, video_model="ltx", extend=7).clip_frames == 961
    with pytest.raises(ValidationError, match="clip of 1081 frames, at most 1024 are allowed; set extend to at most 7 with"):
        Shot(prompt="a", num_frames=121, video_model="ltx", extend=8)
    assert Shot(prompt="a", num_frames=256, extend=15, generate_video=False).extend == 15


def test_wan_lora_equals_diffusers_and_leaves_no_trace(wan, make_shot):
    before = clip_of(wan, item(make_shot, wan, num_frames=5))
    for expert in ("both", "low"):
        lora = [{"path": WAN_LORA, "weight": 0.8, "expert": expert}]
        one = item(make_shot, wan, num_frames=5, video_lora=lora)
        with_lora = clip_of(wan, one)
        pipe = plain(diffusers.WanImageToVideoPipeline, "tiny/wan")
        if expert != "low":
            pipe.load_lora_weights(WAN_LORA, adapter_name="one")
        pipe.load_lora_weights(WAN_LORA, adapter_name="one", load_into_transformer_2=True)
        pipe.set_adapters(["one"], [0.8])
        arguments = {**PROMPTED, "num_frames": 5, "generator": generator(one.shot, "wan"), "guidance_scale": 3.5}
        expected = pipe(image=Image.fromarray(IMAGE), **arguments).frames[0]
        assert np.array_equal(with_lora, as_uint8(expected)), expert
        assert not np.array_equal(with_lora, before), expert
    assert np.array_equal(clip_of(wan, item(make_shot, wan, num_frames=5)), before)


def test_few_step_loras_are_merged_into_both_experts(tiny, wan, make_shot, tmp_path):
    """They have the effect of the same LoRAs when these are active, and further LoRAs are active on top."""
    layers = load_file(WAN_LORA)
    for name, factor in (("high_noise_model", 1.0), ("low_noise_model", 0.5)):
        save_file({key: factor * tensor for key, tensor in layers.items()}, tmp_path / f"{name}.safetensors")
    few = {"num_frames": 5, "steps": {"wan": 4}, "guidance": {"wan": 1.0}}
    pair = [{"path": str(tmp_path / f"{name}_noise_model.safetensors"), "expert": name} for name in ("high", "low")]
    with loaded(WanStage, tiny, extra_weights={"few_step_lora": tmp_path}) as merged:
        assert not any(merged.pipe.get_list_adapters().values())
        clip = clip_of(merged, item(make_shot, merged, **few))
        active = clip_of(wan, item(make_shot, wan, video_lora=pair, **few))
        assert np.abs(clip.astype(int) - active).max() <= 2
        for stage, loras in ((wan, []), (wan, pair[:1]), (wan, pair[1:]), (merged, WAN_LORA)):
            other = clip_of(stage, item(make_shot, stage, video_lora=loras, **few))
            assert not np.array_equal(clip, other), loras
        assert len(WanStage.weight_files(merged.params, make_shot())) == 3


def test_lora_for_another_model_or_expert_is_rejected(ltx, make_shot):
    before = clip_of(ltx, item(make_shot, ltx))
    with pytest.raises(StageError, match=r"wan-lora.*these ltx weights"):
        clip_of(ltx, item(make_shot, ltx, video_lora=WAN_LORA))
    with pytest.raises(StageError, match="got expert low, must be both or high"):
        clip_of(ltx, item(make_shot, ltx, video_lora=[VideoLora(path=LTX_LORA, expert="low")]))
    assert np.array_equal(clip_of(ltx, item(make_shot, ltx)), before)


def test_sizes_and_settings_that_weights_cannot_make_are_rejected(wan, small_wan, make_shot):
    for stage, fields, size, message in (
        (small_wan, {}, (80, 64), "image: got 80x64, width and height must be multiples of 32"),
        (small_wan, {"last_image": "last.png"}, (64, 64), "last_image: these weights take none"),
        (small_wan, {"guidance": {"wan_2": 2.0}}, (64, 64), "wan_2: these weights take none"),
        (wan, {"guidance": {"wan": 1.0, "wan_2": 2.0}}, (64, 64), r"needs guidance\.wan above 1"),
        (wan, {"num_frames": 10}, (64, 64), r"num_frames: got 10, must be 4k \+ 1 for this video model \(nearest: 9, 13\)"),
    ):
        num_frames = fields.pop("num_frames", 9)
        # Shots check the number of frames themselves.
        shot = item(make_shot, stage, **fields).shot.model_copy(update={"num_frames": num_frames})
        with pytest.raises(StageError, match=message):
            stage(Item(shot, {"image": gradient_image(*size), "last_image": LAST}))


@pytest.mark.parametrize(
    ("stage_class", "weights", "kind"), [(WanStage, "wan-ti2v", "WanPipeline"), (LTXStage, "ltx", "LTXPipeline")]
)
def test_folders_that_name_the_text_to_video_pipeline_are_loaded(tiny, tmp_path, stage_class, weights, kind):
    """The published folders of LTX-Video and Wan2.2-TI2V-5B do."""
    for part in resolve(f"builtin:tiny/{weights}").iterdir():
        (tmp_path / part.name).symlink_to(part)
    index = tmp_path / "model_index.json"
    content = {**json.loads(index.read_text()), "_class_name": kind}
    index.unlink()
    index.write_text(json.dumps(content))
    stage_class.check_weights(tiny.params(stage_class).model_copy(update={"weights": tmp_path}))
    assert loaded(stage_class, tiny, weights=tmp_path).pipe.transformer is not None
