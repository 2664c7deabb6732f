"""Steps of a shot: numbers are checked, and a cache that cannot be written does not fail a shot."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.outputs.paths import shot_path
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.stages.base import to_uint8
from vidgen_ray.weights import resolve

SMALL = {"id": "s", "seed": 7, "width": 64, "height": 64, "num_frames": 2, "scale": 2}
NOT_FINITE = "the model returned NaN or infinite values"


@pytest.fixture
def pipeline(tiny, tmp_path):
    pipeline = VideoGenerationPipeline(tiny, tmp_path / "out")
    yield pipeline
    pipeline.close()


def write_nan(source, target):
    weights = load_file(source)
    name = next(iter(weights))
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, target)
    return target


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_must_be_finite(value):
    pixels = np.full((4, 4, 3), 0.5, np.float32)
    assert to_uint8(pixels).max() == 128
    pixels[1, 2, 0] = value
    with pytest.raises(Exception, match=NOT_FINITE):
        to_uint8(pixels)


def test_nan_lora_fails_the_step_and_is_not_cached(pipeline, tmp_path):
    lora = write_nan(resolve("builtin:tiny/lora.safetensors"), tmp_path / "nan.safetensors")
    with pytest.raises(StepFailed, match=f"lora: {NOT_FINITE}") as raised:
        pipeline.generate_video("a", **SMALL, lora_path=lora)
    assert raised.value.stage == "lora"
    assert not list(pipeline.outputs.root.glob(f"{shot_path('s')}/*"))
    assert len(list(pipeline.outputs.root.glob("cache/*/*"))) == 1, "the base image alone"


def test_nan_upscaler_weights_fail_the_step(tiny, tmp_path):
    folder = tmp_path / "upscalers"
    folder.mkdir()
    write_nan(resolve("builtin:realesrgan") / "animevideov3.safetensors", folder / "broken.safetensors")
    actor = tiny.actors["realesrgan"].model_copy(update={"weights": str(folder)})
    profile = tiny.model_copy(update={"actors": {**tiny.actors, "realesrgan": actor}})
    pipeline = VideoGenerationPipeline(profile, tmp_path / "out")
    with pytest.raises(StepFailed, match=f"realesrgan: {NOT_FINITE}"):
        pipeline.generate_video("a", **SMALL, upscaler="broken")
    assert not list(pipeline.outputs.root.glob(f"{shot_path('s')}/*"))


def test_unwritable_cache_does_not_fail_the_shot(pipeline):
    # A file in place of the folder: permissions do not stop root.
    (pipeline.outputs.root / "cache").write_bytes(b"")
    record = pipeline.generate_video("a", **SMALL)["record"]
    assert set(record.files) == {"image.png", "video.mp4", "hd.mp4"}
