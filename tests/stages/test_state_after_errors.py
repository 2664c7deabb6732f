"""State after an error: a shot meets an error at one operation of its models, and the stage then is as it was before.

Operations are those of torch, with the moves of weights to and from a simulated GPU. An error comes once, or lasts until the
call ends, as if another program held the memory. The same shot must then have the same bytes, since the same kernels run.
"""

import gc
import math
from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.fake_stages import plan_of
from tests.stages.conftest import PASSING
from tests.stages.fake_gpu import GPU, FakeGpu, is_on_gpu, tensors_of
from tests.stages.test_parity import loaded
from vidgen_ray.errors import Cancelled, StageError
from vidgen_ray.graph import STAGE_BY_NAME, STAGES
from vidgen_ray.planner.speed_trials import invented_item, run_once
from vidgen_ray.render.oom_fallback import MEMORY_FREED, OomFallback
from vidgen_ray.render.step_runner import StepFailed, StepRunner
from vidgen_ray.stages.base import Item

FACE = {"face_image": "x.jpg"}
INFUSENET = {**FACE, "identity": "infusenet", "negative_prompt": "blurred"}
HALF, BRAIN = {"dtype": "float16"}, {"dtype": "bfloat16"}
SWAPPED, OFFLOAD = {**BRAIN, "text_encoder": "swapped"}, {**BRAIN, "cpu_offload": True}
CACHE = {"first_block_cache": 1.0}
KLEIN = {**FACE, "lora": "builtin:tiny/klein-lora.safetensors"}
WAN = {"video_lora": "builtin:tiny/wan-lora.safetensors"}


class Case(NamedTuple):
    stage: str
    options: Mapping = MappingProxyType({})
    fields: Mapping = MappingProxyType({})


CASES = {
    "flux": Case("flux", BRAIN, INFUSENET),
    "flux with a cache": Case("flux", {**BRAIN, **CACHE}, {**INFUSENET, "steps": {"flux": 4}}),
    "flux swapped": Case("flux", SWAPPED, INFUSENET),
    "flux fp8": Case("flux", {**BRAIN, "quantize": "fp8_storage"}),
    "lora": Case("lora", BRAIN, INFUSENET),
    "lora swapped": Case("lora", SWAPPED),
    "refine": Case("refine", BRAIN, {**FACE, "identity": "instantid-sdxl"}),
    "sdxl": Case("instantid_sdxl", HALF, FACE),
    "klein": Case("klein", BRAIN, KLEIN),
    "klein offload": Case("klein", OFFLOAD, KLEIN),
    "hunyuan": Case("hunyuan", HALF),
    "qwen_edit": Case("qwen_edit", BRAIN),
    "qwen_edit with a cache": Case("qwen_edit", {**OFFLOAD, **CACHE}, {"steps": {"qwen_edit": 4}}),
    "qwen_edit offload": Case("qwen_edit", OFFLOAD),
    "svd": Case("svd", HALF, {"num_frames": 2}),
    "svd with an interval": Case("svd", {**HALF, "guidance_interval": (0.0, 0.5)}, {"num_frames": 2, "steps": {"svd": 2}}),
    "wan": Case("wan", BRAIN, WAN),
    "wan with a cache": Case("wan", {**OFFLOAD, **CACHE}, {**WAN, "steps": {"wan": 4}}),
    "wan offload": Case("wan", OFFLOAD, WAN),
    "ltx": Case("ltx", BRAIN),
    "ltx with a cache": Case("ltx", {**BRAIN, **CACHE}, {"steps": {"ltx": 4}}),
    "ltx offload": Case("ltx", OFFLOAD),
    "rife": Case("rife"),
    "realesrgan": Case("realesrgan", HALF),
}
ONNX = {"instantid", "image_likeness", "clip_likeness"}
"""Stages whose networks run in onnxruntime, which keeps no state between calls."""
ALL = 10**9
EVERY = pytest.param(10**9, marks=[pytest.mark.very_slow, pytest.mark.timeout(86400)], id="all")
POINTS = pytest.mark.parametrize("points", [pytest.param(2, id="2"), pytest.param(16, marks=pytest.mark.slow, id="16"), EVERY])
"""Number of operations at which an error is tried."""


class Failing(TorchDispatchMode):
    """Raises `error` at operation `at` on numbers in the block. `lasts`: also at all later ones that allocate memory."""

    def __init__(self, error: Exception | None = None, at: float = math.inf, *, lasts: bool = False):
        super().__init__()
        self.error, self.at, self.lasts, self.operations = error, at, lasts, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        # Tokenizers and readers of files replace errors, and make tensors in host memory.
        if not any(isinstance(each, torch.Tensor) and each.is_floating_point() for each in tree_leaves(args)):
            return operation(*args, **(kwargs or {}))
        self.operations += 1
        is_later = self.lasts and self.operations > self.at and allocates(operation)
        if self.operations == self.at or is_later:
            raise self.error
        return operation(*args, **(kwargs or {}))


