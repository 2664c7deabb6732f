"""Chunks of clips with chunked stages, and their joined records."""

from fractions import Fraction

import pytest

from vidgen_ray import graph
from vidgen_ray.outputs.records import StepRecord
from vidgen_ray.render.step_runner import chunk_result_bytes, chunk_unit, clip_chunks, join_records
from vidgen_ray.stages.base import ChunkedStage, StageParams
from vidgen_ray.stages.realesrgan import RealESRGANStage


def record(stage, seconds, **fields):
    return StepRecord(
        **{"stage": stage, "key": "", "weights": (), "cached": False, **fields}, seconds=seconds, gpu_seconds=seconds
    )


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


def test_chunks_of_a_clip_grow_up_to_the_byte_limit_in_multiples_of_the_frames_per_call(make_shot):
    shot = make_shot(num_frames=25, width=64, height=64, scale=2)
    assert chunk_result_bytes(shot) == 3 * 64 * 64 * 4
    assert cut(shot, 4, 9 * chunk_result_bytes(shot)) == [(0, 8), (8, 16), (16, 24), (24, 25)]
    assert cut(shot, 12, 1) == [(0, 12), (12, 24), (24, 25)]


def test_chunks_are_those_of_the_finished_clip(make_shot):
    shot = make_shot(num_frames=5, fps=5, fps_out=24)
    assert graph.clip_length(shot) == (24, 24)
    assert chunk_unit(shot, {"rife": 1, "realesrgan": 4}) == 4
    assert cut(shot, 4, 16 * chunk_result_bytes(shot)) == [(0, 16), (16, 24)]
    assert chunk_result_bytes(shot) == 3 * shot.width * shot.height * (1 + shot.scale**2)


def test_every_chunked_stage_starts_at_a_multiple_of_its_frames_per_call(make_shot, doubling):
    units = [chunk_unit(make_shot(), {"doubling": frames, "realesrgan": 4}) for frames in (1, 2, 3, 8)]
    assert units == [4, 4, 12, 8]


def test_growth_of_clips_follows_the_chunked_stages(make_shot, doubling):
    assert graph.clip_growth(make_shot(scale=3)) == {"frames": (1, 2), "hd_frames": (3, 2)}
    assert graph.clip_growth(make_shot(scale=3, upscale_video=False)) == {"frames": (1, 2)}
    assert graph.clip_length(make_shot(num_frames=9, fps=5)) == (18, 10)
    assert graph.clip_length(make_shot(num_frames=9, fps=5, extend=2)) == (50, 10)
    assert graph.clip_growth(make_shot(generate_video=False)) == {}
    for stages, message in (
        ((Doubling, graph.STAGES[0]), "chunked stages must come last"),
        ((RealESRGANStage, Doubling), "must be the first chunked stage"),
    ):
        with pytest.raises(TypeError, match=message):
            graph._check_order(stages)


def test_records_of_chunks_are_joined_by_stage():
    chunks = [[record("a", 1), record("b", 2, recovered="tile_px=512")], [record("a", 3), record("b", 4)]]
    joined = [(one.stage, one.seconds, one.gpu_seconds, one.recovered) for one in join_records(chunks)]
    assert joined == [("a", 4, 4, None), ("b", 6, 6, "tile_px=512")]
