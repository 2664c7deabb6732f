"""Weights in host memory: while they are loaded, of swapped stages, and of parts of pipelines that take turns on the GPU.

The GPU is simulated, or a meta device stands for it. Results with moved weights are equal to the bit, since torch computes them
on the CPU with the same kernels, whose sums do not depend on addresses.
"""

import copy
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.modeling_utils import get_parameter_device
from diffusers.pipelines import pipeline_utils
from peft import LoraConfig, inject_adapter_in_model
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.stages.conftest import PASSING
from tests.stages.fake_gpu import GPU, FakeGpu, is_on_gpu, is_pinned, tensors_of
from tests.stages.test_parity import gradient_image, loaded
from vidgen_ray.bench.tiny_networks import write_random_lora
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.nets import weight_files
from vidgen_ray.nets.diffusers_private import search_hooks_once
from vidgen_ray.stages import flux_model, loading, speed
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.loading import move_networks
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.weights import resolve


@pytest.fixture
def gpu(monkeypatch):
    return FakeGpu(monkeypatch)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).eval().requires_grad_(False)


def test_weights_that_have_no_pinned_copy_get_one(gpu, monkeypatch):
    """T5 starts in pageable host memory, and other networks are loaded on the GPU."""
    monkeypatch.setattr(loading, "_is_pinned", lambda tensor: False)
    net = network()
    tensors = [*net.parameters(), *net.buffers()]
    move_networks([net], GPU)
    assert gpu.copies.count("to host") == len(tensors)
    host = [getattr(tensor, loading._COPY) for tensor in tensors]
    move_networks([net], "cpu")
    assert all(tensor.data_ptr() == copy.data_ptr() for tensor, copy in zip(tensors, host, strict=True))
    move_networks([net], GPU)
    for tensor in tensors:
        setattr(tensor, loading._COPY, None)
    gpu.copies.clear()
    move_networks([net], "cpu")
    assert set(gpu.copies) == {"to host"}


def test_adapters_that_are_loaded_and_changed_later_stay_correct(gpu):
    net = network()
    move_networks([net], GPU)
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), net)
    factors = [p for name, p in adapted.named_parameters() if "lora_" in name]
    x = torch.ones(2, 3)
    for value in (0.5, 0.25):
        for factor in factors:
            factor.data = loading._on_device(torch.full_like(factor, value), GPU, non_blocking=False)
        expected = adapted(x)
        move_networks([adapted], "cpu")
        assert torch.equal(adapted(x), expected)
        move_networks([adapted], GPU)
        assert torch.equal(adapted(x), expected)
        # Replaced in place, as by a hot swap: the copy of the host is not used again.
        for factor in factors:
            factor.data.mul_(3)
        changed = adapted(x)
        move_networks([adapted], "cpu")
        assert torch.equal(adapted(x), changed)
        assert not torch.equal(changed, expected)
        move_networks([adapted], GPU)


def test_hooks_are_searched_once_and_found_when_they_are_registered_later():
    search_hooks_once()
    searches, resets = [], []

    class Network(torch.nn.Sequential):
        def modules(self):
            searches.append(self)
            return super().modules()

    class Offloading(ModelHook):
        _is_stateful = True
        config = SimpleNamespace(onload_device=torch.device("cpu"))

        def reset_state(self, module):
            resets.append(module)

    net = Network(torch.nn.Linear(1, 1))
    for device in ("cpu", "meta"):
        net.to(device)
        assert {get_parameter_device(net).type for _ in range(3)} == {device}
    root, part = (HookRegistry.check_if_exists_or_initialize(each) for each in (net, net[0]))
    root.reset_stateful_hooks()
    assert len(searches) == 1
    part.register_hook(Offloading(), "group_offloading")
    root.reset_stateful_hooks()
    assert (get_parameter_device(net).type, resets) == ("cpu", [net[0]])
    part.remove_hook("group_offloading")
    assert get_parameter_device(net).type == "meta"


def test_shared_weights_stay_shared(gpu):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    net[1].weight = net[0].weight
    move_networks([net], GPU)
    move_networks([net], "cpu")
    assert net[1].weight is net[0].weight


