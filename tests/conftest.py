"""What tests share: one torch thread (the number changes the last bits), a private home for Ray and caches, tiny weights."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # the name is Ray's
os.environ["HOME"] = tempfile.mkdtemp(prefix="vidgen-test-home-")
# Built weights are a pure function of the recipe, so test runs of one checkout may share them.
os.environ.setdefault("VIDGEN_CACHE", str(Path(__file__).parent.parent / ".pytest_cache" / "vidgen"))

import numpy as np
import pytest
from PIL import Image

from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.shot import Shot

atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)

EXAMPLES = Path(__file__).parent.parent / "examples"
ASTRONAUT = EXAMPLES / "faces" / "astronaut.jpg"


@pytest.fixture(scope="session")
def tiny() -> Profile:
    return load_profile("tiny")


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A real portrait, (512, 512, 3)."""
    return np.asarray(Image.open(ASTRONAUT).convert("RGB"))


@pytest.fixture
def make_shot(tiny):
    """A shot with the tiny profile's defaults and a fixed seed."""

    def make(**fields) -> Shot:
        return Shot(**{**tiny.defaults, "id": "s", "prompt": "a photo of a man", "seed": 7, **fields})

    return make
