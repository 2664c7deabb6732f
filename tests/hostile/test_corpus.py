"""Every hostile input is refused with one sentence that names it, or used; never a traceback, never code that runs."""

import json
from pathlib import Path

import pytest

from tests.hostile.images import IMAGES
from tests.hostile.scripts import LINES, PROFILES, SCRIPTS
from tests.hostile.videos import VIDEOS
from tests.hostile.weights import LORAS, UPSCALERS
from vidgen_ray.cli import main
from vidgen_ray.errors import MediaError, ProfileError, StageError
from vidgen_ray.media import open_video, read_image, verify_image
from vidgen_ray.media.decode import sample_frames
from vidgen_ray.nets.lora_header import check_lora_file
from vidgen_ray.profile import load_profile
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import read_script
from vidgen_ray.stages.realesrgan import load_network
from vidgen_ray.upscale.source import read_source


def assert_sentence(error, case, name):
    """Check the text of an error: one line without control characters that names the file and the reason."""
    text = str(error)
    assert name in text
    assert case.message in text
    assert text.isprintable(), text
    assert len(text) < 1000


@pytest.mark.parametrize("case", IMAGES, ids=str)
@pytest.mark.filterwarnings("error")
def test_image(tmp_path, case):
    path = tmp_path / "photo.png"
    case.build(path)
    if case.outcome == "used":
        verify_image(path)
        assert read_image(path).shape[2] == 3
        return
    for read in (read_image, verify_image):
        with pytest.raises(MediaError) as caught:
            read(path)
        assert_sentence(caught.value, case, "photo.png")


@pytest.mark.parametrize("case", VIDEOS, ids=str)
def test_video(tmp_path, case):
    path = tmp_path / "clip.mp4"
    case.build(path)

    for read in (read_all, read_source, read_as_a_child_process_does):
        if case.outcome == "used":
            read(path)
            continue
        with pytest.raises(MediaError) as caught:
            read(path)
        assert_sentence(caught.value, case, "clip.mp4")


def read_all(path, backend="auto"):
    with open_video(path, backend=backend) as video:
        assert len(video.frames(0, video.frame_count)) == video.frame_count > 0


def read_as_a_child_process_does(path):
    read_all(path, backend="pyav")


def test_video_in_a_child_process(tmp_path):
    for name in ("MP4 with 60% of its bytes", "odd size"):
        (case,) = (case for case in VIDEOS if case.name == name)
        case.build(tmp_path / "clip.mp4")
        if case.outcome == "used":
            assert {frame.shape for frame in sample_frames(tmp_path / "clip.mp4", 2, 900)} == {(41, 61, 3)}
            continue
        with pytest.raises(MediaError) as caught:
            list(sample_frames(tmp_path / "clip.mp4", 2, 900))
        assert_sentence(caught.value, case, "clip.mp4")


def test_weights(tmp_path):
    for cases, read in ((LORAS, check_lora_file), (UPSCALERS, load_network)):
        for case in cases:
            path = tmp_path / f"weights{case.ending or '.safetensors'}"
            case.build(path)
            with pytest.raises(StageError) as caught:
                read(path)
            assert_sentence(caught.value, case, path.name)
            path.unlink()
    assert not (tmp_path / "RAN").exists()


def test_profiles(tmp_path):
    for case in PROFILES:
        path = tmp_path / "p.yaml"
        case.build(path)
        with pytest.raises(ProfileError) as caught:
            load_profile(str(path))
        assert_sentence(caught.value, case, path.name)


@pytest.fixture
def validate(tmp_path, capsys):
    """Run `vidgen validate` on a script. Return its exit code and its messages without line breaks."""

    def run(path):
        code = main(["validate", str(path)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert all(char.isprintable() or char.isspace() for char in out + err)
        return code, " ".join((out + err).replace("│", " ").split())

    return run


@pytest.mark.parametrize("case", SCRIPTS, ids=str)
def test_script(tmp_path, validate, case):
    path = tmp_path / f"script{case.ending}"
    case.build(path)
    code, messages = validate(path)
    assert (code, case.message in messages) == (0 if case.outcome == "used" else 3, True), messages[:2000]
    assert len(messages) < 20_000


def test_lines(tmp_path, validate):
    """The lines before and after each one are valid, and the error names the line and the field."""
    script = tmp_path / "s.jsonl"
    script.write_text(as_script(LINES))
    read = read_script(ScriptSettings(script))
    errors = {line.number: line.errors[0] for line in read.rejected}
    for number, case in enumerate(LINES, start=1):
        error = errors.pop(2 * number, None)
        if case.outcome == "used":
            assert error is None, case
            continue
        assert error is not None, case
        assert error.field == case.field, case
        assert_sentence(error, case, f"s.jsonl line {2 * number}")
    assert not errors
    code, messages = validate(script)
    assert code == 3
    assert len(messages) < 50 * 350


def as_script(cases):
    """Return a JSONL script with a good line before, between and after the lines of the cases."""
    lines = [json.dumps({"id": "good-0", "prompt": "good"})]
    for number, case in enumerate(cases, start=1):
        hostile = case.build(Path())
        lines.append(hostile if isinstance(hostile, str) else json.dumps(hostile))
        lines.append(json.dumps({"id": f"good-{number}", "prompt": "good"}))
    return "".join(f"{line}\n" for line in lines)
