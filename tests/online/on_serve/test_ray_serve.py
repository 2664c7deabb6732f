"""The server on Ray Serve: its contract, kills of its processes, shared budgets, memory, new and wrong configs."""

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import psutil
import pytest

from tests.online.contract.test_schemathesis import create_objects, failures_of
from tests.online.on_serve.applications import POLL_S
from tests.online.on_serve.conftest import POOR_GPU_SECONDS, POOR_KEY
from tests.online.on_serve.serve_cluster import pids_of
from tests.online.scripted_stages import pipes_open
from vidgen_ray.online.store.budgets import MAX_CORRECTION

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SHOT = {"width": 64, "height": 64, "generate_video": False}
PROCESSES = (
    "ServeReplica:vidgen:Api",
    "ServeReplica:vidgen:Director",
    "ServeReplica:vidgen:Workers",
    "ProxyActor",
    "ServeController",
)


def get(cluster, path):
    """Return the content of a 200. Repeats the request while the server cannot be reached."""
    while (answer := cluster.request("GET", path))[0] != 200:
        assert answer[0] in (None, 503), answer
        time.sleep(POLL_S)
    return answer[1]


def test_batch_survives_the_loss_of_each_process(cluster):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(api_key="vg-ada-key", base_url=f"{cluster.url}/v1", max_retries=8)
    bodies = ({"prompt": f"a boat {n}", "seed": n, **SHOT} for n in range(40))
    lines = [
        json.dumps({"custom_id": f"{n}", "method": "POST", "url": "/v1/shots", "body": body}) for n, body in enumerate(bodies)
    ]
    file = client.files.create(file=("lines.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/shots", completion_window="24h").id
    for name in PROCESSES:
        before = pids_of(name)
        os.kill(before[0], signal.SIGKILL)
        while not set(pids_of(name)) - set(before):
            time.sleep(POLL_S)
    while (found := get(cluster, f"/v1/batches/{batch}"))["status"] in ("validating", "in_progress", "finalizing"):
        time.sleep(POLL_S)
    assert (found["status"], found["request_counts"]["completed"], found["error_file_id"]) == ("completed", len(lines), None)
    rows = client.files.content(found["output_file_id"]).text.splitlines()
    assert [json.loads(row)["custom_id"] for row in rows] == [f"{n}" for n in range(len(lines))]
    cluster.wait_until_running()


def test_two_replicas_share_a_budget(cluster, pipe):
    # The jobs wait for the pipe, so they have spent nothing.
    fields = {"prompt": f"steps 3 pause at 1 {pipe}", **SHOT}
    status, estimate = cluster.request("POST", "/v1/shots/estimate", fields, POOR_KEY)
    assert status == 200, estimate

    def create(seed):
        return cluster.request("POST", "/v1/shots", {**fields, "seed": seed}, POOR_KEY)[0]

    def budget():
        return cluster.request("GET", "/v1/usage", None, POOR_KEY)[1]["budgets"][0]

    most = int(POOR_GPU_SECONDS / estimate["gpu_seconds"] * MAX_CORRECTION)
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(create, range(most + 16)))
    accepted = answers.count(200)
    assert answers.count(429) == len(answers) - accepted > 0, answers
    each = budget()["reserved"] / accepted
    assert accepted * each <= POOR_GPU_SECONDS < (accepted + 1) * each
    with pipes_open(pipe):
        while budget()["reserved"]:
            time.sleep(POLL_S)


def test_responses_match_the_openapi_document(cluster):
    schemathesis = pytest.importorskip("schemathesis")
    headers = {"Authorization": "Bearer vg-ada-key"}
    schema = schemathesis.openapi.from_url(f"{cluster.url}/openapi.json", headers=headers)
    failures = failures_of(schema, create_objects(cluster.url, headers), headers)
    assert not failures, "\n\n".join(failures)


def test_headers_do_not_stay_in_memory(address, request):
    """In the API of `vidgen serve`, and in the proxy of Ray Serve."""
    (pid,) = pids_of("ProxyActor" if "cluster" in request.node.name else "Api")
    before = psutil.Process(pid).memory_info().rss
    refused = 0
    for _ in range(5):
        with closing(socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))) as connection:
            try:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 1_700_000)
            except OSError:
                refused += 1
    assert (refused, psutil.Process(pid).memory_info().rss - before < 20e6) == (5, True)


@contextmanager
def load(cluster, clients=4):
    """Create images all the time. Yields the statuses of the answers."""
    ends, answers = threading.Event(), []

    def create(seed):
        while not ends.is_set():
            seed += 1
            body = {"prompt": "load", "seed": seed, "size": "64x64"}
            answers.append(cluster.request("POST", "/v1/images/generations", body, "vg-amy-key")[0])

    with ThreadPoolExecutor(clients) as threads:
        running = [threads.submit(create, number * 1_000_000) for number in range(clients)]
        try:
            yield answers
        finally:
            ends.set()
        for each in running:
            each.result()


def test_new_config_and_replicas_drop_no_request(cluster, pipe):
    body = {"prompt": f"steps 3 pause at 1 {pipe}", "size": "64x64", "num_frames": 2}
    status, video = cluster.request("POST", "/v1/videos", body)
    assert status == 200, video
    with load(cluster) as answers, ThreadPoolExecutor(1) as thread:
        stream = thread.submit(cluster.request, "GET", f"/v1/videos/{video['id']}/events")
        # The changed setting replaces all processes.
        for replicas, changes in ((8, {"max_queued": 300}), (2, {})):
            cluster.deploy(api_replicas=replicas, **changes)
            cluster.wait_until_running(replicas)
            before = len(answers)
            while len(answers) < before + 8:
                time.sleep(POLL_S)
    assert set(answers) == {200}, answers
    # It holds no replica, and the job continues in the new workers.
    status, events = stream.result()
    assert (status, b"video.completed" in events) == (200, False), events
    with pipes_open(pipe):
        while get(cluster, f"/v1/videos/{video['id']}")["status"] != "completed":
            time.sleep(POLL_S)


def test_wrong_args_are_a_sentence(cluster):
    build = "vidgen_ray.online.application:build"
    cluster.deploy({"name": "wrong", "route_prefix": "/wrong", "import_path": build, "args": {"prot": 8000}})
    while (status := cluster.status("wrong")) is None or status.status != "DEPLOY_FAILED":
        time.sleep(POLL_S)
    lines = status.message.splitlines()
    assert "args, prot: Extra inputs" in lines[-1], status.message
    # Those of Serve's own process, which reads the result.
    assert len(lines) < 20, status.message
    cluster.deploy()
