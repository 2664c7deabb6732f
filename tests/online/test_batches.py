"""Batches by OpenAI's client, on a server without Ray: every line once, bad input, cancellation in each state."""

import asyncio
import json
import shutil
import subprocess
import time

import pytest
from starlette.testclient import TestClient

from tests.online.directors import LOCAL, client_of, listening_on_a_port, local_server, settings_with_keys
from vidgen_ray.online.api import batch_runner
from vidgen_ray.online.api.batch_runner import advance
from vidgen_ray.online.auth import ApiKeys
from vidgen_ray.online.job_service import plan_job
from vidgen_ray.online.server_settings import OnlineSettings


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
    while batch["status"] in ("validating", "in_progress", "cancelling"):
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
    found = [(each["custom_id"], each["error"]["code"], each["error"]["param"], each["error"]["line"]) for each in errors]
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


def test_late_lines_expire_and_lines_of_a_removed_key_are_cancelled(tiny, tmp_path):
    with local_server(tiny, settings_with_keys(tmp_path, {"ada": {}})) as server:
        server.director.held.set()
        client, lines = client_of(server), jsonl(*(line(f"{seed}", seed=seed, **SMALL) for seed in range(70)))
        late, orphan = create(client, lines, window="1m"), create(client, lines)
        other = client_of(server, None)
        assert other.get(f"/v1/batches/{late['id']}").status_code == 401
        context = server.app.state.server

        def run():
            for batch in server.store.batches.running():
                asyncio.run(advance(context, batch))

        run()
        run()
        with server.store.engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE vidgen_batches SET expires_at = 5 WHERE id = '{late['id']}'")
            connection.exec_driver_sql("UPDATE vidgen_jobs SET start_by = 5")
        server.store.queue.fail_late()
        run()
        run()
        late = ended(client, late)
        assert (late["status"], late["request_counts"]["failed"]) == ("expired", 70)
        assert {each["error"]["code"] for each in results(client, late)[1]} == {"batch_expired"}
        keys, context.auth.keys = context.auth.keys, ApiKeys([], server.settings.limits)
        for _ in range(4):
            run()
        context.auth.keys = keys
        orphan = ended(client, orphan)
        assert (orphan["status"], orphan["errors"]["data"][0]["code"]) == ("cancelled", "invalid_api_key")
        assert len(results(client, orphan)[1]) == 70


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
    assert [each["id"] for each in client.get("/v1/batches", params={"limit": 1}).json()["data"]] == [first["id"]]
    server.director.held.clear()
    ended(client, first)
    assert client.delete(f"/v1/files/{file}").json()["deleted"]


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
