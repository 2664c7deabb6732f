"""Stages with tiny weights in the precision and with the options of the GPU profiles, on the CPU, against float32."""

import numpy as np
import pytest
import torch

from tests.conftest import ASTRONAUT
from tests.stages.conftest import PASSING
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.profile import load_profile
from vidgen_ray.script.check import check_shot
from vidgen_ray.stages.base import Item

MIN_PSNR_DB = 35
"""Random weights amplify rounding more than trained ones; measured values are 43 to 58 dB, 38 with 8-bit weights."""
KEPT_OPTIONS = ("quantize", "vae_tile_px", "decode_chunk_frames", "forward_chunking", "frames_per_call")
"""Options of a GPU profile that change how tiny weights run on a CPU."""


def psnr(a, b):
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


def run(tiny, name, artefacts, fields, **changes):
    stage_class = STAGE_BY_NAME[name]
    params = tiny.params(stage_class).model_copy(update=changes)
    own = {"prompt": "a red ball", "seed": 3, "face_image": str(ASTRONAUT), "width": 64, "height": 64}
    shot = with_local_loras(check_shot({**own, **fields}, "test", tiny.defaults))
    with stage_class(params) as stage:
        result = stage(Item(shot, artefacts))
    return result[stage.writes[0]]


def noise(dtype):
    return torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=dtype).float()


@pytest.mark.skipif(
    not torch.allclose(noise(torch.float32), noise(torch.bfloat16), atol=0.05),
    reason="this torch, such as 2.10, draws other noise in low precision",
)
@pytest.mark.parametrize("name", PASSING)
def test_precision_of_the_profiles_is_close_to_float32(tiny, face, name):
    image = (np.indices((64, 64)).sum(0)[..., None] % 255 * np.ones(3)).astype(np.uint8)
    frames = np.stack([image, np.roll(image, 2, 1)])
    artefacts = {"image": image, "frames": frames, "face": face, "photos": (image,)}
    fields = {**PASSING[name], **({"num_frames": 2, "steps": {"svd": 1}} if name == "svd" else {})}
    exact = run(tiny, name, artefacts, fields, dtype="float32")
    dtypes = set()
    for profile in map(load_profile, ("gpu-24gb", "gpu-80gb")):
        if STAGE_BY_NAME[name].actor not in profile.actors:
            continue
        of_profile = profile.options_of(STAGE_BY_NAME[name])
        options = {option: getattr(of_profile, option) for option in KEPT_OPTIONS if hasattr(of_profile, option)}
        if of_profile.dtype not in dtypes:
            dtypes.add(of_profile.dtype)
            assert psnr(run(tiny, name, artefacts, fields, dtype=of_profile.dtype, **options), exact) > MIN_PSNR_DB, options


def test_other_weights_are_not_close(tiny, face):
    """The bound would notice a wrong result: another seed is far away."""
    a, b = (run(tiny, "flux", {"face": face}, {"seed": seed}) for seed in (3, 4))
    assert psnr(a, b) < MIN_PSNR_DB
