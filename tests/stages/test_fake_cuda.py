"""Stages on a fake CUDA device: every tensor must be on it, in the precision of its operation. Shows nothing about kernels and
speed."""

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
from vidgen_ray.stages.base import Item
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


def shot(tiny, **fields):
    return with_local_loras(check_shot({"prompt": "a red ball", "seed": 3, **fields}, "test", tiny.defaults))


def move_flux(stage, cuda):
    for network in stage.model.text_to_image.components.values():
        cuda.move(network)
    stage.model.device = "cuda:0"
    for injector in stage.injectors.values():
        cuda.move(injector.infusenet.net)
        cuda.move(injector.infusenet.resampler)


def in_precision(profile, stage_class, dtype, **changes):
    """Return a stage that loads its weights in this precision, as on a GPU."""
    return stage_class(profile.params(stage_class).model_copy(update={"dtype": dtype, **changes}))


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
    ("stage_class", "fields", "with_face", "quantize"),
    [
        (FluxStage, {}, False, "none"),
        (FluxStage, {"negative_prompt": "blurry"}, False, "none"),
        (FluxStage, {"face_image": str(ASTRONAUT)}, True, "none"),
        (FluxLoRAStage, {"lora": LORA, "face_image": str(ASTRONAUT)}, True, "none"),
        (FluxLoRAStage, {"lora": LORA, "face_image": str(ASTRONAUT)}, True, "fp8_storage"),
    ],
)
def test_flux_stages_stay_on_the_gpu(tiny, cuda, face, stage_class, fields, with_face, quantize):
    line = shot(tiny, **fields)

    def move(stage):
        if with_face:
            stage._injector("infusenet")
        if line.lora:
            with torch.inference_mode(False), torch.no_grad():
                stage.model.adapters._loaded(line.lora[0], 0)
        move_flux(stage, cuda)

    artefacts = {"image": IMAGE, "face": face} if with_face else {"image": IMAGE}
    run(in_precision(tiny, stage_class, "bfloat16", quantize=quantize), Item(line, artefacts), cuda, move)


@pytest.mark.parametrize(
    ("stage_class", "fields", "dtype"),
    [
        (HunyuanDiTStage, {"use_hunyuan_style": True, "style_prompt": "oil"}, "float16"),
        (SVDStage, {}, "float16"),
        (SVDStage, {}, "bfloat16"),
    ],
)
def test_later_stages_stay_on_the_gpu(tiny, cuda, stage_class, fields, dtype):
    def move(stage):
        for network in stage.pipe.components.values():
            cuda.move(network)

    run(in_precision(tiny, stage_class, dtype), Item(shot(tiny, **fields), {"image": IMAGE}), cuda, move)


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
        for network in stage.pipe.components.values():
            cuda.move(network)

    changes = {"weights": resolve("builtin:tiny/wan-ti2v")} if stage_class is WanStage else {}
    run(
        in_precision(tiny, stage_class, "bfloat16", **changes),
        Item(shot(tiny, **fields), {"image": IMAGE, "photos": (IMAGE,)}),
        cuda,
        move,
    )


def wan_a14b(cuda, left_on_the_host=()):
    """Return what moves the two transformers of Wan I2V-A14B and the rest of the pipeline, and the names of those that ran."""
    ran = []

    def move(stage):
        for name, network in stage.pipe.components.items():
            if name not in left_on_the_host:
                cuda.move(network)
        for name in ("transformer", "transformer_2"):
            getattr(stage.pipe, name).register_forward_hook(lambda *_, name=name: ran.append(name))
        # The first of two steps has a timestep above the boundary.
        cuda.branches.extend([True, False])

    return move, ran


def test_both_transformers_of_wan_stay_on_the_gpu(tiny, cuda):
    line = shot(tiny, video_model="wan", num_frames=5, last_image=str(ASTRONAUT))
    move, ran = wan_a14b(cuda)
    run(in_precision(tiny, WanStage, "bfloat16"), Item(line, {"image": IMAGE, "last_image": IMAGE}), cuda, move)
    assert (list(dict.fromkeys(ran)), len(cuda.branches)) == (["transformer", "transformer_2"], 0)


