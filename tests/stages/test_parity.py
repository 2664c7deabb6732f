"""Parity of the diffusion stages with plain diffusers calls with the same weights and seed, bitwise in fp32."""

from pathlib import Path

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


@pytest.mark.parametrize("negative", [None, "blurred"])
def test_flux_equals_diffusers(flux, make_shot, negative):
    shot = make_shot(negative_prompt=negative)
    cfg = {"negative_prompt": negative, "true_cfg_scale": 4.0} if negative else {}
    expected = plain(diffusers.FluxPipeline, "tiny/flux")(
        shot.prompt, guidance_scale=3.5, generator=torch.Generator().manual_seed(7), **TEXT_CALL, **cfg
    ).images[0]
    assert np.array_equal(flux(Item(shot))["image"], as_uint8(expected))


@pytest.mark.parametrize(("weights", "negative"), [("tiny/flux", None), ("tiny/flux-schnell", "blurred")])
def test_flux_without_distilled_guidance_equals_diffusers_with_two_passes(tiny, make_shot, weights, negative):
    stage = loaded(FluxStage, tiny, weights=resolve(f"builtin:{weights}"), distilled_guidance=False)
    shot = make_shot(negative_prompt=negative, guidance={"flux": 5.0})
    pipe, calls = plain(diffusers.FluxPipeline, weights), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    expected = pipe(
        shot.prompt,
        negative_prompt=negative or "",
        true_cfg_scale=5.0,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(7),
        **TEXT_CALL,
    ).images[0]
    assert len(calls) == 4
    assert np.array_equal(stage(Item(shot))["image"], as_uint8(expected))