def test_network_that_is_loaded_in_a_call_can_be_swapped(tiny, make_shot, gpu):
    stage = loaded(RealESRGANStage, tiny, device=GPU)
    item = Item(make_shot(width=64, num_frames=2, scale=2), {"frames": np.stack([gradient_image(64, 64)] * 2)})
    before = stage(item)["hd_frames"]
    for device in ("cpu", GPU, "cpu", GPU):
        stage.move(device)
    assert gpu.copies.count("to gpu") > 2
    assert np.array_equal(stage(item)["hd_frames"], before)


LORAS = {
    name: {field: [{"path": str(resolve(f"builtin:tiny/{name}-lora.safetensors")), "weight": 0.8}]}
    for name, field in (("wan", "video_lora"), ("ltx", "video_lora"), ("klein", "lora"))
}


@pytest.mark.parametrize("name", ["wan", "ltx", "klein", "qwen_edit"])
def test_offloaded_parts_take_turns_and_are_copied_in_one_direction(tiny, make_shot, gpu, name):
    runs = ["text_encoder", "vae", "transformer", *(["transformer_2"] if name == "wan" else []), "vae"]
    image = gradient_image(64, 64)
    reference = loaded(STAGE_BY_NAME[name], tiny)
    stage = loaded(STAGE_BY_NAME[name], tiny, device=GPU, cpu_offload=True)
    gpu.watch(stage.pipe)
    tensors = {name: len([*part.parameters(), *part.buffers()]) for name, part in gpu.networks.items()}
    assert not gpu.on_gpu
    for loras in ({}, LORAS[name]) if name in LORAS else ({},):
        shot = make_shot(width=64, face_image="x.jpg", **PASSING[name], **loras)
        item = Item(shot, {"image": image, "photos": (image,)})
        (expected,) = reference(item).values()
        gpu.forget()
        (result,) = stage(item).values()
        # A LoRA may change the rounding.
        assert np.abs(result.astype(int) - expected).max() <= bool(loras)
        assert gpu.together == {frozenset({name}) for name in runs}
        assert not gpu.on_gpu
        adapters = {name: sum("lora_" in key for key, _ in part.named_parameters()) for name, part in gpu.networks.items()}
        assert gpu.copies.count("to gpu") == sum(tensors[name] + adapters[name] for name in runs)
        # Only LoRAs, which may change on the GPU, are copied back.
        assert gpu.copies.count("to host") == sum(adapters.values())
    for name, network in gpu.networks.items():
        weights, expected = (each.state_dict() for each in (network, reference.pipe.components[name]))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in weights.items())


@pytest.mark.parametrize(
    ("name", "options"),
    [("lora", {"text_encoder": "swapped"}), ("klein", {"cpu_offload": True}), ("wan", {"cpu_offload": True})],
)
def test_weights_that_move_in_a_call_can_be_changed_by_a_hot_swap(tiny, make_shot, gpu, monkeypatch, tmp_path, name, options):
    """LoRAs are replaced in place, also by ones of lower rank. The networks are not compiled here: they run as they are."""
    monkeypatch.setattr(speed, "compile_blocks", lambda *_: None)
    stage, reference = (
        loaded(STAGE_BY_NAME[name], tiny, device=device, compile=True, **own) for device, own in ((GPU, options), ("cpu", {}))
    )
    pipe = reference.model.text_to_image if name == "lora" else reference.pipe
    plain = copy.deepcopy(pipe.transformer)
    field = "video_lora" if name == "wan" else "lora"
    image = gradient_image(64, 64)
    for number, rank in enumerate((16, 32, 16)):
        write_random_lora(plain, file := tmp_path / f"{number}.safetensors", number, rank=rank)
        # A prompt that is new, so that T5 takes its turn.
        shot = make_shot(
            **{**PASSING[name], "prompt": f"prompt {number}", "width": 64, "height": 64, field: [{"path": str(file)}]}
        )
        item = Item(shot, {"image": image})
        (result,), (expected,) = (each(item).values() for each in (stage, reference))
        assert np.abs(result.astype(int) - expected).max() <= 1


