"""The HunyuanDiT stage on random weights in the real architecture: parity with text to image, geometry.

Parity is bitwise in fp32: the same kernels run in the same order, on tensors of the same shapes.
"""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import HunyuanDiT2DModel, HunyuanDiTPipeline
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import SUPPORTED_SHAPE, map_to_standard_shapes
from PIL import Image as PILImage
from PIL import ImageDraw

from tests.stages.test_parity import loaded
from vidgen_ray.nets.hunyuandit_img2img import steps_to_run
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.hunyuandit import (
    CanvasPlacement,
    HunyuanDiTStage,
    crop_from_canvas,
    fit_to_multiple_of_16,
    fit_to_standard_shape,
    place_on_canvas,
)

PROMPT = "a fox in snow"


@pytest.fixture(scope="module")
def stage(tiny):
    return loaded(HunyuanDiTStage, tiny)


def noise_image(seed, width=64, height=48):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def extent_px(image):
    """Return width and height of the bright area."""
    bright = image.max(axis=2) > 127
    return int(bright.any(axis=0).sum()), int(bright.any(axis=1).sum())


@pytest.mark.parametrize(("guidance", "size_conditions"), [(5.0, False), (1.0, False), (5.0, True)])
def test_full_strength_equals_text_to_image(tiny, guidance, size_conditions):
    pipe = loaded(HunyuanDiTStage, tiny).pipe
    if size_conditions:
        torch.manual_seed(0)
        config = {**pipe.transformer.config, "use_style_cond_and_image_meta_size": True}
        pipe.transformer = HunyuanDiT2DModel.from_config(config).eval()
    text_to_image = HunyuanDiTPipeline(**pipe.components, requires_safety_checker=False)
    text_to_image.set_progress_bar_config(disable=True)
    arguments = {
        "num_inference_steps": 4,
        "guidance_scale": guidance,
        "negative_prompt": "blurry",
        "output_type": "np",
    }
    noise = [torch.Generator().manual_seed(3) for _ in range(2)]
    size = {"height": 48, "width": 64, "use_resolution_binning": False}
    expected = text_to_image(PROMPT, generator=noise[0], **size, **arguments).images
    image = PILImage.fromarray(noise_image(0))
    assert np.array_equal(pipe(PROMPT, image, strength=1.0, generator=noise[1], **arguments).images, expected)


def test_one_step_of_a_thousand_keeps_the_input(stage):
    pipe, image = stage.pipe, PILImage.fromarray(noise_image(1))
    with torch.no_grad():
        mean = pipe.vae.encode(pipe.image_processor.preprocess(image)).latent_dist.mode()
    noise = torch.Generator().manual_seed(3)
    arguments = {"strength": 0.001, "num_inference_steps": 1000, "generator": noise, "output_type": "latent"}
    latents = pipe(PROMPT, image, **arguments).images
    # The variance of the noise is 2 * 0.00085 in this step. Latents without scaling would have a distance of 0.04.
    assert (latents - mean * pipe.vae.config.scaling_factor).square().mean() < 0.003


def test_steps_to_run_rounds_up():
    assert [steps_to_run(30, s) for s in (0.001, 0.1, 0.5, 0.51, 1.0)] == [1, 3, 15, 16, 30]
    # 0.07 * 100 and 0.55 * 100 are above 7 and 55 in floating point.
    assert [steps_to_run(100, s) for s in (0.07, 0.55)] == [7, 55]


def test_texts_change_the_image_and_the_style_prompt_is_appended_to_the_prompt(stage, make_shot):
    def restyle(**fields):
        own = {"prompt": PROMPT, "steps": {"hunyuan": 2}, "guidance": {"hunyuan": 20}, "style_strength": 1.0}
        return stage(Item(make_shot(use_hunyuan_style=True, **{**own, **fields}), {"image": noise_image(3)}))["image"]

    # High guidance makes the effect of the text larger than the rounding to uint8.
    images = [restyle(), restyle(style_prompt="oil"), restyle(negative_prompt="blurry")]
    assert len({image.tobytes() for image in images}) == 3
    assert np.array_equal(images[1], restyle(prompt=f"{PROMPT}, oil"))
    assert np.array_equal(restyle(style_strength=0), noise_image(3))


def test_image_is_fitted_to_the_trained_shape():
    for size in SUPPORTED_SHAPE:
        assert fit_to_standard_shape(*size) == CanvasPlacement(size, size, size)
    assert fit_to_standard_shape(1024, 576) == CanvasPlacement((1024, 576), (1280, 720), (1280, 768))
    assert fit_to_standard_shape(576, 1024) == CanvasPlacement((576, 1024), (720, 1280), (768, 1280))
    assert fit_to_standard_shape(2048, 64) == CanvasPlacement((2048, 64), (1280, 40), (1280, 768))
    for width, height in product(range(64, 2049, 64), repeat=2):
        assert fit_to_standard_shape(width, height).canvas == map_to_standard_shapes(width, height)
    assert fit_to_multiple_of_16(128, 64) == CanvasPlacement((128, 64), (128, 64), (128, 64))
    assert fit_to_multiple_of_16(70, 50) == CanvasPlacement((70, 50), (70, 50), (80, 64))


def test_image_is_not_distorted(tiny, make_shot):
    stage = HunyuanDiTStage(tiny.params(HunyuanDiTStage).model_copy(update={"standard_shapes": True}))
    canvases = []

    def identity(_prompt, image, **_):
        canvases.append(np.asarray(image))
        return SimpleNamespace(images=[torch.tensor(canvases[-1] / np.float32(255)).permute(2, 0, 1)])

    identity.vae = SimpleNamespace(disable_tiling=lambda: None)
    stage.pipe = identity
    drawn = PILImage.new("RGB", (1024, 576))
    ImageDraw.Draw(drawn).ellipse((312, 88, 712, 488), fill="white")
    image = np.asarray(drawn)
    result = stage(Item(make_shot(use_hunyuan_style=True), {"image": image}))["image"]
    assert canvases[0].shape == (768, 1280, 3)
    assert result.shape == image.shape
    for shown, scale in ((canvases[0], 1.25), (result, 1)):
        width, height = extent_px(shown)
        assert abs(width - height) <= 1
        assert abs(width - scale * extent_px(image)[0]) <= 1


def test_padding_repeats_the_edge_and_is_cropped_away():
    image = noise_image(8, 70, 50)
    placement = fit_to_multiple_of_16(70, 50)
    canvas = place_on_canvas(image, placement)
    assert np.array_equal(canvas[:7], np.repeat(canvas[7:8], 7, axis=0))
    assert np.array_equal(canvas[:, -5:], np.repeat(canvas[:, -6:-5], 5, axis=1))
    assert np.array_equal(crop_from_canvas(canvas, placement), image)

    placement = fit_to_standard_shape(1024, 576)
    canvas = place_on_canvas(np.zeros((576, 1024, 3), np.uint8), placement)
    assert not canvas.any()
    canvas[:24] = canvas[-24:] = 255
    assert not crop_from_canvas(canvas, placement).any()
