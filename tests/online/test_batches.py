"""Batches by OpenAI's client, on a server without Ray: every line once, bad input, cancellation in each state."""

import asyncio
import errno
import io
import json
import logging
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from tests.online.directors import LOCAL, client_of, listening_on_a_port, local_server, settings_with_keys
from vidgen_ray.online.api import batch_runner
from vidgen_ray.online.api.batch_files import BatchFiles
from vidgen_ray.online.api.batch_runner import BatchRunner
from vidgen_ray.online.auth import ApiKeys
from vidgen_ray.online.http_fetch import ImageFetcher, UnreachableUrl
from vidgen_ray.online.job_service import plan_job
from vidgen_ray.online.server_settings import OnlineSettings, UrlInputs
from vidgen_ray.online.serving_profile import ServingProfile


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(batch_runner, "QUEUED", 8)


@pytest.fixture
def server(tiny, tmp_path):
    settings = OnlineSettings(profile="tiny", data=str(tmp_path / "out"), gpu_hour_price=2.0)
    with local_server(tiny, settings) as running:
        yield running


@pytest.fixture
def client(server):
    """Client of a server that runs its batches."""
    with TestClient(server.app, **LOCAL) as client:
        yield client


def line(custom_id, url="/v1/videos", **body):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


SMALL = {"prompt": "a man", "num_frames": 2, "size": "64x64", "upscale": False}


def jsonl(*lines) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def create(client, content: bytes, endpoint="/v1/videos", window="24h", **fields):
    file = client.post("/v1/files", files={"file": ("input.jsonl", content)}, data={"purpose": "batch"})
    assert file.status_code == 200, file.text
    body = {"input_file_id": file.json()["id"], "endpoint": endpoint, "completion_window": window, **fields}
    answer = client.post("/v1/batches", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ended(client, batch):
    deadline = time.monotonic() + 60
    while batch["status"] in ("validating", "in_progress", "finalizing", "cancelling"):
        counts = batch["request_counts"]
        assert counts["completed"] + counts["failed"] <= counts["total"], batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)
        answer = client.get(f"/v1/batches/{batch['id']}")
        assert answer.status_code == 200, answer.text
        batch = answer.json()
    return batch


def results(client, batch):
    """Return the lines of both files of a batch that has ended."""
    ids = batch["output_file_id"], batch["error_file_id"]
    return [[json.loads(line) for line in client.get(f"/v1/files/{i}/content").text.splitlines()] if i else [] for i in ids]


def problem(row):
    """Return the error of a line of an error file."""
    return row["error"] or row["response"]["body"]["error"]


@pytest.fixture
def stepped(monkeypatch):
    """Function that returns a function of a server, which does so many rounds of its batches."""
    monkeypatch.setattr(batch_runner, "_POLL_S", 0)
    monkeypatch.setattr(batch_runner, "_ROUND_S", 60)
    monkeypatch.setattr(batch_runner, "LOST_S", 0)
    monkeypatch.setattr(batch_runner, "BATCH_BACKOFF_S", 0)

    def runner_of(context):
        runner = BatchRunner(context)
        return lambda rounds: [asyncio.run(runner.round()) for _ in range(rounds)]

    return runner_of


@pytest.fixture
def logged():
    """Messages that batches log."""
    handler = logging.StreamHandler(io.StringIO())
    batch_runner.log.addHandler(handler)
    yield handler.stream
    batch_runner.log.removeHandler(handler)


