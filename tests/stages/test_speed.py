"""Speed options: each one gives the result of the plain stage, within the tolerance that its kind of change implies."""

import numpy as np
import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

from benchmarks.trace_memory import attention_outputs
from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.stages import speed
from vidgen_ray.stages.base import Item, to_uint8
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.instantid_sdxl import InstantIDSDXLStage
from vidgen_ray.stages.pixels import pixels_to_uint8
from vidgen_ray.stages.svd import SVDStage

ROUNDING_LEVELS = 1
"""Largest difference, in levels of 255, of an option that changes nothing but the rounding."""


def with_options(stage_class, profile, **options):
    return stage_class(type(profile.params(stage_class)).model_validate({**dict(profile.params(stage_class)), **options}))


@pytest.fixture(scope="module")
def picture():
    y, x = np.mgrid[0:64, 0:128]
    return np.stack([x * 2, y * 4, x + y], -1).astype(np.uint8)


def svd_clip(stage, make_shot, picture, **fields):
    return stage([Item(make_shot(**{"num_frames": 4, "steps": {"svd": 3}, **fields}), {"image": picture})])[0]["frames"]


@pytest.fixture(scope="module")
def plain_svd(tiny):
    with SVDStage(tiny.params(SVDStage)) as stage:
        yield stage


@pytest.mark.parametrize(
    "options",
    [{"channels_last": True}, {"fuse_qkv": True}, {"attention_backend": "_native_math"}],
    ids=lambda options: next(iter(options)),
)
def test_svd_option_changes_only_the_rounding(plain_svd, tiny, make_shot, picture, options):
    with with_options(SVDStage, tiny, **options) as stage:
        clip = svd_clip(stage, make_shot, picture)
    difference = np.abs(clip.astype(int) - svd_clip(plain_svd, make_shot, picture))
    assert difference.max() <= ROUNDING_LEVELS


@pytest.mark.parametrize("stage_class", [SVDStage, HunyuanDiTStage])
def test_fused_projections_are_in_every_attention_module(tiny, stage_class):
    with with_options(stage_class, tiny, fuse_qkv=True) as stage:
        network = stage.pipe.unet if stage_class is SVDStage else stage.pipe.transformer
        modules = [module for module in network.modules() if type(module).__name__ == "Attention"]
        assert modules
        assert all(hasattr(m, "to_kv" if m.is_cross_attention else "to_qkv") for m in modules)


def test_svd_step_cache_skips_attention_and_starts_fresh_for_each_clip(plain_svd, tiny, make_shot, picture):
    shot = {"steps": {"svd": 6}}
    with with_options(SVDStage, tiny, step_cache="pyramid_attention") as stage:
        calls = []
        first = next(m for m in stage.pipe.unet.modules() if type(m).__name__ == "Attention" and not m.is_cross_attention)
        processor = first.processor
        first.set_processor(lambda *args, **kwargs: calls.append(1) or processor(*args, **kwargs))
        clip = svd_clip(stage, make_shot, picture, **shot)
        assert 0 < len(calls) < 6
        assert np.array_equal(svd_clip(stage, make_shot, picture, **shot), clip)
    assert not np.array_equal(clip, svd_clip(plain_svd, make_shot, picture, **shot)), "an approximation"


def test_svd_step_cache_keeps_what_the_memory_table_assumes(tiny, make_shot, picture):
    with with_options(SVDStage, tiny, step_cache="pyramid_attention") as stage:
        unet = stage.pipe.unet
        kept = []

        def count(module, args, output):
            states = [hook.state for m in unet.modules() if hasattr(m, "_diffusers_hook") for hook in hooks_of(m)]
            passes, frames, _, height, width = args[0].shape
            kept.append(sum(state.cache.numel() for state in states) / (passes * frames * height * width))

        unet.register_forward_hook(count)
        svd_clip(stage, make_shot, picture)
        assert kept == [pytest.approx(attention_outputs(unet))] * 3
        assert all(hook.state.cache is None for m in unet.modules() if hasattr(m, "_diffusers_hook") for hook in hooks_of(m))


def hooks_of(module):
    return [hook for hook in module._diffusers_hook.hooks.values() if hasattr(hook, "state")]


def test_svd_rejects_a_step_cache_in_a_compiled_network(tiny):
    with pytest.raises(ValueError, match="needs compile: none"):
        with_options(SVDStage, tiny, step_cache="pyramid_attention", compile="full")


@pytest.mark.parametrize("options", [{"channels_last": True}, {"fuse_qkv": True}], ids=lambda options: next(iter(options)))
def test_hunyuandit_option_changes_only_the_rounding(tiny, make_shot, picture, options):
    shot = make_shot(use_hunyuan_style=True)
    with with_options(HunyuanDiTStage, tiny) as plain, with_options(HunyuanDiTStage, tiny, **options) as other:
        a, b = (stage([Item(shot, {"image": picture})])[0]["image"].astype(int) for stage in (plain, other))
    assert np.abs(a - b).max() <= ROUNDING_LEVELS


@pytest.mark.parametrize("stage_class", [SVDStage, HunyuanDiTStage, InstantIDSDXLStage])
def test_unknown_attention_backend_is_refused_with_the_names_that_work(tiny, stage_class):
    with pytest.raises(SetupError, match=r"attention_backend: got 'sage', must be one of _native_cudnn, .*native on this"):
        with_options(stage_class, tiny, attention_backend="sage").load()


def test_installed_attention_backends_leave_out_packages_that_are_missing():
    names = speed.installed_attention_backends()
    assert "native" in names
    assert not {"flash", "sage", "xformers", "flash_hub"} & set(names)


@pytest.mark.parametrize("mode", ["regional", "full"])
def test_compiled_svd_recompiles_once_for_other_sizes(tiny, make_shot, picture, monkeypatch, mode):
    counter = CompileCounter()
    monkeypatch.setattr(speed, "COMPILE_BACKEND", counter)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = []
    with with_options(SVDStage, tiny, compile=mode) as stage, with_options(SVDStage, tiny) as plain:
        for repeat, frames in ((1, 4), (1, 4), (2, 6), (3, 5)):
            image = np.concatenate([picture] * repeat)
            shot = {"height": len(image), "num_frames": frames, "steps": {"svd": 2}}
            clip = svd_clip(stage, make_shot, image, **shot)
            compiled.append(counter.frame_count)
            assert np.abs(clip.astype(int) - svd_clip(plain, make_shot, image, **shot)).max() <= ROUNDING_LEVELS
    assert 0 < compiled[0] == compiled[1] < compiled[2]
    assert compiled[2] == compiled[3], "the sizes are dynamic"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compilation_needs_a_compiler(tiny, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SetupError, match=r"compile: needs a C\+\+ compiler"):
        with_options(SVDStage, tiny, compile="full").load()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixels_on_the_device_give_the_bytes_of_the_host(dtype):
    steps = torch.cat([torch.linspace(0, 1, 3 * 32 * 64 - 256), torch.arange(256) / 255])
    pixels = steps.reshape(3, 32, 64).to(dtype)
    assert np.array_equal(pixels_to_uint8(pixels), to_uint8(pixels.permute(1, 2, 0).float().numpy()))
    assert pixels_to_uint8(pixels[None]).shape == (1, 32, 64, 3)
    pixels[0, 0, 0] = torch.nan
    with pytest.raises(StageError, match="NaN"):
        pixels_to_uint8(pixels)