def allocates(operation):
    return any(result.alias_info is None for result in operation._schema.returns)


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def broken():
    return RuntimeError("CUDA error: unspecified launch failure")


def cancelled():
    return Cancelled("cancelled")


ERRORS = out_of_memory, broken, cancelled


def points_of(operations, count):
    """Return `count` operations, evenly distributed, or all of them."""
    count = min(count, operations)
    return [1 + math.floor(operations * (number + 0.5) / count) for number in range(count)]


def networks_of(stage):
    model = getattr(stage, "model", None)
    pipe = getattr(model, "text_to_image", None) or getattr(stage, "pipe", None)
    parts = [*vars(stage).values(), *(pipe.components.values() if pipe is not None else ())]
    for injector in getattr(stage, "injectors", {}).values():
        parts += [injector.infusenet.net, injector.infusenet.resampler]
    return [part for part in parts if isinstance(part, torch.nn.Module)]


def state_of(stage):
    """Return what a call may change: type and place of each tensor, settings and hooks of each module."""
    state = {}
    for number, network in enumerate(networks_of(stage)):
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            state[number, name] = tensor.dtype, tuple(tensor.shape), is_on_gpu(tensor)
        for name, module in network.named_modules():
            settings = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
            hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
            replaced = module._compiled_call_impl
            state[number, f"{name} (module)"] = settings, hooks, replaced, type(vars(module).get("processor"))
    return state


def changes(before, after):
    keys = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} became {after.get(key)}" for key in keys]


def count_tensors():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


class Subject:
    """A loaded stage, a shot, and the result of the shot."""

    def __init__(self, tiny, make_shot, case):
        stage_class = STAGE_BY_NAME[case.stage]
        self.stage = loaded(stage_class, tiny, device=GPU, **case.options)
        fields = {"width": 64, "height": 64, "seed": 1, **PASSING.get(case.stage, {}), **case.fields}
        self.item = invented_item(stage_class, make_shot(**fields))
        self.expected = self.render()
        self.state = state_of(self.stage)
        with Failing() as counter:
            self.render()
        self.operations = counter.operations

    def forget(self):
        """Drop what makes a second call shorter than the first one."""
        if hasattr(self.stage, "model"):
            self.stage.model._embeddings.clear()
        self.stage._pair = None

    def render(self):
        self.forget()
        return run_once(self.stage, self.item)

    def render_with_fallback(self, failing):
        """Return the shot by the OOM fallback, whose first attempt meets an error, and what has helped."""
        attempts = [failing, nullcontext()]

        def work():
            with attempts.pop(0):
                return self.render()

        return OomFallback(lambda: math.inf).run(self.stage, self.item.shot, work)


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        yield FakeGpu(patch)


@pytest.fixture(scope="module", params=CASES)
def subject(request, gpu, tiny, make_shot):
    return Subject(tiny, make_shot, CASES[request.param])


def test_every_stage_is_tried():
    local = {stage.name for stage in STAGES if not stage.name.startswith("remote")}
    assert {case.stage for case in CASES.values()} | ONNX == local


@POINTS
def test_error_leaves_the_stage_as_it_was(subject, points):
    problems = []
    subject.render()
    tensors = count_tensors()
    for number, at in enumerate(points_of(subject.operations, points)):
        error = ERRORS[number % len(ERRORS)]()
        subject.forget()
        with pytest.raises(type(error)), Failing(error, at):
            run_once(subject.stage, subject.item)
        problems += [f"{at}, {error!r}: {change}" for change in changes(subject.state, state_of(subject.stage))]
        error.__traceback__ = None
        # Nearly all states are equal: then the first bytes show for all.
        if number < 20 and not np.array_equal(subject.render(), subject.expected):
            problems.append(f"{at}, {error!r}: other bytes")
    assert not problems, "\n".join(problems[:20])
    assert count_tensors() <= tensors


@POINTS
@pytest.mark.parametrize("lasts", [False, True], ids=["once", "lasting"])
def test_shot_that_runs_out_of_memory_is_made_by_the_second_attempt(subject, lasts, points):
    for at in points_of(subject.operations, min(points, 100)):
        result, recovered = subject.render_with_fallback(Failing(out_of_memory(), at, lasts=lasts))
        assert (recovered, np.array_equal(result, subject.expected)) == (MEMORY_FREED, True), at
        assert changes(subject.state, state_of(subject.stage)) == [], at


def adapters_of(stage):
    return stage.model.adapters if hasattr(stage, "model") else stage.adapters


