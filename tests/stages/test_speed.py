"""Options that make diffusion models faster or smaller, each compared with the plain stage."""

import numpy as np
import pytest
import torch
import torch._dynamo
from diffusers import UNetSpatioTemporalConditionModel
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

from vidgen_ray.bench.tiny_networks import write_random_lora
from vidgen_ray.errors import Cancelled, SetupError, StageError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.stages import flux_model, speed
from vidgen_ray.stages.base import Item, pixels_to_uint8, progress_callback
from vidgen_ray.stages.flux import FluxLoRAStage, FluxStage
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.loading import networks_from
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.weights import resolve

LORA = resolve("builtin:tiny/lora.safetensors")
ROUNDING_LEVELS = 1
"""Largest difference, in levels of 255, of an option that changes nothing but the rounding."""
SIZES = ((128, 64), (64, 64), (128, 128))
"""Width and height of images."""


def with_options(stage_class, profile, **options):
    return stage_class(type(profile.params(stage_class)).model_validate({**dict(profile.params(stage_class)), **options}))


def image_of(stage, shot, **artefacts):
    return stage(Item(shot, artefacts))["image"]


def svd_clip(stage, make_shot, picture, **fields):
    return stage(Item(make_shot(**{"num_frames": 4, "steps": {"svd": 3}, **fields}), {"image": picture}))["frames"]


def largest_difference(a, b):
    return np.abs(a.astype(int) - b).max()


