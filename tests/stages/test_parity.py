"""Parity of the diffusion stages with plain diffusers calls with the same weights and seed.

Bitwise in fp32: the same kernels run in the same order, on tensors of the same shapes.
"""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.shot import LoraRef
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.flux import FluxLoRAStage, FluxStage
from vidgen_ray.stages.flux_model import FluxModel
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.weights import resolve

LORA = LoraRef(path=str(resolve("builtin:tiny/lora.safetensors")))


def loaded(stage_class, profile, **changes):
    stage = stage_class(profile.params(stage_class).model_copy(update=changes))
    stage.load()
    return stage


def plain(pipeline_class, name):
    pipe = pipeline_class.from_pretrained(str(resolve(f"builtin:{name}")), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(shot, stage):
    return torch.Generator("cpu").manual_seed(STAGE_BY_NAME[stage].generator_seed(shot))


def as_uint8(pixels):
    return (pixels * 255).round().astype(np.uint8)


def levels_apart(a, b):
    """Return the largest difference of two images, in levels of 255."""
    return np.abs(a.astype(int) - b).max()


def gradient_image(width=128, height=64):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def flux(tiny):
    return loaded(FluxStage, tiny)


@pytest.fixture(scope="module")
def lora(tiny, flux):
    return loaded(FluxLoRAStage, tiny)


TEXT_CALL = {"width": 128, "height": 64, "num_inference_steps": 2, "max_sequence_length": 64, "output_type": "np"}
TWO_PASSES = {"guidance_scale": 1.0, "negative_prompt": "", "true_cfg_scale": 5.0}


@pytest.mark.parametrize(
    ("weights", "options", "fields", "call"),
    [
        ("flux", {}, {}, {"guidance_scale": 3.5}),
        (
            "flux",
            {},
            {"negative_prompt": "blurred"},
            {"negative_prompt": "blurred", "true_cfg_scale": 4.0, "guidance_scale": 3.5},
        ),
        ("flux", {"distilled_guidance": False}, {"guidance": {"flux": 5.0}}, TWO_PASSES),
        (
            "flux-schnell",
            {"text_tokens": 512},
            {"steps": {}, "guidance": {"flux": 9.0}},
            {"num_inference_steps": 4, "max_sequence_length": 256, "guidance_scale": 0.0},
        ),
    ],
    ids=("distilled guidance", "negative prompt", "two passes", "schnell"),
)
def test_flux_equals_diffusers(tiny, make_shot, weights, options, fields, call):
    stage = loaded(FluxStage, tiny, weights=resolve(f"builtin:tiny/{weights}"), **options)
    pipe = plain(diffusers.FluxPipeline, f"tiny/{weights}")
    expected = pipe("a photo of a man", generator=torch.Generator().manual_seed(7), **{**TEXT_CALL, **call}).images[0]
    assert np.array_equal(stage(Item(make_shot(**fields)))["image"], as_uint8(expected))


@pytest.mark.parametrize(
    ("distilled", "guidance", "call"),
    [
        (True, {}, {"guidance_scale": 3.5}),
        (False, {"lora": 5.0}, TWO_PASSES),
    ],
    ids=["distilled guidance", "two passes"],
)
def test_lora_stage_equals_diffusers(tiny, make_shot, distilled, guidance, call):
    shot = make_shot(lora=[LORA], lora_strength=0.6, guidance=guidance)
    lora = loaded(FluxLoRAStage, tiny, distilled_guidance=distilled)
    pipe = plain(diffusers.FluxImg2ImgPipeline, "tiny/flux")
    pipe.load_lora_weights(LORA.path, adapter_name="lora")
    expected = pipe(
        shot.prompt,
        image=Image.fromarray(gradient_image()),
        strength=0.6,
        generator=generator(shot, "lora"),
        **{**TEXT_CALL, "num_inference_steps": 4},
        **call,
    ).images[0]
    refined = lora(Item(shot, {"image": gradient_image()}))["image"]
    assert np.array_equal(refined, as_uint8(expected))


def test_layers_of_a_lora_that_flux_has_not_are_noted(flux, make_shot, tmp_path):
    tensors = load_file(LORA.path)
    for key in [key for key in tensors if ".transformer_blocks.0.attn.to_q." in key]:
        tensors[key.replace(".0.", ".99.")] = tensors[key].clone()
    save_file(tensors, tmp_path / "large.safetensors")
    flux.take_notes()
    flux(Item(make_shot(lora=[LORA.path], mode="fast")))
    assert not flux.take_notes()
    flux(Item(make_shot(lora=[str(tmp_path / "large.safetensors")], mode="fast")))
    (note,) = flux.take_notes()
    assert "lora large.safetensors: 1 of its layers are ignored" in note
    assert "the first is transformer.transformer_blocks.99.attn.to_q" in note


def test_least_recently_used_adapter_is_evicted(tiny, tmp_path):
    params = tiny.params(FluxStage).model_copy(update={"adapters_kept": 2})
    model = FluxModel(params)
    files = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for file in files:
        file.write_bytes((resolve("builtin:tiny/lora.safetensors")).read_bytes())
    for file in (files[0], files[1], files[0], files[2]):
        with model.loras_active([LoraRef(path=str(file))]):
            pass
    kept = model.text_to_image.get_list_adapters()["transformer"]
    assert kept == [model.adapters._loaded(LoraRef(path=str(file)), 0) for file in (files[0], files[2])]


def test_unusable_loras_are_rejected_and_unloaded(flux, lora, make_shot, tmp_path):
    file, before = tmp_path / "bad.safetensors", flux(Item(make_shot()))["image"]
    with pytest.raises(StageError, match="lora: got 5, must be at most 4"):
        lora(Item(make_shot(lora=[str(file)] * 5), {"image": before}))
    adapters = flux.model.text_to_image.get_list_adapters()
    unet, block = "unet.down_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.attn.to_q"
    for kind, tensors, message in (
        ("another model", {f"{unet}.lora_A.weight": (4, 32), f"{unet}.lora_B.weight": (32, 4)}, "trained for another model"),
        ("no lora", {"foo.weight": (2,)}, "cannot be loaded"),
        ("wrong shape", {f"{block}.lora_A.weight": (4, 99), f"{block}.lora_B.weight": (32, 4)}, "cannot be loaded"),
        ("untrained", {f"{block}.lora_A.weight": (4, 32), f"{block}.lora_B.weight": (32, 4)}, "has no effect"),
    ):
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
        with pytest.raises(StageError, match=message):
            lora(Item(make_shot(lora=[{"path": str(file)}]), {"image": before}))
        assert flux.model.text_to_image.get_list_adapters() == adapters, kind
    assert np.array_equal(flux(Item(make_shot()))["image"], before)


def test_lora_has_an_effect_only_where_it_is_active(flux, lora, make_shot):
    assert flux.model is lora.model
    without, quality, fast = (
        flux(Item(make_shot(**fields)))["image"] for fields in ({}, {"lora": [LORA]}, {"lora": [LORA], "mode": "fast"})
    )
    assert np.array_equal(without, quality)
    assert not np.array_equal(without, fast)
    refined = [lora(Item(make_shot(lora=[{"path": LORA.path, "weight": w}]), {"image": fast}))["image"] for w in (1.0, 0.0)]
    assert not np.array_equal(*refined)
    assert np.array_equal(flux(Item(make_shot()))["image"], without)
    assert np.array_equal(lora(Item(make_shot(lora=[LORA], lora_strength=0.0), {"image": fast}))["image"], fast)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_planned_memory_of_svd_has_room_for_the_decoded_frames(tiny, make_shot, dtype):
    """Frames are decoded eight at a time, and all of them are kept."""
    params = tiny.params(SVDStage).model_copy(update={"decode_chunk_frames": 8, "dtype": dtype})
    shorter, longer = (SVDStage.memory(params, make_shot(width=512, height=512, num_frames=n)).peak for n in (14, 15))
    assert longer - shorter == np.zeros((512, 512, 3), dtype).nbytes


def test_weights_and_sizes_of_another_model_are_rejected(tiny, make_shot, tmp_path):
    with pytest.raises(StageError, match="image: got 96x64, width and height must be multiples of 64"):
        loaded(SVDStage, tiny)(Item(make_shot(), {"image": gradient_image(96, 64)}))
    with pytest.raises(SetupError, match=r"no model_index\.json"):
        loaded(SVDStage, tiny, weights=tmp_path)
    with pytest.raises(SetupError, match="holds a FluxPipeline, must be a StableVideoDiffusionPipeline"):
        loaded(SVDStage, tiny, weights=resolve("builtin:tiny/flux"))
