"""A simulated GPU for `loading.move_networks`: weights that are on it differ from others, and copies are counted."""

import torch
from diffusers.pipelines import pipeline_utils

from vidgen_ray.stages import loading

GPU = "cpu:0"
"""A device that stages do not take for the CPU. torch computes on it like on the CPU."""
OFFSET = 64
"""Numbers in front of a tensor on the GPU, by which it is recognised."""


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
        return frozenset(name for name, network in self.networks.items() if any(map(is_on_gpu, network.parameters())))

    def _to_gpu(self, host, device):
        assert device == GPU
        self.copies.append("to gpu")
        self.copied_bytes += host.nbytes
        tensor = gpu_copy(host)
        if held := self.on_gpu:
            self.together.add(held)
        return tensor

    def _to_host(self, tensor):
        self.copies.append("to host")
        return tensor.data.clone()


def host_bytes(networks):
    """Return the bytes of weights in host memory: of those that are there, and copies of those on the GPU."""
    held = {}
    for network in networks:
        for tensor in (*network.parameters(), *network.buffers()):
            host = getattr(tensor, loading._COPY, None) if is_on_gpu(tensor) else tensor
            if host is not None:
                held[host.data_ptr()] = host.nbytes
    return sum(held.values())


def gpu_copy(host):
    return host.new_empty(OFFSET + host.numel())[OFFSET:].view(host.shape).copy_(host)


def _to(original):
    def to(self, *args, **kwargs):
        if GPU not in args:
            return original(self, *args, **kwargs)
        return self._apply(lambda tensor: tensor if is_on_gpu(tensor) else gpu_copy(tensor))

    return to


def is_on_gpu(tensor):
    return tensor.storage_offset() == OFFSET
