"""FilmSettings: YAML files, their errors, and sizes and rates."""

from fractions import Fraction

import pytest

from vidgen_ray.errors import ScriptError
from vidgen_ray.film.film_settings import PixelSize, film_settings, read_film_file, shot_settings


def test_film_file_is_read_with_paths_relative_to_it(tmp_path):
    (tmp_path / "sea.wav").write_bytes(b"")
    (tmp_path / "film.yaml").write_text(
        "title: Sea\nsize: 1280x720\nfps: 30000/1001\nmusic: sea.wav\nshots: [{title: One}, {id: a}]\n"
    )
    settings = film_settings(read_film_file(tmp_path / "film.yaml"), "x")
    assert (settings.title, settings.size, settings.fps) == ("Sea", PixelSize(1280, 720), Fraction(30000, 1001))
    assert settings.music == tmp_path / "sea.wav"
    assert [(entry.title, entry.id) for entry in settings.shots] == [("One", None), (None, "a")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size: 1281x720", "film.yaml, size: got '1281x720', must be even numbers"),
        ("fps: 0", "film.yaml, fps: got 0, must be frames per second from 1 to 240"),
        ("music: no.mp3", "must be an existing file (looked for "),
        ("music: s3://clips/sea.mp3", "must be a file on this machine; URLs are not read, download it first"),
        ("shots: [{id: a, duration_s: -1}]", "film.yaml, shots[0].duration_s: got -1, must be greater than 0"),
        ("shots: [{id: a, title: b}]", "film.yaml, shots[0]: got the fields, must have either id"),
        ("shots: [{id: a, colour: b}]", "film.yaml, shots[0].colour: got an unknown field, must be one of caption"),
        ("musik: a.mp3", "film.yaml, musik: got an unknown field, did you mean music?"),
        ("- a", "film.yaml: got list, must be fields"),
        ("title: a\ntitle: b", "duplicate key 'title'"),
    ],
)
def test_film_file_errors_name_file_field_and_what_is_allowed(tmp_path, text, message):
    (tmp_path / "film.yaml").write_text(text)
    with pytest.raises(ScriptError) as error:
        read_film_file(tmp_path / "film.yaml")
    assert message in str(error.value)


def test_metadata_of_a_shot_may_have_other_keys_but_no_wrong_values():
    assert shot_settings({"caption": "Hi", "scene": 3}, "shot a").caption == "Hi"
    with pytest.raises(ScriptError, match="shot a, duration_s: got 'long'"):
        shot_settings({"duration_s": "long"}, "shot a")


def test_narration_file_and_voice_exclude_each_other(tmp_path):
    (tmp_path / "n.wav").write_bytes(b"")
    with pytest.raises(ScriptError, match="got both narration and voice"):
        film_settings({"narration": tmp_path / "n.wav", "voice": "espeak-ng:en"}, "vidgen film")
