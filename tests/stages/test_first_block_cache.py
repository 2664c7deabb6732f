"""First Block Cache: skipped steps, passes, residuals of InfuseNet, keys, memory and the plan."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch._dynamo

from tests.stages.conftest import PASSING
from tests.stages.test_parity import levels_apart
from tests.stages.test_speed import ROUNDING_LEVELS, with_options
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.planner.demand import demand_of, demand_seconds
from vidgen_ray.planner.speed_trials import invented_item
from vidgen_ray.profile import load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.ltx import LTXStage
from vidgen_ray.stages.qwen_edit import QwenEditStage
from vidgen_ray.stages.wan import WanStage

NEVER, ALWAYS = 1e-9, 1.0
"""Thresholds with which no step and nearly all steps of tiny networks are skipped."""
FACE = {"face_image": "x.jpg", "identity": "infusenet"}
CASES = {
    "flux": {},
    "flux with a face": FACE,
    "flux guided": {**FACE, "negative_prompt": "blurred"},
    "lora": {},
    "lora guided": {**FACE, "negative_prompt": "blurred"},
    "wan": {"guidance": {"wan": 4}},
    "ltx": {},
    "qwen_edit": {"negative_prompt": "blurred"},
}


def item_of(make_shot, case, steps=4, **fields):
    name = case.split()[0]
    given = {"width": 64, "height": 64, "seed": 1, **PASSING.get(name, {}), **CASES[case], "steps": {name: steps}, **fields}
    return STAGE_BY_NAME[name], invented_item(STAGE_BY_NAME[name], make_shot(**given))


def transformers_of(stage):
    pipe = stage.pipe if hasattr(stage, "pipe") else stage.model.text_to_image
    return [*filter(None, (pipe.transformer, pipe.components.get("transformer_2")))]


@contextmanager
def counted(*modules):
    """Yield the number of calls of each module."""
    calls = [0] * len(modules)

    def count(number):
        def hook(*_):
            calls[number] += 1

        return hook

    hooks = [module.register_forward_pre_hook(count(number)) for number, module in enumerate(modules)]
    yield calls
    for hook in hooks:
        hook.remove()


@contextmanager
def computed(stage):
    """Yield the calls of the first and of the second block of each transformer, without those that the cache skips."""
    networks = transformers_of(stage)
    blocks = [getattr(network, "transformer_blocks", None) or network.blocks for network in networks]
    # The hooks of the cache enclose the blocks, not their layers.
    layers = [block.attn.to_q if hasattr(block, "attn") else block.attn1.to_q for each in blocks for block in each[:2]]
    with counted(*layers) as calls:
        yield calls


def result(stage, item):
    return stage(item)[stage.writes[0]]


@pytest.mark.parametrize("case", CASES)
def test_cache_that_skips_nothing_gives_the_bytes_of_none(tiny, make_shot, case):
    stage_class, item = item_of(make_shot, case)
    with with_options(stage_class, tiny) as plain, with_options(stage_class, tiny, first_block_cache=NEVER) as cached:
        assert np.array_equal(result(cached, item), result(plain, item))


@pytest.mark.parametrize("case", CASES)
def test_skipped_steps_compute_one_block_and_the_next_shot_starts_anew(tiny, make_shot, case):
    stage_class, item = item_of(make_shot, case)
    _, other = item_of(make_shot, case, width=128, seed=2)
    with with_options(stage_class, tiny) as plain, with_options(stage_class, tiny, first_block_cache=ALWAYS) as cached:
        with computed(plain) as all_calls:
            expected = result(plain, item)
        with computed(cached) as calls:
            first = result(cached, item)
        assert calls[::2] == all_calls[::2]
        assert 0 < calls[1] < all_calls[1]
        assert not np.array_equal(first, expected)
        result(cached, other)
        assert np.array_equal(result(cached, item), first)


def test_infusenet_runs_in_computed_steps_only(tiny, make_shot):
    stage_class, item = item_of(make_shot, "flux guided")
    with with_options(stage_class, tiny, first_block_cache=ALWAYS) as stage:
        net = stage._injector("infusenet").infusenet.net
        with counted(net) as calls, computed(stage) as blocks:
            result(stage, item)
    # Each of the two passes of a step is computed or skipped on its own.
    assert calls[0] <= blocks[1] <= 2 * calls[0] < blocks[0]


@pytest.mark.parametrize("case", ["flux with a face", "flux guided"])
def test_skipped_step_has_the_residuals_of_the_computed_one_once(tiny, make_shot, case):
    """With the inputs of the step before, a skipped step must have its output."""
    stage_class, item = item_of(make_shot, case, steps=2)
    outputs, inputs = [], []

    def repeat(network, args, kwargs):
        passes = 2 if "guided" in case else 1
        inputs.append(kwargs)
        return args, {**kwargs, **inputs[(len(inputs) - 1) % passes]}

    with with_options(stage_class, tiny, first_block_cache=ALWAYS) as stage:
        (network,) = transformers_of(stage)
        network.register_forward_pre_hook(repeat, with_kwargs=True)
        network.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
        with computed(stage) as calls:
            result(stage, item)
    assert calls == [len(outputs), len(outputs) // 2]
    for first, second in zip(outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :], strict=True):
        assert (first - second).abs().max() < 1e-5 * first.abs().max()


@pytest.mark.parametrize(("interval", "expected"), [((0, 1), 1), ((0.5, 1), 2), ((0.25, 0.5), 3)])
def test_step_in_which_the_face_begins_or_ends_is_computed(tiny, make_shot, interval, expected):
    fields = dict(zip(("identity_start", "identity_end"), interval, strict=True))
    stage_class, item = item_of(make_shot, "flux with a face", **fields)
    with with_options(stage_class, tiny, first_block_cache=ALWAYS) as stage, computed(stage) as calls:
        result(stage, item)
    assert calls == [4, expected]


@pytest.mark.parametrize("case", ["flux with a face", "wan", "ltx", "qwen_edit"])
def test_compiled_blocks_have_the_graphs_of_a_plain_stage(tiny, make_shot, counter, case):
    stage_class, item = item_of(make_shot, case, steps=2)
    graphs, images = {}, {}
    for threshold in (0, NEVER, ALWAYS):
        torch._dynamo.reset()
        counter.frame_count = 0
        with with_options(stage_class, tiny, compile=True, first_block_cache=threshold) as stage:
            images[threshold] = result(stage, item)
            graphs[threshold] = counter.frame_count
            result(stage, item)
            assert counter.frame_count == graphs[threshold]
    assert graphs[0] == graphs[NEVER] == graphs[ALWAYS]
    assert levels_apart(images[NEVER], images[0]) <= ROUNDING_LEVELS
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("stage_class", [FluxStage, WanStage, LTXStage, QwenEditStage])
def test_threshold_is_part_of_keys_if_it_is_not_zero(tiny, stage_class):
    params = tiny.params(stage_class)
    assert "first_block_cache" not in params.for_key()
    assert params.model_copy(update={"first_block_cache": 0.1}).for_key()["first_block_cache"] == 0.1


@pytest.mark.parametrize(("stage_class", "share"), [(FluxStage, 0.64), (WanStage, 0.5), (LTXStage, 0.53)])
def test_plan_counts_computed_steps(stage_class, share):
    profile = load_profile("gpu-24gb")

    def seconds(steps, **options):
        demand = demand_of(
            [Shot(prompt="a", video_model="ltx" if stage_class is LTXStage else "wan", steps={stage_class.name: steps})]
        )
        return demand_seconds(profile.with_options({stage_class.actor: options}), stage_class, demand, {}, None)

    assert share < seconds(50, first_block_cache=0.08) / seconds(50) < share + 0.1
    assert seconds(4, first_block_cache=0.08) == seconds(4)


@pytest.mark.parametrize(
    ("stage_class", "fields", "tokens"),
    [
        (FluxStage, {"width": 1024, "height": 1024}, (64 * 64 + 512) * 3072),
        # Two transformers.
        (WanStage, {"width": 1280, "height": 704, "guidance": {"wan": 1}}, 2 * 80 * 44 * 21 * 5120),
    ],
)
def test_plan_counts_the_memory_of_the_cache(stage_class, fields, tokens):
    profile = load_profile("gpu-141gb")
    # Without tiles, decoding takes more than a step.
    options = profile.with_options({"wan": {"vae_tiling": True}}).options_of(stage_class)
    shot = Shot(prompt="a", video_model="wan", num_frames=81, **fields)
    peaks = [
        stage_class.memory(options.model_copy(update={"first_block_cache": threshold}), shot).peak for threshold in (0, 0.08)
    ]
    assert peaks[1] - peaks[0] == 3 * tokens * 2


@pytest.mark.parametrize("stage_class", [FluxStage, WanStage])
def test_groups_of_gpus_do_not_divide_cached_steps(tiny, stage_class):
    params = tiny.params(stage_class)
    assert stage_class.divided(params) is not None
    # Each process would decide by its own tokens.
    assert stage_class.divided(params.model_copy(update={"first_block_cache": 0.1})) is None
