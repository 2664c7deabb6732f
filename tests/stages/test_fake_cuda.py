"""Stages on a fake CUDA device: every tensor must be on it, in the precision of its operation. Shows nothing about kernels and
speed."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from tests.conftest import ASTRONAUT
from tests.stages import fake_cuda
from tests.stages.conftest import PASSING
from tests.stages.fake_cuda import CUDA, FakeCuda, patch_host_code, register_guard
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.nets.rife_network import FramePair, load_rife
from vidgen_ray.script.check import check_shot
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.flux import FluxFamilyStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.rife import RifeStage
from vidgen_ray.weights import resolve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(fake_cuda.COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU has a device guard of its own"),
]
HALF, BRAIN, FLOAT8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn
IMAGE = np.zeros((64, 64, 3), np.uint8)
FACE = {"face_image": str(ASTRONAUT)}


@pytest.fixture(scope="session", autouse=True)
def guard(tmp_path_factory):
    register_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def cuda(monkeypatch):
    device = FakeCuda()
    patch_host_code(device, monkeypatch)
    return device


def move_flux(stage, line, cuda):
    if line.flux_identity:
        stage._injector("infusenet")
    if line.lora:
        with torch.inference_mode(False), torch.no_grad():
            stage.model.adapters._loaded(line.lora[0], 0)
    for network in stage.model.text_to_image.components.values():
        cuda.move(network)
    stage.model.device = "cuda:0"
    for injector in stage.injectors.values():
        cuda.move(injector.infusenet.net)
        cuda.move(injector.infusenet.resampler)


def run(name, tiny, cuda, face, fields, moved=lambda stage: None, left_on_the_host=(), **changes):
    """Run a stage whose networks are on the device. `moved`: called before it runs."""
    own = {"prompt": "a red ball", "seed": 3, "width": 64, **PASSING[name], **fields}
    line = with_local_loras(check_shot(own, "test", tiny.defaults))
    stage_class = STAGE_BY_NAME[name]
    artefacts = {"image": IMAGE, "last_image": IMAGE, "face": face, "photos": (IMAGE,)}
    # The weights are loaded in this precision, as on a GPU.
    with stage_class(tiny.params(stage_class).model_copy(update={"dtype": "bfloat16", **changes})) as stage:
        if isinstance(stage, FluxFamilyStage):
            move_flux(stage, line, cuda)
        else:
            for part, network in {**stage.pipe.components, "resampler": getattr(stage, "resampler", None)}.items():
                if part not in left_on_the_host:
                    cuda.move(network)
        moved(stage)
        with cuda.running():
            stage.run(Item(line, artefacts))
    _, _, device = cuda.outputs[-1]
    assert device == str(CUDA)


@pytest.mark.parametrize(
    ("name", "fields", "changes"),
    [
        ("flux", {"negative_prompt": "blurry"}, {}),
        ("flux", FACE, {}),
        ("lora", FACE, {}),
        ("lora", FACE, {"quantize": "fp8_storage"}),
        ("instantid_sdxl", FACE, {"dtype": "float16"}),
        ("klein", FACE, {}),
        ("hunyuan", {}, {"dtype": "float16"}),
        ("qwen_edit", {}, {}),
        ("svd", {}, {"dtype": "float16"}),
        ("svd", {}, {}),
        ("wan", {}, {"weights": resolve("builtin:tiny/wan-ti2v")}),
        ("ltx", {}, {}),
        ("hunyuan", {}, {"dtype": "float16", "schedule": "hunyuandit-1.2"}),
        ("wan", {}, {"weights": resolve("builtin:tiny/wan-ti2v"), "schedule": "wan2.2-ti2v-5b"}),
        ("ltx", {"steps": {"ltx": 7}}, {"schedule": "ltx-0.9.8-distilled"}),
    ],
)
def test_stage_stays_on_the_gpu(tiny, cuda, face, name, fields, changes):
    run(name, tiny, cuda, face, fields, **changes)


@pytest.mark.parametrize(
    ("name", "fields", "changes"),
    [("flux", {**FACE, "negative_prompt": "blurry"}, {}), ("wan", {}, {"weights": resolve("builtin:tiny/wan-ti2v")})],
)
def test_first_block_cache_stays_on_the_gpu(tiny, cuda, face, monkeypatch, name, fields, changes):
    compared = []

    def skip(difference):
        compared.append(difference)
        return 0.0

    # The change of the first block, by which the cache decides.
    monkeypatch.setattr(FakeTensor, "item", skip, raising=False)
    run(name, tiny, cuda, face, {**fields, "steps": {name: 3}}, first_block_cache=0.1, **changes)
    assert len(compared) == 2 * (3 - 1)


def test_both_transformers_of_wan_stay_on_the_gpu(tiny, cuda, face):
    ran = []

    def watch(stage):
        for name in ("transformer", "transformer_2"):
            getattr(stage.pipe, name).register_forward_hook(lambda *_, name=name: ran.append(name))
        # The first of two steps has a timestep above the boundary.
        cuda.branches.extend([True, False])

    run("wan", tiny, cuda, face, {"last_image": str(ASTRONAUT)}, watch)
    assert (list(dict.fromkeys(ran)), len(cuda.branches)) == (["transformer", "transformer_2"], 0)
    # Positive control: a network that was left in host memory raises an error.
    with pytest.raises(RuntimeError, match="device"):
        run("wan", tiny, cuda, face, {}, watch, left_on_the_host=("transformer_2",))


@pytest.mark.parametrize("tile_px", [None, 48])
def test_upscaler_stays_on_the_gpu(tiny, cuda, tile_px):
    stage = RealESRGANStage(tiny.params(RealESRGANStage).model_copy(update={"tile_px": tile_px}))
    stage.load()
    cuda.move(stage._network("animevideov3").model, HALF)
    stage.params = stage.params.model_copy(update={"device": "cuda:0"})
    with cuda.running():
        pixels = stage._upscale(np.stack([IMAGE, IMAGE]), 2, "animevideov3")
    assert (pixels.shape, pixels.dtype, pixels.device) == ((2, 3, 128, 128), torch.float32, CUDA)


def test_interpolation_stays_on_the_gpu(tiny, cuda):
    network = load_rife(tiny.params(RifeStage).weights, torch.float32)
    cuda.move(network, HALF)
    first, second = (cuda.tensor(1, 3, 64, 64, dtype=torch.float32) for _ in range(2))
    with cuda.running():
        between = FramePair(network, first, second, 1.0).at(Fraction(1, 2))
    assert (between.shape, between.device) == ((1, 3, 64, 64), CUDA)


def test_mistakes_of_precision_and_device_are_found(cuda):
    """Positive controls: each raises an error on a GPU, and the right operations do not."""
    layer = torch.nn.Linear(16, 16)
    cuda.move(layer, BRAIN)
    attention, conv2d = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.conv2d
    floats, numbers = cuda.tensor(2, 16, dtype=torch.float32), cuda.tensor(2, dtype=torch.int64)
    half, brain, float8 = (cuda.tensor(1, 1, 16, 16, dtype=dtype) for dtype in (HALF, BRAIN, FLOAT8))
    for name, mistake in {
        "linear": lambda: layer(floats),
        "linear of tokens": lambda: layer(floats[None]),
        "fp8 matmul": lambda: float8[0, 0] @ float8[0, 0],
        "fp8 sum": lambda: float8 + float8,
        "index": lambda: torch.ones(4)[numbers],
        "index_put": lambda: torch.ones(4).index_put_((numbers,), torch.tensor(0.0)),
        "convolution": lambda: conv2d(half, brain),
        "attention": lambda: attention(half, brain, brain),
        "product with the host": lambda: brain * torch.ones(16),
    }.items():
        with cuda.running(), pytest.raises(RuntimeError):
            pytest.fail(f"{name}: {mistake()}")
    with cuda.running():
        for right in (layer(brain), brain * torch.tensor(2.0), brain[..., torch.tensor([0, 1])], float8.to(BRAIN)):
            assert right.dtype == BRAIN