def test_each_line_is_answered_once_in_one_of_both_files(client):
    good = [line(f"good-{seed}", seed=seed, **SMALL) for seed in range(20)]
    bad = [
        line("field", **SMALL, fps=-1),
        line("model", model="none", **SMALL),
        line("url", url="/v1/images/generations", **SMALL),
        line("two", n=2, **SMALL),
        line("good-3", **SMALL),
        [1],
        line(7, **SMALL),
        line("unsafe", **{**SMALL, "prompt": ""}),
    ]
    content = (
        b"\xef\xbb\xbf"
        + jsonl(*good, *bad).replace(b"\n", b"\r\n")
        + b"\r\n{\n"
        + b'{"custom_id": "long", "x": "'
        + b"a" * (1 << 20)
        + b'"}\n'
    )
    batch = ended(client, create(client, content, metadata={"set": "a"}))
    assert (batch["status"], batch["metadata"], batch["request_counts"]["total"]) == ("completed", {"set": "a"}, 30)
    assert batch["request_counts"] == {"total": 30, "completed": 20, "failed": 10}
    output, errors = results(client, batch)
    assert [each["custom_id"] for each in output] == [f"good-{seed}" for seed in range(20)]
    body = output[0]["response"]["body"]
    assert (output[0]["error"], body["object"], body["priority"], body["cost"]) == (None, "video", "low", 0.0)
    assert body["licences"]
    assert client.get(f"/v1/videos/{body['id']}/content").content
    found = [(each["custom_id"], *(problem(each)[name] for name in ("code", "param", "line"))) for each in errors]
    assert found == [
        ("field", "invalid_value", "fps", 21),
        ("model", "model_not_found", "model", 22),
        ("url", "invalid_value", "url", 23),
        ("two", "invalid_value", "n", 24),
        (None, "duplicate_custom_id", "custom_id", 25),
        (None, "invalid_json", None, 26),
        (None, "invalid_value", "custom_id", 27),
        ("unsafe", "invalid_value", "prompt", 28),
        (None, "invalid_json", None, 30),
        (None, "too_large", None, 31),
    ]
    files = {each["purpose"] for each in client.get("/v1/files").json()["data"]}
    assert files == {"batch", "batch_output"}
    assert len(client.get("/v1/files", params={"purpose": "batch_output"}).json()["data"]) == 2


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"\xef\xbb\xbf\r\n\n", "empty_file"),
        (b"a,b\n1,2\n", "invalid_json"),
        ("{}".encode("utf-16"), "invalid_json"),
        (b"\n" * (batch_runner.MAX_LINES + 1), "too_many_lines"),
    ],
    ids=["empty", "blank", "csv", "utf-16", "long"],
)
def test_file_without_requests_fails_the_batch(client, content, code):
    batch = ended(client, create(client, content))
    assert (batch["status"], batch["errors"]["data"][0]["code"]) == ("failed", code)
    assert batch["failed_at"]
    assert batch["output_file_id"] is batch["error_file_id"] is None


@pytest.mark.parametrize("endpoint", ["/v1/images/generations", "/v1/shots"])
def test_images_and_shots(client, endpoint):
    body = {"prompt": "a man", "width": 64, "height": 64, "seed": 1, "priority": "high"}
    if endpoint == "/v1/shots":
        body |= {"num_frames": 2}
    other = {"stream": True} if "images" in endpoint else {"id": "mine"}
    lines = line("a", endpoint, **body), line("b", endpoint, **body, **other), line("c", endpoint, **body)
    batch = ended(client, create(client, jsonl(*lines), endpoint))
    output, errors = results(client, batch)
    assert ([each["custom_id"] for each in output], errors[0]["custom_id"]) == (["a", "c"], "b")
    answer = output[0]["response"]["body"]
    url = answer["data"][0]["url"] if "images" in endpoint else f"/v1/videos/{answer['id']}/content?variant=image"
    assert client.get(url).content[:4] == b"\x89PNG"
    assert answer["licences"]


def test_batch_is_cancelled_in_each_state(server, client):
    server.director.held.set()
    lines = jsonl(*(line(f"{seed}", seed=seed, **SMALL) for seed in range(batch_runner.QUEUED + 9)))
    validating, running, done = create(client, lines), create(client, lines), create(client, jsonl(line("x")))
    done = ended(client, done)
    while client.get(f"/v1/batches/{running['id']}").json()["status"] == "validating":
        time.sleep(0.02)
    for each in (validating, running, running):
        cancelled = client.post(f"/v1/batches/{each['id']}/cancel").json()
        assert cancelled["status"] in ("cancelling", "cancelled")
        cancelled = ended(client, cancelled)
        assert cancelled["request_counts"] == {"total": 17, "completed": 0, "failed": 17}
        assert cancelled["status"] == "cancelled"
        output, errors = results(client, cancelled)
        assert output == []
        assert [each["custom_id"] for each in errors] == [f"{seed}" for seed in range(17)]
        assert {each["error"]["code"] for each in errors} == {"batch_cancelled"}
    assert client.post(f"/v1/batches/{done['id']}/cancel").json() == done


