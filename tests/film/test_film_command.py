"""`vidgen film`: options, film files, screenplays, messages and exit codes."""

import json
from importlib.metadata import EntryPoints

import pytest

from tests.film.conftest import BLUE, GREEN, Shots, read_frames
from vidgen_ray.cli import main, options


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
        "film: {size: 96x96, fps: 3}\n"
        "shots:\n"
        "  - {id: b, prompt: b}\n"
        # The photo was removed after the shot was rendered.
        "  - {id: a, prompt: a, face_image: removed.png, metadata: {caption: New}}\n"
    )
    assert main(["film", "out", "-o", "film.mp4", "--script", "story.yaml", "--fps", "12", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["size"], report["fps"], report["shots"]) == ("96x96", 12, 2)
    assert read_frames(tmp_path / "film.mp4")[0][48, 48].argmax() == 1  # green: b comes first
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
    assert "pip install 'vidgen-ray[dataset]'" in capsys.readouterr().err


def test_film_without_captions_to_burn_in_says_so(shots, capsys):
    assert main(["film", "out", "--captions", "burn"]) == 0
    assert "no shot has a caption" not in capsys.readouterr().err
    assert main(["film", "out", "--captions", "burn", "--ids", "b"]) == 0
    assert "vidgen: no shot has a caption; set `caption` in the metadata" in capsys.readouterr().err


def test_missing_shots_exit_with_1_and_the_list(shots, capsys):
    assert main(["film", "out", "--ids", "a,x", "--ids", "b"]) == 1
    message = capsys.readouterr().err
    assert "1 of 3 shots are not finished:\n  x: not finished in " in message
    assert "--skip-missing" in message
    assert main(["film", "out", "--ids", "a,x", "--ids", "b", "--skip-missing"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["out", "--size", "10"], 3, "film, size: got '10', must be WIDTHxHEIGHT, such as 1280x720"),
        (["out", "--transition", "wipe"], 3, "film, transition: got 'wipe', must be 'cut' or 'fade'"),
        (["out", "-o", "film.avi"], 2, "film: got 'film.avi', must end in .mp4"),
        (["nowhere"], 4, "nowhere: does not exist"),
        (["out", "--film", "none.yaml"], 3, "none.yaml: got the file, must be readable (No such file or directory)"),
        (["out", "--ids", ","], 2, "--ids: got no ids"),
    ],
)
def test_wrong_arguments_are_explained(shots, capsys, arguments, code, message):
    assert main(["film", *arguments]) == code
    assert message in capsys.readouterr().err
