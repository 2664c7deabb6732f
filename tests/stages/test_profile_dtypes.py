"""Stages with tiny weights in the precision and with the options of the GPU profiles, on the CPU, against float32."""

import numpy as np
import pytest

from tests.conftest import ASTRONAUT
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.engine.step_runner import with_images
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.profile import load_profile
from vidgen_ray.script.check import check_shot
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.instantid import InstantIDStage

MIN_PSNR_DB = 35
"""Random weights amplify rounding more than trained ones; measured values are 43 to 58 dB, 38 with 8-bit weights."""
LORA = "builtin:tiny/lora.safetensors"
KEPT_OPTIONS = ("quantize", "vae_tile_px", "decode_chunk_frames", "forward_chunking", "frames_per_call")
"""Options of a GPU profile that change how tiny weights run on a CPU."""


def psnr(a, b):
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(scope="module")
def face(tiny):
    with InstantIDStage(tiny.params(InstantIDStage)) as stage:
        return stage(with_images(Item(stage_shot(tiny)), stage.takes))["face"]


def stage_shot(tiny, **fields):
    own = {"prompt": "a red ball", "seed": 3, "face_image": str(ASTRONAUT), "width": 64, "height": 64}
    return check_shot({**own, **fields}, "test", tiny.defaults)


def run(tiny, name, artefacts, fields, **changes):
    stage_class = STAGE_BY_NAME[name]
    params = tiny.params(stage_class).model_copy(update=changes)
    shot = with_local_loras(stage_shot(tiny, **fields))
    with stage_class(params) as stage:
        result = stage(Item(shot, artefacts))
    return result[stage.writes[0]]


CASES = [
    ("flux", {}),
    ("lora", {"lora": LORA}),
    ("hunyuan", {"use_hunyuan_style": True}),
    ("svd", {"num_frames": 2, "steps": {"svd": 1}}),
    ("instantid_sdxl", {"identity": "instantid-sdxl"}),
    ("klein", {"identity": "reference"}),
    ("qwen_edit", {"use_hunyuan_style": True, "style_model": "qwen-edit"}),
    ("wan", {"video_model": "wan", "num_frames": 5}),
    ("ltx", {"video_model": "ltx", "num_frames": 9}),
    ("rife", {"interpolation": 2}),
    ("realesrgan", {}),
]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_precision_of_the_profiles_is_close_to_float32(tiny, face, name, fields):
    image = (np.indices((64, 64)).sum(0)[..., None] % 255 * np.ones(3)).astype(np.uint8)
    frames = np.stack([image, np.roll(image, 2, 1)])
    artefacts = {"image": image, "frames": frames, "face": face, "photos": (image,)}
    exact = run(tiny, name, artefacts, fields, dtype="float32")
    seen = []
    for profile in map(load_profile, ("gpu-80gb", "gpu-24gb")):
        if STAGE_BY_NAME[name].actor not in profile.actors:
            continue
        of_profile = profile.options_of(STAGE_BY_NAME[name])
        options = {option: getattr(of_profile, option) for option in KEPT_OPTIONS if hasattr(of_profile, option)}
        changes = {"dtype": of_profile.dtype, **options}
        if changes not in seen:
            seen.append(changes)
            assert psnr(run(tiny, name, artefacts, fields, **changes), exact) > MIN_PSNR_DB, changes


def test_other_weights_are_not_close(tiny, face):
    """The bound would notice a wrong result: another seed is far away."""
    a, b = (run(tiny, "flux", {"face": face}, {"seed": seed}) for seed in (3, 4))
    assert psnr(a, b) < MIN_PSNR_DB
