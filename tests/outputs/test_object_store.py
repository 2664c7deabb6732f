"""Output folder in an object store, tested against a local S3 server (moto)."""

import io
import logging
import os
import re
import threading
from contextlib import closing
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.s3.responses import S3Response

from tests.fake_stages import use_fakes
from tests.film.conftest import Shots, tone
from tests.outputs.test_outputs import commit
from vidgen_ray.cli import main
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs import object_storage
from vidgen_ray.outputs.cleanup import collect_garbage
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.object_storage import MARKER, ObjectStorage
from vidgen_ray.outputs.records import shot_path
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.system.cache_dir import cache_dir


@pytest.fixture
def outputs(url):
    return OutputFolder(url)


def objects(outputs):
    """Return path -> size in bytes of all stored objects, except that with the number of the last lease."""
    stored = {meta["path"]: meta["size"] for page in outputs.storage._store.list() for meta in page}
    return {path: size for path, size in stored.items() if not path.startswith(".lease-")}


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


@pytest.mark.parametrize("uploads", range(3))
def test_commit_killed_between_uploads_leaves_the_shot_unfinished(outputs, plan_of, uploads, monkeypatch):
    plan, upload, uploaded = plan_of("x"), ObjectStorage._upload, []
    commit(outputs, plan)
    assert outputs.find_finished(plan)

    def upload_or_end(*args):
        if len(uploaded) == uploads:
            raise KeyboardInterrupt
        uploaded.append(upload(*args))

    monkeypatch.setattr(object_storage, "MAX_UPLOADS", 1)
    with monkeypatch.context() as patched:
        patched.setattr(ObjectStorage, "_upload", upload_or_end)
        with pytest.raises(KeyboardInterrupt):
            commit(outputs, plan, ("hd.mp4", "image.png"))
    assert outputs.find_finished(plan) is None
    record = commit(outputs, plan, ("hd.mp4", "image.png"))
    assert outputs.find_finished(plan).record() == record
    assert set(outputs.storage.files(shot_path("x"))) == {"hd.mp4", "image.png", "shot.json"}


def test_film_of_shots_in_an_object_store(url, outputs, tmp_path, capsys):
    shots = Shots(tmp_path / "out")
    for shot_id in ("a", "b"):
        shots.add(shot_id, sound=tone(1))
    assert main(["film", str(shots.root), "-o", str(tmp_path / "local.mp4")]) == 0
    for file in filter(Path.is_file, shots.root.rglob("*")):
        outputs.storage.write(file.relative_to(shots.root).as_posix(), file.read_bytes())
    assert main(["film", url, "-o", str(tmp_path / "film.mp4")]) == 0
    assert (tmp_path / "film.mp4").read_bytes() == (tmp_path / "local.mp4").read_bytes()
    capsys.readouterr()
    assert main(["film", url, "-o", "s3://clips/film.mp4"]) == 2
    assert "got 's3://clips/film.mp4', must be a file on this machine" in capsys.readouterr().err


def test_interrupted_upload_keeps_the_old_object(outputs):
    def write_and_interrupt():
        with outputs.storage.new_file("failures.jsonl") as path:
            path.write_text("ha")
            raise KeyboardInterrupt

    outputs.storage.write("failures.jsonl", "whole")
    with pytest.raises(KeyboardInterrupt):
        write_and_interrupt()
    assert outputs.storage.read("failures.jsonl") == b"whole"


def test_collect_garbage_removes_unreferenced_objects(plan_of, outputs):
    record = commit(outputs, plan_of("ball"))
    before = objects(outputs)
    entry, partial, foreign = (
        f"cache/ab/{'ab' * 32}/image.png",
        f"{shot_path('partial')}/image.png",
        f"{shot_path('mine')}/notes.txt",
    )
    for path in (entry, partial, foreign):
        outputs.storage.write(path, "12345")
    assert collect_garbage(outputs).left_young == 2
    assert set(objects(outputs)) - set(before) == {entry, partial, foreign}
    report = collect_garbage(outputs, grace_s=-1)
    assert report.counts == {"cache entries": 1, "partial shots": 1, "stale keys": 0, "temporaries": 0}
    assert report.bytes == 10
    assert objects(outputs) == {**before, foreign: 5}
    assert set(record.files) <= set(outputs.storage.files(shot_path("ball")))


