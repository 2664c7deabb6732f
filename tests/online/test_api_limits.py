"""API keys, limits of requests, tenants and memory, uploads, characters and retention."""

import asyncio
import base64
import dataclasses
import errno
import hashlib
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from threading import Event
from unittest.mock import Mock

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image
from sqlalchemy import update
from starlette.testclient import TestClient

from tests.conftest import ASTRONAUT, CONSENT_FIELD, SYNTHETIC
from tests.decoded import frames_of
from tests.online.directors import LOCAL, SMALL, client_of, listening_on_a_port, local_server, settings_with_keys
from tests.online.test_api_videos import ended, error_of, made
from vidgen_ray.cli import main
from vidgen_ray.errors import SetupError
from vidgen_ray.media.encode import Mp4Settings
from vidgen_ray.media.images import image_size, read_image, verify_image
from vidgen_ray.online import uploads
from vidgen_ray.online.auth import KeyRecord, add_key, check_bind_host, hash_key, load_keys, new_key
from vidgen_ray.online.job_service import plan_job
from vidgen_ray.online.server_settings import Limits, OnlineSettings
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.online.store.database import JOBS
from vidgen_ray.online.store.store import PURGE_DELAY_S
from vidgen_ray.online.webhooks import purge_jobs
from vidgen_ray.outputs.records import shot_path
from vidgen_ray.render.shot_files import write_clip
from vidgen_ray.system import http_limits
from vidgen_ray.system.files import temporary_prefix, this_process

DAY_S = 24 * 3600
FORM = "multipart/form-data"
CAPS = {"batch_bytes": 100_000, "image_bytes": 600_000, "video_bytes": 700_000, "json_bytes": 900_000, "files": 3}
TENANTS = {
    **{name: {} for name in ("ada", "bob")},
    "small": {"limits": {"pixel_frames": 64 * 64 * 2}},
    "slow": {"limits": {"requests_per_minute": 2}},
    "one": {"limits": {"open_jobs": 1}},
    "full": {"limits": {"stored_bytes": 10_000}},
    "late": {"expires_at": (datetime.now(UTC) - timedelta(seconds=1)).isoformat()},
}


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    settings = settings_with_keys(tmp_path_factory.mktemp("server"), TENANTS, uploads=CAPS, max_queued=6)
    with local_server(tiny, settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def png(width=64, height=64, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(buffer, "PNG", **options)
    return buffer.getvalue()


REQUEST = b"POST /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
TRAILERS = b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (REQUEST + b"Content-Length: 300000\r\n\r\n" + bytes(300_000), b"405"),
        (REQUEST + TRAILERS + b"\r\n", b"405"),
        (REQUEST + b"a: b\r\n" * 1000, b"431"),
        (REQUEST + b"a: " + b"b" * 100_000, b"431"),
        (b"GET /" + b"x" * 100_000, b"431"),
        (b"\r\n" * 50_000, b"431"),
        (REQUEST + TRAILERS + b"a: b\r\n" * 1000, b"431"),
        (REQUEST + TRAILERS + b"a: " + b"b" * 600_000, b"431"),
        (b"", b""),
        (b"\r\n", b""),
        (REQUEST, b""),
    ],
    ids=[
        "body",
        "trailers",
        "headers",
        "header",
        "url",
        "newlines",
        "many-trailers",
        "trailer",
        "idle",
        "newline",
        "unfinished",
    ],
)
def test_long_headers_are_refused_and_late_ones_end_the_connection(monkeypatch, sent, status):
    monkeypatch.setattr(http_limits, "HEAD_S", 0.5 if not status else 60)
    app = FastAPI()
    app.add_api_route("/healthz", lambda: None)
    with listening_on_a_port(app) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        connection.settimeout(60)
        answer, is_refused = b"", status != b"405"
        # The connection of a client that still sends may be reset before it has read the answer.
        with suppress(ConnectionError):
            connection.sendall(sent)
            while is_refused or not answer:
                if not (piece := connection.recv(1 << 16)):
                    break
                answer += piece
    assert (b"HTTP/1.1 " + status in answer) if status and answer else is_refused


