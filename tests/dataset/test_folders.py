"""The output folders of these tests are like those of a run."""

from unittest.mock import ANY

from tests.dataset.conftest import make_folder, moving, texture
from vidgen_ray.media import open_video
from vidgen_ray.outputs.manifest import FinishedShots, read_manifest
from vidgen_ray.outputs.verify import VerifyReport, verify


def test_folder_has_rows_records_and_files(tmp_path):
    face = {"face_image": ("examples/faces/astronaut.jpg",), "consent": {"subject": "s", "basis": "synthetic"}}
    clips = [
        ({"id": "clip", "metadata": {"character": "ada"}, **face}, moving(9)),
        ({"id": "image"}, texture(64, 96)),
        ({"id": "bad"}, None),
    ]
    outputs = make_folder(tmp_path / "out", clips)
    rows = {row.id: row for row in read_manifest(outputs.root)}
    assert {name: row.status for name, row in rows.items()} == {"clip": "done", "image": "done", "bad": "failed"}
    with open_video(outputs.root / rows["clip"].video) as video:
        assert (video.width, video.height, video.frame_count, float(video.fps)) == (192, 128, 9, rows["clip"].fps)
    assert rows["image"].video is None
    assert outputs.find_by_id("clip").key == rows["clip"].key
    assert len(FinishedShots.load(outputs)) == 2
    make_folder(tmp_path / "out", [({"id": "bad", "hd": moving(4, size=(128, 128))}, moving(4, size=(64, 64)))])
    assert {row.id for row in read_manifest(outputs.root) if row.hd_video} == {"bad"}
    assert verify(outputs) == VerifyReport(shots=3, bytes=ANY)
