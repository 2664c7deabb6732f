"""Which actors a run has, and whether a cluster can hold them."""

import pytest

from vidgen_ray.batch.layout import Layout, Pool, fits, layout_of
from vidgen_ray.batch.upscaling import clips_at_once
from vidgen_ray.graph import STAGES, stages_used
from vidgen_ray.shot import Shot


def pools(*shares):
    return Layout(tuple(Pool(str(n), (), actors, 1, gpus) for n, (actors, gpus) in enumerate(shares)), None)


@pytest.mark.parametrize(
    ("shares", "gpus", "expected"),
    [
        ([(1, 0)], [], True),
        ([(5, 0.2)], [1], True),
        ([(5, 1)], [1], False),
        ([(2, 0.6), (2, 0.4)], [1, 1], True),
        ([(3, 0.6)], [2], False),
        ([(1, 1.2)], [4], False),
        ([(4, 0.5), (2, 1)], [2, 2], True),
        ([(10, 0.1)], [1], True),
    ],
)
def test_an_actors_share_lies_on_one_gpu(shares, gpus, expected):
    assert fits(pools(*shares), gpus) is expected


def test_staged_has_a_pool_an_actor_and_flux_and_lora_share_one(tiny):
    staged = layout_of(tiny.model_copy(update={"layout": "staged"}), STAGES)
    assert [(pool.name, [s.name for s in pool.stages]) for pool in staged.pools] == [
        ("instantid", ["instantid"]),
        ("flux", ["flux", "lora"]),
        ("hunyuan", ["hunyuan"]),
        ("svd", ["svd"]),
        ("realesrgan", ["realesrgan"]),
    ]


def test_fused_has_one_pool_and_the_upscalers(tiny):
    fused = layout_of(tiny, STAGES)
    assert [pool.name for pool in fused.pools] == ["chain", "realesrgan"]


def test_a_stage_that_no_shot_uses_has_no_actor(tiny):
    stages = stages_used([Shot(prompt="a", generate_video=False)])
    assert [pool.name for pool in layout_of(tiny.model_copy(update={"layout": "staged"}), stages).pools] == ["flux"]


@pytest.mark.parametrize("upscalers", [0, 1, 2, 5, 50])
def test_enough_clips_are_finished_at_once_to_give_each_upscaler_two_chunks(upscalers):
    assert clips_at_once(upscalers) >= 2
    assert clips_at_once(upscalers) * 3 >= upscalers * 2