def test_connection_ends_although_the_rest_of_an_answered_request_never_arrives(monkeypatch):
    monkeypatch.setattr(http_limits, "HEAD_S", 0.3)
    app, started, release, end_late = FastAPI(), Event(), Event(), http_limits.LimitedHttp._end_late
    app.add_api_route("/slow", lambda: started.set() or release.wait(60))
    monkeypatch.setattr(http_limits.LimitedHttp, "_end_late", lambda self: end_late(self) or release.set())
    with listening_on_a_port(app) as url:
        address = "127.0.0.1", int(url.rpartition(":")[2])
        with socket.create_connection(address, 60) as answered:
            answered.sendall(REQUEST + b"Content-Length: 100\r\n\r\n")
            assert b"HTTP/1.1 404" in answered.recv(1 << 16)
            answered.sendall(b"a")
            while answered.recv(1 << 16):
                pass
        release.clear()
        with socket.create_connection(address, 60) as slow:
            slow.sendall(b"GET /slow HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert started.wait(60)
            slow.sendall(b"\r\n")
            assert b"HTTP/1.1 200" in slow.recv(1 << 16), "the start of the next request must not end this one"


def test_request_of_a_client_that_has_gone_is_no_error(server):
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/x-www-form-urlencoded"), (b"content-length", b"99"), (b"host", b"127.0.0.1")]
    scope = {"type": "http", "method": "POST", "path": "/sign-in", "query_string": b"", "headers": headers}
    asyncio.run(server.app({**scope, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "scheme": "http"}, receive, send))
    assert sent[0]["status"] == 499


def test_missing_or_invalid_key_is_rejected_except_by_health_checks(server):
    client = client_of(server, None)
    assert client.get("/healthz").json() == client.get("/readyz").json() == {"status": "ok"}
    for header in (None, "", "Bearer", "Bearer ", "Bearer vg-unknown", "Basic dmctYWRh", "vg-ada", "Bearer vg-ada x"):
        headers = {} if header is None else {"Authorization": header}
        for method, path in (("POST", "/v1/videos"), ("GET", "/v1/videos/x/content"), ("GET", "/openapi.json")):
            response = client.request(method, path, headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key", header
            assert response.headers["www-authenticate"] == "Bearer"
    assert error_of(client_of(server, "late").get("/v1/models"), 401)["code"] == "invalid_api_key", "an expired key"
    assert [client.head(path).status_code for path in ("/healthz", "/health", "/readyz")] == [200] * 3
    for path, methods in (
        ("/v1/videos", "GET, POST"),
        ("/v1/videos/x", "GET, DELETE"),
        ("/v1/videos/sync", "POST"),
        ("/readyz", "GET, HEAD"),
    ):
        refused = client.patch(path)
        assert (error_of(refused, 405)["code"], refused.headers["allow"]) == ("method_not_allowed", methods)


def test_other_tenants_objects_are_not_found(server, client, held):
    video, upload = made(client), client.post("/v1/files", files={"file": ("a", png())}).json()
    bob, photo = client_of(server, "bob"), {"image": ("me.jpg", ASTRONAUT.read_bytes())}
    own, other = (each.post("/v1/videos/characters", data={"name": "Same"}, files=photo).json() for each in (client, bob))
    for method, path in (
        ("GET", f"/v1/videos/{video['id']}"),
        ("GET", f"/v1/videos/{video['id']}/content"),
        ("GET", f"/v1/videos/{video['id']}/events"),
        ("POST", f"/v1/videos/{video['id']}/cancel"),
        ("DELETE", f"/v1/videos/{video['id']}"),
        ("GET", f"/v1/shots/{video['id']}"),
        ("GET", f"/v1/files/{upload['id']}"),
        ("DELETE", f"/v1/files/{upload['id']}"),
        ("GET", f"/v1/videos/characters/{own['id']}"),
        ("DELETE", f"/v1/videos/characters/{own['id']}"),
        ("DELETE", f"/v1/characters/{own['id']}"),
    ):
        error_of(bob.request(method, path), 404)
    assert bob.get("/v1/videos/characters").json()["data"] == [other]
    taken = client.post("/v1/videos/characters", data={"name": "Same", **CONSENT_FIELD}, files={"image": ("a", resized(220))})
    assert error_of(taken, 409)["param"] == "name"
    for each, character in ((client, own), (bob, other)):
        assert each.delete(f"/v1/videos/characters/{character['id']}").json()["deleted"]
    remixed = bob.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "x"})
    assert error_of(remixed, 404)["code"] == "video_not_found"
    used = bob.post("/v1/videos", json={**SMALL, "input_reference": {"file_id": upload["id"]}})
    assert error_of(used, 400)["code"] == "file_not_found"


def test_server_without_keys_rejects_other_hosts_and_binds_to_loopback_only(tiny, tmp_path):
    with local_server(tiny, OnlineSettings(profile="tiny", data=str(tmp_path))) as server:

        def models(host, client="127.0.0.1", **headers):
            return TestClient(server.app, base_url=f"http://{host}", client=(client, 5), headers=headers).get("/v1/models")

        for name in ("127.0.0.1:8000", "localhost", "[::1]:8000"):
            assert models(name).status_code == 200
        for refused in (models("rebound.example"), models("localhost", "192.0.2.7")):
            assert error_of(refused, 403)["code"] == "unknown_host"
        proxied = models("localhost", **{"X-Forwarded-For": "192.0.2.7"})
        assert "x-forwarded-for" in error_of(proxied, 403)["message"]
    no_keys = load_keys(None, Limits(), {})
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        check_bind_host(host, no_keys)
    for host in ("0.0.0.0", "::", "192.168.0.2", "example.com", ""):
        with pytest.raises(SetupError, match="vidgen keys new"):
            check_bind_host(host, no_keys)
    check_bind_host("0.0.0.0", load_keys(None, Limits(), {"VIDGEN_API_KEYS": f"ada={hash_key(new_key())}"}))


def test_root_path_is_part_of_links_and_urls_with_a_proxy_that_removes_it_or_not(tiny, tmp_path):
    settings = settings_with_keys(tmp_path, {"ada": {}}, root_path="/vidgen")
    with local_server(tiny, settings) as server:
        client = client_of(server)
        for prefix in ("", "/vidgen"):
            page = TestClient(server.app, base_url="http://videos.example", follow_redirects=False)
            for path in (f"{prefix}/", prefix):
                assert page.get(path).headers["location"] == "/vidgen/sign-in"
            assert 'href="/vidgen/static/' in page.get(f"{prefix}/sign-in").text
            assert "/vidgen/" in page.post(f"{prefix}/sign-in", data={"key": "vg-ada"}).headers["set-cookie"]
            assert client.get(f"{prefix}/static/page.css").status_code == 200
            body = {"prompt": "x", "size": "64x64", "response_format": "url"}
            (image,) = client.post(f"{prefix}/v1/images/generations", json=body).json()["data"]
            assert image["url"].startswith("http://videos.example/vidgen/v1/videos/")
            assert client.get(image["url"]).headers["content-type"] == "image/png"
        through_tls = client.post("/v1/images/generations", json=body, headers={"X-Forwarded-Proto": "https, http"})
        assert through_tls.json()["data"][0]["url"].startswith("https://videos.example/vidgen/v1/videos/")
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/vidgen"}]


