"""Interpolation: number, times and content of the frames; scene cuts; any cut of the clip.

Frames that are drawn twice are equal to the bit: each is a call of the network of its own, with tensors of one shape.
"""

from fractions import Fraction

import numpy as np
import pytest
from skimage import data

from tests.stages.test_profile_dtypes import psnr
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Item, frame_chunks, progress_callback
from vidgen_ray.stages.rife import KEPT_FRAMES, LARGEST_MULTIPLE_PX, RifeStage, image_similarity

SIZE_PX = 64
STEP_PX = 6


def pan(photo, n_frames, step_px=STEP_PX):
    """Return a clip (T, 64, 64, 3) that pans over a photo by `step_px` per frame."""
    return np.stack([photo[100 : 100 + SIZE_PX, 60 + step_px * n : 60 + SIZE_PX + step_px * n] for n in range(n_frames)])


@pytest.fixture(scope="module")
def rife(tiny):
    with RifeStage(tiny.params(RifeStage)) as stage:
        yield stage


def interpolated(rife, shot, clip):
    return rife(Item(shot, {"frames": clip}))["frames"]


def test_frame_count_grows_by_the_factor_and_generated_frames_stay(rife, make_shot):
    clip = pan(data.astronaut(), 3)
    result = interpolated(rife, make_shot(fps=6, interpolation=4), clip)
    assert len(result) == 12
    assert np.array_equal(result[::4], clip)
    assert all(np.array_equal(held, clip[-1]) for held in result[-4:]), "the last frame is held for its duration"
    assert all(not np.array_equal(frame, other) for frame in result[1:4] for other in clip)
    assert np.array_equal(result, interpolated(rife, make_shot(fps=6, fps_out=24), clip))


def test_drawn_frames_are_nearer_to_the_truth_than_blending(rife, make_shot):
    truth = pan(data.rocket(), 5, STEP_PX // 2)
    result = interpolated(rife, make_shot(interpolation=2), truth[::2])
    blended = (truth[0].astype(float) + truth[2]) / 2
    assert psnr(result[1], truth[1]) > psnr(blended, truth[1]) + 6


@pytest.mark.parametrize(("fps", "fps_out", "n_frames", "expected"), [(5, 12, 3, 8), (16, 24, 3, 5)])
def test_clip_plays_at_exactly_fps_out(rife, make_shot, fps, fps_out, n_frames, expected):
    clip = pan(data.coffee(), n_frames)
    result = interpolated(rife, make_shot(fps=fps, fps_out=fps_out), clip)
    assert len(result) == expected
    assert 0 <= Fraction(len(result), fps_out) - Fraction(n_frames, fps) < Fraction(1, fps_out), "the duration stays"
    for number, frame in enumerate(result):
        position = Fraction(number * fps, fps_out)
        if position.denominator == 1:
            assert np.array_equal(frame, clip[int(position)])
        if position >= n_frames - 1:
            assert np.array_equal(frame, clip[-1])


def test_scene_cuts_are_not_blended(rife, make_shot):
    before, after = pan(data.astronaut(), 2), pan(data.coffee(), 2)
    result = interpolated(rife, make_shot(interpolation=4), np.concatenate([before, after]))
    assert all(np.array_equal(frame, before[1]) for frame in result[4:8])
    assert not np.array_equal(result[1], before[0])
    assert not np.array_equal(result[9], after[0])


def test_fast_motion_is_not_taken_for_a_cut(rife, make_shot):
    clip = pan(data.chelsea(), 2, 24)
    assert image_similarity(*clip) < rife.params.min_similarity, "without undoing the motion"
    assert not np.array_equal(interpolated(rife, make_shot(interpolation=2), clip)[1], clip[0])


def test_clip_may_be_cut_anywhere(rife, make_shot):
    shot, clip = make_shot(fps=7, fps_out=16), pan(data.astronaut(), 3)
    whole = interpolated(rife, shot, clip)
    for cut in (2, 5):
        chunks = frame_chunks(len(whole), cut)
        parts = [rife.run_chunk(shot, clip[rife.source_frames(shot, chunk)], chunk) for chunk in chunks]
        assert np.array_equal(np.concatenate(parts), whole), cut


def test_parts_of_a_chunk_draw_equally_many_frames(rife, make_shot, monkeypatch):
    shot, clip, drawn, reports = make_shot(interpolation=2), pan(data.astronaut(), 6), [], []
    whole, joined = interpolated(rife, shot, clip)[2:10], np.empty((8, SIZE_PX, SIZE_PX, 3), np.uint8)
    between = rife._between
    monkeypatch.setattr(rife, "_between", lambda *pair: drawn.append(number) or between(*pair))
    for number in (0, 1):
        with progress_callback(lambda *progress: reports.append(progress[1:])):
            rife.run_chunk(shot, clip[1:], slice(2, 10), joined, (number, 2))
    assert np.array_equal(joined, whole)
    assert drawn == [0, 0, 1, 1]
    assert reports == [(2, 8), (4, 8), (6, 8), (8, 8)] * 2


def test_stage_applies_only_to_clips_of_a_higher_rate(make_shot):
    assert not RifeStage.applies(make_shot())
    assert not RifeStage.applies(make_shot(fps=6, fps_out=6))
    assert not RifeStage.applies(make_shot(interpolation=2, generate_video=False))
    assert RifeStage.applies(make_shot(interpolation=2))
    assert RifeStage.applies(make_shot(fps=6, fps_out=7))


def test_wrong_rates_are_refused():
    with pytest.raises(ValueError, match="fps_out 5 is lower than fps 6; set fps_out to at least 6"):
        Shot(prompt="a", fps=6, fps_out=5)
    with pytest.raises(ValueError, match="contradicts interpolation 4, which gives 24"):
        Shot(prompt="a", fps=6, fps_out=25, interpolation=4)


def test_planned_memory_has_room_for_the_kept_frames(tiny, make_shot):
    """Both sizes are padded to the same one, so they differ by the frames only."""
    small, large = (
        RifeStage.memory(tiny.params(RifeStage), make_shot(width=side_px, height=side_px)).peak
        for side_px in (LARGEST_MULTIPLE_PX // 2, LARGEST_MULTIPLE_PX)
    )
    pixels = LARGEST_MULTIPLE_PX**2 - (LARGEST_MULTIPLE_PX // 2) ** 2
    assert large - small == np.zeros((KEPT_FRAMES, pixels, 3), np.float32).nbytes
