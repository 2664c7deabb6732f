"""Stages on a fake CUDA device: every tensor must be on it. Shows nothing about kernels and speed."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.conftest import ASTRONAUT
from tests.stages import fake_cuda
from tests.stages.fake_cuda import CUDA, FakeCuda, patch_host_code, register_guard
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.nets.rife_network import FramePair, load_rife
from vidgen_ray.script.check import check_shot
from vidgen_ray.stages.base import FaceFeatures, Item
from vidgen_ray.stages.flux import FluxLoRAStage, FluxStage
from vidgen_ray.stages.flux2_klein import Flux2KleinStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.instantid_sdxl import InstantIDSDXLStage
from vidgen_ray.stages.ltx import LTXStage
from vidgen_ray.stages.qwen_edit import QwenEditStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.rife import RifeStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.weights import resolve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(fake_cuda.COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has a device guard of its own"),
]
HALF, BRAIN = torch.float16, torch.bfloat16
IMAGE = np.zeros((64, 128, 3), np.uint8)
LORA = "builtin:tiny/lora.safetensors"


@pytest.fixture(scope="session", autouse=True)
def guard(tmp_path_factory):
    register_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def cuda(monkeypatch):
    device = FakeCuda()
    patch_host_code(device, monkeypatch)
    return device


@pytest.fixture
def face():
    rng = np.random.default_rng(0)
    unit = rng.standard_normal(512).astype("f")
    embeddings = {"antelopev2": rng.standard_normal(512).astype("f"), "ir_se50": unit / np.linalg.norm(unit)}
    points = np.array([[40, 30], [60, 30], [50, 40], [42, 50], [58, 50]], "f")
    return FaceFeatures(embeddings, points, (30, 20, 70, 60), 0.9, 1, (100, 80), "d")


def shot(tiny, **fields):
    return with_local_loras(check_shot({"prompt": "a red ball", "seed": 3, **fields}, "test", tiny.defaults))


def move_flux(stage, cuda):
    for network in stage.model.text_to_image.components.values():
        cuda.move(network, BRAIN)
    stage.model.device = "cuda:0"
    for injector in stage.injectors.values():
        cuda.move(injector.infusenet.net, BRAIN)
        cuda.move(injector.infusenet.resampler, BRAIN)


def run(stage, item, cuda, move):
    stage.load()
    try:
        move(stage)
        with cuda.running():
            stage.run(item)
    finally:
        stage.close()
    _, _, device = cuda.outputs[-1]
    assert device == str(CUDA)


@pytest.mark.parametrize(
    ("stage_class", "fields", "with_face"),
    [
        (FluxStage, {}, False),
        (FluxStage, {"negative_prompt": "blurry"}, False),
        (FluxStage, {"face_image": str(ASTRONAUT)}, True),
        (FluxLoRAStage, {"lora": LORA, "face_image": str(ASTRONAUT)}, True),
    ],
)
def test_flux_stages_stay_on_the_gpu(tiny, cuda, face, stage_class, fields, with_face):
    line = shot(tiny, **fields)

    def move(stage):
        if with_face:
            stage._injector("infusenet")
        if line.lora:
            with torch.inference_mode(False), torch.no_grad():
                stage.model.adapters._loaded(line.lora[0])
        move_flux(stage, cuda)

    artefacts = {"image": IMAGE, "face": face} if with_face else {"image": IMAGE}
    run(stage_class(tiny.params(stage_class)), Item(line, artefacts), cuda, move)


@pytest.mark.parametrize(
    ("stage_class", "fields", "dtype"),
    [(HunyuanDiTStage, {"use_hunyuan_style": True, "style_prompt": "oil"}, HALF), (SVDStage, {}, HALF), (SVDStage, {}, BRAIN)],
)
def test_later_stages_stay_on_the_gpu(tiny, cuda, stage_class, fields, dtype):
    def move(stage):
        for network in stage.pipe.components.values():
            cuda.move(network, dtype)

    run(stage_class(tiny.params(stage_class)), Item(shot(tiny, **fields), {"image": IMAGE}), cuda, move)


@pytest.mark.parametrize(
    ("stage_class", "fields"),
    [
        (Flux2KleinStage, {"identity": "reference", "face_image": str(ASTRONAUT)}),
        (QwenEditStage, {"use_hunyuan_style": True, "style_model": "qwen-edit", "style_prompt": "oil"}),
        (WanStage, {"video_model": "wan", "num_frames": 5}),
        (LTXStage, {"video_model": "ltx", "num_frames": 9}),
    ],
)
def test_other_models_stay_on_the_gpu(tiny, cuda, stage_class, fields):

    def move(stage):
        for name, network in stage.pipe.components.items():
            cuda.move(network, torch.float32 if (name, stage_class) == ("vae", WanStage) else BRAIN)

    params = tiny.params(stage_class)
    if stage_class is WanStage:
        params = params.model_copy(update={"weights": resolve("builtin:tiny/wan-ti2v")})
    run(stage_class(params), Item(shot(tiny, **fields), {"image": IMAGE, "photos": (IMAGE,)}), cuda, move)


def wan_a14b(cuda, left_on_the_host=()):
    """Return what moves the two transformers of Wan I2V-A14B and the rest of the pipeline, and the names of those that ran."""
    ran = []

    def move(stage):
        for name, network in stage.pipe.components.items():
            dtype = torch.float32 if name == "vae" else BRAIN
            if name in left_on_the_host:
                network.to(dtype)
            else:
                cuda.move(network, dtype)
        for name in ("transformer", "transformer_2"):
            getattr(stage.pipe, name).register_forward_hook(lambda *_, name=name: ran.append(name))
        # The first of two steps has a timestep above the boundary.
        cuda.branches.extend([True, False])

    return move, ran


def test_both_transformers_of_wan_stay_on_the_gpu(tiny, cuda):
    line = shot(tiny, video_model="wan", num_frames=5, last_image=str(ASTRONAUT))
    move, ran = wan_a14b(cuda)
    run(WanStage(tiny.params(WanStage)), Item(line, {"image": IMAGE, "last_image": IMAGE}), cuda, move)
    assert (list(dict.fromkeys(ran)), len(cuda.branches)) == (["transformer", "transformer_2"], 0)


@pytest.mark.parametrize("network", ["transformer_2", "vae"])
def test_network_on_the_host_is_found(tiny, cuda, network):
    """Positive control: a network of Wan I2V-A14B that was left in host memory raises an error."""
    line = shot(tiny, video_model="wan", num_frames=5)
    move, _ = wan_a14b(cuda, left_on_the_host=(network,))
    with pytest.raises(RuntimeError, match="device"):
        run(WanStage(tiny.params(WanStage)), Item(line, {"image": IMAGE}), cuda, move)


def test_sdxl_stays_on_the_gpu(tiny, cuda, face):
    def move(stage):
        for network in (*stage.pipe.components.values(), stage.resampler):
            cuda.move(network, HALF)

    line = shot(tiny, identity="instantid-sdxl", face_image=str(ASTRONAUT))
    run(InstantIDSDXLStage(tiny.params(InstantIDSDXLStage)), Item(line, {"face": face}), cuda, move)


@pytest.mark.parametrize("tile_px", [None, 48])
def test_upscaler_stays_on_the_gpu(tiny, cuda, tile_px):
    stage = RealESRGANStage(tiny.params(RealESRGANStage).model_copy(update={"tile_px": tile_px}))
    stage.load()
    cuda.move(stage._network("animevideov3").model, HALF)
    stage.params = stage.params.model_copy(update={"device": "cuda:0"})
    with cuda.running():
        pixels = stage._upscale(np.stack([IMAGE, IMAGE]), 2, "animevideov3")
    assert (pixels.shape, pixels.dtype, pixels.device) == ((2, 3, 128, 256), torch.float32, CUDA)


def test_interpolation_stays_on_the_gpu(tiny, cuda):
    network = load_rife(tiny.params(RifeStage).weights, torch.float32)
    cuda.move(network, HALF)
    first, second = (cuda.tensor(1, 3, *IMAGE.shape[:2], dtype=torch.float32) for _ in range(2))
    with cuda.running():
        between = FramePair(network, first, second, 1.0).at(Fraction(1, 2))
    assert (between.shape, between.device) == ((1, 3, 64, 128), CUDA)
