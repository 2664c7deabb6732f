"""The HunyuanDiT stage on random weights in the real architecture: parity with text to image, geometry, determinism."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL import ImageDraw

from vidgen_ray.errors import SetupError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Image, Item
from vidgen_ray.stages.hunyuandit import (
    CanvasPlacement,
    HunyuanDiTParams,
    HunyuanDiTStage,
    crop_from_canvas,
    fit_to_multiple_of_16,
    fit_to_standard_shape,
    place_on_canvas,
)
from vidgen_ray.weights import resolve

PROMPT = "a fox in snow"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("builtin:tiny/hunyuandit")


@pytest.fixture(scope="module")
def stage(folder: Path) -> HunyuanDiTStage:
    return loaded(folder)


def loaded(folder: Path) -> HunyuanDiTStage:
    stage = HunyuanDiTStage(HunyuanDiTParams(weights=folder, standard_shapes=False))
    stage.load()
    return stage


def noise_image(seed: int, width: int = 64, height: int = 48) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def circle_image(width: int, height: int, radius: int) -> Image:
    image = PILImage.new("RGB", (width, height))
    x, y = width // 2, height // 2
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill="white")
    return np.asarray(image)


def extent_px(image: Image) -> tuple[int, int]:
    """Return width and height of the bright area."""
    bright = image.max(axis=2) > 127
    return int(bright.any(axis=0).sum()), int(bright.any(axis=1).sum())


def shot(**fields: Any) -> Shot:
    own = {"use_hunyuan_style": True, "steps": {"hunyuan": 4}, "generate_video": False}
    return Shot(**{"prompt": PROMPT, "seed": 5, **own, **fields})


def restyle(stage: HunyuanDiTStage, image: Image, **fields: Any) -> Image:
    artefacts = stage(Item(shot(**fields), {"image": image}))
    return artefacts["image"]


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_full_strength_equals_text_to_image(guidance: float, folder: Path) -> None:
    expected, got = text_to_image_and_full_strength(loaded(folder).pipe, guidance)
    assert np.array_equal(got, expected)


def test_full_strength_equals_text_to_image_for_weights_with_size_conditions(folder: Path) -> None:
    from diffusers import HunyuanDiT2DModel

    pipe = loaded(folder).pipe
    torch.manual_seed(0)
    pipe.transformer = HunyuanDiT2DModel.from_config(pipe.transformer.config, use_style_cond_and_image_meta_size=True).eval()
    expected, got = text_to_image_and_full_strength(pipe, guidance=5.0)
    assert np.array_equal(got, expected)


def text_to_image_and_full_strength(pipe: Any, guidance: float) -> tuple[Any, Any]:
    from diffusers import HunyuanDiTPipeline

    text_to_image = HunyuanDiTPipeline(**pipe.components, requires_safety_checker=False)
    text_to_image.set_progress_bar_config(disable=True)
    arguments = {
        "num_inference_steps": 5,
        "guidance_scale": guidance,
        "negative_prompt": "blurry",
        "output_type": "np",
    }
    expected = text_to_image(
        PROMPT,
        height=48,
        width=64,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(3),
        **arguments,
    ).images
    image = PILImage.fromarray(noise_image(0))
    got = pipe(PROMPT, image, strength=1.0, generator=torch.Generator().manual_seed(3), **arguments).images
    return expected, got


def test_distance_to_the_input_grows_with_strength(folder: Path) -> None:
    pipe = loaded(folder).pipe
    distances = [distance_to_the_input(pipe, strength, steps=10) for strength in (0.1, 0.3, 0.5, 0.7, 1.0)]
    assert distances == sorted(distances)
    assert distances[-1] > 2 * distances[0]


def test_one_step_of_a_thousand_keeps_the_input(folder: Path) -> None:
    # The variance of the noise is 2 * 0.00085 in this step. Latents without scaling would have a distance of 0.04.
    assert distance_to_the_input(loaded(folder).pipe, strength=0.001, steps=1000) < 0.003


def distance_to_the_input(pipe: Any, strength: float, steps: int) -> float:
    """Return the mean squared difference of the latents."""
    image = PILImage.fromarray(noise_image(1))
    with torch.no_grad():
        mean = pipe.vae.encode(pipe.image_processor.preprocess(image)).latent_dist.mode()
    latents = pipe(
        PROMPT,
        image,
        strength=strength,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    return float((latents - mean * pipe.vae.config.scaling_factor).square().mean())


def test_steps_to_run_rounds_up() -> None:
    from vidgen_ray.nets.hunyuandit_img2img import steps_to_run

    assert [steps_to_run(30, s) for s in (0.001, 0.1, 0.5, 0.51, 1.0)] == [1, 3, 15, 16, 30]
    # 0.07 * 100 and 0.55 * 100 are above 7 and 55 in floating point.
    assert [steps_to_run(100, s) for s in (0.07, 0.55)] == [7, 55]


def test_prompt_style_prompt_and_negative_prompt_change_the_image(stage: HunyuanDiTStage) -> None:
    image = noise_image(3)
    texts: tuple[dict[str, str], ...] = ({}, {"prompt": "a cat"}, {"style_prompt": "oil"}, {"negative_prompt": "blurry"})
    # High guidance makes the effect of the text larger than the rounding to uint8.
    images = [restyle(stage, image, guidance={"hunyuan": 20}, style_strength=1.0, **text) for text in texts]
    for i, one in enumerate(images):
        for other in images[i + 1 :]:
            assert not np.array_equal(one, other)


def test_style_prompt_is_appended_to_the_prompt(stage: HunyuanDiTStage) -> None:
    image = noise_image(3)
    restyled = restyle(stage, image, style_prompt="oil painting")
    assert np.array_equal(restyled, restyle(stage, image, prompt=f"{PROMPT}, oil painting"))


def test_style_strength_0_returns_the_image_unchanged(stage: HunyuanDiTStage) -> None:
    image = noise_image(4, 70, 50)
    assert np.array_equal(restyle(stage, image, style_strength=0), image)


def test_other_weights_raise_setup_error(tmp_path: Path) -> None:
    for weights, message in ((tmp_path, r"no model_index\.json"), (resolve("builtin:tiny/flux"), "holds a FluxPipeline")):
        with pytest.raises(SetupError, match=message):
            HunyuanDiTStage(HunyuanDiTParams(weights=weights)).load()


def test_fit_to_standard_shape() -> None:
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import SUPPORTED_SHAPE

    for size in SUPPORTED_SHAPE:
        assert fit_to_standard_shape(*size) == CanvasPlacement(size, size, size)
    assert fit_to_standard_shape(1024, 576) == CanvasPlacement((1024, 576), (1280, 720), (1280, 768))
    assert fit_to_standard_shape(576, 1024) == CanvasPlacement((576, 1024), (720, 1280), (768, 1280))
    assert fit_to_standard_shape(2048, 64) == CanvasPlacement((2048, 64), (1280, 40), (1280, 768))


def test_fit_to_multiple_of_16_does_not_scale() -> None:
    assert fit_to_multiple_of_16(128, 64) == CanvasPlacement((128, 64), (128, 64), (128, 64))
    assert fit_to_multiple_of_16(70, 50) == CanvasPlacement((70, 50), (70, 50), (80, 64))


def test_fit_to_standard_shape_fills_the_canvas_without_distortion() -> None:
    for width in range(64, 2049, 61):
        for height in range(64, 2049, 67):
            placement = fit_to_standard_shape(width, height)
            (scaled_w, scaled_h), (canvas_w, canvas_h) = placement.scaled, placement.canvas
            scale = min(canvas_w / width, canvas_h / height)
            assert abs(scaled_w - scale * width) <= 0.5
            assert abs(scaled_h - scale * height) <= 0.5
            assert scaled_w <= canvas_w
            assert scaled_h <= canvas_h


def test_image_is_not_distorted(folder: Path) -> None:
    stage = HunyuanDiTStage(HunyuanDiTParams(weights=folder))
    canvases: list[Image] = []

    def identity(_prompt: str, image: PILImage.Image, **_: Any) -> SimpleNamespace:
        canvases.append(np.asarray(image))
        return SimpleNamespace(images=[torch.tensor(canvases[-1] / np.float32(255)).permute(2, 0, 1)])

    identity.vae = SimpleNamespace(disable_tiling=lambda: None)  # type: ignore[attr-defined]
    stage.pipe = identity
    image = circle_image(1024, 576, radius=200)
    result = restyle(stage, image)

    (canvas,) = canvases
    assert canvas.shape == (768, 1280, 3)
    width, height = extent_px(canvas)
    assert abs(width - height) <= 1
    assert abs(width - 1.25 * extent_px(image)[0]) <= 1
    assert result.shape == image.shape
    width, height = extent_px(result)
    assert abs(width - height) <= 1
    assert abs(width - extent_px(image)[0]) <= 1


def test_padding_repeats_the_edge_and_is_cropped_away() -> None:
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