def test_interactive_jobs_pass_a_batch_and_its_lines_use_up_no_limit(server, client):
    server.director.held.set()
    create(client, jsonl(*(line(f"{seed}", seed=seed, **SMALL) for seed in range(20))))
    while server.store.open_counts()["queued"] < batch_runner.QUEUED:
        time.sleep(0.02)
    fields = {"prompt": "first", "num_frames": 2, "size": "64x64", "upscale": False}
    ids = [client.post("/v1/videos", json={**fields, "seed": seed}).json()["id"] for seed in range(31)]
    order = list(server.store.queue_order())
    assert order[:31] == ids
    shots = [plan_job(server.store.get(each, "local"), server.serving_profile, server.settings).shot for each in order[30:32]]
    assert [shot.priority for shot in shots] == ["normal", "low"], "as the engine sees them"
    assert len(server.store.queue_order()) == batch_runner.QUEUED + 31


def test_batch_waits_for_a_removed_key_and_late_lines_expire(tiny, tmp_path, stepped):
    with local_server(tiny, settings_with_keys(tmp_path, {"ada": {}})) as server:
        server.director.held.set()
        client, lines = client_of(server), jsonl(*(line(f"{seed}", seed=seed, **SMALL) for seed in range(70)))
        late, orphan = create(client, lines, window="1m"), create(client, lines)
        assert client_of(server, None).get(f"/v1/batches/{late['id']}").status_code == 401
        context = server.app.state.server
        step = stepped(context)
        keys, context.auth.keys = context.auth.keys, ApiKeys([], server.settings.limits)
        step(12)
        context.auth.keys = keys
        assert [client.get(f"/v1/batches/{each['id']}").json()["status"] for each in (late, orphan)] == ["in_progress"] * 2
        assert server.store.open_counts()["queued"] == 0
        step(2)
        assert server.store.open_counts()["queued"] > 0, "the key is back"
        with server.store.engine.begin() as connection:
            connection.exec_driver_sql("UPDATE vidgen_batches SET expires_at = 5")
            connection.exec_driver_sql("UPDATE vidgen_jobs SET start_by = 5")
        server.store.queue.fail_late()
        step(20)
        for batch in (late, orphan):
            batch = ended(client, batch)
            assert (batch["status"], batch["request_counts"]["failed"]) == ("expired", 70)
            errors = results(client, batch)[1]
            assert {(each["response"], each["error"]["code"]) for each in errors} == {(None, "batch_expired")}


def test_lost_input_fails_the_batch_and_cancel_ends(tiny, tmp_path, stepped, monkeypatch):
    monkeypatch.setattr(batch_runner, "INPUT_WAIT_S", 0)
    with local_server(tiny, settings_with_keys(tmp_path, {"ada": {}})) as server:
        client = client_of(server)
        step = stepped(server.app.state.server)
        batches = [create(client, jsonl(*(line(f"{n} {seed}", seed=seed, **SMALL) for seed in range(20)))) for n in range(3)]
        server.director.held.set()
        step(8)
        batches.append(create(client, jsonl(line("unread", **SMALL))))
        for batch in batches:
            (tmp_path / "out/inputs" / batch["input_file_id"].removeprefix("file-batch-")).unlink()
        assert client.post(f"/v1/batches/{batches[1]['id']}/cancel").json()["status"] == "cancelling"
        server.director.held.clear()
        while server.store.open_counts() != {"queued": 0, "in_progress": 0}:
            time.sleep(0.01)
        step(30)
        states = [client.get(f"/v1/batches/{batch['id']}").json() for batch in batches]
        assert [state["status"] for state in states] == ["failed", "cancelled", "failed", "failed"]
        assert {state["errors"]["data"][0]["code"] for state in states} == {"input_lost"}
        assert [state["request_counts"]["total"] for state in states] == [20, 20, 20, 0]
        output, errors = results(client, states[0])
        assert 0 < len(output) < 20
        counts = states[0]["request_counts"]
        assert (errors, counts["completed"], counts["failed"]) == ([], len(output), 20 - len(output))


