"""OOM fallback: lower-memory settings from the plan, after an error, and remembered per stage and size."""

import ctypes
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from vidgen_ray.engine.calls import CallResult
from vidgen_ray.engine.worker import gpu_of_process
from vidgen_ray.errors import OutOfMemory
from vidgen_ray.graph import STAGES
from vidgen_ray.planner.cluster import GB
from vidgen_ray.profile import load_profile
from vidgen_ray.render import oom_fallback
from vidgen_ray.render.oom_fallback import (
    EXACT_PINNED_BLOCKS,
    EXPANDABLE_SEGMENTS,
    MEMORY_FREED,
    OomFallback,
    prepare_gpu,
)
from vidgen_ray.render.step_runner import StepFailed
from vidgen_ray.shot import Shot
from vidgen_ray.stages.rife import RifeStage
from vidgen_ray.stages.svd import SVDParams, SVDStage
from vidgen_ray.system import free_memory
from vidgen_ray.system.free_memory import is_out_of_memory, pins_exact_sizes

SHOT = Shot(prompt="a")
OOM = "CUDA out of memory. Tried to allocate 9.00 GiB"
PROFILE = load_profile("gpu-80gb")


class Decoder:
    """Work of a stage that runs out of memory with more than `limit` frames at once. Records its calls."""

    def __init__(self, stage, limit, message=OOM):
        self.stage, self.limit, self.message = stage, limit, message
        self.calls = []

    def __call__(self):
        self.calls.append(self.stage.params.decode_chunk_frames)
        if self.calls[-1] > self.limit:
            raise RuntimeError(self.message)
        return "frames"


def svd():
    return SVDStage(SVDParams(weights="w", dtype="float16", device="cuda", decode_chunk_frames=8))


def without_gpu():
    return OomFallback(lambda: math.inf)


def test_oom_falls_back_to_smaller_chunks_which_are_remembered_for_the_size():
    stage, fallback = svd(), without_gpu()
    for shot, limit, changes, calls in (
        (SHOT, 2, "decode_chunk_frames=2", [8, 8, 4, 2]),
        (SHOT, 2, "decode_chunk_frames=2", [2]),
        (Shot(prompt="a", num_frames=14), 8, None, [8]),
    ):
        work = Decoder(stage, limit)
        assert fallback.run(stage, shot, work) == ("frames", changes)
        assert work.calls == calls
        assert stage.params.decode_chunk_frames == 8
    results = iter([RuntimeError(OOM), "frames"])
    assert fallback.run(svd(), Shot(prompt="a", width=512), Mock(side_effect=results)) == ("frames", MEMORY_FREED)


def test_settings_that_need_more_memory_for_the_size_are_not_tried():
    stage, tried = RifeStage(PROFILE.options_of(RifeStage)), []

    def work():
        tried.append(stage.params.flow_scale)
        raise RuntimeError(OOM)

    with pytest.raises(OutOfMemory):
        without_gpu().run(stage, Shot(prompt="a", interpolation=2, width=1024, height=576), work)
    assert tried == [1, 1, 0.5]


@pytest.mark.parametrize(
    "stage_class",
    [stage for stage in STAGES if (actor := PROFILE.actors.get(stage.actor)) and actor.device == "cuda"],
    ids=lambda stage: stage.name,
)
def test_every_gpu_stage_has_settings_that_need_less_memory(stage_class):
    params = lowest = PROFILE.options_of(stage_class)
    while (lower := stage_class.lower_memory(lowest)) is not None:
        lowest = lower
    # Multiples of 512 pixels, which RIFE pads at no resolution of motion.
    shot = Shot(prompt="a", **{**stage_class.examples[0], "width": 2048, "height": 1024})
    assert stage_class.memory(lowest, shot).total < stage_class.memory(params, shot).total
    stage = stage_class(params)

    def work():
        if stage.params != lowest:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return "result"

    result, changes = without_gpu().run(stage, shot, work)
    assert result == "result"
    changed = [name for name in type(params).model_fields if getattr(params, name) != getattr(lowest, name)]
    assert all(f"{name}={getattr(lowest, name)}" in changes for name in changed)
    assert stage.params == params


