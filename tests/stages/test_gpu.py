"""Tests that need a GPU. Skipped without one."""

import numpy as np
import pytest
import torch

from vidgen_ray.errors import MediaError
from vidgen_ray.media import Mp4Settings, Mp4Writer, open_video
from vidgen_ray.media.encode import nvenc_problem
from vidgen_ray.stages.base import Item, to_uint8
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux_lora import FluxLoRAStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.pixels import pixels_to_uint8
from vidgen_ray.stages.quantization import PACKAGES
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.weights import resolve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_gpu(stage_class, profile, **changes):
    return stage_class(profile.params(stage_class).model_copy(update={"device": "cuda", **changes}))


def test_flux_image_on_gpu_is_close_to_cpu(tiny, make_shot):
    with FluxStage(tiny.params(FluxStage)) as cpu, on_gpu(FluxStage, tiny) as gpu:
        a, b = (stage([Item(make_shot())])[0]["image"].astype(int) for stage in (cpu, gpu))
    assert np.abs(a - b).max() <= 8


def test_float16_upscaler_is_close_to_float32(tiny, photo, make_shot):
    shot = make_shot(scale=4, upscaler="animevideov3")
    frames = photo[None, 60:124, 180:244]
    with RealESRGANStage(tiny.params(RealESRGANStage)) as cpu, on_gpu(RealESRGANStage, tiny, dtype="float16") as gpu:
        a, b = (stage.run_chunk(shot, frames).astype(float) for stage in (cpu, gpu))
    assert 10 * np.log10(255**2 / np.mean((a - b) ** 2)) > 45


LORAS = [str(resolve("builtin:tiny/lora.safetensors"))]
PICTURE = np.tile(np.linspace(0, 255, 128, dtype=np.uint8)[None, :, None], (64, 1, 3))


def difference(a, b):
    return np.abs(a.astype(int) - b).max()


def result(stage, shot, **artefacts):
    return stage([Item(shot, artefacts)])[0][stage.writes[0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pixels_of_the_gpu_have_the_bytes_of_the_host(dtype):
    pixels = torch.rand((2, 3, 64, 96), generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    expected = to_uint8(pixels.permute(0, 2, 3, 1).float().numpy())
    assert np.array_equal(pixels_to_uint8(pixels.cuda()), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"channels_last": True},
        {"fuse_qkv": True},
        {"attention_backend": "_native_efficient"},
        {"attention_backend": "_native_cudnn"},
        {"compile": "regional"},
        {"compile": "full"},
        {"step_cache": "pyramid_attention"},
    ],
    ids=str,
)
def test_svd_option_on_gpu(tiny, make_shot, options):
    shot = make_shot(num_frames=4, steps={"svd": 4})
    with on_gpu(SVDStage, tiny) as plain, on_gpu(SVDStage, tiny, **options) as other:
        expected, clip = (result(stage, shot, image=PICTURE) for stage in (plain, other))
        assert np.array_equal(result(other, shot, image=PICTURE), clip)
    assert difference(expected, clip) <= (255 if "step_cache" in options else 4)


@pytest.mark.parametrize("options", [{"channels_last": True}, {"fuse_qkv": True}, {"compile": "regional"}], ids=str)
def test_hunyuandit_option_on_gpu(tiny, make_shot, options):
    shot = make_shot(use_hunyuan_style=True)
    with on_gpu(HunyuanDiTStage, tiny) as plain, on_gpu(HunyuanDiTStage, tiny, **options) as other:
        assert difference(*(result(stage, shot, image=PICTURE) for stage in (plain, other))) <= 4


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({"channels_last": True}, 4),
        ({"attention_backend": "_native_cudnn"}, 8),
        ({"attention_backend": "_native_flash"}, 8),
        ({"compile": "regional"}, 8),
        ({"lora_hotswap": True}, 4),
        ({"step_cache": "first_block"}, 255),
        ({"step_cache": "magcache"}, 255),
        ({"step_cache": "taylorseer"}, 255),
        ({"quantize": "fp8_storage"}, 64),
        ({"text_encoder": "cpu"}, 8),
        ({"keep_text_encoder": False}, 0),
    ],
    ids=str,
)
def test_flux_option_on_gpu(tiny, make_shot, options, levels):
    changes = {"dtype": "bfloat16", **options}
    shot = make_shot(lora=LORAS, steps={"flux": 4, "lora": 4})
    with on_gpu(FluxStage, tiny, dtype="bfloat16") as plain, on_gpu(FluxStage, tiny, **changes) as other:
        image = result(plain, shot)
        assert difference(image, result(other, shot)) <= levels
        with on_gpu(FluxLoRAStage, tiny, dtype="bfloat16") as lora, on_gpu(FluxLoRAStage, tiny, **changes) as other_lora:
            assert difference(*(result(stage, shot, image=image) for stage in (lora, other_lora))) <= levels


@pytest.mark.parametrize("name", ["fp8", "fp8_weights", "int8_weights", "nf4"])
def test_quantised_flux_on_gpu(tiny, make_shot, name):
    pytest.importorskip(PACKAGES[name])
    if name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs Ada or Hopper")
    with on_gpu(FluxStage, tiny, dtype="bfloat16") as plain, on_gpu(FluxStage, tiny, dtype="bfloat16", quantize=name) as other:
        assert difference(*(result(stage, make_shot()) for stage in (plain, other))) <= 64


def test_compiled_flux_stays_compiled_when_its_weights_are_swapped(tiny, make_shot):
    with on_gpu(FluxLoRAStage, tiny, compile="regional") as stage:
        expected = result(stage, make_shot(lora=LORAS), image=PICTURE)
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        stage.move("cpu")
        stage.move("cuda")
        assert np.array_equal(result(stage, make_shot(lora=LORAS), image=PICTURE), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_nvenc_writes_a_clip_or_says_why_not(tmp_path):
    settings, path = Mp4Settings(codec="h264_nvenc"), tmp_path / "clip.mp4"
    frames = np.zeros((8, 256, 256, 3), np.uint8)
    if nvenc_problem() is not None:
        with pytest.raises(MediaError, match="h264_nvenc does not work on this machine"):
            Mp4Writer(path, 256, 256, 24, settings)
        return
    with Mp4Writer(path, 256, 256, 24, settings) as clip:
        clip.write(frames)
    assert len(open_video(path)) == 8
