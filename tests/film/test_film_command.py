"""`vidgen film`: options, film files, screenplays, messages and exit codes."""

import json
import re
from fractions import Fraction
from importlib.metadata import EntryPoints

import av
import pytest

from tests.film.conftest import BLUE, GREEN, Shots, read_frames
from vidgen_ray.cli import main, options
from vidgen_ray.errors import ScriptError
from vidgen_ray.film.film_settings import PixelSize, film_settings, read_film_file, shot_settings


@pytest.fixture
def shots(tmp_path, monkeypatch) -> Shots:
    monkeypatch.chdir(tmp_path)
    shots = Shots(tmp_path / "out")
    shots.add("a", metadata={"caption": "Old"})
    shots.add("b", colour=GREEN)
    return shots


def test_film_prints_what_was_made(shots, capsys):
    assert main(["film", "out", "-o", "new/film.mp4"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "new/film.mp4: 2 shots, 2.0 s, 64x48, 6 fps (2 copied, 0 rendered, 0 unchanged)",
        "new/film.srt",
        "new/film.vtt",
    ]


def test_film_takes_order_metadata_and_settings_from_a_screenplay_and_options_override(shots, tmp_path, capsys):
    (tmp_path / "story.yaml").write_text(
        "title: A walk\n"
        "film: {size: 96x96, fps: 3, title_s: 1}\n"
        "shots:\n"
        "  - {id: b, prompt: b}\n"
        # The photo was removed after the shot was rendered.
        "  - {id: a, prompt: a, face_image: removed.png, metadata: {caption: New}}\n"
    )
    assert main(["film", "out", "-o", "film.mp4", "--script", "story.yaml", "--fps", "12", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["size"], report["fps"], report["shots"]) == ("96x96", 12, 2)
    with av.open(str(tmp_path / "film.mp4")) as opened:
        assert opened.metadata["title"] == "A walk"
    frames = read_frames(tmp_path / "film.mp4")
    assert frames[0].min() < 30  # the title card
    assert frames[12][48, 48].argmax() == 1  # green: b comes first
    assert "New" in (tmp_path / "film.srt").read_text()


def test_film_of_the_shots_that_match_and_are_best(shots, tmp_path, capsys, monkeypatch):
    pytest.importorskip("duckdb")
    shots.add("c", line=1, colour=BLUE)
    shots.add_failed("d")
    # Two shots of the first line. `--ids` gives the order.
    assert main(["film", "out", "--best", "id", "--ids", "b,a,c", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shots"] == 2
    middle = read_frames(tmp_path / "film.mp4")[::6]
    assert [frame[24, 32].argmax() for frame in middle] == [1, 2]
    assert main(["film", "out", "--where", "id != 'b'", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shots"] == 2
    assert main(["film", "out", "--where", "stars > 3"]) == 2
    assert "no finished shot matches" in capsys.readouterr().err
    monkeypatch.setattr(options, "entry_points", lambda group: EntryPoints(()))
    assert main(["film", "out", "--where", "stars > 3"]) == 4
    assert "pip install 'duckdb>=" in capsys.readouterr().err


def test_missing_shots_exit_with_1_and_the_list(shots, capsys):
    # Its older clip is still in the folder.
    shots.add("c")
    shots.add_failed("c")
    words = ["film", "out", "--ids", "a,x", "--ids", "b,c"]
    assert main(words) == 1
    message = capsys.readouterr().err
    assert "2 of 4 shots are not finished:\n  x: not finished in " in message
    assert "\n  c: failed in svd: out of memory\n" in message
    assert "--skip-missing" in message
    assert main([*words, "--skip-missing", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shots"] == 2
    assert main(["film", "out", "--captions", "burn", "--ids", "b"]) == 0
    assert "vidgen: no shot has a caption; set `caption` in the metadata" in capsys.readouterr().err


def test_wrong_arguments_are_explained(shots, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip = shots.add("a").relative_to(tmp_path)
    for arguments, code, message in (
        ("out --size 10", 3, "film, size: got '10', must be WIDTHxHEIGHT, such as 1280x720"),
        ("out --transition wipe", 3, "film, transition: got 'wipe', must be 'cut' or 'fade'"),
        ("out -o film.avi", 2, "film: got 'film.avi', must end in .mp4"),
        ("out --film none.yaml", 3, "none.yaml: got the file, must be readable (No such file or directory)"),
        ("out --ids ,", 2, "--ids: got no ids"),
        (f"out -o {clip}", 2, "would replace a source"),
    ):
        assert main(["film", *arguments.split()]) == code
        assert message in capsys.readouterr().err


def test_film_file_is_read_with_paths_relative_to_it(tmp_path):
    (tmp_path / "sea.wav").write_bytes(b"")
    (tmp_path / "film.yaml").write_text(
        "title: Sea\nsize: 1280x720\nfps: 30000/1001\nmusic: sea.wav\nshots: [{title: One}, {id: a}]\n"
    )
    settings = film_settings(read_film_file(tmp_path / "film.yaml"), "x")
    assert (settings.title, settings.size, settings.fps) == ("Sea", PixelSize(1280, 720), Fraction(30000, 1001))
    assert settings.music == tmp_path / "sea.wav"
    assert [(entry.title, entry.id) for entry in settings.shots] == [("One", None), (None, "a")]


def test_film_file_errors_name_file_field_and_what_is_allowed(tmp_path):
    file = tmp_path / "film.yaml"
    for text, message in (
        ("size: 1281x720", "film.yaml, size: got '1281x720', must be even numbers"),
        ("fps: 0", "film.yaml, fps: got 0, must be frames per second from 1 to 240"),
        ("music: no.mp3", "must be an existing file (looked for "),
        ("music: s3://clips/sea.mp3", "must be a file on this machine; URLs are not read, download it first"),
        ("shots: [{id: a, title: b}]", "film.yaml, shots[0]: got the fields, must have either id"),
        ("shots: [{id: a, colour: b}]", "film.yaml, shots[0].colour: got an unknown field, must be one of caption"),
        ("musik: a.mp3", "film.yaml, musik: got an unknown field, did you mean music?"),
        ("- a", "film.yaml: got list, must be fields"),
        ("title: a\ntitle: b", "duplicate key 'title'"),
    ):
        file.write_text(text)
        with pytest.raises(ScriptError, match=re.escape(message)):
            read_film_file(file)


def test_metadata_of_a_shot_may_have_other_keys(tmp_path):
    assert shot_settings({"caption": "Hi", "scene": 3}, "shot a").caption == "Hi"
    (tmp_path / "n.wav").write_bytes(b"")
    with pytest.raises(ScriptError, match="got both narration and voice"):
        film_settings({"narration": tmp_path / "n.wav", "voice": "espeak-ng:en"}, "vidgen film")
