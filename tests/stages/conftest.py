"""Setup of the tests of stages."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def small_images_for_qwen():
    """Let Qwen-Image-Edit see images of 128x128 pixels. diffusers scales them to 1024x1024, which takes a minute on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE", 128 * 128)
        yield
