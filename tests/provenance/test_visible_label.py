"""Visible label: in the lower right corner of every frame, the rest of the pixels unchanged."""

import numpy as np
import pytest

from tests.provenance.test_metadata import FRAMES, plan_of, write_shot
from vidgen_ray.cli import main
from vidgen_ray.errors import MediaError
from vidgen_ray.media import open_video, read_image
from vidgen_ray.provenance.record import ProvenanceSettings, labelled

LABEL = "AI-generated"


@pytest.mark.parametrize("size", [(64, 96), (576, 1024), (1080, 608)])
def test_label_is_readable_in_the_corner_and_nowhere_else(size):
    frames = np.full((2, *size, 3), 120, np.uint8)
    result = labelled(frames, LABEL)
    assert (frames == 120).all()
    changed = (result != frames).any((0, 3))
    rows, columns = np.nonzero(changed)
    assert rows.max() == size[0] - 1
    assert columns.max() == size[1] - 1
    assert rows.min() >= size[0] * 0.7
    assert (result[0] == result[1]).all()
    box = result[0][rows.min() :, columns.min() :]
    # White letters on a dark box.
    assert box.max() > 240
    assert np.median(box) < 60
    assert changed[rows.min() :, columns.min() :].mean() > 0.95


def test_label_that_does_not_fit_or_has_no_letters_is_an_error():
    with pytest.raises(MediaError, match="too long for 32×32 pixels"):
        labelled(np.zeros((1, 32, 32, 3), np.uint8), LABEL)
    with pytest.raises(MediaError, match="the font has no letter"):
        labelled(np.zeros((1, 576, 1024, 3), np.uint8), "\u6f22")


def test_files_of_a_shot_carry_the_label_and_have_their_own_key(tiny, make_shot, tmp_path):
    shot = make_shot(num_frames=FRAMES, scale=2)
    plain = write_shot(tiny, shot, tmp_path / "plain")
    settings = ProvenanceSettings(label=LABEL)
    folder = write_shot(tiny, shot, tmp_path / "labelled", settings)
    without, image = read_image(plain / "image.png"), read_image(folder / "image.png")
    assert (image == labelled(without[None], LABEL)[0]).all()
    for name in ("video.mp4", "hd.mp4"):
        with open_video(plain / name) as before, open_video(folder / name) as after:
            difference = np.abs(before.frames(0, FRAMES).astype(int) - after.frames(0, FRAMES))
            height, width = difference.shape[1:3]
            assert difference[:, -8:, -40:].mean() > 20
            assert difference[:, : height // 2, : width // 2].mean() < difference[:, -8:, -40:].mean() / 4
    assert plan_of(tiny, shot, settings).key != plan_of(tiny, shot).key


def test_command_refuses_a_label_of_several_lines(tmp_path, capsys):
    assert main(["shot", "a", "--label", "a\nb", "-o", str(tmp_path)]) == 2
    assert "--label: got 'a\\nb', must be one line" in capsys.readouterr().err