def test_batch_whose_files_cannot_be_written_delays_no_other_and_fails(tiny, tmp_path, stepped, monkeypatch, logged):
    monkeypatch.setattr(batch_runner, "MAX_FAILURES", 3)
    write = BatchFiles.write_piece

    def write_piece(files):
        if files.batch.tenant == "ada":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(files)

    monkeypatch.setattr(BatchFiles, "write_piece", write_piece)
    with local_server(tiny, settings_with_keys(tmp_path, {"ada": {}, "bob": {}})) as server:
        ada, bob = client_of(server), client_of(server, "bob")
        step = stepped(server.app.state.server)
        first, second = create(ada, jsonl(line("a"))), create(bob, jsonl(line("b")))
        step(5)
        assert bob.get(f"/v1/batches/{second['id']}").json()["status"] == "completed"
        first = ada.get(f"/v1/batches/{first['id']}").json()
        assert first["status"] == "finalizing"
        assert first["finalizing_at"]
        step(3)
        first = ada.get(f"/v1/batches/{first['id']}").json()
        assert (first["status"], first["errors"]["data"][0]["code"]) == ("failed", "storage")
        assert f"{first['id']} of ada: its files cannot be read or written: No space left on device" in logged.getvalue()
        assert [path for path in (tmp_path / "out/inputs").iterdir() if path.name.startswith(".")] == []


def test_slow_images_of_one_tenant_delay_no_other(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_runner, "_ROUND_S", 0)
    is_fetching, answer = Event(), Event()

    def fetch(fetcher, url):
        is_fetching.set()
        assert answer.wait(60)
        raise UnreachableUrl("no answer")

    monkeypatch.setattr(ImageFetcher, "fetch", fetch)
    keys = settings_with_keys(tmp_path, {"ada": {}, "bob": {}})
    settings = keys.model_copy(update={"url_inputs": UrlInputs(allow_hosts=["images.example"])})
    with local_server(tiny, settings) as server, TestClient(server.app, **LOCAL):
        ada, bob = client_of(server), client_of(server, "bob")
        url = "https://images.example/a.png"
        slow = create(ada, jsonl(line("a", **SMALL, input_reference={"image_url": url})))
        assert is_fetching.wait(60)
        assert ended(bob, create(bob, jsonl(line("b", **SMALL))))["status"] == "completed"
        assert ada.get(f"/v1/batches/{slow['id']}").json()["status"] == "in_progress"
        answer.set()
        slow = ended(ada, slow)
        assert problem(results(ada, slow)[1][0])["code"] == "url_not_fetched"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "read error"), OperationalError("", {}, Exception("locked"))])
def test_lines_are_counted_once_although_counting_fails(server, stepped, monkeypatch, error):
    client, step = TestClient(server.app, **LOCAL), stepped(server.app.state.server)
    start, errors = server.store.batches.start, [error, error]
    monkeypatch.setattr(server.store.batches, "start", lambda *args: _raise(errors.pop()) if errors else start(*args))
    batch = create(client, jsonl(line("a"), line("b")))
    step(9)
    batch = client.get(f"/v1/batches/{batch['id']}").json()
    assert (batch["status"], batch["request_counts"]["total"]) == ("completed", 2)


def test_requests_are_answered_between_lines_that_take_long_and_a_bug_fails_one_line(server, client, monkeypatch):
    turns, read = [], batch_runner.json_object

    def slow_json(content):
        asyncio.get_running_loop().call_soon(turns.append, None)
        time.sleep(0.006)
        if turns and b"bug" in content:
            raise RuntimeError("a bug")
        return read(content)

    monkeypatch.setattr(batch_runner, "json_object", slow_json)
    batch = ended(client, create(client, jsonl(*[line(f"{n}", prompt=1) for n in range(9)], line("bug"))))
    rows = results(client, batch)[1]
    assert [row["response"]["status_code"] for row in rows] == [400] * 9 + [500], "the loop has had a turn before the last line"
    assert problem(rows[-1])["code"] == "internal_error"


