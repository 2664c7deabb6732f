"""Limits inside a request and between tenants: memory, JSON, error messages, stored bytes, expiry and shared results."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import yaml
from starlette.testclient import TestClient

from tests.conftest import ASTRONAUT
from tests.decoded import frames_of
from tests.online.directors import LOCAL, listening_on_a_port, local_server
from tests.online.test_api_limits import png
from tests.online.test_api_videos import SMALL, ended, error_of, made
from vidgen_ray.errors import MediaError
from vidgen_ray.media import image_size, read_image, verify_image
from vidgen_ray.online import uploads
from vidgen_ray.online.auth import hash_key
from vidgen_ray.online.server_settings import OnlineSettings

DAY_S = 24 * 3600


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "JSON_VALUES", 1000)
        with local_server(tiny, settings_with_keys(folder)) as running:
            yield running


def settings_with_keys(folder, **settings) -> OnlineSettings:
    keys = [{"tenant": name, "sha256": hash_key(f"vg-{name}")} for name in ("ada", "bob")]
    keys.append({"tenant": "full", "sha256": hash_key("vg-full"), "limits": {"stored_bytes": 10_000}})
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    return OnlineSettings(profile="tiny", data=str(folder / "out"), keys_file=folder / "keys.yaml", **settings)


def client_of(server, tenant="ada") -> TestClient:
    headers = {"Authorization": f"Bearer vg-{tenant}"}
    return TestClient(server.app, base_url="http://videos.example", headers=headers, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


# JSON and forms


def test_json_structure_inside_strings_does_not_count_as_depth(client):
    prompt = '\\"' * 20 + "[{" * 60 + '\\\\" ]'
    assert client.post("/v1/videos", json={**SMALL, "prompt": prompt}).json()["prompt"] == prompt


# Memory


def most_threads_in(monkeypatch, name, wait=lambda: None):
    """Count the threads that are in a function of `uploads` at once. Return a list whose only item is their maximum."""
    function, threads, most, lock = getattr(uploads, name), 0, [0], threading.Lock()

    def counted(*args):
        nonlocal threads
        with lock:
            threads += 1
            most[0] = max(most[0], threads)
        wait()
        try:
            return function(*args)
        finally:
            with lock:
                threads -= 1

    monkeypatch.setattr(uploads, name, counted)
    return most


def post_at_once(server, path, requests):
    """Send requests with these arguments at once. Return the statuses."""
    with listening_on_a_port(server.app) as url, ThreadPoolExecutor(len(requests)) as pool:
        headers = {"Authorization": "Bearer vg-ada"}
        return [*pool.map(lambda body: httpx.post(url + path, **body, headers=headers, timeout=60).status_code, requests)]


def test_images_are_decoded_one_at_a_time(server, monkeypatch):
    most = most_threads_in(monkeypatch, "verify_image")
    files = [{"files": {"file": ("a.png", png() + bytes([number]))}} for number in range(6)]
    assert post_at_once(server, "/v1/files", files) == [200] * 6
    assert most == [1]


def test_large_urlencoded_forms_are_decoded_one_at_a_time(server, monkeypatch):
    read_body, received, all_received = uploads._read_body, [], threading.Event()

    async def read(*args):
        body = await read_body(*args)
        received.append(body)
        if len(received) == 4:
            all_received.set()
        return body

    monkeypatch.setattr(uploads, "_read_body", read)
    most = most_threads_in(monkeypatch, "_from_urlencoded", lambda: all_received.wait(60))
    form = {"data": {**SMALL, "size": "1x1", "prompt": "é" * 9_000}}
    assert post_at_once(server, "/v1/videos", [form] * 4) == [400] * 4
    assert most == [1]


def test_image_size_and_verification_agree_with_decoding(tmp_path):
    from PIL import Image

    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    assert image_size(path) == read_image(path).shape[:2] == (30, 20)
    verify_image(path)
    path.write_bytes(ASTRONAUT.read_bytes()[:-2000])
    assert image_size(path)
    with pytest.raises(MediaError):
        verify_image(path)


# Stored files


def test_stored_bytes_of_a_tenant_are_limited(server):
    full = client_of(server, "full")
    ids = [full.post("/v1/files", files={"file": ("a", png(side, side))}).json()["id"] for side in (64, 65)]
    # Small files count as 4096 bytes.
    again = full.post("/v1/files", files={"file": ("a", png(64, 64))})
    assert again.json()["id"] == ids[0]
    refused = full.post("/v1/videos", data=SMALL, files={"input_reference": ("a", png(66, 66))})
    error = error_of(refused, 413)
    assert error["code"] == "storage_full"
    assert "may use 10000" in error["message"]
    assert full.delete(f"/v1/files/{ids[0]}").status_code == 200
    assert full.post("/v1/files", files={"file": ("a", png(66, 66))}).status_code == 200
    assert client_of(server, "bob").post("/v1/files", files={"file": ("a", png(67, 67))}).status_code == 200


def test_unused_uploads_expire(tiny, tmp_path, database_url):
    settings = OnlineSettings(profile="tiny", data=str(tmp_path), database=database_url, uploads={"unused_s": 5 * DAY_S})
    with local_server(tiny, settings) as server:
        client = TestClient(server.app, **LOCAL)
        folder, records = server.app.state.server.job_service.uploads, server.store.uploads
        sides = {"unused": 64, "used": 65, "queued": 66}
        ids = {
            name: client.post("/v1/files", files={"file": ("a", png(side, side))}).json()["id"] for name, side in sides.items()
        }
        ids["character"] = client.post(
            "/v1/videos/characters", data={"name": "Me"}, files={"image": ("a", ASTRONAUT.read_bytes())}
        ).json()["photos"][0]
        server.director.held.set()
        made(client, input_reference={"file_id": ids["queued"]})
        now = records._now
        records._now = lambda: now() + 4 * DAY_S
        folder.expire()
        assert {name for name, each in ids.items() if records.get(each, "local")} == set(ids)
        job = made(client, input_reference={"file_id": ids["used"]})
        client.post(f"/v1/videos/{job['id']}/cancel")
        records._now = lambda: now() + 6 * DAY_S
        folder.expire(retention_s=60 * DAY_S)
        left = {name for name, each in ids.items() if records.get(each, "local")}
        assert left == {"used", "queued", "character"}
        assert {path.name for path in (tmp_path / "inputs").iterdir()} == {ids[name].removeprefix("file-") for name in left}
        records._now = lambda: now() + 8.5 * DAY_S
        folder.expire(retention_s=2 * DAY_S)
        assert {name for name, each in ids.items() if records.get(each, "local")} == {"queued", "character"}


# Tenants


@pytest.mark.parametrize("shared", [False, True])
def test_another_tenants_result_is_reused_only_if_allowed(tiny, tmp_path, shared):
    with local_server(tiny, settings_with_keys(tmp_path, share_results_between_tenants=shared)) as server:
        ada, bob = client_of(server, "ada"), client_of(server, "bob")
        first = ended(ada, made(ada, seed=1)["id"])
        assert first["status"] == "completed"
        server.director.held.set()
        assert made(ada, seed=1)["status"] == "completed"
        assert made(bob, seed=1)["status"] == ("completed" if shared else "queued")
        server.director.held.clear()
        server.director.wake()
        (own,) = [video["id"] for video in bob.get("/v1/videos").json()["data"]]
        assert ended(bob, own)["status"] == "completed"
        assert len(server.director.rendered) == (1 if shared else 2)
        answers = [client.get(f"/v1/videos/{video}/content") for client, video in ((ada, first["id"]), (bob, own))]
        np.testing.assert_array_equal(*(frames_of(answer.content) for answer in answers))


def test_queued_job_keeps_its_key_when_the_setting_changes(tiny, tmp_path):
    with local_server(tiny, settings_with_keys(tmp_path, share_results_between_tenants=True)) as server:
        server.director.held.set()
        video = made(client_of(server), seed=1)
    with local_server(tiny, settings_with_keys(tmp_path)) as server:
        client = client_of(server)
        assert ended(client, video["id"])["status"] == "completed"
        assert client.get(f"/v1/videos/{video['id']}/content").status_code == 200