def test_planned_settings_are_used_without_an_error_first():
    stage = svd()
    needed = stage.memory(stage.params.model_copy(update={"decode_chunk_frames": 4}), SHOT).peak
    for free, calls in ((needed + GB / 100, [4]), (80 * GB, [8])):
        work = Decoder(stage, 8)
        OomFallback(lambda free=free: free).run(stage, SHOT, work)
        assert work.calls == calls


def test_settings_recover_when_another_program_gives_its_memory_back():
    stage, free = svd(), [80 * GB]
    fallback = OomFallback(lambda: free[0])
    needed = stage.memory(stage.params.model_copy(update={"decode_chunk_frames": 4}), SHOT).peak

    def calls(limit, free_during=None):
        work = Decoder(stage, limit)

        def run():
            free[0] = free_during or free[0]
            return work()

        fallback.run(stage, SHOT, run)
        return work.calls

    assert calls(8) == [8]
    free[0] = needed + GB / 100
    assert calls(4) == [4]
    free[0] = 80 * GB
    assert calls(8) == [8]
    assert calls(2, free_during=GB) == [8, 8, 4, 2]
    assert calls(2) == [2]
    free[0] = 80 * GB
    assert calls(8) == [8]


def test_oom_names_other_processes_that_hold_the_memory(torch_on_a_gpu):
    stage = svd()
    for shot, free, reason in (
        (SHOT, 2 * GB, r"the shot needs [\d.]+ GB of this GPU, other processes hold 21.4 of its 24 GB; end those"),
        (SHOT.model_copy(update={"width": 4096, "height": 4096}), 2 * GB, "the largest GPU has 24; at most"),
        (SHOT, 23 * GB, "the largest GPU has 24"),
    ):
        torch_on_a_gpu.mem_get_info.return_value = (free, 24 * GB)
        with pytest.raises(OutOfMemory, match=reason):
            OomFallback().run(stage, shot, Decoder(stage, 0))


def test_oom_with_the_lowest_settings_is_an_error_of_its_own_and_others_are_unchanged():
    stage = svd()
    with pytest.raises(OutOfMemory, match=r"lowest-memory settings of svd: CUDA out of memory") as raised:
        without_gpu().run(stage, SHOT, Decoder(stage, 0))
    result = CallResult.of_failure(StepFailed("svd", raised.value))
    assert (result.failure.error, result.context_broken) == ("OutOfMemory", False)
    with pytest.raises(RuntimeError, match="other"):
        without_gpu().run(stage, SHOT, Decoder(stage, 0, "other"))


@pytest.mark.parametrize(
    ("message", "out_of_memory", "context_broken"),
    [
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True, False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True, False),
        ("CUDA error: out of memory", True, False),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", False, True),
        ("CUDA error: an illegal memory access was encountered", False, True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", False, True),
        ("Triton Error [CUDA]: out of memory", True, False),
    ],
)
def test_failed_allocations_do_not_count_as_a_broken_context(message, out_of_memory, context_broken):
    error = RuntimeError(message)
    assert is_out_of_memory(error) is out_of_memory
    assert CallResult.of_failure(StepFailed("svd", error)).context_broken is context_broken


@pytest.fixture
def torch_on_a_gpu(monkeypatch):
    """Replace torch by one with a GPU that records its settings."""
    torch = Mock(__version__="2.11.0")
    torch.cuda.get_device_properties.return_value = SimpleNamespace(total_memory=24 * GB, is_integrated=False)
    torch.cuda.memory_reserved.return_value = torch.cuda.memory_allocated.return_value = 0
    torch._C = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    return torch.cuda


def test_process_that_shares_a_gpu_is_limited_to_its_share_without_its_context(torch_on_a_gpu):
    prepare_gpu(1)
    assert not torch_on_a_gpu.set_per_process_memory_fraction.called
    prepare_gpu(0.4)
    (fraction,) = torch_on_a_gpu.set_per_process_memory_fraction.call_args.args
    assert fraction * 24 == pytest.approx(0.4 * 24 - 0.6)


