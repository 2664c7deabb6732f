"""Setup of the tests of stages."""

import numpy as np
import pytest

from tests.ray_workers import use_small_images
from vidgen_ray.stages.base import FaceFeatures


@pytest.fixture(autouse=True, scope="session")
def small_images_for_qwen():
    use_small_images()


@pytest.fixture
def face():
    """Features of a face that no model has found."""
    rng = np.random.default_rng(0)
    unit = rng.standard_normal(512).astype("f")
    embeddings = {"antelopev2": rng.standard_normal(512).astype("f"), "ir_se50": unit / np.linalg.norm(unit)}
    points = np.array([[40, 30], [60, 30], [50, 40], [42, 50], [58, 50]], "f")
    return FaceFeatures(embeddings, points, (30, 20, 70, 60), 0.9, 1, (100, 80), "d")