def test_schnell_uses_4_steps_and_256_text_tokens(tiny, make_shot):
    schnell = loaded(FluxStage, tiny, weights=resolve("builtin:tiny/flux-schnell"), text_tokens=512)
    shot = make_shot(steps={}, guidance={"flux": 9.0})
    expected = plain(diffusers.FluxPipeline, "tiny/flux-schnell")(
        shot.prompt,
        width=128,
        height=64,
        num_inference_steps=4,
        guidance_scale=0.0,
        max_sequence_length=256,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images[0]
    assert np.array_equal(schnell(Item(shot))["image"], as_uint8(expected))


@pytest.mark.parametrize(
    ("distilled", "guidance", "call"),
    [
        (True, {}, {"guidance_scale": 3.5}),
        (False, {"lora": 5.0}, {"guidance_scale": 1.0, "negative_prompt": "", "true_cfg_scale": 5.0}),
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


def test_flux_stages_share_one_model(flux, lora):
    assert flux.model is lora.model
    assert flux.model.image_to_image.transformer is flux.model.text_to_image.transformer
    assert flux.model.text_to_image.transformer.dtype == torch.float32


def test_lora_does_not_change_later_images_without_it(flux, lora, make_shot):
    before = flux(Item(make_shot()))["image"]
    refined = [lora(Item(make_shot(lora=[{"path": LORA.path, "weight": w}]), {"image": before})) for w in (1.0, 0.0)]
    assert not np.array_equal(refined[0]["image"], refined[1]["image"]), "the LoRA has no effect"
    assert np.array_equal(flux(Item(make_shot()))["image"], before)


def test_layers_of_a_lora_that_flux_has_not_are_noted(flux, make_shot, tmp_path):
    tensors = load_file(LORA.path)
    name = next(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))
    for factor in "AB":
        tensors[f"transformer.transformer_blocks.99.attn.to_q.lora_{factor}.weight"] = tensors[
            f"{name}.lora_{factor}.weight"
        ].clone()
    save_file(tensors, tmp_path / "large.safetensors")
    flux.take_notes()
    for path, notes in ((LORA.path, 0), (str(tmp_path / "large.safetensors"), 1), (str(tmp_path / "large.safetensors"), 0)):
        flux(Item(make_shot(lora=[path], mode="fast")))
        found = flux.take_notes()
        assert len(found) == notes
        if notes:
            assert "lora large.safetensors: 1 of its layers are ignored" in found[0]
            assert "the first is transformer.transformer_blocks.99.attn.to_q" in found[0]


def test_fast_mode_applies_the_lora_in_the_flux_stage(flux, make_shot):
    without_lora, quality, fast = (
        flux(Item(make_shot(**fields)))["image"] for fields in ({}, {"lora": [LORA]}, {"lora": [LORA], "mode": "fast"})
    )
    assert np.array_equal(without_lora, quality)
    assert not np.array_equal(without_lora, fast)


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


def test_too_many_loras_are_rejected_and_do_not_change_the_weights(flux, lora, make_shot, tmp_path):
    before = flux(Item(make_shot()))["image"]
    files = [tmp_path / f"{n}.safetensors" for n in range(5)]
    for file in files:
        file.write_bytes(Path(LORA.path).read_bytes())
    with pytest.raises(StageError, match="lora: got 5, must be at most 4"):
        lora(Item(make_shot(lora=[str(file) for file in files]), {"image": before}))
    assert np.array_equal(flux(Item(make_shot()))["image"], before)


def test_lora_without_effect_is_rejected_and_unloaded(flux, lora, make_shot, tmp_path):
    file, before = tmp_path / "bad.safetensors", flux(Item(make_shot()))["image"]
    unet, block = "unet.down_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.attn.to_q"
    for kind, tensors, message in (
        ("another model", {f"{unet}.lora_A.weight": (4, 32), f"{unet}.lora_B.weight": (32, 4)}, "has no effect"),
        ("no lora", {"foo.weight": (2,)}, "cannot be loaded"),
        ("wrong shape", {f"{block}.lora_A.weight": (4, 99), f"{block}.lora_B.weight": (32, 4)}, "cannot be loaded"),
        ("untrained", {f"{block}.lora_A.weight": (4, 32), f"{block}.lora_B.weight": (32, 4)}, "has no effect"),
    ):
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
        with pytest.raises(StageError, match=message):
            lora(Item(make_shot(lora=[{"path": str(file)}]), {"image": before}))
        assert np.array_equal(flux(Item(make_shot()))["image"], before), kind


def test_lora_strength_0_returns_the_image_unchanged(lora, make_shot):
    refined = lora(Item(make_shot(lora=[LORA], lora_strength=0.0), {"image": gradient_image()}))
    assert np.array_equal(refined["image"], gradient_image())


def test_svd_equals_diffusers_with_its_conditions(tiny, make_shot):
    stage = loaded(SVDStage, tiny)
    shot = make_shot(num_frames=7, fps=5, motion_bucket_id=90, noise_aug_strength=0.1, guidance={"svd": 2.5})
    image = gradient_image(64, 64)
    expected = plain(diffusers.StableVideoDiffusionPipeline, "tiny/svd")(
        Image.fromarray(image),
        height=64,
        width=64,
        num_frames=7,
        num_inference_steps=2,
        max_guidance_scale=2.5,
        fps=5,
        motion_bucket_id=90,
        noise_aug_strength=0.1,
        decode_chunk_size=5,
        generator=generator(shot, "svd"),
        output_type="np",
    ).frames[0]
    clip = stage(Item(shot, {"image": image}))["frames"]
    assert clip.shape == (7, 64, 64, 3)
    assert np.array_equal(clip, as_uint8(expected))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_planned_memory_of_svd_has_room_for_the_decoded_frames(tiny, make_shot, dtype):
    """Frames are decoded eight at a time, and all of them are kept."""
    params = tiny.params(SVDStage).model_copy(update={"decode_chunk_frames": 8, "dtype": dtype})
    shorter, longer = (SVDStage.memory(params, make_shot(width=512, height=512, num_frames=n)).peak for n in (14, 15))
    assert longer - shorter == np.zeros((512, 512, 3), dtype).nbytes


def test_svd_rejects_sizes_that_are_not_multiples_of_64(tiny, make_shot):
    with pytest.raises(StageError, match="image: got 96x64, width and height must be multiples of 64"):
        loaded(SVDStage, tiny)(Item(make_shot(), {"image": gradient_image(96, 64)}))


def test_missing_weights_and_weights_of_another_model_raise_setup_error(tiny, tmp_path):
    with pytest.raises(SetupError, match=r"no model_index\.json"):
        loaded(SVDStage, tiny, weights=tmp_path)
    with pytest.raises(SetupError, match="holds a FluxPipeline, must be a StableVideoDiffusionPipeline"):
        loaded(SVDStage, tiny, weights=resolve("builtin:tiny/flux"))