def test_memory_of_an_integrated_gpu_is_what_the_host_has(torch_on_a_gpu, monkeypatch, tmp_path):
    """The driver counts the page cache as taken. Without a limit, the kernel would end processes before torch raises."""
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text(f"MemFree: {2**20} kB\nMemAvailable: {20 * 2**20} kB\n")
    torch_on_a_gpu.mem_get_info.return_value = (GB, 24 * GB)
    assert free_memory.free_gpu_bytes() == GB
    torch_on_a_gpu.get_device_properties.return_value.is_integrated = True
    assert free_memory.free_gpu_bytes() == 20 * GB
    prepare_gpu(1)
    assert not torch_on_a_gpu.set_per_process_memory_fraction.called
    prepare_gpu(1, 16.0)
    (fraction,) = torch_on_a_gpu.set_per_process_memory_fraction.call_args.args
    assert fraction * 24 == pytest.approx(16 - 0.6)


@pytest.mark.parametrize(
    ("torch_version", "on_wsl", "expected"),
    [
        ("2.10.0", False, EXPANDABLE_SEGMENTS),
        ("2.12.1+cu128", False, EXPANDABLE_SEGMENTS),
        ("2.12.1+cu128", True, None),
        ("2.13.0", True, EXACT_PINNED_BLOCKS),
        ("2.13.0+cu130", False, f"{EXPANDABLE_SEGMENTS},{EXACT_PINNED_BLOCKS}"),
        ("3.0.0a0+git", False, f"{EXPANDABLE_SEGMENTS},{EXACT_PINNED_BLOCKS}"),
        ("unknown", False, EXPANDABLE_SEGMENTS),
    ],
)
def test_allocator_settings_by_version_of_torch(torch_on_a_gpu, monkeypatch, tmp_path, torch_version, on_wsl, expected):
    monkeypatch.setattr(free_memory, "version", lambda package: torch_version)
    monkeypatch.setattr(oom_fallback, "WSL_DEVICE", tmp_path if on_wsl else tmp_path / "none")
    pins_exact_sizes.cache_clear()
    prepare_gpu(1)
    pins_exact_sizes.cache_clear()
    assert [call.args for call in torch_on_a_gpu.memory._set_allocator_settings.call_args_list] == [(expected,)] * bool(
        expected
    )


def test_allocators_of_torch_are_set_by_a_function_that_is_not_deprecated(torch_on_a_gpu):
    sys.modules["torch"]._C._accelerator_setAllocatorSettings = settings = Mock()
    prepare_gpu(1)
    assert settings.called
    assert not torch_on_a_gpu.memory._set_allocator_settings.called


@pytest.mark.parametrize("error", [ValueError("Unrecognized key"), RuntimeError("Unrecognized key"), AttributeError("no name")])
def test_refused_allocator_settings_stop_no_worker(torch_on_a_gpu, error):
    torch_on_a_gpu.memory._set_allocator_settings.side_effect = error
    with pytest.warns(
        UserWarning, match=r"torch 2.11.0 does not accept the allocator settings expandable_segments:True.*(key|name)"
    ):
        prepare_gpu(0.4)
    assert torch_on_a_gpu.set_per_process_memory_fraction.called


def test_blocks_of_pinned_memory_are_as_large_as_their_tensors(tmp_path):
    """By torch's own allocator, compiled with its headers."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("needs g++")
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    source = Path(__file__).with_name("pinned_blocks.cpp")
    options = "-std=c++20", "-w", f"-I{include}", f"-L{libraries}", f"-Wl,-rpath,{libraries}"
    subprocess.run([compiler, *options, source, "-lc10", "-ltorch_cpu", "-o", tmp_path / "blocks"], check=True)
    # Without the segments of the GPU, which only the parser of CUDA knows.
    pinned = EXACT_PINNED_BLOCKS if pins_exact_sizes() else ""
    done = subprocess.run([tmp_path / "blocks", pinned], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_worker_without_a_gpu_driver_does_not_import_torch(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", Mock(side_effect=OSError))
    monkeypatch.setitem(sys.modules, "torch", None)  # its import would raise
    prepare_gpu(1)
    assert gpu_of_process() == ""
