"""A simulated GPU for `loading.move_networks`: weights that are on it differ from others, and copies are counted."""

import torch

from vidgen_ray.stages import loading

GPU = "cpu:0"
"""A device that stages do not take for the CPU. torch computes on it like on the CPU."""
OFFSET = 64
"""Numbers in front of a tensor on the GPU, by which it is recognised."""


class FakeGpu:
    def __init__(self, monkeypatch):
        self.copies = []
        """Copies that were made: `to gpu` and `to host`."""
        self.pinned_bytes = 0
        """Bytes of all copies in host memory."""
        self.networks = {}
        """Name -> network, of those to look at."""
        self.together = set()
        """Sets of these networks that were on the GPU at the same time."""
        monkeypatch.setattr(loading, "_on_device", self._to_gpu)
        monkeypatch.setattr(loading, "_pinned_copy", self._to_host)
        monkeypatch.setattr(loading, "_is_on_host", lambda tensor: not is_on_gpu(tensor))

    def watch(self, pipe):
        self.networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        self.forget()

    def forget(self):
        self.copies.clear()
        self.together.clear()

    @property
    def on_gpu(self):
        return frozenset(name for name, network in self.networks.items() if any(map(is_on_gpu, network.parameters())))

    def _to_gpu(self, host, device):
        assert device == GPU
        self.copies.append("to gpu")
        tensor = host.new_empty(OFFSET + host.numel())[OFFSET:].view(host.shape)
        tensor.copy_(host)
        if held := self.on_gpu:
            self.together.add(held)
        return tensor

    def _to_host(self, tensor):
        self.copies.append("to host")
        self.pinned_bytes += tensor.nbytes
        return tensor.data.clone()


def is_on_gpu(tensor):
    return tensor.storage_offset() == OFFSET