def test_weights_that_move_in_a_call_compile_nothing_again(tiny, make_shot, gpu, counter):
    stage = loaded(FluxStage, tiny, device=GPU, text_encoder="swapped", compile=True)
    stage(Item(make_shot(width=64, prompt="a")))
    graphs = counter.frame_count
    assert graphs > 0
    # A prompt that is new, and one that is known after the networks took turns.
    stage(Item(make_shot(width=64, prompt="b")))
    stage.move("cpu")
    stage.move(GPU)
    stage(Item(make_shot(width=64, prompt="a")))
    assert counter.frame_count == graphs


def test_weights_of_several_tensors_move_as_these(gpu):
    """As those of torchao, which consist of values and scales."""
    net = network()
    net[0].weight = torch.nn.Parameter(TwoTensor(net[0].weight.data, net[0].weight.data.clone()), requires_grad=False)
    values, scales = net[0].weight.a, net[0].weight.b
    before = values.clone()
    for device, has_moved in ((GPU, is_on_gpu), ("cpu", is_pinned), (GPU, is_on_gpu)):
        with torch.inference_mode():
            move_networks([net], device)
        assert all(map(has_moved, tensors_of(net)))
        assert (net[0].weight.a is values, net[0].weight.b is scales) == (True, True)
        assert torch.equal(values, before)
        assert not any(tensor.is_inference() for tensor in tensors_of(net))


@pytest.fixture
def fp8_weights(monkeypatch):
    """Replace fp8 by torchao's weights in 8 bits, with which a CPU multiplies in 16."""
    torchao = pytest.importorskip("torchao.quantization")

    def quantise(network, device):
        torchao.quantize_(network, torchao.Float8WeightOnlyConfig())
        network.to(device)

    monkeypatch.setattr(loading, "require_fp8", lambda params: None)
    for module in (flux_model, loading):
        monkeypatch.setattr(module, "compute_in_fp8", quantise)


def test_offloaded_weights_of_torchao_are_on_the_gpu_only_while_they_run(tiny, make_shot, gpu, fp8_weights):
    """Each of the two transformers of Wan, alone."""
    options = {"quantize": "fp8", "dtype": "bfloat16"}
    reference = loaded(WanStage, tiny, **options)
    stage = loaded(WanStage, tiny, device=GPU, cpu_offload=True, **options)
    gpu.watch(stage.pipe)
    assert not gpu.on_gpu
    item = Item(make_shot(**PASSING["wan"], width=64), {"image": gradient_image(64, 64)})
    for _ in range(2):
        assert np.array_equal(stage(item)["frames"], reference(item)["frames"])
        assert not gpu.on_gpu
    assert all(map(is_pinned, tensors_of(stage.pipe.transformer)))


def test_weights_of_torchao_move_in_a_call(tiny, make_shot, gpu, monkeypatch, fp8_weights):
    """When T5 takes its turn."""
    options = {"quantize": "fp8", "dtype": "bfloat16", "compile": True}
    monkeypatch.setattr(speed, "compile_blocks", lambda *_: None)
    reference = loaded(FluxStage, tiny, **options)
    stage = loaded(FluxStage, tiny, device=GPU, text_encoder="swapped", **options)
    pipe = stage.model.text_to_image
    gpu.watch(pipe)
    weights = tensors_of(pipe.transformer)
    assert len(weights) > len([*pipe.transformer.parameters(), *pipe.transformer.buffers()])
    item = Item(make_shot(width=64))
    for first in (True, False):
        gpu.forget()
        assert np.array_equal(stage(item)["image"], reference(item)["image"])
        assert gpu.on_gpu >= {"transformer", "vae"}
        assert not any(is_on_gpu(tensor) for tensor in tensors_of(pipe.text_encoder_2))
        # Loading has made the copies on the host.
        assert gpu.copies.count("to host") == 0
        assert gpu.copies.count("to gpu") == (len(weights) + len(tensors_of(pipe.text_encoder_2)) if first else 0)
        stage.move("cpu")
        assert not gpu.on_gpu
        assert all(map(is_pinned, weights))
        stage.move(GPU)
        assert all(tensor is weight for tensor, weight in zip(tensors_of(pipe.transformer), weights, strict=True))


