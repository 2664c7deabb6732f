"""Sound of films: clips, music, narration, loudness, ducking, spoken text, and its position against the picture."""

import os
import shutil
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest

from tests.film.conftest import BLUE, FAST, RED, read_frames, read_sound, tone, write_sound
from vidgen_ray.errors import MediaError, SetupError, UsageError
from vidgen_ray.film.film_settings import film_settings
from vidgen_ray.film.make_film import make_film
from vidgen_ray.film.picture import add_chain, filtered
from vidgen_ray.film.sound import speaker
from vidgen_ray.film.timeline import sound_seconds


@pytest.fixture
def film(shots, tmp_path):
    """Return a function that makes tmp_path/film.mp4 and returns its path."""

    def make(ids=None, **settings):
        fields = {"encode": FAST.model_dump(), **settings}
        make_film(shots.outputs, film_settings(fields, "test"), tmp_path / "film.mp4", ids=ids)
        return tmp_path / "film.mp4"

    return make


def loudness(path) -> float:
    """Return the integrated loudness in LUFS."""
    with av.open(str(path)) as opened:
        stream = opened.streams.audio[0]
        graph = av.filter.Graph()
        source = graph.add_abuffer(template=stream)
        sink = add_chain(graph, source, ["ebur128=metadata=1", "abuffersink"])
        graph.configure()
        measured = [frame.metadata.get("lavfi.r128.I") for frame in filtered(zip(opened.decode(stream)), [source], sink)]
    return float([value for value in measured if value is not None][-1])


def level_db(samples, start_s, stop_s, hertz) -> float:
    """Return the level of one frequency between two times, in dB of full scale."""
    part = samples[0, round(start_s * 48_000) : round(stop_s * 48_000)]
    angle = 2 * np.pi * hertz * np.arange(len(part)) / 48_000
    return 20 * np.log10(abs(np.mean(part * np.exp(-1j * angle))) * 2 + 1e-9)


def test_loudness_is_normalised(shots, film, tmp_path):
    shots.add("a", frames=18)
    for gain in (0.01, 0.9):
        # Without the highest octaves, which AAC removes.
        music = np.repeat(np.random.default_rng(1).normal(0, gain / 4, (2, 30_000)), 8, axis=1).astype(np.float32)
        path = film(music=str(write_sound(tmp_path / "m.wav", music)), loudness_lufs=-16)
        assert abs(loudness(path) + 16) < 0.5
        assert np.abs(read_sound(path)).max() < 10 ** (-1 / 20)


def test_sound_of_clips_is_kept_resampled_and_slowed_with_its_pitch(shots, film):
    shots.add("b", colour=BLUE)
    with av.open(str(film())) as opened:
        assert not opened.streams.audio
    shots.add("a", sound=tone(1, 500))
    shots.add("c", sound=(tone(1, 900, rate=44_100), 44_100), metadata={"duration_s": 2, "fit": "slow"})
    samples = read_sound(film(ids=["a", "b", "c"]))
    places = ((0.2, 0.8), (1.2, 1.8), (2.3, 3.7))
    levels = [[level_db(samples, *place, hertz) for hertz in (500, 900, 450)] for place in places]
    assert levels[0][0] > -30 > levels[0][1] + 10
    assert max(levels[1]) < -50
    assert levels[2][1] > -30 > max(levels[2][0], levels[2][2]) + 10


def test_music_is_repeated_and_lowered_under_the_narration(shots, film, tmp_path):
    shots.add("a", frames=42)
    speech = np.concatenate([np.zeros((2, 96_000)), tone(2, 300, 0.5)], axis=1)
    path = film(
        music=str(write_sound(tmp_path / "m.wav", tone(2, 1000, 0.3))), narration=str(write_sound(tmp_path / "n.wav", speech))
    )
    samples = read_sound(path)
    alone, under, after = (level_db(samples, start, start + 0.5, 1000) for start in (1, 3, 5.0))
    assert under < alone - 6
    assert after > under + 6
    assert level_db(samples, 3, 3.5, 300) > under + 10
    # Faded out at the end.
    assert level_db(samples, 6.8, 7, 1000) < alone - 12


def test_narration_longer_than_the_film_and_music_without_sound(shots, tmp_path):
    shots.add("a")
    settings = film_settings({"narration": str(write_sound(tmp_path / "n.wav", tone(5)))}, "test")
    report = make_film(shots.outputs, settings, tmp_path / "film.mp4")
    assert report.notes == (f"{tmp_path / 'n.wav'}: is 5.0 s long, the film 1.0 s; the rest is cut",)
    (tmp_path / "m.txt").write_text("not music")
    with pytest.raises(MediaError, match=r"m\.txt: cannot be read as sound"):
        make_film(shots.outputs, film_settings({"music": str(tmp_path / "m.txt")}, "test"), tmp_path / "film.mp4")


