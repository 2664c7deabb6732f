"""Host copies of swapped weights. A GPU is simulated by tensors that are cloned on the way to it."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from vidgen_ray.stages import loading
from vidgen_ray.stages.loading import move_networks

GPU = "cuda:0"


@pytest.fixture
def copies(monkeypatch):
    """Simulate a GPU. Yields the names of the copies that were made: `to gpu` and `to host`."""
    made = []
    on_gpu = set()

    def to_gpu(host, device):
        made.append("to gpu")
        tensor = host.clone()
        on_gpu.add(tensor.data_ptr())
        return tensor

    def to_host(tensor):
        made.append("to host")
        return tensor.data.clone()

    monkeypatch.setattr(loading, "_on_device", to_gpu)
    monkeypatch.setattr(loading, "_pinned_copy", to_host)
    monkeypatch.setattr(loading, "_is_on_host", lambda tensor: tensor.data_ptr() not in on_gpu)
    return made


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).eval().requires_grad_(False)


def test_weights_are_copied_to_the_host_once(copies):
    net = network()
    x = torch.ones(2, 3)
    before = net(x)
    move_networks([net], GPU)
    host = [tensor.data_ptr() for tensor in net.parameters()]
    copies.clear()
    for _ in range(3):
        move_networks([net], "cpu")
        assert torch.equal(net(x), before)
        move_networks([net], GPU)
        assert torch.equal(net(x), before)
    assert "to host" not in copies
    assert [tensor.data_ptr() for tensor in net.parameters()] != host


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