def test_signed_url_needs_no_key_until_it_expires_and_names_one_file(tiny, tmp_path, monkeypatch):
    settings = settings_with_keys(tmp_path, {"ada": {}, "bob": {}, "cat": {"limits": {"requests_per_minute": 3}}})
    body = {"prompt": "x", "size": "64x64", "response_format": "url"}
    with local_server(tiny, settings) as server:
        ada, bob, cat, browser = (client_of(server, name) for name in ("ada", "bob", "cat", None))
        url, of_bob, of_cat = (
            each.post("/v1/images/generations", json=body).json()["data"][0]["url"] for each in (ada, bob, cat)
        )
        assert Image.open(io.BytesIO(browser.get(url).content)).size == (64, 64)
        assert browser.head(url).status_code == 200
        key, of_other_key = (httpx.URL(each).params["key"] for each in (url, of_bob))
        signature = httpx.URL(of_bob).params["signature"]
        for forged in (
            url.replace("variant=image", "variant=thumbnail"),
            url.replace("expires=1", "expires=2"),
            url.replace(httpx.URL(url).path, httpx.URL(of_bob).path),
            url.replace(key, of_other_key),
            f"{url[:-64]}{signature}",
            f"{url}0",
            url[:-64],
        ):
            assert error_of(browser.get(forged), 403)["code"] == "invalid_signature", forged
        assert error_of(browser.get(url.partition("&")[0]), 401)["code"] == "invalid_api_key"
        # Not counted as requests with the key, but limited, too.
        assert [browser.get(of_cat).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert cat.get("/v1/models").status_code == 200
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 3601)
        assert error_of(browser.get(url), 403)["code"] == "invalid_signature"
    monkeypatch.undo()
    # The secret survives a restart. The key of ada is gone.
    with local_server(tiny, settings_with_keys(tmp_path, {"bob": {}})) as server:
        browser = client_of(server, None)
        assert browser.get(of_bob).status_code == 200
        assert error_of(browser.get(url), 403)["code"] == "invalid_signature"


def test_key_file_errors_do_not_contain_the_key(tmp_path):
    file = tmp_path / "keys.yaml"
    for text, message in (
        ("keys: []", "keys"),
        ("keys: [{tenant: ada, sha256: vg-the-key-itself}]", r"keys\.0\.sha256"),
        ("keys: [{tenant: ../x, sha256: '%s'}]" % ("0" * 64), r"keys\.0\.tenant"),
        ("keys: [{tenant: a, sha256: '%s', limit: {}}]" % ("0" * 64), r"keys\.0\.limit"),
        ("{ vg-the-key-itself", r"not YAML \(line 1\)"),
        ("a: &a 'vg-the-key-itself'\nkeys: [*a]", r"YAML aliases are not allowed; write the values out \(line 2\)"),
    ):
        file.write_text(text)
        with pytest.raises(SetupError, match=message) as raised:
            load_keys(file, Limits(), {})
        assert "vg-the-key-itself" not in str(raised.value)


def test_keys_of_file_and_environment_are_accepted_with_the_limits_of_the_server_except_their_own(tmp_path, capsys):
    file, own, of_environment = tmp_path / "keys.yaml", new_key(), new_key()
    add_key(file, KeyRecord(tenant="eve", sha256=hash_key(own), limits={"open_jobs": 8}))
    for tenant in ("ada", "bob"):
        assert main(["keys", "new", "--tenant", tenant, "--file", str(file)]) == 0
    first, second = capsys.readouterr().out.split()
    environment = {"VIDGEN_API_KEYS": f"cem={hash_key(of_environment)}, bob={'0' * 64}"}
    keys = load_keys(file, Limits(open_jobs=3, max_priority="low"), environment)
    tenants = [keys.verify(key) for key in (own, first, second, of_environment)]
    assert [(each.name, each.limits.open_jobs) for each in tenants] == [("eve", 8), ("ada", 3), ("bob", 3), ("cem", 3)]
    assert {each.limits.max_priority for each in tenants} == {"low"}
    assert keys.by_id(tenants[0].key_id) == tenants[0]
    assert keys.verify(None) is None
    assert first not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    assert main(["keys", "new", "--tenant", "../x"]) == 2
    with pytest.raises(SetupError, match="TENANT=SHA256"):
        load_keys(None, Limits(), {"VIDGEN_API_KEYS": own})


def test_job_larger_than_the_limit_or_than_any_gpu_is_rejected(server, client, monkeypatch):
    small = client_of(server, "small")
    assert small.post("/v1/videos", json=SMALL).status_code == 200
    error = error_of(small.post("/v1/videos", json={**SMALL, "num_frames": 3}), 400)
    assert (error["code"], error["param"]) == ("too_large", "num_frames")
    reason = "stage svd: 64x64 with 2 frames needs 30 GB; at most 32x32 fits"
    monkeypatch.setattr(ServingProfile, "too_large", lambda self, shot: reason)
    error = error_of(client.post("/v1/videos", json=SMALL), 400)
    assert (error["code"], error["param"], error["message"]) == ("too_large", "num_frames", reason)


