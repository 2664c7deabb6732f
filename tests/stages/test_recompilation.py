"""Number of compilations of FLUX and HunyuanDiT. The compiler backend only counts, so no code is generated."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

from benchmarks.recompilations import NO_LIMIT, SIZES, count_adapters, count_images, count_slots, write_loras
from vidgen_ray.errors import StageError
from vidgen_ray.shot import LoraRef
from vidgen_ray.stages import speed
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux_lora import FluxLoRAStage
from vidgen_ray.stages.instantid import InstantIDStage

LORAS = 9


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """LoRA files of different ranks, scales and sets of layers."""
    return write_loras(tmp_path_factory.mktemp("loras"), LORAS)


@pytest.fixture(scope="module")
def face(tiny, photo):
    with InstantIDStage(tiny.params(InstantIDStage)) as stage:
        return stage.features([photo])


@pytest.fixture
def counter(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounter()
    monkeypatch.setattr(speed, "COMPILE_BACKEND", counter)
    yield counter
    torch._dynamo.reset()


def stages(tiny, **options):
    params = tiny.params(FluxStage)
    changed = type(params).model_validate({**dict(params), "lora_max_rank": 8, **options})
    return FluxStage(changed), FluxLoRAStage(changed)


def image_of_size(width, height):
    return np.full((height, width, 3), 127, np.uint8)


def refine(stage, make_shot, lora, width, height, **fields):
    weighted = [LoraRef(path=lora, weight=fields.pop("weight", 1.0))]
    shot = make_shot(width=width, height=height, lora=weighted, **fields)
    return stage([Item(shot, {"image": image_of_size(width, height)})])[0]["image"]


def test_loras_and_sizes_compile_nothing_after_the_first_two_sizes(tiny, make_shot, loras, face, counter):
    flux, lora = stages(tiny, compile="regional")
    counts = {}
    with flux, lora:
        for width, height in SIZES[:2]:
            flux([Item(make_shot(width=width, height=height))])
            flux([Item(make_shot(width=width, height=height, face_image="x.jpg"), {"face": face})])
            refine(lora, make_shot, loras[0], width, height)
            counts[f"warm-up {width}x{height}"] = counter.frame_count
        for number, file in enumerate(loras):
            # Each rank, which depends on the number modulo 3, in each size.
            refine(lora, make_shot, file, *SIZES[number // 3], weight=0.5 + number / 20)
        for width, height in SIZES:
            flux([Item(make_shot(width=width, height=height, negative_prompt="blurred"))])
            flux([Item(make_shot(width=width, height=height, face_image="x.jpg"), {"face": face})])
        assert lora.adapter_loads == LORAS
    counts["all LoRAs in 3 sizes"] = counter.frame_count
    assert 0 < counts["warm-up 128x64"] < counts["warm-up 64x64"], "the second size compiles for dynamic sizes"
    assert counter.frame_count == counts["warm-up 64x64"]
    assert not torch._dynamo.utils.counters["graph_break"]


def test_adapters_without_slots_exceed_the_recompile_limit(tiny, make_shot, loras, counter):
    """The positive control: what the slots prevent."""
    _, lora = stages(tiny)
    with lora, torch._dynamo.config.patch(recompile_limit=8):
        lora.model.text_to_image.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
        counts = []
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):  # noqa: PT012  # which LoRA it is does not matter
            for file in loras:
                refine(lora, make_shot, file, 128, 64)
                counts.append(counter.frame_count)
    assert len(counts) < 10
    assert all(later > earlier for earlier, later in pairwise(counts)), "each LoRA compiles"


@pytest.mark.slow
def test_twenty_loras_in_three_sizes_compile_nothing_after_the_second_size(tiny, tmp_path):
    files = write_loras(tmp_path, 20)
    slots, adapters = count_slots(tiny, files), count_adapters(tiny, files, NO_LIMIT)
    assert slots.calls == adapters.calls == 20 * len(SIZES)
    assert slots.first > 0
    assert slots.second_size > 0
    assert slots.later == 0
    assert adapters.later >= 20, "the positive control: each LoRA compiles"


@pytest.mark.parametrize("mode", ["regional", "full"])
def test_hunyuandit_compiles_at_most_once_for_each_side_that_changes(tiny, mode):
    counts = count_images(tiny, mode)
    assert counts.calls == 2 * len(SIZES)
    assert counts.first > 0
    assert counts.second_size == counts.first
    # The second size has another width, the third one another height. The blocks see the number of patches only.
    assert counts.later == (0 if mode == "regional" else 1)


def test_slots_give_the_images_of_adapters(tiny, make_shot, loras):
    slots, adapters = stages(tiny, lora_hotswap=True)[1], stages(tiny)[1]
    with slots, adapters:
        for file in (loras[0], loras[1], loras[2], loras[0]):
            for weight in (1.0, 0.7):
                a, b = (refine(stage, make_shot, file, 128, 64, weight=weight).astype(int) for stage in (slots, adapters))
                assert np.abs(a - b).max() <= 1
        two = make_shot(lora=[LoraRef(path=loras[1]), LoraRef(path=loras[2], weight=0.5)])
        a, b = (stage([Item(two, {"image": image_of_size(128, 64)})])[0]["image"].astype(int) for stage in (slots, adapters))
        assert np.abs(a - b).max() <= 1


def test_shots_without_loras_are_bitwise_those_of_plain_flux_after_a_lora(tiny, make_shot, loras):
    flux, lora = stages(tiny, lora_hotswap=True)
    with flux, lora, stages(tiny)[0] as plain:
        refine(lora, make_shot, loras[0], 128, 64)
        assert np.array_equal(*(stage([Item(make_shot())])[0]["image"] for stage in (flux, plain)))


def test_lora_that_fits_no_slot_is_refused_and_changes_nothing(tiny, make_shot, loras):
    _, lora = stages(tiny, lora_hotswap=True, lora_max_rank=3, lora_slots=1)
    with lora:
        before = refine(lora, make_shot, loras[2], 128, 64)
        with pytest.raises(StageError, match=r"0\.safetensors: has rank 4, must be at most 3, the profile's lora_max_rank"):
            refine(lora, make_shot, loras[0], 128, 64)
        two = make_shot(lora=[LoraRef(path=loras[1]), LoraRef(path=loras[2])])
        with pytest.raises(StageError, match="got 2, must be at most 1, the profile's lora_slots"):
            lora([Item(two, {"image": image_of_size(128, 64)})])
        assert np.array_equal(refine(lora, make_shot, loras[2], 128, 64), before)
