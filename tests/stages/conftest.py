"""Setup of the tests of stages."""

import pytest

from tests.ray_workers import use_small_images

PASSING = {
    "flux": {},
    "lora": {"lora": "builtin:tiny/lora.safetensors"},
    "instantid_sdxl": {"identity": "instantid-sdxl"},
    "klein": {"image_model": "klein", "identity": "reference"},
    "hunyuan": {"use_hunyuan_style": True, "style_prompt": "ink"},
    "qwen_edit": {"use_hunyuan_style": True, "style_model": "qwen-edit", "style_prompt": "ink"},
    "svd": {"num_frames": 4},
    "wan": {"video_model": "wan", "num_frames": 5},
    "ltx": {"video_model": "ltx", "num_frames": 9},
    "rife": {"interpolation": 2},
    "realesrgan": {"scale": 4},
}
"""Stage -> fields of a shot that passes it."""


@pytest.fixture(autouse=True, scope="session")
def small_images_for_qwen():
    use_small_images()


@pytest.fixture
def counter(monkeypatch):
    """A backend of torch.compile that counts graphs and generates no code."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    from vidgen_ray.stages import speed

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounter()
    monkeypatch.setattr(speed, "COMPILE_BACKEND", counter)
    yield counter
    torch._dynamo.reset()