def test_request_rate_limit(server):
    slow = client_of(server, "slow")
    responses = [slow.get("/v1/models") for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 429]
    assert error_of(responses[2], 429)["type"] == "rate_limit_error"
    assert 0 < int(responses[2].headers["retry-after"]) <= 60
    assert client_of(server, "ada").get("/v1/models").status_code == 200


def test_limit_on_open_jobs(server, held):
    one = client_of(server, "one")
    first = made(one)
    response = one.post("/v1/videos", json=SMALL)
    assert error_of(response, 429)["code"] == "too_many_jobs"
    assert int(response.headers["retry-after-ms"]) > 0
    one.post(f"/v1/videos/{first['id']}/cancel")
    made(one)
    # Two images of one request are two jobs.
    assert error_of(one.post("/v1/images/generations", json={"prompt": "x", "size": "64x64", "n": 2}), 429)


def test_full_queue_rejects_all_tenants_but_repeats_the_response_to_an_idempotency_key(client, held, server, monkeypatch):
    headers = {"Idempotency-Key": "once"}
    photo = {"face_image": ("a.png", ASTRONAUT.read_bytes())}
    forms = [client.post("/v1/videos", data=SMALL, files=photo, headers={"Idempotency-Key": "form"}).json() for _ in range(2)]
    assert forms[0]["id"] == forms[1]["id"], "the boundaries of the forms differ"
    first = client.post("/v1/videos", json=SMALL, headers=headers).json()
    for _ in range(4):
        made(client)
    refused = client_of(server, "bob").post("/v1/videos", json=SMALL)
    assert error_of(refused, 429)["code"] == "queue_full"
    assert refused.headers["retry-after"] == "5"
    # Photos or weights may be gone since the first request.
    monkeypatch.setattr(server.app.state.server.job_service, "new_job", lambda *_: pytest.fail("planned again"))
    assert client.post("/v1/videos", json=SMALL, headers=headers).json()["id"] == first["id"]
    other = client.post("/v1/videos", json={**SMALL, "prompt": "else"}, headers=headers)
    elsewhere = client.post(f"/v1/videos/{first['id']}/remix", json=SMALL, headers=headers)
    for response in (other, elsewhere):
        assert error_of(response, 409)["code"] == "idempotency_key_reused"
    assert other.headers["x-should-retry"] == "false"


def test_request_has_a_deadline_and_a_priority_that_its_key_allows(tiny, tmp_path):
    tenants = {"guest": {"limits": {"max_priority": "low"}}, "ada": {"limits": {"open_jobs": 9}}}
    with local_server(tiny, settings_with_keys(tmp_path, tenants)) as server:
        server.director.held.set()
        ada, guest = client_of(server, "ada"), client_of(server, "guest")
        _, second = (made(ada, priority=each) for each in ("normal", "high"))
        assert (second["priority"], second["queue_position"]) == ("high", 0)
        assert ada.post(f"/v1/videos/{second['id']}/remix", json={"prompt": "x"}).json()["priority"] == "normal"
        assert "'high'" in error_of(ada.post("/v1/videos", json={**SMALL, "priority": 9}), 400)["message"]

        assert made(guest)["priority"] == "low"
        error = error_of(guest.post("/v1/videos", json={**SMALL, "priority": "high"}), 400)
        assert (error["param"], error["message"]) == ("priority", "priority: got high, must be low with this key")
        small = {"prompt": "x", "width": 64, "height": 64, "num_frames": 2}
        shot = guest.post("/v1/shots", json={**small, "priority": "low"}).json()
        assert shot["priority"] == "low"
        assert "priority" not in shot["shot"]

        late, patient = made(ada, deadline_s=1e-6), made(ada, deadline_s=600)
        server.store.queue.fail_late()
        failed = ada.get(f"/v1/videos/{late['id']}").json()
        assert failed["status"] == "failed"
        assert (failed["error"]["code"], failed["error"]["param"]) == ("deadline_exceeded", "deadline_s")
        assert ada.get(f"/v1/videos/{patient['id']}").json()["status"] == "queued"
        assert error_of(ada.post("/v1/videos", json={**SMALL, "deadline_s": 0}), 400)["param"] == "deadline_s"


def test_image_as_a_data_url(client, held):
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    assert client.post("/v1/videos", json={**SMALL, "image_reference": {"image_url": url}}).status_code == 200
    form = client.post("/v1/videos", data={**SMALL, "image_reference": json.dumps({"image_url": url})})
    assert form.status_code == 200
    for invalid in ("data:image/png;base64,%%%", "data:text/html,<script>", "data:,", "data:image/png;base64,AAAA"):
        response = client.post("/v1/videos", json={**SMALL, "image_reference": {"image_url": invalid}})
        assert error_of(response, 400)["param"] == "image_reference"
    for names in (("input_reference", "input_reference"), ("input_reference", "image_reference")):
        response = client.post("/v1/videos", data=SMALL, files=[(name, ("a", png())) for name in names])
        assert error_of(response, 400)["param"] == names[1], "two start images"
    texts = {"prompt": "a" * 1_100_000, "negative_prompt": "b" * 1_100_000}
    message = error_of(client.post("/v1/videos", data=SMALL | texts, files={"input_reference": ("a", png())}), 400)["message"]
    assert message.startswith("The text fields have more than 2097152 characters.")


