"""Output folder in an object store, tested against a local S3 server (moto)."""

import io
import logging
import os
import re
import threading
from contextlib import closing

import boto3
import numpy as np
import pytest

from tests.fake_stages import use_fakes
from tests.outputs.test_outputs import commit
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs import object_storage
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.object_storage import MARKER, ObjectStorage
from vidgen_ray.outputs.records import shot_path
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.system.cache_dir import cache_dir


@pytest.fixture
def outputs(url):
    return OutputFolder(url)


def workspaces():
    return set((cache_dir() / "unfinished").iterdir())


def test_shot_has_the_same_bytes_as_on_disk_and_is_not_rendered_twice(tiny, make_shot, url, outputs, tmp_path, monkeypatch):
    shot = make_shot(id="ball", num_frames=2)
    with closing(use_fakes(VideoGenerationPipeline(tiny, tmp_path))) as pipeline:
        local = pipeline.render(shot)
    with closing(use_fakes(VideoGenerationPipeline(tiny, url))) as pipeline:
        remote = pipeline.render(shot)
        assert remote.files == local.files
        assert set(remote.files) == {"image.png", "video.mp4", "hd.mp4"}
        for name in remote.files:
            assert outputs.read("ball", name) == (tmp_path / shot_path("ball") / name).read_bytes()
        assert str(outputs.place("ball", "hd.mp4")) == f"{outputs.url}/{shot_path('ball')}/hd.mp4"

        monkeypatch.setattr(OutputFolder, "draft", lambda *_: pytest.fail("rendered twice"))
        pipeline.render(shot)
    assert not [path for path in workspaces() if f"-{os.getpid()}-" in path.name]


def test_damaged_cache_entry_is_dropped(outputs):
    cache, frames = outputs.stage_cache, np.zeros((2, 16, 16, 3), np.uint8)
    for digit, damage in enumerate(("none", "truncated", "deleted", "incomplete")):
        key = str(digit) * 64
        entry = f"cache/{key[:2]}/{key}"
        cache.put(key, {"frames": frames})
        assert set(outputs.storage.files(entry)) == {"frames.mkv", "entry.json", MARKER}
        if damage == "truncated":
            outputs.storage.write(f"{entry}/frames.mkv", outputs.storage.read(f"{entry}/frames.mkv")[:100])
        elif damage != "none":
            outputs.storage.delete(f"{entry}/{'frames.mkv' if damage == 'deleted' else MARKER}")
        found = cache.get(key, ["frames"])
        assert (found is None, cache.has(key)) == (damage != "none", damage == "none"), damage
        if found is not None:
            np.testing.assert_array_equal(found["frames"], frames)


def test_commit_killed_between_uploads_leaves_the_shot_unfinished(outputs, plan_of, monkeypatch):
    plan, upload, files = plan_of("x"), ObjectStorage._upload, ("hd.mp4", "image.png")
    monkeypatch.setattr(object_storage, "MAX_UPLOADS", 1)
    for uploads in range(3):
        commit(outputs, plan)
        assert outputs.find_finished(plan)
        uploaded = []

        def upload_or_end(*args, uploads=uploads, uploaded=uploaded):
            if len(uploaded) == uploads:
                raise KeyboardInterrupt
            uploaded.append(upload(*args))

        with monkeypatch.context() as patched:
            patched.setattr(ObjectStorage, "_upload", upload_or_end)
            with pytest.raises(KeyboardInterrupt):
                commit(outputs, plan, files)
        assert outputs.find_finished(plan) is None, uploads
    record = commit(outputs, plan, files)
    assert outputs.find_finished(plan) == record
    assert set(outputs.storage.files(shot_path("x"))) == {*files, "shot.json"}


def test_failed_upload_raises_os_error_without_credentials(endpoint):
    outputs = OutputFolder(f"s3://KEY:SECRET@nowhere/x?endpoint={endpoint}")
    with pytest.raises(SetupError, match="output folder s3://nowhere/x: cannot be written") as error:
        outputs.prepare()
    assert "SECRET" not in str(error.value)
    for size in (10, 12 << 20):
        with pytest.raises(OSError, match="bucket does not exist"):
            outputs.storage.write("hd.mp4", bytes(size))


def test_missing_credentials_are_named(endpoint, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # No instance role.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    object_storage._aws_files.cache_clear()
    with pytest.raises(SetupError, match=r"s3://clips/x: cannot be written .no credentials: set AWS_ACCESS_KEY_ID"):
        OutputFolder(f"s3://clips/x?endpoint={endpoint}").prepare()
    object_storage._aws_files.cache_clear()


def test_region_of_a_bucket_is_found(endpoint, monkeypatch):
    monkeypatch.setattr(object_storage, "S3_ADDRESS", endpoint)
    paris = boto3.client("s3", endpoint_url=endpoint, region_name="eu-west-3")
    paris.create_bucket(Bucket="in-paris", CreateBucketConfiguration={"LocationConstraint": "eu-west-3"})
    assert OutputFolder("s3://in-paris/x").storage._store.config["region"] == "eu-west-3"
    assert OutputFolder("s3://in-paris/x?region=us-east-2").storage._store.config["region"] == "us-east-2"
    monkeypatch.setattr(object_storage, "S3_ADDRESS", "http://127.0.0.1:9")
    assert "region" not in OutputFolder("s3://elsewhere/x").storage._store.config


def test_commit_of_a_new_shot_waits_for_three_requests(outputs, plan_of, monkeypatch):
    """The listing of its folder, the uploads, which run at once in one request each, and the record."""
    outputs.prepare()
    files = ("image.png", "video.mp4", "hd.mp4")
    together = threading.Barrier(len(files) + 1, timeout=60)
    upload, log, server = ObjectStorage._upload, io.StringIO(), logging.getLogger("werkzeug")

    def upload_together(self, file, path):
        if not path.endswith("shot.json"):
            together.wait()
        upload(self, file, path)

    monkeypatch.setattr(ObjectStorage, "_upload", upload_together)
    handler = logging.StreamHandler(log)
    server.addHandler(handler)
    commit(outputs, plan_of("x"), files)
    server.removeHandler(handler)
    # A multipart upload takes three requests.
    assert re.findall(r"([A-Z]+) /", log.getvalue()) == ["GET", *["PUT"] * (1 + len(files)), "PUT"]
