"""A simulated GPU for `loading.move_networks`: weights that are on it differ from others, and copies are counted."""

import torch
from diffusers.pipelines import pipeline_utils
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vidgen_ray.nets.torch_private import plain_tensors
from vidgen_ray.stages import loading

GPU = "cpu:0"
"""A device that stages do not take for the CPU. torch computes on it like on the CPU."""
OFFSET = 64
"""Numbers in front of a tensor on the GPU, by which it is recognised."""
PINNED_OFFSET = 32
"""The same for a tensor in pinned host memory."""


class FakeGpu:
    def __init__(self, monkeypatch):
        self.copies = []
        """Copies that were made: `to gpu` and `to host`."""
        self.copied_bytes = 0
        """Bytes that were copied to the GPU by `move_networks`."""
        self.networks = {}
        """Name -> network, of those to look at."""
        self.together = set()
        """Sets of these networks that were on the GPU at the same time."""
        monkeypatch.setattr(loading, "_on_device", self._to_gpu)
        monkeypatch.setattr(loading, "_pinned_copy", self._to_host)
        monkeypatch.setattr(loading, "_is_on_host", lambda tensor: not is_on_gpu(tensor))
        monkeypatch.setattr(loading, "_is_pinned", is_pinned)
        monkeypatch.setattr(pipeline_utils, "SUPPORTED_DEVICE_MAP", [GPU])
        monkeypatch.setattr(torch.nn.Module, "to", _to(torch.nn.Module.to))

    def watch(self, pipe):
        self.networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        self.forget()

    def forget(self):
        self.copies.clear()
        self.together.clear()
        self.copied_bytes = 0

    @property
    def on_gpu(self):
        return frozenset(name for name, network in self.networks.items() if any(map(is_on_gpu, tensors_of(network))))

    def _to_gpu(self, host, device, *, non_blocking):
        assert device == GPU
        assert not non_blocking or is_pinned(host), "a copy from pageable memory is not asynchronous"
        self.copies.append("to gpu")
        self.copied_bytes += host.nbytes
        tensor = gpu_copy(host)
        if held := self.on_gpu:
            self.together.add(held)
        return tensor

    def _to_host(self, tensor):
        self.copies.append("to host")
        return copy_at(PINNED_OFFSET, tensor.data)


def tensors_of(network):
    """Return the plain tensors of a network: parameters and buffers, and those that quantised ones consist of."""
    tensors = (*network.parameters(), *network.buffers())
    return [plain for tensor in tensors for plain in plain_tensors(tensor)]


def host_bytes(networks):
    """Return the bytes of weights in host memory: of those that are there, and copies of those on the GPU."""
    held = {}
    for network in networks:
        for tensor in tensors_of(network):
            host = getattr(tensor, loading._COPY, None) if is_on_gpu(tensor) else tensor
            if host is not None:
                held[host.data_ptr()] = host.nbytes
    return sum(held.values())


def gpu_copy(host):
    """Return a copy on the GPU. A quantised tensor becomes one that was made there."""
    if not is_traceable_wrapper_subclass(host):
        return copy_at(OFFSET, host)
    names, context = host.__tensor_flatten__()
    plain = {name: gpu_copy(getattr(host, name)) for name in names}
    return type(host).__tensor_unflatten__(plain, context, host.size(), host.stride())


def copy_at(offset, tensor):
    return tensor.new_empty(offset + tensor.numel())[offset:].view(tensor.shape).copy_(tensor)


def _to(original):
    def to(self, *args, **kwargs):
        if GPU not in args:
            return original(self, *args, **kwargs)
        others = [each for each in args if each != GPU]
        network = original(self, *others, **kwargs) if others or kwargs else self
        return network._apply(lambda tensor: tensor if is_on_gpu(tensor) else gpu_copy(tensor))

    return to


def is_on_gpu(tensor):
    return all(plain.storage_offset() == OFFSET for plain in plain_tensors(tensor))


def is_pinned(tensor):
    return tensor.storage_offset() == PINNED_OFFSET
