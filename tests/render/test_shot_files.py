"""Files of a cropped shot: exact sizes, the middle of the whole frames, the same bytes however they are written."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.fake_stages import plan_of
from vidgen_ray.errors import MediaError, ScriptError
from vidgen_ray.media.decode import open_video
from vidgen_ray.media.images import read_image
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.profile import ProvenanceSettings
from vidgen_ray.render.shot_files import ShotFiles, write_clip
from vidgen_ray.render.step_runner import ForeignArtefacts
from vidgen_ray.script.check import check_shot
from vidgen_ray.stages.base import Artefacts, Item

FRAMES = 4


def shot_files(tiny, shot, folder: Path) -> tuple[dict[str, np.ndarray], Path]:
    """Write random pixels as the files of a shot, the larger clip in two chunks. Return the pixels and the folder."""
    random = np.random.default_rng(0)
    outputs = OutputFolder(folder)
    outputs.prepare()
    plan = plan_of(tiny, shot)
    image = random.integers(0, 256, (shot.height, shot.width, 3), np.uint8)
    frames = random.integers(0, 256, (FRAMES, shot.height, shot.width, 3), np.uint8)
    pixels = {"image.png": image, "video.mp4": frames}
    plain = ProvenanceSettings(metadata="off")
    files = ShotFiles(plan, Item(shot, Artefacts(image=image, frames=frames)), outputs, tiny.encode, provenance=plain)
    if shot.upscale_video:
        hd = random.integers(0, 256, (FRAMES, shot.height * shot.scale, shot.width * shot.scale, 3), np.uint8)
        pixels["hd.mp4"] = hd
        files.add(Artefacts(hd_frames=hd[:3], chunk=(0, 3)))
        with pytest.raises(ForeignArtefacts, match="must begin with frame 3"):
            files.add(Artefacts(hd_frames=hd[4:], chunk=(4, FRAMES)))
        files.add(Artefacts(hd_frames=hd[:3], chunk=(0, 3)))  # delivered twice
        files.add(Artefacts(hd_frames=hd[3:], chunk=(3, FRAMES)))
    files.commit([])
    files.close()
    return pixels, next(folder.rglob("image.png")).parent


@pytest.mark.parametrize(
    ("fields", "sizes"),
    [
        ({"scale": 3, "crop_width": 322, "crop_height": 182}, {"image.png": (108, 60), "hd.mp4": (322, 182)}),
        ({"upscale_video": False, "crop_width": 90, "crop_height": 50}, {"image.png": (90, 50), "video.mp4": (90, 50)}),
    ],
)
def test_files_are_the_middle_of_the_whole_frames(tiny, make_shot, tmp_path, fields, sizes):
    shot = make_shot(width=128, height=64, num_frames=FRAMES, **fields)
    pixels, folder = shot_files(tiny, shot, tmp_path / "out")
    for name, size in {"video.mp4": sizes["image.png"], **sizes}.items():
        (width, height), whole = size, pixels[name]
        top, left = (whole.shape[-3] - height) // 2, (whole.shape[-2] - width) // 2
        middle = whole[..., top : top + height, left : left + width, :]
        if name == "image.png":
            assert (read_image(folder / name) == middle).all()
            continue
        write_clip(tmp_path / "expected.mp4", [middle], shot.fps, tiny.encode)
        assert (folder / name).read_bytes() == (tmp_path / "expected.mp4").read_bytes()
        with open_video(folder / name) as clip:
            assert (clip.width, clip.height) == size


def test_error_of_a_chunk_is_not_replaced_by_that_of_the_unfinished_clip(tiny, make_shot, tmp_path):
    shot = make_shot(width=128, height=64, num_frames=FRAMES, scale=2)
    outputs = OutputFolder(tmp_path)
    outputs.prepare()
    plan = plan_of(tiny, shot)
    frames = np.zeros((FRAMES, shot.height, shot.width, 3), np.uint8)
    files = ShotFiles(plan, Item(shot, Artefacts(image=frames[0], frames=frames)), outputs, tiny.encode)
    with pytest.raises(MediaError, match="must be uint8"), closing(files):
        files.add(Artefacts(hd_frames=frames, chunk=(0, len(frames))))
    assert not list(tmp_path.rglob("*.mp4"))


def test_crop_changes_the_key_of_the_files_only(tiny, make_shot):
    crops = ({}, {"crop_width": 64}, {"crop_height": 64})
    whole, cropped, other = (plan_of(tiny, make_shot(**crop)) for crop in crops)
    assert len({whole.key, cropped.key, other.key}) == 3
    assert whole.steps == cropped.steps == other.steps


def test_invalid_crop_is_rejected(tiny):
    for fields, message in (
        ({"crop_width": 101}, "crop_width: got 101, must be a multiple of 2"),
        ({"crop_width": 258}, "crop_width: got 258, must be at most 256, the width of the finished clip or image"),
        ({"crop_height": 66, "upscale_video": False}, "crop_height: got 66, must be at most 64, the height"),
    ):
        with pytest.raises(ScriptError, match=message):
            check_shot({"prompt": "a", **fields}, "test", tiny.defaults)