def announce(url, content_type, length, sent, request=("POST", "/v1/videos")):
    """Announce a body of this length, send its start, and return the status and the error code of the response."""
    with closing(HTTPConnection(url.removeprefix("http://"), timeout=60)) as connection:
        connection.putrequest(*request)
        connection.putheader("Content-Type", content_type)
        connection.putheader("Content-Length", str(length))
        connection.endheaders(sent)
        response = connection.getresponse()
        return response.status, json.loads(response.read())["error"]["code"]


def test_too_large_and_too_slow_bodies_are_refused_before_they_have_arrived(tiny, tmp_path):
    settings = OnlineSettings(profile="tiny", data=str(tmp_path), uploads={**CAPS, "seconds": 0.5})
    with local_server(tiny, settings) as server, listening_on_a_port(server.app) as url:
        assert announce(url, "application/json", 99_999_999_999, b"{") == (413, "too_large")
        # Less than the largest body of any request, more than that of a form without files.
        assert announce(url, "application/x-www-form-urlencoded", 600_000, b"") == (413, "too_large")
        assert announce(url, "application/json", 1000, b"{") == (408, "timeout")
        # Without a key, before anything is done.
        for request in (("GET", "/readyz"), ("DELETE", "/v1/videos/x"), ("POST", "/v1/videos/x/cancel")):
            assert announce(url, FORM, 4_000_000, b"", request) == (413, "too_large")
        assert announce(url, FORM, 9_000, b"", ("GET", "/readyz")) == (413, "too_large")
        # Smaller than the largest form.
        assert announce(url, FORM, 3_000_000, b"", ("POST", "/v1/files")) == (413, "too_large")
        with closing(HTTPConnection(url.removeprefix("http://"), timeout=60)) as connection:
            # A chunked body announces no length.
            endless, headers = (bytes(100_000) for _ in range(100)), {"Content-Type": "application/json"}
            # The server may respond and close the connection before everything was sent.
            with suppress(OSError):
                connection.request("POST", "/v1/videos", endless, headers, encode_chunked=True)
                assert connection.getresponse().status == 413


def test_bodies_that_arrive_at_once_are_limited(tiny, tmp_path):
    tenants = {"ada": {}, "bob": {}, "eve": {}}
    settings = settings_with_keys(
        tmp_path, tenants, uploads={**CAPS, "receiving_bytes": 5_000_000}, limits={"receiving_bytes": 2_000_000}
    )
    with local_server(tiny, settings) as server, listening_on_a_port(server.app) as url, ExitStack() as stack:

        def send(tenant, body, length=None):
            """Send a body, or the start of one with this length, 0 for a chunked one. Return the connection."""
            connection = stack.enter_context(closing(HTTPConnection(url.removeprefix("http://"), timeout=60)))
            connection.putrequest("POST", "/v1/videos")
            connection.putheader("Authorization", f"Bearer vg-{tenant}")
            connection.putheader("Content-Type", "application/json" if length is None else f"{FORM}; boundary=x")
            announced = ("Transfer-Encoding", "chunked") if length == 0 else ("Content-Length", length or len(body))
            connection.putheader(*announced)
            connection.endheaders(body)
            return connection

        def code_of(connection):
            response = connection.getresponse()
            error = json.loads(response.read()).get("error") or {}
            return response.status, error.get("code"), response.getheader("Retry-After")

        def until(condition):
            while not condition():
                time.sleep(0.01)

        budget = server.app.state.server.body_budget
        refused = (429, "too_many_bytes", "2")
        # One body is always accepted.
        arriving = [send("ada", b"--x", 3_400_000)]
        until(lambda: budget.arriving.total() == 3_400_000)
        for length in (100_000, 0):
            assert code_of(send("ada", b"", length)) == refused
        assert code_of(send("ada", json.dumps(SMALL).encode())) == (200, None, None), "small ones are not counted"
        arriving.append(send("bob", b"--x", 1_500_000))
        until(lambda: budget.arriving.total() == 4_900_000)
        assert code_of(send("eve", b"", 200_000)) == refused
        for connection in arriving:
            connection.close()
        until(lambda: not budget.arriving.total())
        assert code_of(send("ada", b'{"' + b"x" * 100_000 + b'": 1}')) == (400, "unknown_parameter", None)


def test_upload_stays_on_disk_until_it_is_unused(server, client, held):
    folder = server.app.state.server.job_service.uploads._folder
    before = sorted(folder.iterdir())
    truncated = {"file": ("photo.png", png()[:60], "image/png")}
    error = error_of(client.post("/v1/files", files=truncated), 400)
    assert (error["param"], error["code"]) == ("file", "invalid_image")
    assert error_of(client.post("/v1/videos", data=SMALL, files={"input_reference": truncated["file"]}), 400)
    assert sorted(folder.iterdir()) == before
    content = png(99, 33)
    upload = client.post("/v1/files", files={"file": ("a", content)}).json()["id"]
    client_of(server, "bob").post("/v1/files", files={"file": ("b", content)})
    path = server.app.state.server.job_service.uploads.find("bob", upload)
    assert client.delete(f"/v1/files/{upload}").json() == {"id": upload, "object": "file", "deleted": True}
    assert error_of(client.get(f"/v1/files/{upload}"), 404)["code"] == "file_not_found"
    assert path.exists()
    video = made(client_of(server, "bob"), input_reference={"file_id": upload})
    client_of(server, "bob").delete(f"/v1/files/{upload}")
    assert path.exists(), "an open job needs it"
    server.store.request_cancel(video["id"], None)
    client_of(server, "bob").post("/v1/files", files={"file": ("b", content)})
    client_of(server, "bob").delete(f"/v1/files/{upload}")
    assert not path.exists()