def test_write_errors_do_not_leak_credentials(endpoint):
    outputs = OutputFolder(f"s3://KEY:SECRET@nowhere/x?endpoint={endpoint}")
    with pytest.raises(SetupError, match="output folder s3://nowhere/x: cannot be written") as error:
        outputs.prepare()
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("size", [10, 12 << 20])
def test_failed_upload_raises_os_error(endpoint, size):
    storage = OutputFolder(f"s3://nowhere/x?endpoint={endpoint}").storage
    with pytest.raises(OSError, match="bucket does not exist"):
        storage.write("hd.mp4", bytes(size))


@pytest.fixture
def no_credentials(monkeypatch):
    """No credentials in the environment, and no instance role."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    object_storage._aws_files.cache_clear()
    yield
    object_storage._aws_files.cache_clear()


def test_missing_credentials_are_named(endpoint, no_credentials):
    with pytest.raises(SetupError, match=r"s3://clips/x: cannot be written .no credentials: set AWS_ACCESS_KEY_ID"):
        OutputFolder(f"s3://clips/x?endpoint={endpoint}").prepare()


def test_credentials_and_region_of_the_aws_files_are_used(endpoint, no_credentials, tmp_path, monkeypatch):
    (tmp_path / "credentials").write_text("[films]\naws_access_key_id = FILMS\naws_secret_access_key = SECRET\n")
    (tmp_path / "config").write_text("[profile films]\nregion = eu-west-3\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "films")
    signatures, put = [], S3Response.put_object

    def record(self):
        signatures.append(self.headers["Authorization"])
        return put(self)

    monkeypatch.setattr(S3Response, "put_object", record)
    OutputFolder(f"s3://clips/x?endpoint={endpoint}").prepare()
    assert re.search(r"Credential=FILMS/\d+/eu-west-3/s3/", signatures[0])


def test_region_of_a_bucket_is_found(endpoint, monkeypatch):
    monkeypatch.setattr(object_storage, "S3_ADDRESS", endpoint)
    paris = boto3.client("s3", endpoint_url=endpoint, region_name="eu-west-3")
    paris.create_bucket(Bucket="in-paris", CreateBucketConfiguration={"LocationConstraint": "eu-west-3"})
    assert OutputFolder("s3://in-paris/x").storage._store.config["region"] == "eu-west-3"
    assert OutputFolder("s3://in-paris/x?region=us-east-2").storage._store.config["region"] == "us-east-2"
    monkeypatch.setattr(object_storage, "S3_ADDRESS", "http://127.0.0.1:9")
    assert "region" not in OutputFolder("s3://elsewhere/x").storage._store.config


def test_commit_of_a_new_shot_waits_for_three_requests(outputs, plan_of, monkeypatch):
    """The listing of its folder, the uploads, which run at once, and the record."""
    outputs.prepare()
    requests, files = [], ("image.png", "video.mp4", "hd.mp4")
    together = threading.Barrier(len(files) + 1, timeout=60)
    upload, listing = ObjectStorage._upload, ObjectStorage._listing

    def recorded_upload(self, file, path):
        requests.append(path)
        if not path.endswith("shot.json"):
            together.wait()
        upload(self, file, path)

    monkeypatch.setattr(ObjectStorage, "_upload", recorded_upload)
    monkeypatch.setattr(ObjectStorage, "_listing", lambda self, folder: requests.append("list") or listing(self, folder))
    monkeypatch.setattr(ObjectStorage, "delete", lambda *_: pytest.fail("nothing is there"))
    commit(outputs, plan_of("x"), files)
    assert requests[0] == "list"
    assert requests[-1].endswith("shot.json")
    assert len(requests) == 1 + len(files) + 2


def test_small_object_is_uploaded_in_one_request(outputs):
    """Three requests (multipart upload) would triple the cost and time of caching small images."""
    outputs.storage.folders("")
    log, server = io.StringIO(), logging.getLogger("werkzeug")
    handler = logging.StreamHandler(log)
    server.addHandler(handler)
    outputs.storage.write("a/b.json", "{}")
    server.removeHandler(handler)
    assert re.findall(r"([A-Z]+) /", log.getvalue()) == ["PUT"]