@POINTS
@pytest.mark.parametrize("name", ["lora", "klein", "wan"])
def test_lora_whose_loading_fails_is_not_loaded_in_part(gpu, tiny, make_shot, name, points):
    subject = Subject(tiny, make_shot, CASES[name])
    stage = subject.stage
    adapters = stage.model.adapters if hasattr(stage, "model") else stage.adapters

    def load():
        for adapter in list(adapters._names):
            adapters._unload(adapter)
        with Failing(error, at) as counter, adapters.active(stage.active_loras(subject.item.shot)):
            return counter.operations

    error, at = None, math.inf
    for number, at in enumerate(points_of(load(), points)):
        error = ERRORS[number % 2]()
        with pytest.raises((type(error), StageError)) as raised:
            load()
        # What safetensors says if it cannot make a tensor.
        in_file = "UntypedStorage" in str(raised.value)
        assert in_file or raised.value is error or not isinstance(error, torch.OutOfMemoryError), at
        assert not any(adapters._pipe.get_list_adapters().values()), at
        if number < 20:
            assert np.array_equal(subject.render(), subject.expected), at


class Chain:
    """FLUX and SVD, of which only one fits on the GPU at a time, and a shot that passes both."""

    def __init__(self, gpu, tiny, make_shot):
        self.gpu = gpu
        options = {"flux": SWAPPED, "svd": HALF}
        stages = [STAGE_BY_NAME[name] for name in options]
        self.runner = StepRunner(
            [stage(tiny.params(stage).model_copy(update={"device": GPU, **options[stage.name]})) for stage in stages],
            1.0,
            None,
            swapped=(("flux",), ("svd",)),
        )
        self.runner.load()
        shot = make_shot(width=64, height=64, num_frames=2, upscale_video=False)
        self.plan = plan_of(tiny, shot)
        self.flux, self.svd = self.runner.stages.values()

    def render(self):
        self.flux.model._embeddings.clear()
        item, records = self.runner.run(self.plan, Item(self.plan.shot, {}), ("flux", "svd"))
        return item.artefacts["frames"], [record.recovered for record in records]

    def on_gpu(self):
        networks = {"flux": self.flux.model.text_to_image.transformer, "svd": self.svd.pipe.unet}
        return {name: sum(map(is_on_gpu, tensors_of(network))) for name, network in networks.items()}


@POINTS
def test_stages_that_take_turns_go_on_after_an_error(gpu, tiny, make_shot, points):
    chain = Chain(gpu, tiny, make_shot)
    expected, _ = chain.render()
    placed = chain.on_gpu()
    assert placed["flux"] == 0 < placed["svd"]
    with Failing() as counter:
        chain.render()
    for number, at in enumerate(points_of(counter.operations, points)):
        with pytest.raises((StepFailed, Cancelled)), Failing(ERRORS[1 + number % 2](), at):
            chain.render()
        # The next shot shows that the error has left nothing.
        with Failing(out_of_memory(), at):
            frames, recovered = chain.render()
        assert (sorted(map(str, recovered)), chain.on_gpu()) == (["None", MEMORY_FREED], placed), at
        assert np.array_equal(frames, expected), at


def test_turns_go_on_when_another_program_gives_its_memory_back(gpu, tiny, make_shot, monkeypatch):
    chain = Chain(gpu, tiny, make_shot)
    expected, _ = chain.render()
    moves = []

    def no_memory(host, device, **_):
        moves.append(device)
        raise out_of_memory()

    with monkeypatch.context() as patch:
        patch.setattr("vidgen_ray.stages.loading._on_device", no_memory)
        with pytest.raises(StepFailed, match="out of memory"):
            chain.render()
    assert len(moves) == 2, "each turn is tried twice"
    assert not any(chain.on_gpu().values())
    frames, _ = chain.render()
    assert np.array_equal(frames, expected)


def test_memory_that_another_program_takes_between_two_shots_is_used_again_later(gpu, tiny, make_shot):
    chain, free = Chain(gpu, tiny, make_shot), [math.inf]
    chain.runner._fallback = OomFallback(lambda: free[0])
    expected, _ = chain.render()
    placed = chain.on_gpu()
    lowest = list(chain.svd.lower_memory_steps(chain.svd.params, chain.plan.shot))[-1]
    memory = chain.svd.memory(lowest, chain.plan.shot)
    free[0] = memory.total - sum(memory.weights.values())
    _, recovered = chain.render()
    assert "decode_chunk_frames=1" in recovered[-1]
    free[0] = 0
    with pytest.raises(StepFailed, match="out of memory"), Failing(out_of_memory(), 1, lasts=True):
        chain.render()
    assert not any(chain.on_gpu().values())
    free[0] = math.inf
    frames, recovered = chain.render()
    assert (recovered, chain.on_gpu()) == ([None, None], placed)
    assert np.array_equal(frames, expected)


def test_tiles_of_a_shot_with_little_memory_do_not_change_the_next_one(gpu, tiny, make_shot):
    subject = Subject(tiny, make_shot, Case("flux", BRAIN, {**INFUSENET, "width": 320, "height": 320}))
    own = subject.stage.params
    subject.stage.params = own.model_copy(update={"vae_tile_px": 256})
    assert not np.array_equal(subject.render(), subject.expected)
    subject.stage.params = own
    assert np.array_equal(subject.render(), subject.expected)
