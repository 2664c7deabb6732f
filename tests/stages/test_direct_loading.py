"""Weights that belong on the GPU: read tensor by tensor, and checked there. A meta device stands for the GPU."""

import weakref

import pytest
import torch
from diffusers.pipelines import pipeline_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.stages.test_parity import loaded
from vidgen_ray.errors import SetupError
from vidgen_ray.nets import weight_files
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.instantid_sdxl import InstantIDSDXLStage
from vidgen_ray.stages.ltx import LTXStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage

GPU = "meta"


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
        return tensor.device.type == GPU or is_finite(tensor)

    monkeypatch.setattr(weight_files, "is_finite", check)
    monkeypatch.setattr(pipeline_utils, "SUPPORTED_DEVICE_MAP", [GPU])
    return devices


@pytest.mark.parametrize("stage_class", [HunyuanDiTStage, InstantIDSDXLStage, LTXStage, SVDStage, WanStage])
def test_converted_weights_pass_host_memory_one_tensor_at_a_time(tiny, checked, stage_class):
    peaks = {}
    for device in ("cpu", GPU):
        checked.clear()
        with HostBytes() as host:
            stage = loaded(stage_class, tiny, device=device, dtype="bfloat16")
        peaks[device] = host.peak
        networks = [part for part in stage.pipe.components.values() if isinstance(part, torch.nn.Module)]
        tensors = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
        assert {tensor.device.type for tensor in tensors} == {device}
        # The attention of the IP-Adapter is checked in its file.
        assert checked.count(device) > 0.9 * sum(1 for network in networks for _ in network.parameters())
    weights = sum(tensor.nbytes for tensor in tensors)
    assert peaks["cpu"] > 0.5 * weights
    # Small networks have few tensors.
    assert peaks[GPU] < 0.3 * weights


def test_weights_with_nan_are_refused_on_another_device():
    network = torch.nn.Linear(2, 2)
    weight_files.require_finite_weights({"a": network}, device="cpu:0")
    network.weight.data[1, 1] = float("nan")
    with pytest.raises(SetupError, match="a: weight has NaN"):
        weight_files.require_finite_weights({"a": network}, device="cpu:0")
