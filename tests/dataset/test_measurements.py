"""Built-in measurements on clips that are made for them, each with its tolerance. The clips are real H.264 files."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.conftest import ASTRONAUT
from tests.dataset.conftest import make_folder, moving, texture
from vidgen_ray.dataset.measurements import FaceScorer, HashScorer, MotionScorer, PixelScorer
from vidgen_ray.dataset.scorers import MEASURED_SIDE_PX, Clip, Networks, face_params
from vidgen_ray.media.decode import open_video
from vidgen_ray.media.encode import Mp4Settings, Mp4Writer
from vidgen_ray.media.images import read_image, write_png
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.profile import load_profile
from vidgen_ray.stages.instantid import InstantIDStage, measure_likeness, sampled_frames

FPS = 8


@pytest.fixture(scope="module")
def networks():
    return Networks(("flow",), None)


@pytest.fixture
def clip_of(tmp_path, networks):
    """Return a function that encodes frames as a run does, and returns them as a clip."""

    def make(frames: np.ndarray) -> Clip:
        # Without an ending, like a copy from an object store.
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        if frames.ndim == 3:
            write_png(path, frames)
        else:
            with Mp4Writer(path, frames.shape[2], frames.shape[1], FPS, Mp4Settings(threads=1)) as file:
                file.write(frames)
        name = "image.png" if frames.ndim == 3 else "video.mp4"
        return Clip({"clip": f"shots/00/a/{name}"}, path, networks, OutputFolder(tmp_path))

    return make


def pixels(clip):
    return PixelScorer(None).score(clip)


def test_black_and_blank_frames_duration_and_bitrate(clip_of):
    frames = moving(12)
    frames[2:5] = 0
    frames[6] = (40, 90, 200)
    clip = clip_of(frames)
    values = pixels(clip)
    assert (values["black_frames"], values["blank_frames"]) == (3, 4)
    assert values["file_duration_s"] == 12 / FPS
    assert values["file_kbps"] == pytest.approx(clip.path.stat().st_size * 8 / 1000 / 1.5, abs=0.1)
    dim = pixels(clip_of(moving(4) // 5))
    assert (dim["black_frames"], dim["blank_frames"]) == (0, 0)


def test_frozen_frames_are_counted_and_slow_motion_is_not_frozen(clip_of):
    frames = moving(12)
    frames[3:8] = frames[2]  # a run of 5
    frames[10] = frames[9]
    values = pixels(clip_of(frames))
    assert (values["frozen_frames"], values["frozen_longest"]) == (6, 5)
    still = texture(128, 192)
    slow = np.stack([cv2.warpAffine(still, np.float32([[1, 0, 0.2 * number], [0, 1, 0]]), (192, 128)) for number in range(9)])
    assert pixels(clip_of(slow))["frozen_frames"] == 0
    # A small thing that moves before a still background.
    alive = np.stack([still] * 9)
    for number in range(9):
        alive[number, 60:68, 20 + 2 * number : 28 + 2 * number] = 255
    assert pixels(clip_of(alive))["frozen_frames"] == 0


def test_flicker_is_the_amplitude_within_a_tenth_of_a_level_and_no_trend_or_cut(clip_of):
    for amplitude in (1, 10):
        signs = (-1) ** np.arange(9)
        frames = np.stack([(texture(128, 192) // 2 + 60 + amplitude * sign).astype(np.uint8) for sign in signs])
        assert pixels(clip_of(frames))["flicker"] == pytest.approx(amplitude, abs=0.1)
    fade = np.stack([(texture(128, 192) * share).astype(np.uint8) for share in np.linspace(0.3, 1, 9)])
    assert pixels(clip_of(fade))["flicker"] == 0
    cut = np.concatenate([moving(5) // 3, moving(5, seed=1)])
    assert pixels(clip_of(cut))["flicker"] < 0.2


def test_motion_is_exact_to_a_tenth_of_a_pixel(clip_of):
    """45 pixels of 256 are beyond inverse search alone, one pixel is below what RIFE alone measures."""
    width = 256
    for px in (0, 1, 12, 45):
        clip = clip_of(moving(3, px, (144, width)))
        values = MotionScorer(None).score(clip)
        inside = clip.flow.motion[:, :, px:] - np.array([-px, 0])
        assert np.hypot(inside[..., 0], inside[..., 1]).mean() < 0.1
        # At the border, where pixels come in, motion is a guess.
        assert values["motion"] == pytest.approx(px, abs=0.1 + 0.2 * px * px / width)
        assert values["motion_share"] == pytest.approx(values["motion"] / width, abs=1e-5)
        assert values["motion_worst"] >= values["motion"]
        assert values["cuts"] == 0
        assert values["similarity_worst"] > 0.7
    large = clip_of(moving(2, 6, (288, 1280)))
    assert max(large.frames.shape[1:3]) == MEASURED_SIDE_PX
    assert MotionScorer(None).score(large)["motion"] == pytest.approx(6, abs=0.3)


def test_cuts_are_counted_and_have_no_motion(clip_of):
    values = MotionScorer(None).score(clip_of(np.concatenate([moving(3), moving(3, seed=1), moving(3, seed=2)])))
    assert values["cuts"] == 2
    assert values["similarity_worst"] < 0.5
    assert values["motion"] == pytest.approx(3, abs=0.2)


def test_sharpness_falls_with_blur_and_not_with_size(clip_of):
    sharp = read_image(ASTRONAUT)[:256, :384]
    values = [
        pixels(clip_of(np.stack([cv2.GaussianBlur(sharp, (0, 0), sigma) if sigma else sharp] * 3)))["sharpness"]
        for sigma in (0, 1, 2)
    ]
    assert values[0] > 3 * values[1] > 9 * values[2] > 0
    large = cv2.resize(sharp, (768, 512), interpolation=cv2.INTER_CUBIC)
    assert pixels(clip_of(np.stack([large] * 3)))["sharpness"] == pytest.approx(values[0], rel=0.25)
    one_blurred = np.stack([sharp, cv2.GaussianBlur(sharp, (0, 0), 2), sharp])
    assert pixels(clip_of(one_blurred))["sharpness_worst"] == pytest.approx(values[2], rel=0.2)


def test_exposure_is_exact_to_a_level_and_a_hundredth(clip_of):
    frames = np.stack([cv2.cvtColor(texture(128, 192)[..., 0] // 4 + 80, cv2.COLOR_GRAY2RGB)] * 3)
    expected = frames.mean()
    assert pixels(clip_of(frames))["luma"] == pytest.approx(expected, abs=1)
    frames[:, :32], frames[:, 112:] = 0, 255
    values = pixels(clip_of(frames))
    assert (values["dark_share"], values["bright_share"]) == (pytest.approx(0.25, abs=0.01), pytest.approx(0.125, abs=0.01))


def test_image_has_no_values_of_a_clip(clip_of):
    clip = clip_of(texture(128, 192))
    values = pixels(clip)
    assert (values["black_frames"], values["flicker"]) == (0, None)
    assert not values.keys() & {"file_duration_s", "file_kbps", "frozen_frames"}
    assert MotionScorer(None).score(clip) == {}
    assert len(set(HashScorer(None).score(clip)["phash"])) == 1


def test_likeness_is_that_of_a_run(tmp_path, clip_of):
    profile = load_profile("demo").model_copy(deep=True)
    profile.actors["instantid"].options["detection_sizes_px"] = [320]
    networks = Networks(("faces",), profile)
    face = read_image(ASTRONAUT)[:256, 100:356]
    frames = np.stack([np.roll(face, number, 1) for number in range(3)])
    frames[2] = texture(256, 256)
    outputs = make_folder(
        tmp_path / "out",
        [({"id": "a", "face_image": (str(ASTRONAUT),), "consent": {"subject": "s", "basis": "synthetic"}}, frames)],
    )
    clip_path = outputs.shot_folder("a") / "video.mp4"
    row = {"face_image": [str(ASTRONAUT)], "face_index": None, "clip": str(clip_path.relative_to(outputs.root))}
    values = FaceScorer(None).score(Clip(row, clip_path, networks, outputs))
    stage = InstantIDStage(face_params(profile))
    stage.load()
    with open_video(clip_path) as video:
        sampled = video.frames_at(sampled_frames(video.frame_count))
    expected = measure_likeness(sampled, stage.features([read_image(ASTRONAUT)]), networks.faces)
    assert values["likeness_frames"] == pytest.approx(expected.similarities, abs=1e-4)
    assert (values["faces_max"], values["faces_mean"]) == (1, pytest.approx(2 / 3))
    assert values["likeness_frames"][2] is None
    assert values["likeness"] == pytest.approx(expected.mean, abs=1e-4)
    assert values["likeness_worst"] == pytest.approx(expected.worst, abs=1e-4)
    changed = Clip({**row, "face_image": [str(tmp_path / "gone.jpg")]}, Path(clip_path), networks, outputs)
    assert FaceScorer(None).score(changed).keys() == {"faces_mean", "faces_max"}