def test_line_over_a_budget_that_does_not_reset_has_the_status_of_the_request(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ServingProfile, "gpu_seconds", lambda _, seconds: sum(seconds.values()))
    tenants = {"ada": {"limits": {"budgets": [{"window": "total", "gpu_seconds": 0}]}}}
    with local_server(tiny, settings_with_keys(tmp_path, tenants)) as server, client_of(server) as ada:
        (row,) = results(ada, ended(ada, create(ada, jsonl(line("a", **SMALL)))))[1]
    assert (row["response"]["status_code"], problem(row)["code"]) == (429, "budget_exceeded")
    assert problem(row)["type"] == "insufficient_quota"


def test_cancelled_batch_does_not_wait_for_the_next_attempt(server, stepped, monkeypatch):
    client, step = TestClient(server.app, **LOCAL), stepped(server.app.state.server)
    monkeypatch.setattr(batch_runner, "BATCH_BACKOFF_S", 3600)
    errors = [OSError(errno.EIO, "read error")]
    start = server.store.batches.start
    monkeypatch.setattr(server.store.batches, "start", lambda *args: _raise(errors.pop()) if errors else start(*args))
    monkeypatch.setattr(batch_runner, "FIRST_BATCH_BACKOFF_S", 3600)
    batch = create(client, jsonl(line("a")))
    step(3)
    assert client.get(f"/v1/batches/{batch['id']}").json()["status"] == "validating"
    client.post(f"/v1/batches/{batch['id']}/cancel")
    step(6)
    assert client.get(f"/v1/batches/{batch['id']}").json()["status"] == "cancelled"


def test_batches_go_on_after_an_unexpected_error(server, monkeypatch, logged):
    monkeypatch.setattr(batch_runner, "LOST_S", 0.01)
    running, errors = server.store.batches.running, [RuntimeError("a bug"), OperationalError("", {}, Exception("locked"))]
    monkeypatch.setattr(server.store.batches, "running", lambda: _raise(errors.pop()) if errors else running())
    with TestClient(server.app, **LOCAL) as client:
        assert ended(client, create(client, jsonl(line("a"))))["status"] == "completed"
    assert "a bug" in logged.getvalue()
    assert "locked" in logged.getvalue()


def _raise(error):
    raise error


def test_tenants_take_turns_while_lines_are_counted(tiny, tmp_path, stepped, monkeypatch):
    monkeypatch.setattr(batch_runner, "COUNTED_LINES", 10)
    with local_server(tiny, settings_with_keys(tmp_path, {"ada": {}, "bob": {}})) as server:
        ada, bob = client_of(server), client_of(server, "bob")
        first = [create(ada, b"\n" * 1_000 + jsonl(line("a", **SMALL)) + b"\n" * n) for n in range(3)]
        second = create(bob, jsonl(line("b", prompt=1)))
        step = stepped(server.app.state.server)
        step(5)
        assert bob.get(f"/v1/batches/{second['id']}").json()["status"] == "completed"
        assert {ada.get(f"/v1/batches/{each['id']}").json()["status"] for each in first} == {"validating"}
        monkeypatch.setattr(batch_runner, "COUNTED_LINES", 400)
        step(40)
        assert {ada.get(f"/v1/batches/{each['id']}").json()["request_counts"]["total"] for each in first} == {1}


