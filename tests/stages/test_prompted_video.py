"""Wan and LTX: parity with plain diffusers calls with the same weights and seed, bitwise in fp32; LoRAs; limits."""

import json

import diffusers
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.stages.test_parity import as_uint8, generator, gradient_image, loaded, plain
from vidgen_ray.errors import StageError
from vidgen_ray.shot import VideoLora
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.ltx import LTXStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.weights import resolve

SIZE = {"height": 64, "width": 128, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 64, "output_type": "np"}
OWN_SETTINGS = {
    "negative_prompt": "blurred",
    "motion_prompt": "he walks",
    "fps": 8,
    "guidance": {"wan": 2.0, "ltx": 2.0},
    "steps": {"wan": 3, "ltx": 3},
}
"""Settings of a shot that differ from those of the profile and of the weights."""
WAN_LORA = str(resolve("builtin:tiny/wan-lora.safetensors"))
LTX_LORA = str(resolve("builtin:tiny/ltx-lora.safetensors"))
MODELS = {
    "wan": (WanStage, "tiny/wan", {}),
    "wan-ti2v": (WanStage, "tiny/wan-ti2v", {}),
    "ltx": (LTXStage, "tiny/ltx", {"frame_rate": 8}),
    "ltx-distilled": (
        LTXStage,
        "tiny/ltx-distilled",
        {"frame_rate": 8, "decode_timestep": 0.05, "decode_noise_scale": 0.025},
    ),
}


def item(make_shot, stage, width=64, **fields):
    shot = make_shot(video_model=stage.name, width=width, **{"num_frames": 9, "fps": 25, **fields})
    return Item(shot, {"image": gradient_image(width)})


def clip_of(stage, item):
    return stage(item)["frames"]


@pytest.fixture(scope="module")
def wan(tiny):
    return loaded(WanStage, tiny)


@pytest.fixture(scope="module")
def ltx(tiny):
    return loaded(LTXStage, tiny)


@pytest.fixture(params=["wan", "ltx"])
def stage(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("model", MODELS)
def test_stage_equals_diffusers(tiny, make_shot, model):
    stage_class, weights, arguments = MODELS[model]
    stage = loaded(stage_class, tiny, weights=resolve(f"builtin:{weights}"))
    one = item(make_shot, stage, 128, **OWN_SETTINGS)
    expected = plain(type(stage.pipe), weights)(
        image=Image.fromarray(gradient_image()),
        prompt="a photo of a man, he walks",
        negative_prompt="blurred",
        generator=generator(one.shot, stage.name),
        guidance_scale=2.0,
        **{**SIZE, "num_inference_steps": 3},
        **arguments,
    ).frames[0]
    clip = clip_of(stage, one)
    assert clip.shape == (9, 64, 128, 3)
    assert np.array_equal(clip, as_uint8(expected))


def test_wan_ends_with_the_last_image(wan, tiny, make_shot):
    last = gradient_image()[::-1, ::-1].copy()
    shot = make_shot(video_model="wan", num_frames=9, last_image="last.png")
    assert wan.needs(shot) == ("image", "last_image")
    one = Item(shot, {"image": gradient_image(), "last_image": last})
    expected = plain(diffusers.WanImageToVideoPipeline, "tiny/wan")(
        image=Image.fromarray(gradient_image()),
        last_image=Image.fromarray(last),
        prompt=shot.prompt,
        generator=generator(shot, "wan"),
        guidance_scale=3.5,
        **SIZE,
    ).frames[0]
    assert np.array_equal(clip_of(wan, one), as_uint8(expected))
    assert not np.array_equal(clip_of(wan, one), clip_of(wan, item(make_shot, wan, 128)))
    small = loaded(WanStage, tiny, weights=resolve("builtin:tiny/wan-ti2v"))
    with pytest.raises(StageError, match="last_image: these weights take none"):
        small(one)


def test_guidance_wan_2_changes_only_the_steps_of_the_low_noise_expert(wan, tiny, make_shot):
    begins = []
    hook = wan.pipe.transformer_2.register_forward_pre_hook(
        lambda module, args, inputs: begins.append(inputs["hidden_states"].clone()), with_kwargs=True
    )
    clips = []
    for scales in ({"wan": 3.5}, {"wan": 3.5, "wan_2": 3.5}, {"wan": 3.5, "wan_2": 1.5}, {"wan": 2.0, "wan_2": 1.5}):
        begins.append(None)
        clips.append(clip_of(wan, item(make_shot, wan, 128, guidance=scales)))
    hook.remove()
    same, equal, second, first = (begins[n + 1] for n, each in enumerate(begins) if each is None)
    assert same.equal(equal)
    assert same.equal(second)
    assert not same.equal(first)
    assert np.array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])
    one = item(make_shot, wan, 128)
    arguments = {
        "prompt": one.shot.prompt,
        "generator": generator(one.shot, "wan"),
        "guidance_scale": 3.5,
        "guidance_scale_2": 1.5,
    }
    pipe = plain(diffusers.WanImageToVideoPipeline, "tiny/wan")
    assert np.array_equal(clips[2], as_uint8(pipe(image=Image.fromarray(gradient_image()), **arguments, **SIZE).frames[0]))


def test_guidance_of_1_takes_one_pass_per_step_of_each_expert(wan, make_shot):
    passes = []
    hooks = [
        network.register_forward_pre_hook(lambda network, _: passes.append(network))
        for network in (wan.pipe.transformer, wan.pipe.transformer_2)
    ]
    clip_of(wan, item(make_shot, wan, steps={"wan": 4}, guidance={"wan": 1.0, "wan_2": 1.0}))
    for hook in hooks:
        hook.remove()
    assert len(passes) == 4
    assert len(set(passes)) == 2


