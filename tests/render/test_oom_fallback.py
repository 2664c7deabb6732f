"""OOM fallback: lower-memory settings from the plan, after an error, and remembered per stage and size."""

import ctypes
import math
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from vidgen_ray.engine.calls import CallResult
from vidgen_ray.engine.worker import gpu_of_process
from vidgen_ray.errors import OutOfMemory
from vidgen_ray.graph import STAGES
from vidgen_ray.planner.cluster import GB
from vidgen_ray.profile import load_profile
from vidgen_ray.render.oom_fallback import ALLOCATOR, MEMORY_FREED, OomFallback, is_out_of_memory, prepare_gpu
from vidgen_ray.render.step_runner import StepFailed
from vidgen_ray.shot import Shot
from vidgen_ray.stages.rife import RifeStage
from vidgen_ray.stages.svd import SVDParams, SVDStage

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
    ],
)
def test_failed_allocations_do_not_count_as_a_broken_context(message, out_of_memory, context_broken):
    error = RuntimeError(message)
    assert is_out_of_memory(error) is out_of_memory
    assert CallResult.of_failure(StepFailed("svd", error)).context_broken is context_broken


def test_process_that_shares_a_gpu_is_limited_to_its_share(monkeypatch):
    settings = []
    memory = SimpleNamespace(_set_allocator_settings=settings.append)
    cuda = SimpleNamespace(is_available=lambda: True, memory=memory, set_per_process_memory_fraction=settings.append)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    prepare_gpu(1)
    prepare_gpu(0.4)
    assert settings == [ALLOCATOR, ALLOCATOR, 0.4]


def test_worker_without_a_gpu_driver_does_not_import_torch(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", Mock(side_effect=OSError))
    monkeypatch.setitem(sys.modules, "torch", None)  # its import would raise
    prepare_gpu(1)
    assert gpu_of_process() == ""
