"""Tests that need a GPU. Skipped without one."""

import numpy as np
import pytest
import torch
from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

from tests.stages.conftest import PASSING
from tests.stages.test_parity import levels_apart
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.flux import FluxLoRAStage, FluxStage
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.weights import resolve

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


LORAS = [str(resolve("builtin:tiny/lora.safetensors"))]
PICTURE = np.tile(np.linspace(0, 255, 128, dtype=np.uint8)[None, :, None], (64, 1, 3))
WITH_FACE = ("flux", "lora", "klein")


@pytest.fixture(scope="module", autouse=True)
def full_precision():
    """Compute float32 on the GPU in full, as on the CPU: TF32 has 10 bits, which changes images of Wan by 25 levels."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def result(stage, shot, **artefacts):
    return stage(Item(shot, artefacts))[stage.writes[0]]


def on_gpu(stage_class, profile, **changes):
    return stage_class(profile.params(stage_class).model_copy(update={"device": "cuda", **changes}))


@pytest.mark.parametrize("name", PASSING)
def test_stage_on_gpu_is_close_to_cpu_also_offloaded_and_after_weight_swapping(tiny, make_shot, face, photo, name):
    stage = STAGE_BY_NAME[name]
    shot = with_local_loras(make_shot(**PASSING[name], **({"face_image": "face.png"} if name in WITH_FACE else {})))
    frames = np.stack([np.roll(PICTURE, 2 * n, 1) for n in range(2)])
    artefacts = {"image": PICTURE, "frames": frames, "face": face, "photos": (photo,)}
    with stage(tiny.params(stage)) as cpu, on_gpu(stage, tiny) as gpu:
        expected = result(gpu, shot, **artefacts)
        assert levels_apart(result(cpu, shot, **artefacts), expected) <= 8
        gpu.move("cpu")
        used = torch.cuda.memory_allocated()
        gpu.move("cuda")
        assert torch.cuda.memory_allocated() > used
        assert np.array_equal(result(gpu, shot, **artefacts), expected)
    if hasattr(gpu.params, "cpu_offload"):
        with on_gpu(stage, tiny, cpu_offload=True) as offloaded:
            assert np.array_equal(result(offloaded, shot, **artefacts), expected)


def test_faces_on_gpu_are_close_to_cpu(tiny, photo):
    """The session refuses to load if onnxruntime has no CUDA on this machine."""
    pytest.importorskip("onnxruntime")
    with InstantIDStage(tiny.params(InstantIDStage)) as cpu, on_gpu(InstantIDStage, tiny) as gpu:
        face, found = (stage.features([photo]) for stage in (cpu, gpu))
    assert np.abs(found.keypoints - face.keypoints).max() < 1
    for recogniser, expected in face.embeddings.items():
        embedding = found.embedding(recogniser)
        assert embedding @ expected / np.linalg.norm(embedding) / np.linalg.norm(expected) > 0.999


@pytest.mark.parametrize(
    ("name", "options", "levels"),
    [
        ("svd", {"channels_last": True}, 4),
        ("svd", {"attention_backend": "_native_efficient"}, 4),
        ("svd", {"attention_backend": "_native_cudnn"}, 4),
        ("svd", {"compile": True}, 4),
        ("hunyuan", {"compile": True}, 4),
        ("realesrgan", {"dtype": "float16"}, 8),
    ],
    ids=str,
)
def test_option_on_gpu_changes_only_the_rounding(tiny, make_shot, name, options, levels):
    stage = STAGE_BY_NAME[name]
    shot, artefacts = make_shot(**PASSING[name]), {"image": PICTURE, "frames": PICTURE[None]}
    with on_gpu(stage, tiny) as plain, on_gpu(stage, tiny, **options) as other:
        expected, changed = (result(each, shot, **artefacts) for each in (plain, other))
        assert np.array_equal(result(other, shot, **artefacts), changed)
    assert levels_apart(expected, changed) <= levels


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.float16, 3e-3)], ids=str)
def test_dense_kernel_gives_what_torch_gives(dtype, allowed):
    """Relative L2 difference, for frames whose sides are no multiples of a tile. float16 rounds either way by 1e-3."""
    pytest.importorskip("triton")
    from vidgen_ray.nets.dense_blocks import DenseTrunk, supports

    torch.manual_seed(0)
    network = RRDBNet(in_nc=3, out_nc=3, num_filters=64, num_blocks=2, scale=4).eval().requires_grad_(False)
    assert supports(network)
    network.to("cuda", dtype, memory_format=torch.channels_last)
    pixels = torch.rand(2, 3, 37, 53).to("cuda", dtype, memory_format=torch.channels_last)
    with torch.inference_mode():
        expected, result = network(pixels).float(), DenseTrunk(network)(pixels).float()
    assert (result - expected).norm() / expected.norm() < allowed


@pytest.mark.parametrize(
    ("options", "levels"),
    [
        ({"attention_backend": "_native_cudnn"}, 8),
        ({"attention_backend": "_native_flash"}, 8),
        ({"compile": True}, 8),
        ({"quantize": "fp8_storage"}, 64),
        ({"quantize": "fp8"}, 64),
        ({"text_encoder": "cpu"}, 8),
    ],
    ids=str,
)
def test_flux_option_on_gpu(tiny, make_shot, options, levels):
    changes = {"dtype": "bfloat16", **options}
    if changes.get("quantize") == "fp8":
        pytest.importorskip("torchao")
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("needs Ada or Hopper")
    shot = make_shot(lora=LORAS, steps={"flux": 4, "lora": 4})
    with on_gpu(FluxStage, tiny, dtype="bfloat16") as plain, on_gpu(FluxStage, tiny, **changes) as other:
        image = result(plain, shot)
        assert levels_apart(image, result(other, shot)) <= levels
        with on_gpu(FluxLoRAStage, tiny, dtype="bfloat16") as lora, on_gpu(FluxLoRAStage, tiny, **changes) as other_lora:
            assert levels_apart(*(result(stage, shot, image=image) for stage in (lora, other_lora))) <= levels


def test_compiled_flux_stays_compiled_when_its_weights_are_swapped(tiny, make_shot):
    with on_gpu(FluxLoRAStage, tiny, compile=True) as stage:
        expected = result(stage, make_shot(lora=LORAS), image=PICTURE)
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        stage.move("cpu")
        stage.move("cuda")
        assert np.array_equal(result(stage, make_shot(lora=LORAS), image=PICTURE), expected)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