@pytest.mark.parametrize("network", ["transformer_2", "vae"])
def test_network_on_the_host_is_found(tiny, cuda, network):
    """Positive control: a network of Wan I2V-A14B that was left in host memory raises an error."""
    line = shot(tiny, video_model="wan", num_frames=5)
    move, _ = wan_a14b(cuda, left_on_the_host=(network,))
    with pytest.raises(RuntimeError, match="device"):
        run(in_precision(tiny, WanStage, "bfloat16"), Item(line, {"image": IMAGE}), cuda, move)


def test_sdxl_stays_on_the_gpu(tiny, cuda, face):
    def move(stage):
        for network in (*stage.pipe.components.values(), stage.resampler):
            cuda.move(network)

    line = shot(tiny, identity="instantid-sdxl", face_image=str(ASTRONAUT))
    run(in_precision(tiny, InstantIDSDXLStage, "float16"), Item(line, {"face": face}), cuda, move)


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


def _linear_in_bfloat16(cuda):
    layer = torch.nn.Linear(16, 16)
    cuda.move(layer, BRAIN)
    return layer


FLOAT8 = torch.float8_e4m3fn
_attention = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize(
    "mistake",
    [
        lambda cuda: _linear_in_bfloat16(cuda)(cuda.tensor(2, 16, dtype=torch.float32)),
        lambda cuda: _linear_in_bfloat16(cuda)(cuda.tensor(2, 3, 16, dtype=torch.float32)),
        lambda cuda: cuda.tensor(16, 16, dtype=FLOAT8) @ cuda.tensor(16, 16, dtype=FLOAT8),
        lambda cuda: cuda.tensor(4, dtype=FLOAT8) + cuda.tensor(4, dtype=FLOAT8),
        lambda cuda: torch.ones(4)[cuda.tensor(2, dtype=torch.int64)],
        lambda cuda: torch.ones(4).index_put_((cuda.tensor(2, dtype=torch.int64),), torch.tensor(0.0)),
        lambda cuda: torch.nn.functional.conv1d(cuda.tensor(1, 4, 8, dtype=HALF), cuda.tensor(4, 4, 3, dtype=BRAIN)),
        lambda cuda: torch.nn.functional.conv2d(
            cuda.tensor(1, 4, 8, 8, dtype=torch.float32), cuda.tensor(4, 4, 3, 3, dtype=HALF)
        ),
        lambda cuda: _attention(cuda.tensor(1, 1, 4, 8, dtype=HALF), *(cuda.tensor(1, 1, 4, 8, dtype=BRAIN),) * 2),
        lambda cuda: cuda.tensor(4, dtype=BRAIN) * torch.ones(4),
    ],
    ids=(
        *("linear", "linear of tokens", "fp8 matmul", "fp8 sum", "index", "index_put", "convolution of mixed 16 bits"),
        *("convolution of float32", "attention", "product with the host"),
    ),
)
def test_mistakes_of_precision_and_device_are_found(cuda, mistake):
    """Positive controls: each raises an error on a GPU."""
    with cuda.running(), pytest.raises(RuntimeError):
        mistake(cuda)


@pytest.mark.parametrize(
    "operation",
    [
        lambda cuda: _linear_in_bfloat16(cuda)(cuda.tensor(2, 16, dtype=BRAIN)),
        lambda cuda: cuda.tensor(4, dtype=BRAIN) * torch.tensor(2.0),
        lambda cuda: cuda.tensor(4, dtype=BRAIN)[torch.tensor([0, 1])],
        lambda cuda: cuda.tensor(4, dtype=FLOAT8).to(BRAIN),
    ],
    ids=["linear", "number on the host", "index on the host", "fp8 cast"],
)
def test_operations_that_a_gpu_runs_raise_no_error(cuda, operation):
    with cuda.running():
        assert operation(cuda).dtype == BRAIN


def test_network_in_another_precision_is_found(tiny, cuda, face):
    """Positive control: a resampler of face embeddings that was left in float32 raises an error."""
    line = shot(tiny, face_image=str(ASTRONAUT))

    def move(stage):
        stage._injector("infusenet")
        move_flux(stage, cuda)
        cuda.move(stage.injectors["infusenet"].infusenet.resampler, torch.float32)

    with pytest.raises(RuntimeError, match="dtype"):
        run(in_precision(tiny, FluxStage, "bfloat16"), Item(line, {"image": IMAGE, "face": face}), cuda, move)
