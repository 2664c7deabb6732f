"""Chunks of clips with chunked stages."""

from fractions import Fraction

import pytest

from vidgen_ray import graph
from vidgen_ray.engine.calls import chunk_result_bytes, chunk_unit, clip_chunks, join_records
from vidgen_ray.outputs.records import StepRecord
from vidgen_ray.stages.base import ChunkedStage, StageParams
from vidgen_ray.stages.realesrgan import RealESRGANStage


def cut(shot, unit, max_bytes=0):
    return [(chunk.start, chunk.stop) for chunk in clip_chunks(shot, unit, max_bytes)]


class Doubling(ChunkedStage[StageParams]):
    name = actor = "doubling"
    takes = writes = ("frames",)

    @staticmethod
    def applies(shot):
        return True

    @staticmethod
    def frame_factor(shot):
        return Fraction(2)


@pytest.fixture
def doubling(monkeypatch):
    monkeypatch.setattr(graph, "STAGES", (*graph.STAGES[:-2], Doubling, RealESRGANStage))
    monkeypatch.setattr(graph, "CHUNKED_STAGES", (Doubling, RealESRGANStage))


def test_clip_is_cut_at_multiples_of_the_frames_per_call(make_shot):
    shot = make_shot(num_frames=9)
    assert chunk_unit(shot, {"realesrgan": 4}) == 4
    assert cut(shot, 4) == [(0, 4), (4, 8), (8, 9)]


def test_chunks_grow_up_to_the_byte_limit(make_shot):
    shot = make_shot(num_frames=25, width=64, height=64, scale=2)
    assert chunk_result_bytes(shot) == 3 * 64 * 64 * 4
    assert cut(shot, 4, 9 * chunk_result_bytes(shot)) == [(0, 8), (8, 16), (16, 24), (24, 25)]
    assert cut(shot, 4, 1) == cut(shot, 4)


def test_chunks_are_those_of_the_finished_clip(make_shot):
    shot = make_shot(num_frames=5, fps=5, fps_out=24)
    assert graph.clip_length(shot) == (24, 24)
    assert chunk_unit(shot, {"rife": 1, "realesrgan": 4}) == 4
    assert cut(shot, 4, 16 * chunk_result_bytes(shot)) == [(0, 16), (16, 24)]
    assert chunk_result_bytes(shot) == 3 * shot.width * shot.height * (1 + shot.scale**2)


@pytest.mark.parametrize(("doubling_frames", "unit"), [(1, 4), (2, 4), (3, 12), (8, 8)])
def test_every_chunked_stage_starts_at_a_multiple_of_its_frames_per_call(make_shot, doubling, doubling_frames, unit):
    assert chunk_unit(make_shot(), {"doubling": doubling_frames, "realesrgan": 4}) == unit


def test_growth_of_clips_follows_the_chunked_stages(make_shot, doubling):
    assert graph.clip_growth(make_shot(scale=3)) == {"frames": (1, 2), "hd_frames": (3, 2)}
    assert graph.clip_growth(make_shot(scale=3, upscale_video=False)) == {"frames": (1, 2)}
    assert graph.clip_length(make_shot(num_frames=9, fps=5)) == (18, 10)
    assert graph.clip_length(make_shot(num_frames=9, fps=5, extend=2)) == (50, 10)
    assert graph.clip_growth(make_shot(generate_video=False)) == {}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Doubling, graph.STAGES[0]), "chunked stages must come last"),
        ((RealESRGANStage, Doubling), "must be the first chunked stage"),
    ],
)
def test_chunked_stages_in_the_wrong_order_are_refused(stages, message):
    with pytest.raises(TypeError, match=message):
        graph._check_order(stages)


def test_records_of_chunks_are_joined_by_stage():
    def record(stage, seconds, recovered=None):
        return StepRecord(
            stage=stage, key="k", weights=(), seconds=seconds, gpu_seconds=seconds, cached=False, recovered=recovered
        )

    chunks = [[record("a", 1), record("b", 2, "tile_px=512")], [record("a", 3), record("b", 4)]]
    joined = join_records(chunks)
    assert [(one.stage, one.seconds, one.gpu_seconds, one.recovered) for one in joined] == [
        ("a", 4, 4, None),
        ("b", 6, 6, "tile_px=512"),
    ]