def test_uploads_and_images_are_listed_downloaded_and_deleted_by_the_openai_package(server, client):
    openai = pytest.importorskip("openai")
    contents = [png(width=width) for width in (65, 66, 67)]
    with listening_on_a_port(server.app) as url:
        ada, bob = (openai.OpenAI(base_url=f"{url}/v1", api_key=f"vg-{name}", max_retries=0) for name in ("ada", "bob"))
        ids = [ada.files.create(file=content, purpose="vision").id for content in contents]
        assert [file.id for file in ada.files.list(limit=2)][:3] == ids[::-1], "pages are followed"
        assert [file.id for file in ada.files.list(limit=1, order="asc")][-3:] == ids
        assert not list(ada.files.list(purpose="batch"))
        assert ada.files.content(ids[0]).read() == contents[0]
        assert ada.files.content(ids[0], extra_headers={"Range": "bytes=1-3"}).read() == b"PNG"
        assert not {file.id for file in bob.files.list()} & {*ids}
        with pytest.raises(openai.NotFoundError):
            bob.files.content(ids[0])
        for file in ada.files.list(limit=1):
            if file.id in ids:
                ada.files.delete(file.id)
        assert not {file.id for file in ada.files.list()} & {*ids}
        image = ada.images.generate(prompt="listed", size="64x64", model="gpt-image-1").data[0]
    listed = client.get("/v1/images", params={"limit": 1}).json()["data"]
    assert [(each["id"], each["prompt"]) for each in listed] == [(image.id, "listed")]
    assert image.id not in client.get("/v1/videos").text
    client.delete(f"/v1/videos/{image.id}")
    assert image.id not in client.get("/v1/images").text
    assert error_of(client.get("/v1/images", params={"after": "image_x"}), 404)["param"] == "after"


def test_create_list_and_delete_characters(client, held):
    photo = {"image": ("me.jpg", ASTRONAUT.read_bytes())}
    character = client.post("/v1/videos/characters", data={"name": "Éileen"}, files=photo).json()
    photos = [f"file-{hashlib.sha256(ASTRONAUT.read_bytes()).hexdigest()}"]
    assert (character["object"], character["name"], character["photos"]) == ("character", "Éileen", photos)
    assert error_of(client.delete(f"/v1/files/{photos[0]}"), 409)["code"] == "file_in_use"
    assert client.post("/v1/videos/characters", data={"name": "Éileen"}, files=photo).json() == character
    assert client.get("/v1/videos/characters").json()["data"] == [character]
    assert client.get(f"/v1/videos/characters/{character['id']}").json() == character
    video = made(client, character="Éileen", prompt="at sea")
    assert len(client.get(f"/v1/shots/{video['id']}").json()["shot"]["face_image"]) == 1
    both = client.post("/v1/videos", json={**SMALL, "character": "Éileen", "face_image": ["x"]})
    assert error_of(both, 400)["param"] in ("character", "face_image")
    assert client.delete(f"/v1/videos/characters/{character['id']}").json()["deleted"]
    assert error_of(client.get(f"/v1/videos/characters/{character['id']}"), 404)["code"] == "character_not_found"
    assert client.delete(f"/v1/files/{photos[0]}").json()["deleted"]


def test_character_from_the_first_frame_with_a_face(client, tmp_path):
    face = np.asarray(Image.open(ASTRONAUT).convert("RGB"))
    dark = np.zeros_like(face)

    def clip_of(*frames) -> bytes:
        path = tmp_path / "clip.mp4"
        write_clip(path, [np.stack(frames)], 5, Mp4Settings(threads=1))
        return path.read_bytes()

    video = clip_of(dark, dark, face, face)
    response = client.post(
        "/v1/videos/characters", data={"name": "from a clip", **CONSENT_FIELD}, files={"video": ("a.mp4", video)}
    )
    assert response.status_code == 200, response.text
    assert response.json()["consent"] == {**SYNTHETIC, "reference": None}
    video_of_the_dark = {"video": ("a.mp4", clip_of(dark))}
    without_face = client.post("/v1/videos/characters", data={"name": "y", **CONSENT_FIELD}, files=video_of_the_dark)
    assert "no frame" in error_of(without_face, 400)["message"]
    photo, clip = ("image", ("a", png())), ("video", ("a", b"x"))
    for name, files in ((" ", [photo]), ("a\0", [photo]), ("x" * 129, [photo]), ("x", [photo, clip]), ("x", [])):
        error_of(client.post("/v1/videos/characters", data={"name": name}, files=files or {"other": ("a", b"")}), 400)


def resized(side: int = 256) -> bytes:
    """Return a photo of a face that does not come with vidgen."""
    content = io.BytesIO()
    Image.open(ASTRONAUT).resize((side, side)).save(content, "PNG")
    return content.getvalue()


