"""Batch runs with changed inputs and with cache modes, on a real Ray."""

import shutil

import pytest
import ray

from tests.batch.test_batch import Events
from tests.batch.test_faults import ONE_GPU, profile, render_lines, shots  # noqa: F401  # `profile` is a fixture
from tests.conftest import ASTRONAUT, SYNTHETIC
from vidgen_ray.engine.ray_cluster import init_local_ray
from vidgen_ray.media import read_image, write_png


@pytest.fixture(scope="module", autouse=True)
def own_ray():
    init_local_ray(num_cpus=16, num_gpus=1, log_to_driver=False)
    yield
    ray.shutdown()


def test_photo_replaced_during_the_run_fails_only_its_line(tmp_path, profile):  # noqa: F811
    photo = tmp_path / "photo.jpg"
    shutil.copy(ASTRONAUT, photo)
    lines = [*shots(4), {"id": "face", "prompt": "a", "face_image": str(photo), "consent": SYNTHETIC}]

    class ReplacePhoto(Events):
        def on_lines(self, *counts):
            """All lines are planned, none is rendered."""
            write_png(photo, read_image(photo)[:, ::-1])

    report, rows = render_lines(tmp_path, profile, lines, ReplacePhoto(), gpus=ONE_GPU)
    row = rows["face"]
    assert (report.done, report.failed) == (4, 1), row
    assert (row.failure_stage, row.failure_error) == ("instantid", "InputChanged")
    assert "photo.jpg: changed since the run planned this shot; render the line again" in row.failure_message
    report, rows = render_lines(tmp_path, profile, lines, gpus=ONE_GPU)
    assert (report.done, rows["face"].status) == (1, "done")


@pytest.mark.parametrize(("mode", "files"), [("none", set()), ("images", {"image.png"}), ("all", {"image.png", "frames.mkv"})])
def test_cache_mode(tmp_path, profile, mode, files):  # noqa: F811
    report, _ = render_lines(tmp_path, profile, shots(4), gpus=ONE_GPU, cache=mode)
    assert report.done == 4
    kept = [file.name for file in (tmp_path / "out").glob("cache/*/*/*")]
    assert (set(kept), len(kept)) == (files, 4 * len(files)), "what was queued is written when the run ends"