def test_cross_fade_keeps_the_level_of_the_sound(shots, film):
    shots.add("a", frames=12, sound=tone(2, 500))
    shots.add("b", frames=12, sound=tone(2, 900))
    samples = read_sound(film(transition="fade", fade_s=1))
    assert samples.shape[1] / 48_000 == pytest.approx(3, abs=0.05)
    assert level_db(samples, 0.2, 0.8, 900) < -50
    assert level_db(samples, 2.3, 2.8, 500) < -50
    assert level_db(samples, 1.4, 1.6, 500) == pytest.approx(level_db(samples, 0.2, 0.8, 500) - 3, abs=1)
    assert level_db(samples, 1.4, 1.6, 900) == pytest.approx(level_db(samples, 2.3, 2.8, 900) - 3, abs=1)


@pytest.mark.parametrize(("transition", "fade_frames"), [("cut", 0), ("fade", 2)])
def test_picture_and_sound_stay_within_a_frame_over_many_clips(shots, film, transition, fade_frames):
    """Clips of rates that do not divide the film's begin with a click. Every second one is blue."""
    count, fps = 16, Fraction(30000, 1001)
    click = np.concatenate([tone(0.02, 3000, 0.9), np.zeros((2, 16_000))], axis=1)
    rates = [5, 7, 11, 13]
    for number, rate in enumerate(rates):
        # Not a whole number of seconds, and sound that is longer or shorter than the picture.
        shots.add(
            f"s{number}", fps=rate, frames=2 + number, colour=[RED, BLUE][number % 2], sound=click[:, : 12_000 + 1000 * number]
        )
    shots_of_film = [{"id": f"s{number % 4}"} for number in range(count)]
    path = film(shots=shots_of_film, fps=str(fps), size="64x48", transition=transition, fade_s=0.07)

    blue = np.array([frame[24, 32, 2] > frame[24, 32, 0] for frame in read_frames(path)])
    changes = np.flatnonzero(blue[1:] != blue[:-1]) + 1
    samples = np.abs(read_sound(path)).max(axis=0)
    loud = np.flatnonzero(samples > 0.3 * samples.max())
    clicks = loud[np.concatenate([[True], np.diff(loud) > 3000])]
    assert (len(changes), len(clicks)) == (count - 1, count)
    # A cross-fade begins with the sound and shows the next colour after its middle.
    offsets = clicks[1:] / 48_000 * float(fps) - (changes - fade_frames / 2)
    assert np.abs(offsets).max() <= 1
    with av.open(str(path)) as opened:
        seconds = [stream.duration * stream.time_base for stream in (opened.streams.video[0], opened.streams.audio[0])]
    assert abs(seconds[0] - seconds[1]) * fps <= 1


PIPER_VOICE = os.environ.get("VIDGEN_TEST_PIPER_VOICE", "")


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_narration_is_spoken_at_its_shot_which_stays_until_it_ends(shots, tmp_path):
    shots.add("a", frames=12)
    shots.add("b", metadata={"narration": "The boat leaves the harbour early in the morning."})
    settings = film_settings({"voice": "espeak-ng:en", "encode": FAST.model_dump()}, "test")
    report = make_film(shots.outputs, settings, tmp_path / "film.mp4")
    assert report.seconds > 4
    samples = np.abs(read_sound(tmp_path / "film.mp4")).max(axis=0)
    first, last = np.flatnonzero(samples > 0.05)[[0, -1]] / 48_000
    assert 2 <= first < 2.3
    assert report.seconds - 1.5 < last < report.seconds
    # The spoken text is kept beside the film.
    (wav,) = (tmp_path / "film.pieces").glob("*.wav")
    before = wav.stat().st_mtime_ns
    make_film(shots.outputs, settings, tmp_path / "film.mp4")
    assert wav.stat().st_mtime_ns == before


def test_narration_without_a_voice_is_reported(shots, tmp_path):
    shots.add("a", metadata={"narration": "Unheard."})
    report = make_film(shots.outputs, film_settings({}, "test"), tmp_path / "film.mp4")
    assert report.notes == ("1 shot has a narration, but the film has no voice; set one with --voice",)


def test_unknown_voices_are_errors(tmp_path):
    for voice in ("festival:en", "piper", ""):
        with pytest.raises(UsageError, match=r"must be espeak-ng:LANGUAGE, such as espeak-ng:en, or piper:VOICE\.onnx"):
            speaker(voice)
    with pytest.raises(SetupError, match=r"must be an existing \.onnx file of piper"):
        speaker(f"piper:{tmp_path / 'none.onnx'}")
    if shutil.which("espeak-ng"):
        with pytest.raises(SetupError, match="espeak-ng cannot speak 'xx-none'"):
            speaker("espeak-ng:xx-none")("Hello", tmp_path / "a.wav")


@pytest.mark.skipif(find_spec("piper") is None, reason="piper-tts, the extra `narration`, is not installed")
@pytest.mark.skipif(not PIPER_VOICE, reason="VIDGEN_TEST_PIPER_VOICE does not name a voice of piper (.onnx)")
def test_piper_speaks(tmp_path):
    speaker(f"piper:{Path(PIPER_VOICE)}")("The boat leaves the harbour.", tmp_path / "a.wav")
    assert 0.8 < sound_seconds(tmp_path / "a.wav") < 5