PRODUCTS = """
import sys
import torch

if used_before := "used before" in sys.argv:
    torch.ones(64, 64) @ torch.ones(64, 64)
from vidgen_ray.stages.base import adds_by_address

def moved(tensor, start):
    return torch.empty(start + tensor.numel())[start:].view(tensor.shape).copy_(tensor)

def products(x, y, w):
    return x @ w.T, x @ y.mT, torch.nn.functional.scaled_dot_product_attention(x, y, y)

torch.manual_seed(0)
different = []
for rows in (1, 10, 64):
    operands = [torch.randn(2, rows, 48), torch.randn(2, rows, 48), torch.randn(100, 48)]
    expected = products(*operands)
    for start in range(16):
        results = products(*(moved(each, start) for each in operands))
        different += [(rows, start) for result, right in zip(results, expected) if not torch.equal(result, right)]
assert adds_by_address() >= bool(different)
assert used_before or not different, different
"""


@pytest.mark.parametrize(
    ("variables", "when"),
    [
        ({}, ""),
        ({}, "used before"),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, ""),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, ""),
    ],
)
def test_products_do_not_depend_on_where_operands_lie(variables, when):
    """Weights are mapped from files, or copied. The variables limit what torch uses of the CPU.

    A process that has used torch before it imports this package knows that products may differ.
    """
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"} | variables
    subprocess.run([sys.executable, "-c", PRODUCTS, when], env=environment, check=True)


OTHER_DEVICE = "meta"


class HostBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that operations make in host memory. Those of mapped files are not made."""

    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        inputs = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        for tensor in (each for each in tree_leaves(output) if isinstance(each, torch.Tensor)):
            storage = tensor.untyped_storage()
            if tensor.device.type == "cpu" and storage._cdata not in inputs and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return output


@pytest.fixture
def checked(monkeypatch):
    """Devices of the tensors that were checked for NaN."""
    devices = []
    is_finite = weight_files.is_finite

    def check(tensor):
        devices.append(tensor.device.type)
        return tensor.device.type == OTHER_DEVICE or is_finite(tensor)

    monkeypatch.setattr(weight_files, "is_finite", check)
    monkeypatch.setattr(pipeline_utils, "SUPPORTED_DEVICE_MAP", [OTHER_DEVICE])
    return devices


@pytest.mark.parametrize(
    ("stage_class", "options", "host_parts"),
    [(WanStage, {}, ()), (FluxStage, {}, ()), (FluxStage, {"text_encoder": "cpu"}, ("text_encoder_2",))],
)
def test_converted_weights_pass_host_memory_one_tensor_at_a_time(tiny, checked, stage_class, options, host_parts):
    peaks = {}
    for device in ("cpu", OTHER_DEVICE):
        checked.clear()
        with HostBytes() as host:
            stage = loaded(stage_class, tiny, device=device, dtype="bfloat16", **options)
        peaks[device] = host.peak
        pipe = stage.model.text_to_image if stage_class is FluxStage else stage.pipe
        networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        tensors = {name: [*network.parameters(), *network.buffers()] for name, network in networks.items()}
        for name, own in tensors.items():
            assert {tensor.device.type for tensor in own} == {"cpu" if name in host_parts else device}
        # Those that stay in host memory are also checked on the GPU.
        assert checked.count(device) > 0.9 * sum(1 for network in networks.values() for _ in network.parameters())
    sizes = {name: sum(tensor.nbytes for tensor in own) for name, own in tensors.items()}
    assert peaks["cpu"] > 0.4 * sum(sizes.values())
    # Small networks have few tensors.
    assert peaks[OTHER_DEVICE] < 0.3 * sum(sizes.values()) + sum(sizes[name] for name in host_parts)