def test_files_of_batches_count_as_stored_and_running_batches_are_limited(tiny, tmp_path, stepped):
    limits = {"stored_bytes": 300_000, "open_batches": 2}
    with local_server(tiny, settings_with_keys(tmp_path, {"ada": {"limits": limits}})) as server:
        client, step = client_of(server), stepped(server.app.state.server)

        def post(content):
            file = client.post("/v1/files", files={"file": ("a", content)}, data={"purpose": "batch"}).json()["id"]
            body = {"input_file_id": file, "endpoint": "/v1/videos", "completion_window": "24h"}
            return client.post("/v1/batches", json=body)

        refused = post(b"{}\n" * 200)
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "storage_full")
        first, second = post(b"{}\n" * 50), post(b"{}\n" * 40)
        assert (first.status_code, second.status_code) == (200, 200)
        third = post(b"{}\n")
        assert (third.status_code, third.json()["error"]["code"]) == (429, "too_many_batches")
        assert third.headers["retry-after"] == "60"
        big = client.post("/v1/files", files={"file": ("a", b"x" * 200_000)}, data={"purpose": "batch"})
        assert (big.status_code, "are reserved for running batches" in big.json()["error"]["message"]) == (413, True)
        step(12)
        assert {client.get(f"/v1/batches/{each.json()['id']}").json()["status"] for each in (first, second)} == {"completed"}
        assert post(b"{}\n" * 50).status_code == 200, "only what is written counts"
        output = sum(each["bytes"] for each in client.get("/v1/files").json()["data"] if each["purpose"] == "batch_output")
        assert 0 < output < 90 * 2_048


def test_counts_include_lines_whose_jobs_were_deleted(server, stepped):
    client, step = TestClient(server.app, **LOCAL), stepped(server.app.state.server)
    server.director.held.set()
    batch = create(client, jsonl(line("a", **SMALL), line("b", seed=2, **SMALL), line("c", prompt=1)))
    step(3)
    deleted, cancelled = (video["id"] for video in client.get("/v1/videos").json()["data"])
    client.delete(f"/v1/videos/{deleted}")
    assert client.get(f"/v1/batches/{batch['id']}").json()["request_counts"] == {"total": 3, "completed": 0, "failed": 2}
    assert client.post(f"/v1/videos/{cancelled}/cancel").status_code == 200
    step(6)
    errors = results(client, client.get(f"/v1/batches/{batch['id']}").json())[1]
    found = [(problem(each)["code"], each["response"] and each["response"]["status_code"]) for each in errors]
    assert found == [("cancelled", None), ("deleted", None), ("invalid_value", 400)]


def test_ended_batches_are_deleted_after_the_retention_time(tiny, tmp_path, stepped):
    settings = OnlineSettings(profile="tiny", data=str(tmp_path / "out"), retention_s=60)
    with local_server(tiny, settings) as server:
        client, step = TestClient(server.app, **LOCAL), stepped(server.app.state.server)
        batch = create(client, b"x")
        server.store._now = lambda: time.time() + 100
        server.store.purge(lambda key: None, 8)
        assert client.get(f"/v1/batches/{batch['id']}").status_code == 200
        step(3)
        server.store.purge(lambda key: None, 8)
        assert client.get(f"/v1/batches/{batch['id']}").status_code == 404


def test_objects_and_files_of_the_openai_package(server, client):
    openai = pytest.importorskip("openai")
    with listening_on_a_port(server.app) as url:
        api = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        content = jsonl(line("good", **SMALL), line("bad", prompt="a", fps=-1), line("fail", **{**SMALL, "prompt": "fail"}))
        hour = {"anchor": "created_at", "seconds": 3600}
        file = api.files.create(file=("shots of ada.jsonl", content), purpose="batch", expires_after=hour)
        assert (file.filename, file.expires_at) == ("shots of ada.jsonl", file.created_at + 3600)
        batch = api.batches.create(
            input_file_id=file.id, endpoint="/v1/videos", completion_window="24h", output_expires_after=hour
        )
        while batch.status in ("validating", "in_progress", "finalizing"):
            batch = api.batches.retrieve(batch.id)
        assert (batch.status, batch.model, batch.usage.total_tokens) == ("completed", "tiny", 0)
        assert batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
        output, errors = (api.files.retrieve(each) for each in (batch.output_file_id, batch.error_file_id))
        assert (output.filename, errors.filename) == (f"{batch.id}_output.jsonl", f"{batch.id}_error.jsonl")
        assert output.expires_at == output.created_at + 3600
        rows = [json.loads(row) for row in api.files.content(errors.id).text.splitlines()]
        found = [(each["custom_id"], each["response"]["status_code"], each["error"]) for each in rows]
        assert found == [("bad", 400, None), ("fail", 500, None)]
        body = rows[0]["response"]["body"]["error"]
        assert {**body, "message": ""} == {
            "code": "invalid_value",
            "message": "",
            "param": "fps",
            "type": "invalid_request_error",
            "line": 2,
        }
        uploads, now = server.store.uploads, time.time()
        uploads._now = lambda: now + 3601
        server.app.state.server.job_service.uploads.expire()
        with pytest.raises(openai.NotFoundError):
            api.files.retrieve(file.id)
        with pytest.raises(openai.BadRequestError):
            api.files.create(file=("a", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 5})


