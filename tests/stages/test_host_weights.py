"""Weights in host memory: swapped stages, and parts of pipelines that take turns on the GPU. The GPU is simulated."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from tests.stages.fake_gpu import GPU, FakeGpu, is_on_gpu
from tests.stages.test_parity import gradient_image, loaded
from vidgen_ray.stages import loading
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.flux2_klein import Flux2KleinStage
from vidgen_ray.stages.loading import move_networks
from vidgen_ray.stages.ltx import LTXStage
from vidgen_ray.stages.qwen_edit import QwenEditStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.weights import resolve


@pytest.fixture
def gpu(monkeypatch):
    return FakeGpu(monkeypatch)


@pytest.fixture
def copies(gpu):
    """The copies that were made: `to gpu` and `to host`."""
    return gpu.copies


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).eval().requires_grad_(False)


def test_weights_are_copied_to_the_host_once(copies):
    net = network()
    x = torch.ones(2, 3)
    before = net(x)
    move_networks([net], GPU)
    copies.clear()
    for _ in range(3):
        move_networks([net], "cpu")
        assert torch.equal(net(x), before)
        move_networks([net], GPU)
        assert torch.equal(net(x), before)
    assert "to host" not in copies
    assert all(map(is_on_gpu, net.parameters()))


def test_network_that_was_loaded_in_pageable_memory_is_pinned_once(copies, monkeypatch):
    """T5 starts in host memory."""
    monkeypatch.setattr(loading, "_is_pinned", lambda tensor: False)
    net = network()
    tensors = [*net.parameters(), *net.buffers()]
    move_networks([net], GPU)
    assert copies.count("to host") == len(tensors)
    host = [getattr(tensor, loading._COPY) for tensor in tensors]
    move_networks([net], "cpu")
    assert all(tensor.data is copy or tensor.data_ptr() == copy.data_ptr() for tensor, copy in zip(tensors, host, strict=True))


def test_network_that_was_loaded_on_the_gpu_gets_a_host_copy(copies):
    net = network()
    move_networks([net], GPU)
    for tensor in (*net.parameters(), *net.buffers()):
        setattr(tensor, loading._COPY, None)
    copies.clear()
    move_networks([net], "cpu")
    assert set(copies) == {"to host"}


def test_adapters_that_are_loaded_and_changed_later_stay_correct(copies):
    net = network()
    move_networks([net], GPU)
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), net)
    factors = [p for name, p in adapted.named_parameters() if "lora_" in name]
    x = torch.ones(2, 3)
    for value in (0.5, 0.25):
        for factor in factors:
            factor.data = loading._on_device(torch.full_like(factor, value), GPU)
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


def test_shared_weights_stay_shared(copies):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    net[1].weight = net[0].weight
    move_networks([net], GPU)
    move_networks([net], "cpu")
    assert net[1].weight is net[0].weight


def test_moving_without_a_gpu_changes_nothing():
    net = network()
    pointers = [tensor.data_ptr() for tensor in net.parameters()]
    move_networks([net, None, "a tokenizer"], "cpu")
    assert [tensor.data_ptr() for tensor in net.parameters()] == pointers


def test_network_that_is_loaded_in_a_call_can_be_swapped(tiny, make_shot, gpu):
    stage = loaded(RealESRGANStage, tiny, device=GPU)
    item = Item(make_shot(width=64, num_frames=2, scale=2), {"frames": np.stack([gradient_image(64, 64)] * 2)})
    before = stage(item)["hd_frames"]
    for device in ("cpu", GPU, "cpu", GPU):
        stage.move(device)
    assert gpu.copies.count("to gpu") > 2
    assert np.array_equal(stage(item)["hd_frames"], before)


QWEN = {"use_hunyuan_style": True, "style_model": "qwen-edit", "style_prompt": "ink"}
LORAS = {
    "wan": {"video_lora": [{"path": str(resolve("builtin:tiny/wan-lora.safetensors")), "weight": 0.8}]},
    "ltx": {"video_lora": [{"path": str(resolve("builtin:tiny/ltx-lora.safetensors")), "weight": 0.8}]},
    "klein": {"lora": [{"path": str(resolve("builtin:tiny/klein-lora.safetensors")), "weight": 0.8}]},
    "qwen_edit": {},
}


@pytest.mark.parametrize(
    ("stage_class", "fields", "runs"),
    [
        (WanStage, {"video_model": "wan", "num_frames": 5}, ("text_encoder", "vae", "transformer", "transformer_2", "vae")),
        (LTXStage, {"video_model": "ltx", "num_frames": 9}, ("text_encoder", "vae", "transformer", "vae")),
        (
            Flux2KleinStage,
            {"face_image": "x.jpg", "identity": "reference"},
            ("text_encoder", "vae", "transformer", "vae"),
        ),
        (QwenEditStage, QWEN, ("text_encoder", "vae", "transformer", "vae")),
    ],
)
def test_offloaded_parts_take_turns_and_are_copied_in_one_direction(tiny, make_shot, gpu, stage_class, fields, runs):
    image = gradient_image(64, 64)
    reference = loaded(stage_class, tiny)
    stage = loaded(stage_class, tiny, device=GPU, cpu_offload=True)
    gpu.watch(stage.pipe)
    tensors = {name: len([*part.parameters(), *part.buffers()]) for name, part in gpu.networks.items()}
    assert not gpu.on_gpu
    expected = {}
    for loras in ({}, LORAS[stage.name], {}):
        item = Item(make_shot(width=64, **fields, **loras), {"image": image, "photos": (image,)})
        if str(loras) not in expected:
            (expected[str(loras)],) = reference(item).values()
        gpu.forget()
        (result,) = stage(item).values()
        assert np.array_equal(result, expected[str(loras)])
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