@pytest.fixture(scope="module")
def picture():
    y, x = np.mgrid[0:64, 0:128]
    return np.stack([x * 2, y * 4, x + y], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def face(tiny, photo):
    with InstantIDStage(tiny.params(InstantIDStage)) as stage:
        return stage.features([photo])


@pytest.fixture(scope="module")
def plain(tiny):
    with FluxStage(tiny.params(FluxStage)) as stage:
        yield stage


@pytest.fixture
def counter(monkeypatch):
    """A backend of torch.compile that counts graphs and generates no code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounter()
    monkeypatch.setattr(speed, "COMPILE_BACKEND", counter)
    yield counter
    torch._dynamo.reset()


def test_exact_options_change_only_the_rounding(tiny, make_shot, picture):
    with SVDStage(tiny.params(SVDStage)) as stage:
        clip = svd_clip(stage, make_shot, picture)
    for options in ({"channels_last": True}, {"attention_backend": "_native_math"}):
        with with_options(SVDStage, tiny, **options) as stage:
            assert largest_difference(svd_clip(stage, make_shot, picture), clip) <= ROUNDING_LEVELS, options


def test_attention_backend_that_is_not_installed_is_refused(tiny):
    for stage_class, name, message in (
        (FluxStage, "sage", r"attention_backend: .*'sage'"),
        (FluxStage, "flash_hub", "'flash_hub', which downloads code"),
        (SVDStage, "sage", r"attention_backend: .*'sage'"),
    ):
        with pytest.raises(SetupError, match=message):
            with_options(stage_class, tiny, attention_backend=name).load()


# Compilation


def small_unet(params, float32_parts):
    """Return a UNet of one level for SVD. torch.compile traces it in a third of the time."""
    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        cross_attention_dim=32,
        num_attention_heads=(2,),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
    )
    return {"unet": unet.eval()}


@pytest.mark.very_slow
def test_compiled_svd_recompiles_once_for_other_sizes(tiny, make_shot, picture, counter):
    compiled = []
    with (
        networks_from(small_unet),
        with_options(SVDStage, tiny, compile=True) as stage,
        with_options(SVDStage, tiny) as other,
    ):
        for repeat, frames in ((1, 2), (2, 4), (3, 3)):
            image = np.concatenate([picture[:, :64]] * repeat)
            shot = {"width": 64, "height": len(image), "num_frames": frames, "steps": {"svd": 1}}
            clip = svd_clip(stage, make_shot, image, **shot)
            compiled.append(counter.frame_count)
            assert largest_difference(clip, svd_clip(other, make_shot, image, **shot)) <= ROUNDING_LEVELS
    assert 0 < compiled[0] < compiled[1] == compiled[2], "the sizes are dynamic"
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_compiled_flux_recompiles_once_for_other_sizes_with_and_without_faces(tiny, make_shot, face, counter):
    compiled = []
    with with_options(FluxStage, tiny, compile=True) as stage:
        for width, height in SIZES:
            fields = {"width": width, "height": height, "steps": {"flux": 1}}
            image_of(stage, make_shot(**fields))
            image_of(stage, make_shot(face_image="x.jpg", negative_prompt="blurred", **fields), face=face)
            compiled.append(counter.frame_count)
    assert 0 < compiled[0] < compiled[1] == compiled[2]
    assert not torch._dynamo.utils.counters["graph_break"]


PROMPTED = {
    "klein": {"image_model": "klein", "identity": "none"},
    "hunyuan": {"use_hunyuan_style": True},
    "wan": {"video_model": "wan", "num_frames": 5},
    "ltx": {"video_model": "ltx", "num_frames": 9},
}
"""Stage whose blocks are compiled -> fields of a shot that passes it."""


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTED)
def test_compiled_blocks_and_attention_backends_change_only_the_rounding(tiny, make_shot, picture, counter, name):
    stage_class, shot = STAGE_BY_NAME[name], make_shot(**PROMPTED[name], steps={name: 2})
    item = Item(shot, {"image": picture})
    with with_options(stage_class, tiny) as plain:
        expected = plain(item)[plain.writes[0]]
    with with_options(stage_class, tiny, compile=True, attention_backend="_native_math") as fast:
        assert largest_difference(fast(item)[fast.writes[0]], expected) <= ROUNDING_LEVELS
    assert counter.frame_count > 0


@pytest.mark.slow
def test_compiled_flux_swaps_loras_of_the_same_layers_without_compiling_again(tiny, make_shot, counter, tmp_path):
    files = []
    with with_options(FluxStage, tiny) as plain, with_options(FluxStage, tiny, compile=True) as stage:
        for n in range(20):
            files.append(tmp_path / f"{n}.safetensors")
            write_random_lora(plain.model.text_to_image.transformer, files[-1], n, rank=(16, 4, 8)[n % 3])
        compiled = []
        for n, file in enumerate(files):
            width, height = SIZES[n % 3]
            lora = [{"path": str(file), "weight": 1 - 0.04 * n}]
            shot = make_shot(mode="fast", lora=lora, width=width, height=height, steps={"flux": 1})
            image = image_of(stage, shot)
            compiled.append(counter.frame_count)
            assert largest_difference(image, image_of(plain, shot)) <= ROUNDING_LEVELS, n
        assert compiled[1] == compiled[-1], "one compilation for the first size, and one for all others"
        # Other layers: one more compilation, and the layers of the LoRA before have no effect.
        tensors = load_file(files[0])
        save_file({key: value for key, value in tensors.items() if "to_out" not in key}, tmp_path / "fewer.safetensors")
        for name in ("fewer", "0"):
            shot = make_shot(mode="fast", lora=[str(tmp_path / f"{name}.safetensors")], steps={"flux": 1})
            assert largest_difference(image_of(stage, shot), image_of(plain, shot)) <= ROUNDING_LEVELS
        without = make_shot(steps={"flux": 1})
        assert largest_difference(image_of(stage, without), image_of(plain, without)) <= ROUNDING_LEVELS


def test_compilation_needs_a_compiler(tiny, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SetupError, match=r"compile: needs a C\+\+ compiler"):
        with_options(SVDStage, tiny, compile=True).load()


# Step caches

EVERY_STEP = {"step_cache_threshold": 10.0}
"""Reuse the result of every step that may be reused."""


def transformer_calls(stage):
    """Return a list that grows with each call of a block of the transformer."""
    calls = []
    block = stage.model.text_to_image.transformer.single_transformer_blocks[0]
    block.attn.to_q.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_step_cache_skips_blocks_of_drafts_and_starts_fresh_for_each_shot(plain, tiny, make_shot):
    shot = make_shot(mode="fast", steps={"flux": 8, "lora": 8})
    with with_options(FluxStage, tiny, **EVERY_STEP) as flux, with_options(FluxLoRAStage, tiny, **EVERY_STEP) as lora:
        calls = transformer_calls(flux)
        image = image_of(flux, shot)
        assert 0 < len(calls) < 8
        assert not np.array_equal(image, image_of(plain, shot)), "an approximation"
        # FluxImg2ImgPipeline names no passes, and a negative prompt has two per step.
        two_passes = make_shot(mode="fast", lora=[str(LORA)], negative_prompt="blurred", steps={"lora": 8})
        image_of(lora, two_passes, image=image)
        assert np.array_equal(image_of(flux, shot), image)


def test_step_cache_is_off_for_faces_and_finished_work(plain, tiny, make_shot, face):
    """The residuals of InfuseNet are part of the cached result, and would be added again between the skipped blocks."""
    draft = make_shot(mode="fast", steps={"flux": 6})
    with with_options(FluxStage, tiny, **EVERY_STEP) as stage:
        calls = transformer_calls(stage)
        cached = image_of(stage, draft)
        assert len(calls) < 6
        calls.clear()
        for shot in (make_shot(mode="fast", face_image="x.jpg", steps={"flux": 6}), make_shot(steps={"flux": 6})):
            assert np.array_equal(image_of(stage, shot, face=face), image_of(plain, shot, face=face))
        assert len(calls) == 12
        assert np.array_equal(image_of(stage, draft), cached)


def test_cancelled_shot_does_not_change_the_next_one(tiny, make_shot):
    def cancel(stage, done, steps):
        if done == 3:
            raise Cancelled

    shot = make_shot(mode="fast", steps={"flux": 8})
    with with_options(FluxStage, tiny, **EVERY_STEP) as stage:
        expected = image_of(stage, shot)
        with pytest.raises(Cancelled), progress_callback(cancel):
            image_of(stage, shot.model_copy(update={"prompt": "another"}))
        assert np.array_equal(image_of(stage, shot), expected)


# Weights in 8 bits, few-step weights


def test_weights_stored_in_fp8_are_computed_in_the_dtype(plain, tiny, make_shot, face):
    shot = make_shot(face_image="x.jpg")
    with with_options(FluxStage, tiny, quantize="fp8_storage") as stage:
        weights = stage.model.text_to_image.transformer.single_transformer_blocks[0].proj_mlp.weight
        assert weights.dtype == torch.float8_e4m3fn
        image = image_of(stage, shot, face=face)
        with FluxLoRAStage(stage.params) as lora:
            assert not np.array_equal(image_of(lora, make_shot(lora=[str(LORA)]), image=image), image)
    difference = np.abs(image.astype(int) - image_of(plain, shot, face=face))
    assert 0 < difference.mean() < 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_fp8_names_what_is_missing(tiny, monkeypatch):
    for found, message in (
        (None, r"package torchao; pip install 'vidgen-ray\[quant"),
        ("found", "NVIDIA GPU .* use fp8_storage"),
    ):
        monkeypatch.setattr(flux_model, "find_spec", lambda _, found=found: found)
        with pytest.raises(SetupError, match=f"quantize: fp8 needs .*{message}"):
            with_options(FluxStage, tiny, quantize="fp8").load()


def test_few_step_lora_is_merged_into_the_weights(plain, tiny, make_shot):
    with with_options(FluxStage, tiny, extra_weights={"few_step_lora": LORA}) as stage:
        assert not stage.model.text_to_image.get_list_adapters()
        assert not np.array_equal(image_of(stage, make_shot()), image_of(plain, make_shot()))


def test_profiles_with_other_options_share_no_model(tiny):
    with with_options(FluxStage, tiny) as one, with_options(FluxStage, tiny, quantize="fp8_storage") as other:
        assert one.model is not other.model
        with with_options(FluxLoRAStage, tiny) as same:
            assert one.model is same.model


# Pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixels_on_the_device_give_the_bytes_of_the_host(dtype):
    steps = torch.cat([torch.linspace(0, 1, 3 * 32 * 64 - 256), torch.arange(256) / 255])
    pixels = steps.reshape(3, 32, 64).to(dtype)
    assert np.array_equal(pixels_to_uint8(pixels), (pixels.permute(1, 2, 0).float().numpy() * 255).round())
    assert pixels_to_uint8(pixels[None]).shape == (1, 32, 64, 3)
    pixels[0, 0, 0] = torch.nan
    with pytest.raises(StageError, match="NaN"):
        pixels_to_uint8(pixels)
