"""Fake tensors on a CUDA device that does not exist: they have a shape, a precision and a device, and operations check them."""

import ctypes
import shutil
import subprocess
from collections import deque
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    StableVideoDiffusionPipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.video_processor import VideoProcessor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from vidgen_ray.nets.weight_files import is_finite
from vidgen_ray.stages import base, flux, flux2_klein, flux_model, hunyuandit, instantid_sdxl, qwen_edit, svd, video
from vidgen_ray.stages.base import pixels_to_uint8

CUDA = torch.device("cuda:0")
aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot, aten.convolution)
ARITHMETIC = (aten.add, aten.sub, aten.mul, aten.div)
FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index)
COMPILER = shutil.which("g++")


@cache
def register_guard(folder: Path) -> None:
    """Compile the device guard and load it into this process, once."""
    folder_of_torch = Path(torch.__file__).parent
    include, libraries = folder_of_torch / "include", folder_of_torch / "lib"
    library = folder / "guard.so"
    sources = str(Path(__file__).with_name("cuda_guard.cpp"))
    options = "-shared", "-fPIC", "-std=c++20", f"-I{include}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"
    subprocess.run([COMPILER, *options, sources, "-lc10", "-o", str(library)], check=True)
    ctypes.CDLL(str(library))


class FakeCuda:
    """A fake CUDA device. `move` puts networks on it; code runs on it within `running`."""

    def __init__(self):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.outputs = []
        """Shape, dtype and device of the pixels that pipelines return."""
        self.branches = deque()
        """Results of the next branches on values of tensors, as in `if timestep >= boundary`."""

    def tensor(self, *shape, dtype):
        return FakeTensor(self.mode, torch.empty(*shape, dtype=dtype, device="meta"), CUDA)

    def move(self, network, dtype=None):
        """Replace all tensors of a module by fake ones on the GPU. `dtype`: new precision. Anything else is ignored."""
        if not isinstance(network, torch.nn.Module):
            return
        for module in network.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None:
                        store[name] = self._fake(tensor, dtype, is_parameter=store is module._parameters)

    def _fake(self, tensor, dtype, *, is_parameter):
        kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        fake = FakeTensor(self.mode, torch.empty_strided(tensor.shape, tensor.stride(), dtype=kept, device="meta"), CUDA)
        return torch.nn.Parameter(fake, requires_grad=False) if is_parameter else fake

    @contextmanager
    def running(self):
        with self.mode, ErrorsOfCuda(), torch.no_grad():
            yield