def test_guidance_wan_2_without_effect_is_refused(wan, tiny, make_shot):
    with pytest.raises(StageError, match=r"needs guidance\.wan above 1"):
        wan(item(make_shot, wan, guidance={"wan": 1.0, "wan_2": 2.0}))
    with pytest.raises(StageError, match="wan_2: these weights take none"):
        loaded(WanStage, tiny, weights=resolve("builtin:tiny/wan-ti2v"))(item(make_shot, wan, guidance={"wan_2": 2.0}))


def test_wan_lora_equals_diffusers_and_leaves_no_trace(wan, make_shot):
    size = {"width": 64, "num_frames": 5}
    image = gradient_image(64, 64)

    def clip(**fields):
        one = item(make_shot, wan, **size, **fields)
        return one.shot, clip_of(wan, Item(one.shot, {"image": image}))

    _, before = clip()
    for expert in ("both", "high", "low"):
        shot, with_lora = clip(video_lora=[{"path": WAN_LORA, "weight": 0.8, "expert": expert}])
        pipe = plain(diffusers.WanImageToVideoPipeline, "tiny/wan")
        if expert != "low":
            pipe.load_lora_weights(WAN_LORA, adapter_name="one")
        if expert != "high":
            pipe.load_lora_weights(WAN_LORA, adapter_name="one", load_into_transformer_2=True)
        pipe.set_adapters(["one"], [0.8])
        arguments = {"prompt": shot.prompt, "generator": generator(shot, "wan"), "guidance_scale": 3.5}
        expected = pipe(image=Image.fromarray(image), **arguments, **{**SIZE, **size}).frames[0]
        assert np.array_equal(with_lora, as_uint8(expected)), expert
        assert not np.array_equal(with_lora, before), expert
    assert np.array_equal(clip()[1], before)


def test_loras_for_each_expert_are_active_together(wan, make_shot, tmp_path):
    """The layout of LoRAs distilled to four steps: one file for each transformer."""
    low = tmp_path / "low.safetensors"
    layers = {name: 0.5 * tensor for name, tensor in load_file(WAN_LORA).items()}
    save_file(layers, low)
    pair = [{"path": WAN_LORA, "expert": "high"}, {"path": str(low), "expert": "low"}]
    few = {"steps": {"wan": 4}, "guidance": {"wan": 1.0}}
    together = clip_of(wan, item(make_shot, wan, video_lora=pair, **few))
    for one in pair:
        assert not np.array_equal(together, clip_of(wan, item(make_shot, wan, video_lora=[one], **few)))


def test_few_step_loras_are_merged_into_both_experts(tiny, wan, make_shot, tmp_path):
    layers = load_file(WAN_LORA)
    for name, factor in (("high_noise_model", 1.0), ("low_noise_model", 0.5)):
        save_file({key: factor * tensor for key, tensor in layers.items()}, tmp_path / f"{name}.safetensors")
    pair = [{"path": str(tmp_path / f"{name}_noise_model.safetensors"), "expert": name} for name in ("high", "low")]
    few = {"steps": {"wan": 4}, "guidance": {"wan": 1.0}}
    with loaded(WanStage, tiny, extra_weights={"few_step_lora": tmp_path}) as merged:
        assert not any(merged.pipe.get_list_adapters().values())
        clip, active = (
            clip_of(merged, item(make_shot, merged, **few)),
            clip_of(wan, item(make_shot, wan, video_lora=pair, **few)),
        )
        assert np.abs(clip.astype(int) - active).max() <= 2
        assert not np.array_equal(clip, clip_of(wan, item(make_shot, wan, **few)))
        assert len(WanStage.weight_files(merged.params, make_shot())) == 3
        # Further LoRAs are active on top.
        assert not np.array_equal(clip, clip_of(merged, item(make_shot, merged, video_lora=WAN_LORA, **few)))


def test_ltx_lora_changes_the_clip_and_leaves_no_trace(ltx, make_shot):
    before = clip_of(ltx, item(make_shot, ltx))
    assert not np.array_equal(clip_of(ltx, item(make_shot, ltx, video_lora=LTX_LORA)), before)
    assert np.array_equal(clip_of(ltx, item(make_shot, ltx)), before)


def test_lora_for_another_model_or_expert_is_rejected(wan, ltx, make_shot):
    before = clip_of(ltx, item(make_shot, ltx))
    with pytest.raises(StageError, match=r"wan-lora.*these ltx weights"):
        clip_of(ltx, item(make_shot, ltx, video_lora=WAN_LORA))
    with pytest.raises(StageError, match="got expert low, must be both or high"):
        clip_of(ltx, item(make_shot, ltx, video_lora=[VideoLora(path=LTX_LORA, expert="low")]))
    assert np.array_equal(clip_of(ltx, item(make_shot, ltx)), before)


def test_sizes_and_numbers_of_frames_that_a_model_cannot_make_are_rejected(tiny, wan, make_shot):
    small = loaded(WanStage, tiny, weights=resolve("builtin:tiny/wan-ti2v"))
    shot = item(make_shot, wan).shot
    assert clip_of(wan, Item(shot, {"image": gradient_image(80, 64)})).shape == (9, 64, 80, 3)
    with pytest.raises(StageError, match="image: got 80x64, width and height must be multiples of 32"):
        small(Item(shot, {"image": gradient_image(80, 64)}))
    with pytest.raises(StageError, match=r"num_frames: got 10, must be 4k \+ 1 for this video model \(nearest: 9, 13\)"):
        wan(Item(shot.model_copy(update={"num_frames": 10}), {"image": gradient_image()}))


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


def test_tiles_of_the_autoencoder_are_the_fallback_for_little_memory(stage):
    lower = stage.lower_memory(stage.params)
    assert lower.vae_tiling
    assert stage.lower_memory(lower) is None
