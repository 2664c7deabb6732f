"""Setup of the tests of stages."""

import pytest

from tests.ray_workers import use_small_images


@pytest.fixture(autouse=True, scope="session")
def small_images_for_qwen():
    use_small_images()
