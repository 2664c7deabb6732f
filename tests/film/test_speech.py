"""Spoken narration: espeak-ng and piper, and how long a shot stays on screen."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.film.conftest import FAST, read_sound
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.film.film_settings import film_settings
from vidgen_ray.film.make_film import make_film
from vidgen_ray.film.sound import speaker
from vidgen_ray.film.timeline import sound_seconds

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
PIPER_VOICE = os.environ.get("VIDGEN_TEST_PIPER_VOICE", "")


@needs_espeak
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
    assert report.notes == ("1 shots have a narration, but the film has no voice; set one with --voice",)


@needs_espeak
def test_unknown_language_is_an_error(tmp_path):
    with pytest.raises(SetupError, match="espeak-ng cannot speak 'xx-none'"):
        speaker("espeak-ng:xx-none")("Hello", tmp_path / "a.wav")


@pytest.mark.parametrize("voice", ["festival:en", "piper", ""])
def test_unknown_engine_is_an_error(voice):
    with pytest.raises(UsageError, match=r"must be espeak-ng:LANGUAGE, such as espeak-ng:en, or piper:VOICE\.onnx"):
        speaker(voice)


def test_missing_piper_voice_is_an_error(tmp_path):
    with pytest.raises(SetupError, match=r"must be an existing \.onnx file of piper"):
        speaker(f"piper:{tmp_path / 'none.onnx'}")


@pytest.mark.skipif(find_spec("piper") is None, reason="piper-tts, the extra `narration`, is not installed")
@pytest.mark.skipif(not PIPER_VOICE, reason="VIDGEN_TEST_PIPER_VOICE does not name a voice of piper (.onnx)")
def test_piper_speaks(tmp_path):
    speaker(f"piper:{Path(PIPER_VOICE)}")("The boat leaves the harbour.", tmp_path / "a.wav")
    assert 0.8 < sound_seconds(tmp_path / "a.wav") < 5
