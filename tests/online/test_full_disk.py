"""Requests to a server whose disk is full, or whose store is locked."""

import asyncio
import sqlite3
from contextlib import closing

import httpx
import pytest
from starlette.testclient import TestClient

from tests.online.directors import LOCAL, SMALL, local_server
from tests.online.test_api_limits import png
from tests.online.test_api_videos import ended
from vidgen_ray.online import asgi_app, job_service
from vidgen_ray.online.job_service import storage_problem
from vidgen_ray.online.server_settings import Limits, OnlineSettings
from vidgen_ray.online.store.database import POOL_SIZE
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.outputs.folder import OutputFolder


@pytest.fixture(autouse=True)
def no_reuse(monkeypatch):
    monkeypatch.setattr(job_service, "RESULT_VALID_S", 0.0)


def test_requests_get_a_sentence_while_the_disk_is_full(tiny, small_disk):
    settings = OnlineSettings(profile="tiny", data=str(small_disk.folder / "out"))
    with local_server(tiny, settings) as server:
        client = TestClient(server.app, raise_server_exceptions=False, **LOCAL)
        assert client.get("/readyz").status_code == 200
        upload = client.post("/v1/files", files={"file": ("a.png", png())}).json()["id"]
        videos = [ended(client, client.post("/v1/videos", json={**SMALL, "seed": n}).json()["id"])["id"] for n in range(2)]
        server.director.held.set()
        small_disk.fill()
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["error"]["message"].startswith("The disk of the output folder is almost full: 0.0")
        assert str(small_disk.folder) not in ready.text
        refused = client.post("/v1/videos", json=SMALL)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        assert refused.json()["error"]["message"] == "The disk of the server is full. Try again later."
        paths = [f"/v1/files/{upload}", *(f"/v1/videos/{each}" for each in videos)]
        assert [client.delete(path).status_code for path in paths] == [200] * 3
        small_disk.make_room()
        assert client.get("/readyz").status_code == 200
        accepted = client.post("/v1/videos", json=SMALL)
        assert accepted.status_code == 200
        server.director.held.clear()
        assert ended(client, accepted.json()["id"])["status"] == "completed"


def test_check_writes_to_database_and_output_folder(tmp_path, small_disk):
    outputs = OutputFolder(tmp_path / "out")
    outputs.prepare()
    store = JobStore(f"sqlite:///{small_disk.folder}/jobs.db")
    before = sorted(outputs.root.iterdir())
    assert storage_problem(store, outputs) is None
    assert sorted(outputs.root.iterdir()) == before
    small_disk.fill()
    assert storage_problem(store, outputs).startswith("The disk of the database is almost full: ")
    small_disk.make_room()
    assert storage_problem(store, outputs) is None
    with store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE vidgen_meta")
    assert storage_problem(store, outputs) == "The database does not respond."
    (tmp_path / "file").touch()
    assert storage_problem(store, OutputFolder(tmp_path / "file")) == "The output folder cannot be written: File exists."
    store.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/videos", {"json": SMALL}, 200),
        ("POST", "/v1/videos/video_x/cancel", {}, 404),
        ("DELETE", "/v1/videos/video_x", {}, 404),
        ("DELETE", "/v1/files/file-x", {}, 404),
        ("DELETE", "/v1/videos/characters/x", {}, 404),
        ("GET", "/readyz", {}, 503),
    ],
)
def test_reads_respond_while_the_store_is_locked(tiny, tmp_path, monkeypatch, method, path, body, status):
    monkeypatch.setattr(asgi_app, "READY_S", 0.2)
    settings = OnlineSettings(profile="tiny", data=str(tmp_path / "out"), limits=Limits(open_jobs=POOL_SIZE + 10))
    checks = []
    monkeypatch.setattr(job_service, "storage_problem", lambda *args: checks.append(args) or storage_problem(*args))

    async def requests(app, lock):
        transport = httpx.ASGITransport(app, client=LOCAL["client"])
        client = httpx.AsyncClient(transport=transport, base_url=LOCAL["base_url"], timeout=60)
        async with app.router.lifespan_context(app), client:
            lock.execute("BEGIN IMMEDIATE")
            writing = asyncio.gather(*(client.request(method, path, **body) for _ in range(POOL_SIZE + 10)))
            # Each of these needs a thread and a connection, as the requests that wait do.
            reads = [await client.get("/v1/videos") for _ in range(3)]
            ready = await client.get("/readyz")
            waiting = status == 503 or not writing.done()
            lock.execute("ROLLBACK")
            return reads, ready, waiting, await writing

    with local_server(tiny, settings) as server, closing(sqlite3.connect(server.store.folder / "jobs.db")) as lock:
        server.director.held.set()
        reads, ready, waiting, written = asyncio.run(requests(server.app, lock))
    assert waiting
    assert {response.status_code for response in reads} == {200}
    assert ready.json()["error"]["message"] == "The job store or the output folder has not responded for 0.2 s."
    assert {response.status_code for response in written} == {status}
    assert len(checks) == 1
