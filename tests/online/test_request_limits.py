"""Limits inside a request and between tenants: memory, JSON, error messages, stored bytes, expiry and shared results."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.conftest import ASTRONAUT
from tests.decoded import frames_of
from tests.online.directors import LOCAL, SMALL, client_of, listening_on_a_port, local_server, settings_with_keys
from tests.online.test_api_limits import png
from tests.online.test_api_videos import ended, error_of, made
from vidgen_ray.media import image_size, read_image, verify_image
from vidgen_ray.online import uploads
from vidgen_ray.online.server_settings import OnlineSettings

DAY_S = 24 * 3600
TENANTS = {"ada": {}, "bob": {}, "full": {"limits": {"stored_bytes": 10_000}}}


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uploads, "JSON_VALUES", 1000)
        with local_server(tiny, settings_with_keys(tmp_path_factory.mktemp("server"), TENANTS)) as running:
            yield running


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def test_json_structure_inside_strings_does_not_count_as_depth(client):
    prompt = '\\"' * 20 + "[{" * 60 + '\\\\" ]'
    assert client.post("/v1/videos", json={**SMALL, "prompt": prompt}).json()["prompt"] == prompt


@pytest.mark.parametrize(
    ("name", "path", "requests", "status"),
    [
        ("verify_image", "/v1/files", [{"files": {"file": ("a.png", png() + bytes([number]))}} for number in range(4)], 200),
        ("_from_urlencoded", "/v1/videos", [{"data": {**SMALL, "size": "1x1", "prompt": "é" * 9_000}}] * 4, 400),
    ],
)
def test_images_and_large_forms_are_decoded_one_at_a_time(server, monkeypatch, name, path, requests, status):
    decode, lock, second, busy, most = getattr(uploads, name), threading.Lock(), threading.Event(), 0, 0

    def counted(*args):
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
            if busy == 2:
                second.set()
        second.wait(0.2)
        try:
            return decode(*args)
        finally:
            with lock:
                busy -= 1

    monkeypatch.setattr(uploads, name, counted)
    with listening_on_a_port(server.app) as url, ThreadPoolExecutor(4) as pool:
        headers = {"Authorization": "Bearer vg-ada"}
        answers = pool.map(lambda body: httpx.post(url + path, **body, headers=headers, timeout=60), requests)
        assert [answer.status_code for answer in answers] == [status] * 4
    assert most == 1


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


def test_image_size_and_verification_agree_with_decoding(tmp_path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    assert image_size(path) == read_image(path).shape[:2] == (30, 20)
    verify_image(path)


def test_another_tenants_result_is_reused_only_if_allowed(tiny, tmp_path):
    with local_server(tiny, settings_with_keys(tmp_path, TENANTS, share_results_between_tenants=True)) as server:
        ada, bob = client_of(server, "ada"), client_of(server, "bob")
        ended(ada, made(ada, seed=1)["id"])
        server.director.held.set()
        assert made(bob, seed=1)["status"] == "completed"
        queued = made(ada, seed=2)
    with local_server(tiny, settings_with_keys(tmp_path, TENANTS)) as server:
        ada, bob = client_of(server, "ada"), client_of(server, "bob")
        assert ended(ada, queued["id"])["status"] == "completed", "it keeps its key when the setting changes"
        assert ada.get(f"/v1/videos/{queued['id']}/content").status_code == 200
        first = ended(ada, made(ada, seed=3)["id"])
        server.director.held.set()
        assert made(ada, seed=3)["status"] == "completed"
        own = made(bob, seed=3)
        assert own["status"] == "queued"
        server.director.held.clear()
        server.director.wake()
        assert ended(bob, own["id"])["status"] == "completed"
        assert len(server.director.rendered) == 3
        contents = [client.get(f"/v1/videos/{video['id']}/content") for client, video in ((ada, first), (bob, own))]
        np.testing.assert_array_equal(*(frames_of(content.content) for content in contents))
