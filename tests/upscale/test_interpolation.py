"""`vidgen upscale --fps`: which frames are drawn between which, at which times."""

from fractions import Fraction

import numpy as np
import pytest

from tests.upscale.conftest import FAST, TAGGED
from tests.upscale.videos import decoded, packets, picture, write_video
from vidgen_ray.errors import MediaError
from vidgen_ray.upscale.frames import FrameInterpolator, interpolated
from vidgen_ray.upscale.source import Place, places, read_source, timeline_of


def test_frames_of_the_source_stay_at_their_times_and_the_others_lie_between(tmp_path, upscale, short_segments):
    video = write_video(tmp_path / "in.mp4", 8, colour=TAGGED, sound_s=0.6)
    lossless = FAST.model_copy(update={"crf": 0})
    report = upscale(video, tmp_path / "out.mp4", fps=Fraction(24), encode=lossless)
    frames, times = decoded(tmp_path / "out.mp4")
    assert report.frames == len(frames) == 16
    assert times == [Fraction(n, 24) for n in range(16)]
    assert packets(tmp_path / "out.mp4", "audio") == packets(video, "audio")
    upscale(video, tmp_path / "plain.mp4", encode=lossless)
    plain, _ = decoded(tmp_path / "plain.mp4")
    for number in range(8):
        np.testing.assert_array_equal(frames[2 * number], plain[number])
    repeated = [number for number in range(8) if np.array_equal(frames[2 * number + 1], plain[number])]
    # The chessboard flips after frames 2 and 5, which may be taken for cuts. The last frame is held. All others are drawn.
    assert set(repeated) <= {2, 5, 7}
    assert 7 in repeated


def test_places_in_a_video_with_variable_times(tmp_path):
    video = write_video(tmp_path / "in.mkv", 4, times=[100, 200, 250, 400], time_base=Fraction(1, 1000))
    source = read_source(video)
    timeline = timeline_of(source, Fraction(20))
    first = Fraction(source.times[0], 1000)
    assert [time * timeline.time_base - first for time in timeline.times[:4]] == [
        0,
        Fraction(1, 20),
        Fraction(1, 10),
        Fraction(3, 20),
    ]
    got = places(source, timeline, 0, 6)
    expected = [Place(0, Fraction(0)), Place(0, Fraction(1, 2)), Place(1, Fraction(0)), Place(2, Fraction(0))]
    assert got[:4] == expected
    assert got[4:] == [Place(2, Fraction(1, 3)), Place(2, Fraction(2, 3))]


def test_lower_rate_is_refused(tmp_path, upscale):
    video = write_video(tmp_path / "in.mp4", 4)
    with pytest.raises(MediaError, match="has 12 frames per second, more than 10; frames would be dropped"):
        upscale(video, tmp_path / "out.mp4", fps=Fraction(10))


def test_cuts_repeat_the_frame_before_and_sixteen_bits_stay():
    network = FrameInterpolator("cpu", threads=1)
    rng = np.random.default_rng(0)
    cut = [picture(0), rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)]
    wanted = [Place(0, Fraction(0)), Place(0, Fraction(1, 2)), Place(1, Fraction(0))]
    frames = list(interpolated(iter(cut), wanted, network))
    np.testing.assert_array_equal(frames[1], cut[0])
    deep = [picture(n, levels=65535) for n in (0, 1)]
    drawn = list(interpolated(iter(deep), wanted, network))[1]
    assert drawn.dtype == np.uint16
    shallow = list(interpolated(iter([picture(0), picture(1)]), wanted, network))[1]
    assert np.abs(drawn / 257 - shallow).mean() < 0.6