def test_webhooks_get_one_message_for_a_batch_unless_they_ask_for_lines(tiny, tmp_path, stepped):
    target = {"url": "http://127.0.0.1/", "secret": "whsec_AAAA"}
    targets = [{"name": "all", **target}, {"name": "lines", "batch_lines": True, **target}]
    targets.append({"name": "failed", "events": ["batch.failed", "video.failed"], **target})
    settings = OnlineSettings(profile="tiny", data=str(tmp_path / "out"), webhooks={"targets": targets})
    with local_server(tiny, settings) as server:
        client, step = TestClient(server.app, **LOCAL), stepped(server.app.state.server)
        create(client, jsonl(line("a", **SMALL), line("b", seed=2, **SMALL)))
        step(3)
        while server.store.open_counts() != {"queued": 0, "in_progress": 0}:
            time.sleep(0.01)
        step(5)
        create(client, b"x")
        step(3)
        sent = set()
        while (message := server.store.outbox.claim_due(60)) is not None:
            sent.add((message.target, message.event, message.job.partition("_")[0]))
    lines = {("lines", "video.completed", "video")}
    completed, failed = ({(name, f"batch.{state}", "batch") for name in ("all", "lines")} for state in ("completed", "failed"))
    assert sent == lines | completed | failed | {("failed", "batch.failed", "batch")}


def test_batch_is_created_once_for_an_idempotency_key_and_keeps_its_input(client, server):
    server.director.held.set()
    headers = {"Idempotency-Key": "x"}
    file = client.post("/v1/files", files={"file": ("a", jsonl(line("a", **SMALL)))}, data={"purpose": "batch"}).json()["id"]
    body = {"input_file_id": file, "endpoint": "/v1/videos", "completion_window": "24h"}
    first, again = (client.post("/v1/batches", json=body, headers=headers).json() for _ in range(2))
    assert first["id"] == again["id"]
    assert client.post("/v1/batches", json={**body, "completion_window": "1d"}, headers=headers).status_code == 409
    assert client.delete(f"/v1/files/{file}").status_code == 409
    assert client.post("/v1/videos", json={**SMALL, "input_reference": file}).json()["error"]["code"] == "file_not_found"
    for wrong in ({"input_file_id": "file-1"}, {"endpoint": "/v1/chat"}, {"completion_window": "0h"}, {"metadata": {"a": 1}}):
        answer = client.post("/v1/batches", json={**body, **wrong})
        assert (answer.status_code, answer.json()["error"]["param"].split(".")[0]) == (400, next(iter(wrong)))
    refused = client.post("/v1/batches", json={**body, "completion_window": "1y"}).json()["error"]["message"]
    assert "got '1y', must be a number of minutes, hours or days" in refused
    assert [each["id"] for each in client.get("/v1/batches", params={"limit": 1}).json()["data"]] == [first["id"]]
    server.director.held.clear()
    ended(client, first)
    assert client.delete(f"/v1/files/{file}").json()["deleted"]


