"""Every hostile input is refused with one sentence that names it, or used; never a traceback, never code that runs."""

import pytest

from tests.hostile.files import IMAGES, LORAS, UPSCALERS, VIDEOS
from tests.hostile.scripts import PROFILES, SCRIPTS
from vidgen_ray.cli import main
from vidgen_ray.errors import MediaError, ProfileError, StageError
from vidgen_ray.media import open_video, read_image, verify_image
from vidgen_ray.media.decode import sample_frames
from vidgen_ray.nets.weight_files import check_lora_file
from vidgen_ray.profile import load_profile
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
    (case,) = (case for case in VIDEOS if case.name == "MP4 with 60% of its bytes")
    case.build(tmp_path / "clip.mp4")
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


@pytest.mark.parametrize("case", SCRIPTS, ids=str)
def test_script(tmp_path, capsys, case):
    path = tmp_path / f"script{case.ending}"
    case.build(path)
    code = main(["validate", str(path)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert all(char.isprintable() or char.isspace() for char in out + err)
    messages = " ".join((out + err).replace("│", " ").split())
    assert (code, case.message in messages) == (0 if case.outcome == "used" else 3, True), messages[:2000]
    assert len(messages) < 20_000
