"""Tests that need a GPU. Skipped without one."""

import numpy as np
import pytest
import torch

from vidgen_ray.stages.base import Item
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.realesrgan import RealESRGANStage

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
