"""Tests that need a GPU. Skipped without one."""

import numpy as np
import pytest
import torch

from vidgen_ray.bench.published_models import random_model, random_pipeline
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.stages.base import Item, pixels_to_uint8
from vidgen_ray.stages.flux import FluxLoRAStage, FluxStage
from vidgen_ray.stages.flux_model import T5
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.weights import resolve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


LORAS = [str(resolve("builtin:tiny/lora.safetensors"))]
PICTURE = np.tile(np.linspace(0, 255, 128, dtype=np.uint8)[None, :, None], (64, 1, 3))


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    """Compute float32 on the GPU in full, as on the CPU: TF32 has 10 bits, which changes images of Wan by 25 levels."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def difference(a, b):
    return np.abs(a.astype(int) - b).max()


def result(stage, shot, **artefacts):
    return stage(Item(shot, artefacts))[stage.writes[0]]


def on_gpu(stage_class, profile, **changes):
    return stage_class(profile.params(stage_class).model_copy(update={"device": "cuda", **changes}))


STAGES = {
    "flux": {"face_image": "face.png"},
    "lora": {"lora": "builtin:tiny/lora.safetensors", "face_image": "face.png"},
    "instantid_sdxl": {"identity": "instantid-sdxl"},
    "klein": {"identity": "reference", "face_image": "face.png"},
    "hunyuan": {"use_hunyuan_style": True},
    "qwen_edit": {"use_hunyuan_style": True, "style_model": "qwen-edit"},
    "svd": {"num_frames": 4},
    "wan": {"video_model": "wan", "num_frames": 5},
    "ltx": {"video_model": "ltx", "num_frames": 9},
    "rife": {"interpolation": 2},
    "realesrgan": {"scale": 4},
}
"""Stage -> fields of a shot that passes it."""
OFFLOADED = ("klein", "qwen_edit", "wan", "ltx")
each_stage = pytest.mark.parametrize("name", STAGES)


@pytest.fixture
def item_of(make_shot, face, photo):
    """Return a function that makes an item that passes a stage."""

    def make(name, **fields):
        shot = with_local_loras(make_shot(**STAGES[name], **fields))
        frames = np.stack([np.roll(PICTURE, 2 * n, 1) for n in range(2)])
        return Item(shot, {"image": PICTURE, "frames": frames, "face": face, "photos": (photo,)})

    return make


@each_stage
def test_stage_on_gpu_is_close_to_cpu(tiny, item_of, name):
    stage, item = STAGE_BY_NAME[name], item_of(name)
    with stage(tiny.params(stage)) as cpu, on_gpu(stage, tiny) as gpu:
        a, b = (each(item)[stage.writes[0]] for each in (cpu, gpu))
    assert difference(a, b) <= 8


@each_stage
def test_stage_gives_the_same_bytes_after_weight_swapping(tiny, item_of, name):
    stage, item = STAGE_BY_NAME[name], item_of(name)
    with on_gpu(stage, tiny) as gpu:
        expected = gpu(item)[stage.writes[0]]
        gpu.move("cpu")
        used = torch.cuda.memory_allocated()
        gpu.move("cuda")
        assert torch.cuda.memory_allocated() > used
        assert np.array_equal(gpu(item)[stage.writes[0]], expected)


@pytest.mark.parametrize("name", OFFLOADED)
def test_offloaded_stage_gives_the_same_bytes(tiny, item_of, name):
    stage, item = STAGE_BY_NAME[name], item_of(name)
    with on_gpu(stage, tiny) as resident, on_gpu(stage, tiny, cpu_offload=True) as offloaded:
        a, b = (each(item)[stage.writes[0]] for each in (resident, offloaded))
    assert np.array_equal(a, b)


def test_faces_on_gpu_are_close_to_cpu(tiny, photo):
    """The session refuses to load if onnxruntime has no CUDA on this machine."""
    pytest.importorskip("onnxruntime")
    with InstantIDStage(tiny.params(InstantIDStage)) as cpu, on_gpu(InstantIDStage, tiny) as gpu:
        face, found = (stage.features([photo]) for stage in (cpu, gpu))
    assert np.abs(found.keypoints - face.keypoints).max() < 1
    for recogniser, expected in face.embeddings.items():
        embedding = found.embedding(recogniser)
        assert embedding @ expected / np.linalg.norm(embedding) / np.linalg.norm(expected) > 0.999


def test_float16_upscaler_is_close_to_float32(tiny, photo, make_shot):
    shot = make_shot(scale=4, upscaler="animevideov3")
    frames = photo[None, 60:124, 180:244]
    with RealESRGANStage(tiny.params(RealESRGANStage)) as cpu, on_gpu(RealESRGANStage, tiny, dtype="float16") as gpu:
        a, b = (stage.run_chunk(shot, frames).astype(float) for stage in (cpu, gpu))
    assert 10 * np.log10(255**2 / np.mean((a - b) ** 2)) > 45


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_pixels_of_the_gpu_have_the_bytes_of_the_host(dtype):
    pixels = torch.rand((2, 3, 64, 96), generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    expected = (pixels.permute(0, 2, 3, 1).float().numpy() * 255).round()
    assert np.array_equal(pixels_to_uint8(pixels.cuda()), expected)


@pytest.mark.parametrize(
    ("stage_class", "options"),
    [
        (SVDStage, {"channels_last": True}),
        (SVDStage, {"attention_backend": "_native_efficient"}),
        (SVDStage, {"attention_backend": "_native_cudnn"}),
        (SVDStage, {"compile": True}),
        (HunyuanDiTStage, {"compile": True}),
    ],
    ids=str,
)
def test_option_on_gpu_changes_only_the_rounding(tiny, make_shot, stage_class, options):
    shot = make_shot(num_frames=4, steps={"svd": 4}, use_hunyuan_style=True)
    with on_gpu(stage_class, tiny) as plain, on_gpu(stage_class, tiny, **options) as other:
        expected, changed = (result(stage, shot, image=PICTURE) for stage in (plain, other))
        assert np.array_equal(result(other, shot, image=PICTURE), changed)
    assert difference(expected, changed) <= 4


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({"attention_backend": "_native_cudnn"}, 8),
        ({"attention_backend": "_native_flash"}, 8),
        ({"compile": True}, 8),
        ({"quantize": "fp8_storage"}, 64),
        ({"text_encoder": "cpu"}, 8),
    ],
    ids=str,
)
def test_flux_option_on_gpu(tiny, make_shot, options, levels):
    changes = {"dtype": "bfloat16", **options}
    shot = make_shot(lora=LORAS, steps={"flux": 4, "lora": 4})
    with on_gpu(FluxStage, tiny, dtype="bfloat16") as plain, on_gpu(FluxStage, tiny, **changes) as other:
        image = result(plain, shot)
        assert difference(image, result(other, shot)) <= levels
        with on_gpu(FluxLoRAStage, tiny, dtype="bfloat16") as lora, on_gpu(FluxLoRAStage, tiny, **changes) as other_lora:
            assert difference(*(result(stage, shot, image=image) for stage in (lora, other_lora))) <= levels


def test_flux_computed_in_fp8_on_gpu(tiny, make_shot):
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs Ada or Hopper")
    with on_gpu(FluxStage, tiny, dtype="bfloat16") as plain, on_gpu(FluxStage, tiny, dtype="bfloat16", quantize="fp8") as other:
        assert difference(*(result(stage, make_shot()) for stage in (plain, other))) <= 64


def test_random_weights_that_stay_on_the_host_are_drawn_on_the_gpu(tiny):
    networks = {T5: random_model("builtin:tiny/flux", None).networks[T5]}
    params = tiny.params(FluxStage).model_copy(update={"device": "cuda"})
    (resident,), (swapped,) = (
        random_pipeline(networks, params.model_copy(update={"text_encoder": place})).values() for place in ("gpu", "swapped")
    )
    for name, tensor in swapped.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, resident.state_dict()[name].cpu())


def test_compiled_flux_stays_compiled_when_its_weights_are_swapped(tiny, make_shot):
    with on_gpu(FluxLoRAStage, tiny, compile=True) as stage:
        expected = result(stage, make_shot(lora=LORAS), image=PICTURE)
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        stage.move("cpu")
        stage.move("cuda")
        assert np.array_equal(result(stage, make_shot(lora=LORAS), image=PICTURE), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