class ErrorsOfCuda(TorchDispatchMode):
    """Raises the errors of CUDA's kernels that fake tensors do not raise."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        dtypes = {tensor.dtype for tensor in tensors}
        if operation.overloadpacket in PRODUCTS and len(dtypes) > 1:
            raise RuntimeError(f"{operation}: expected tensors of the same dtype, got {sorted(map(str, dtypes))}")
        if operation.overloadpacket in (*PRODUCTS, *ARITHMETIC) and not dtypes.isdisjoint(FLOAT8):
            raise RuntimeError(f"{operation}: not implemented for {sorted(map(str, dtypes))}")
        if operation.overloadpacket in INDEXING:
            indices = {index.device.type for index in args[1] if index is not None}
            if args[0].device.type == "cpu" and "cuda" in indices:
                raise RuntimeError(f"{operation}: indices should be on the same device as the indexed tensor (cpu)")
        return operation(*args, **(kwargs or {}))


def patch_host_code(cuda, monkeypatch):
    """Replace code of diffusers that looks at values, which fake tensors do not have: it runs on the host."""

    def outside(function):
        def run(*args, **kwargs):
            with unset_fake_temporarily():
                return function(*(torch.zeros(arg.shape) if isinstance(arg, FakeTensor) else arg for arg in args), **kwargs)

        return run

    def image_result(self, image, output_type="pil", **kwargs):
        cuda.outputs.append((tuple(image.shape), image.dtype, str(image.device)))
        with unset_fake_temporarily():
            return torch.zeros(image.shape)

    def video_result(self, video, output_type="np", **kwargs):
        cuda.outputs.append((tuple(video.shape), video.dtype, str(video.device)))
        with unset_fake_temporarily():
            return torch.zeros(1, video.shape[2], 3, *video.shape[3:])

    for module in (flux_model, base):
        monkeypatch.setattr(module, "is_finite", lambda tensor: isinstance(tensor, FakeTensor) or is_finite(tensor))
    for stage_module in (flux, flux2_klein, hunyuandit, instantid_sdxl, qwen_edit, video, svd):
        monkeypatch.setattr(stage_module, "pixels_to_uint8", outside(pixels_to_uint8))
    monkeypatch.setattr(VaeImageProcessor, "preprocess", outside(VaeImageProcessor.preprocess))
    monkeypatch.setattr(VaeImageProcessor, "postprocess", image_result)
    monkeypatch.setattr(VideoProcessor, "postprocess_video", video_result)
    monkeypatch.setattr(StableVideoDiffusionPipeline, "do_classifier_free_guidance", property(lambda self: True))
    for scheduler in (EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler):
        monkeypatch.setattr(scheduler, "_init_step_index", lambda self, t: setattr(self, "_step_index", 0))
    monkeypatch.setattr(EulerDiscreteScheduler, "step", _euler_step)
    monkeypatch.setattr(WanImageToVideoPipeline, "_get_t5_prompt_embeds", _t5_embeds)
    monkeypatch.setattr(QwenImageEditPlusPipeline, "_get_qwen_prompt_embeds", _qwen_embeds)
    monkeypatch.setattr(FakeTensor, "__bool__", lambda self: cuda.branches.popleft(), raising=False)
    for scheduler in (EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        monkeypatch.setattr(scheduler, "set_timesteps", _set_timesteps(cuda, scheduler.set_timesteps))
    for owner in (ModelMixin, torch.nn.Module):
        monkeypatch.setattr(owner, "to", _to(cuda, owner.to))


def _set_timesteps(cuda, original):
    def set_timesteps(self, num_inference_steps=None, device=None, **kwargs):
        with unset_fake_temporarily():
            original(self, num_inference_steps, device="cpu", **kwargs)
        if device is not None and torch.device(device).type == "cuda":
            self.timesteps = cuda.tensor(*self.timesteps.shape, dtype=self.timesteps.dtype)

    return set_timesteps


def _to(cuda, original):
    def to(self, *args, **kwargs):
        if not isinstance(next(self.parameters(), None), FakeTensor):
            return original(self, *args, **kwargs)
        dtype = kwargs.get("dtype") or next((arg for arg in args if isinstance(arg, torch.dtype)), None)
        if dtype is not None:
            cuda.move(self, dtype)
        return self

    return to


def _euler_step(self, model_output, timestep, sample, *args, return_dict=True, **kwargs):
    """The arithmetic of a step without its branches on the noise level: x + (x - prediction) / sigma * dt in float32."""
    sigma = torch.ones((), device=sample.device)
    pixels = sample.to(torch.float32)
    prediction = model_output * (-sigma / (sigma**2 + 1) ** 0.5) + pixels / (sigma**2 + 1)
    previous = (pixels + (pixels - prediction) / sigma * sigma).to(model_output.dtype)
    self._step_index = (self._step_index or 0) + 1
    return EulerDiscreteSchedulerOutput(previous, prediction) if return_dict else (previous, prediction)


def _t5_embeds(self, prompt, num_videos_per_prompt, max_sequence_length, device, dtype):
    """The embeddings of a prompt that has all tokens. The length of a prompt is a value."""
    tokens = torch.ones(1, max_sequence_length, dtype=torch.int64, device=device)
    return self.text_encoder(tokens, tokens).last_hidden_state.to(dtype)


def _qwen_embeds(self, prompt, image, device):
    """The embeddings of a prompt that has 32 tokens, without images. Their patches and the length of a prompt are values."""
    tokens = torch.ones(1, 32, dtype=torch.int64, device=device)
    positions = torch.arange(32, device=device).expand(3, 1, 32)
    hidden = self.text_encoder.model.language_model(tokens, position_ids=positions).last_hidden_state
    return hidden, None