def test_request_and_character_with_a_face_need_a_consent_and_record_it(server, client, held, monkeypatch):
    photo = client.post("/v1/files", files={"file": ("me.png", resized())}).json()["id"]
    request = {**SMALL, "face_image": [photo]}
    for path in ("videos", "shots", "images/generations", "videos/estimate"):
        error = error_of(client.post(f"/v1/{path}", json={"prompt": "a", "face_image": [photo]}), 400)
        assert (error["param"], error["code"]) == ("consent", "missing_required_parameter"), path
        assert '{"subject": "NAME", "basis": "written"' in error["message"]
    error = error_of(client.post("/v1/videos", json={**request, "consent": {"subject": "Anna", "basis": "yes"}}), 400)
    assert error["param"] == "consent.basis"
    form = client.post("/v1/videos", data=SMALL | CONSENT_FIELD, files={"face_image": ("me.png", resized())})
    assert form.status_code == 200, form.text
    video = made(client, face_image=[photo], consent=SYNTHETIC)
    for each in (video["id"], form.json()["id"]):
        assert client.get(f"/v1/shots/{each}").json()["shot"]["consent"] == SYNTHETIC
    remixed = client.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "b"})
    assert remixed.status_code == 200, remixed.text
    other = {"face_image": [client.post("/v1/files", files={"file": ("me", resized() + b"x")}).json()["id"]]}
    assert error_of(client.post(f"/v1/videos/{video['id']}/remix", json=other), 400)["param"] == "consent", "another face"
    photos = {"image": ("me.png", resized())}
    error = error_of(client.post("/v1/videos/characters", data={"name": "Own"}, files=photos), 400)
    assert (error["param"], error["code"]) == ("consent", "missing_required_parameter")
    consent = {"subject": "Own", "basis": "self"}
    of_itself = {"name": "Own", "consent": json.dumps(consent)}
    character = client.post("/v1/videos/characters", data=of_itself, files=photos).json()
    assert client.get(f"/v1/videos/characters/{character['id']}").json()["consent"] == {**consent, "reference": None}
    by_character = made(client, character="Own")
    assert client.get(f"/v1/shots/{by_character['id']}").json()["shot"]["consent"] == consent
    again = client.post("/v1/videos/characters", data={"name": "Own", **CONSENT_FIELD}, files=photos).json()
    assert (again["id"], again["consent"]) == (character["id"], {**SYNTHETIC, "reference": None})
    service = server.app.state.server.job_service
    profile = service.serving_profile.profile.model_copy(update={"require_consent": False})
    monkeypatch.setattr(service, "serving_profile", dataclasses.replace(service.serving_profile, profile=profile))
    video = client.post("/v1/videos", data=SMALL, files={"face_image": ("me.png", resized())})
    job = server.store.get(video.json()["id"], None)
    assert (job.shot.consent, job.request["require_consent"]) == (None, False)