def test_batch_and_deletion_of_its_input_exclude_each_other(tiny, tmp_path, database_url):
    settings = OnlineSettings(profile="tiny", data=str(tmp_path / "out"), database=database_url)
    with local_server(tiny, settings) as server, ThreadPoolExecutor(2) as pool:
        client, other = (TestClient(server.app, **LOCAL) for _ in range(2))
        for pair in range(30):
            content = jsonl(line(f"{pair}", **SMALL))
            file = client.post("/v1/files", files={"file": ("a", content)}, data={"purpose": "batch"}).json()["id"]
            body = {"input_file_id": file, "endpoint": "/v1/videos", "completion_window": "24h"}
            created = pool.submit(client.post, "/v1/batches", json=body)
            deleted = pool.submit(other.delete, f"/v1/files/{file}")
            answers = created.result().status_code, deleted.result().status_code
            assert answers in ((200, 409), (400, 200))
            assert client.get(f"/v1/files/{file}/content").status_code == {200: 404, 409: 200}[answers[1]]


def test_lines_are_stored_once_by_two_replicas_that_crash(server, client, monkeypatch):
    """Each step may be done by both replicas, and fails after it has begun every third time."""
    monkeypatch.setattr(batch_runner, "LOST_S", 0)
    stop, calls = server.store.batches.end, iter(range(10_000))

    def crash(*args, **values):
        if next(calls) % 3:
            raise OSError("crashed")
        stop(*args, **values)

    monkeypatch.setattr(server.store.batches, "end", crash)
    with TestClient(server.app, **LOCAL) as other:
        lines = [line(f"{seed}", seed=seed % 20, **SMALL) for seed in range(24)]
        output, errors = results(other, ended(other, create(client, jsonl(*lines))))
    assert [each["custom_id"] for each in output] == [f"{seed}" for seed in range(24)]
    assert errors == []
    assert len(server.director.rendered) == 20


NPM_CLIENT = "openai@6.49.0"
"""Needs Node 20. Version 7 needs 22."""
NPM_SCRIPT = """
import OpenAI, { toFile } from "openai";
const [url, lines] = process.argv.slice(2), client = new OpenAI({ apiKey: "none", baseURL: url });
const file = await client.files.create({ file: await toFile(Buffer.from(lines), "lines.jsonl"), purpose: "batch" });
const fields = { input_file_id: file.id, endpoint: "/v1/videos", completion_window: "24h", metadata: { set: "a" } };
const first = await client.batches.create(fields), second = await client.batches.create(fields);
const states = [(await client.batches.cancel(second.id)).status];
console.log("cancelled");
for (const { id } of [first, second]) {
  let batch;
  do batch = await client.batches.retrieve(id); while (!batch.completed_at && !batch.cancelled_at);
  const text = await (await client.files.content(batch.output_file_id ?? batch.error_file_id)).text();
  states.push(batch.status, batch.request_counts, text.trim().split("\\n").map((row) => JSON.parse(row).custom_id));
}
const listed = [];
for await (const batch of client.batches.list({ limit: 1 })) listed.push([batch.id, batch.metadata.set]);
console.log(JSON.stringify([states, listed, [[second.id, "a"], [first.id, "a"]]]));
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npm"), reason="needs Node and npm")
def test_npm_client_sends_lists_and_cancels_batches(server, client, tmp_path):
    (tmp_path / "batches.mjs").write_text(NPM_SCRIPT)
    install = ["npm", "install", "--prefix", str(tmp_path), "--ignore-scripts", "--no-audit", "--no-fund", NPM_CLIENT]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=300, check=False)
    if installed.returncode:
        pytest.skip(f"npm cannot install {NPM_CLIENT}: {installed.stderr[-300:]}")
    server.director.held.set()
    lines = jsonl(*(line(f"{seed}", seed=seed, **SMALL) for seed in range(3))).decode()
    with listening_on_a_port(server.app) as url:
        command = ["node", str(tmp_path / "batches.mjs"), f"{url}/v1", lines]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "cancelled\n"
            server.director.held.clear()
            states, listed, newest_first = json.loads(process.communicate(timeout=60)[0])
    done, cancelled = ({"total": 3, "completed": n, "failed": 3 - n} for n in (3, 0))
    assert states == ["cancelling", "completed", done, ["0", "1", "2"], "cancelled", cancelled, ["0", "1", "2"]]
    assert listed == newest_first
