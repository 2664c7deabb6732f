"""Stages with tiny weights in the precision and with the options of the GPU profiles, on the CPU, against float32."""

import numpy as np
import pytest

from tests.conftest import ASTRONAUT
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.engine.step_runner import with_images
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.profile import load_profile
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
def face(tiny_module):
    with InstantIDStage(tiny_module.params(InstantIDStage)) as stage:
        shot = stage_shot(tiny_module)
        return stage([with_images(Item(shot), stage.takes)])[0]["face"]


@pytest.fixture(scope="module")
def tiny_module():
    return load_profile("tiny")


def stage_shot(tiny, **fields):
    from vidgen_ray.script.check import check_shot

    return check_shot({"prompt": "a red ball", "seed": 3, "face_image": str(ASTRONAUT), **fields}, "test", tiny.defaults)


def run(tiny, name, artefacts, fields, **changes):
    stage_class = STAGE_BY_NAME[name]
    params = tiny.params(stage_class).model_copy(update=changes)
    shot = with_local_loras(stage_shot(tiny, **fields))
    with stage_class(params) as stage:
        (result,) = stage([Item(shot, artefacts)])
    return result[stage.writes[0]]


CASES = [
    ("flux", {}),
    ("lora", {"lora": LORA}),
    ("hunyuan", {"use_hunyuan_style": True}),
    ("svd", {"num_frames": 4}),
    ("instantid_sdxl", {"identity": "instantid-sdxl"}),
    ("klein", {"identity": "reference"}),
    ("qwen_edit", {"use_hunyuan_style": True, "style_model": "qwen-edit"}),
    ("wan", {"video_model": "wan", "num_frames": 5}),
    ("ltx", {"video_model": "ltx", "num_frames": 9}),
    ("rife", {"interpolation": 2}),
    ("realesrgan", {}),
]


@pytest.mark.parametrize("profile", ["gpu-80gb", "gpu-24gb"])
@pytest.mark.parametrize(("name", "fields"), CASES)
def test_precision_of_the_profile_is_close_to_float32(tiny_module, face, profile, name, fields):
    if STAGE_BY_NAME[name].actor not in load_profile(profile).actors:
        pytest.skip(f"{profile} has no {name}")
    image = (np.indices((64, 128)).sum(0)[..., None] % 255 * np.ones(3)).astype(np.uint8)
    frames = np.stack([image, np.roll(image, 2, 1)])
    artefacts = {"image": image, "frames": frames, "face": face, "photos": (image,)}
    of_profile = load_profile(profile).options_of(STAGE_BY_NAME[name])
    options = {option: getattr(of_profile, option) for option in KEPT_OPTIONS if hasattr(of_profile, option)}
    # The number of frames per chunk changes results by itself.
    chunk = {option: options[option] for option in ("decode_chunk_frames",) if option in options}
    exact = run(tiny_module, name, artefacts, fields, dtype="float32", **chunk)
    rounded = run(tiny_module, name, artefacts, fields, dtype=of_profile.dtype, **options)
    assert psnr(rounded, exact) > MIN_PSNR_DB


def test_other_weights_are_not_close(tiny_module, face):
    """The bound would notice a wrong result: another seed is far away."""
    a, b = (run(tiny_module, "flux", {"face": face}, {"seed": seed}) for seed in (3, 4))
    assert psnr(a, b) < MIN_PSNR_DB