def before(monkeypatch, owner, name, call):
    """Call a function once, before the next call of a method."""
    original, calls = getattr(owner, name), [call]

    def wrapped(*args, **options):
        if calls:
            calls.pop()()
        return original(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("first", ["delete", "create"])
@pytest.mark.parametrize("kind", ["characters", "videos"])
def test_upload_that_is_deleted_while_a_request_uses_it(server, client, held, monkeypatch, kind, first):
    """Each request is the second one to write, but has begun before the other one."""
    content = resized(230 + len(kind)) if kind == "characters" else png(71, 70)
    upload = client.post("/v1/files", files={"file": ("a", content)}).json()["id"]
    image = {"file_id": upload}

    def create():
        if kind == "characters":
            return client.post("/v1/videos/characters", json={"name": f"race {first}", "image": image, **CONSENT_FIELD})
        return client.post("/v1/videos", json={**SMALL, "input_reference": image, "seed": 5})

    def delete():
        return client.delete(f"/v1/files/{upload}")

    answers = []
    if first == "delete":
        owner, name = (server.store.characters, "create") if kind == "characters" else (server.store, "create_all")
        before(monkeypatch, owner, name, lambda: answers.append(delete()))
        assert error_of(create(), 400)["code"] == "file_not_found"
        assert answers[0].status_code == 200
        return
    before(monkeypatch, server.store.uploads, "delete", lambda: answers.append(create()))
    assert delete().status_code == (409 if kind == "characters" else 200)
    assert answers[0].status_code == 200
    file = server.app.state.server.job_service.uploads._folder / upload.removeprefix("file-")
    assert file.exists(), "the open job needs it"


def test_face_of_a_job_that_is_created_while_its_character_is_erased(server, client, held, monkeypatch):
    fields, files = {"name": "Racing", **CONSENT_FIELD}, {"image": ("me.png", resized(240))}
    character = client.post("/v1/videos/characters", data=fields, files=files).json()
    late, service = [], server.app.state.server.job_service
    dropped = service._drop_cached

    def drop(jobs):
        number = dropped(jobs)
        if not late:
            late.append(made(client, character="Racing")["id"])
        return number

    monkeypatch.setattr(service, "_drop_cached", drop)
    erased = client.delete(f"/v1/characters/{character['id']}").json()
    assert erased["videos"] == late
    assert client.get(f"/v1/videos/{late[0]}").json()["error"]["code"] == "cancelled"


@pytest.mark.parametrize("has_other_keys", [False, True])
def test_erased_character_leaves_no_photo_and_no_features(server, client, held, has_other_keys):
    """`held`: the jobs stay queued, so what their stages would store is put in place by hand. `has_other_keys`: as if another
    profile had changed the keys of the jobs, but not those of all steps."""
    content, other = resized(200 + has_other_keys), {"input_reference": ("a.png", png(65, 65))}
    files, fields = {"image": ("me.png", content)}, {"name": "Gone", **CONSENT_FIELD}
    character = client.post("/v1/videos/characters", data=fields, files=files).json()
    made_with_it = [made(client, character="Gone", prompt=prompt)["id"] for prompt in ("one", "two")]
    unrelated = client.post("/v1/videos", data=SMALL, files=other).json()["id"]
    service, cache = server.app.state.server.job_service, server.outputs.stage_cache
    (photo,) = character["photos"]
    path = service.uploads.find("ada", photo)
    jobs = [server.store.get(job, None) for job in (*made_with_it, unrelated)]
    keys = {job.id: plan_job(job, service.serving_profile, server.settings).steps for job in jobs}
    for step in (step for steps in keys.values() for step in steps):
        server.outputs.storage.write(f"cache/{step.key[:2]}/{step.key}/face.json", "{}")
    if has_other_keys:
        with server.store.engine.begin() as connection:
            connection.execute(update(JOBS).where(JOBS.c.id.in_(made_with_it)).values(key="k" * 64))
    erased = client.delete(f"/v1/characters/{character['id']}").json()
    steps = {step.key for job in made_with_it for step in keys[job]}
    assert (erased["characters"], erased["photos"], erased["cached_steps"]) == ([character["id"]], [photo], len(steps))
    assert (erased["videos"], erased["videos_deleted"]) == (made_with_it, False)
    assert not path.exists()
    assert not any(cache.has(key) for key in steps)
    assert all(cache.has(step.key) for step in keys[unrelated])
    assert error_of(client.get("/v1/videos/characters/Gone"), 404)["code"] == "character_not_found"
    assert [client.get(f"/v1/videos/{job}").json()["error"]["code"] for job in made_with_it] == ["cancelled"] * 2
    again = client.post("/v1/videos/characters", data=fields, files={"image": ("me.png", content)}).json()
    assert client.delete(f"/v1/characters/{again['id']}", params={"videos": True}).json()["videos_deleted"]
    assert [client.get(f"/v1/videos/{job}").status_code for job in (*made_with_it, unrelated)] == [404, 404, 200]


def test_files_of_a_deleted_video_stay_while_another_uses_them(tiny, tmp_path):
    with local_server(tiny, OnlineSettings(profile="tiny", data=str(tmp_path))) as server:
        client = TestClient(server.app, **LOCAL)
        first = ended(client, made(client, seed=1)["id"])
        second = made(client, seed=1)
        assert second["status"] == "completed"
        folder = tmp_path / shot_path(server.store.get(first["id"], None).shot_id)
        now = server.store._now
        for deleted, exists in ((first, True), (second, False)):
            client.delete(f"/v1/videos/{deleted['id']}")
            server.store._now = lambda: now() + PURGE_DELAY_S + 1
            purge_jobs(server.store, server.outputs)
            server.store._now = now
            assert folder.exists() == exists
            assert any((tmp_path / "keys").glob("*/*")) == exists


def test_api_on_sqlite_and_postgresql(tiny, tmp_path, database_url):
    with local_server(tiny, OnlineSettings(profile="tiny", data=str(tmp_path), database=database_url)) as server:
        client = TestClient(server.app, raise_server_exceptions=False, **LOCAL)
        video = made(client, prompt="«ünter» 🌧", metadata={"nul": "a\0b"})
        assert ended(client, video["id"])["status"] == "completed"
        assert [one["id"] for one in client.get("/v1/videos").json()["data"]] == [video["id"]]
        photo = {"image": ("me.jpg", ASTRONAUT.read_bytes())}
        character = client.post("/v1/videos/characters", data={"name": "Me"}, files=photo).json()
        for path in (f"videos/characters/{character['id']}", f"files/{character['photos'][0]}"):
            assert client.delete(f"/v1/{path}").status_code == 200
        # PostgreSQL rejects NUL characters in queries.
        for path in ("videos/a%00", "videos?after=a%00", "files/%00", "videos/characters/%00", "shots/x%00"):
            assert error_of(client.get(f"/v1/{path}"), 400)["code"] == "invalid_url"
        for field in ("character", "face_image", "user", "model"):
            assert client.post("/v1/videos", json={**SMALL, field: "a\0b"}).status_code in (400, 404)
        assert client.get("/v1/videos/characters/%F0%9F%8C%A7").status_code == 404


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


@pytest.mark.parametrize("thread_of", [lambda of: of.job_service.uploads.decoding, lambda of: of.face_check.thread])
def test_tenants_take_turns_when_images_are_decoded_and_faces_checked(server, thread_of):
    thread, order = thread_of(server.app.state.server), []

    async def calls():
        await asyncio.gather(*(thread.run(tenant, order.append, tenant) for tenant in ["ada"] * 9 + ["bob"] * 2))

    asyncio.run(calls())
    assert order[:5] == ["ada", "bob", "ada", "bob", "ada"]


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


def test_upload_that_cannot_be_stored_leaves_no_record_and_temporary_files_of_ended_processes_go(server, monkeypatch):
    bob, folder = client_of(server, "bob"), server.app.state.server.job_service.uploads
    before = bob.get("/v1/files").json()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", Mock(side_effect=OSError(errno.ENOSPC, "full")))
        assert bob.post("/v1/files", files={"file": ("a", png(70, 70))}).status_code == 503
    assert bob.get("/v1/files").json() == before
    ended, own = this_process()._replace(started=1), folder.temporary_file()
    left = folder._folder / f"{temporary_prefix(ended)}x"
    left.touch()
    folder.remove_unreferenced(3600)
    assert (left.exists(), own.exists()) == (False, True)
    own.unlink()


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
