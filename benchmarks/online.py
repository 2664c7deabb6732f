"""Benchmark of the server: latency, request rate, and jobs lost when processes are killed. Uses the real HTTP API.

Latency: stages do nothing, and clients wait for their results; measures the time from a request to its response. One client
sends one request after another, also while many event streams are open, while many clients poll, beside a batch, and when many
jobs are stored.
Then several clients do so at once, which gives the images per second, and the CPU time of each process for an image.
Serve: `vidgen serve` with the profile `tiny`, as a command: seconds until it is ready, memory at rest, and images of one step.
Kills: many clients submit jobs while every few seconds a random process of the server (API, director, owner of the workers,
worker, encoder; with Ray Serve also its proxy and controller) is killed with SIGKILL.

`--host ray-serve` runs the server on Ray Serve, as `serve deploy` does.
Clients and server share this machine. The time includes encoding and writing the files, which are tiny.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import psutil
import yaml
from rich.console import Console
from rich.table import Table
from sqlalchemy import update

from benchmarks.local_ray import ENVIRONMENT, local_ray
from benchmarks.machine import machine, write_json
from benchmarks.noop_stages import FRAMES, ON_THESE_ACTORS, SIDE_PX
from benchmarks.open_connections import Connections, running
from benchmarks.stored_jobs import fill
from vidgen_client import Client as BatchClient
from vidgen_ray.engine.ray_cluster import muted_stderr
from vidgen_ray.online.store.database import JOBS
from vidgen_ray.online.store.jobs import Job, JobKind, JobProgress, JobState, new_id
from vidgen_ray.shot import Shot

ROOT = Path(__file__).parent.parent
GOALS = {"image, 1 client, p50": 60.0, "images per second, 100 clients": 150.0, "accepted jobs lost": 0.0}
HOSTS = ("actors", SERVE_HOST := "ray-serve")
"""Actors of `vidgen serve`, and Ray Serve."""
PROCESSES = (
    *("ray::Api", "ray::Director", "ray::Worker", "ray::Encoder"),
    *("ray::ServeReplica", "ray::ProxyActor", "ray::ServeController"),
)
"""Prefixes of the process titles of the server, and of Ray Serve."""
CPU_WORKERS = 2
OTHER_DIRECTOR = "benchmark"
"""Owner of jobs that stay in progress."""
POLL_S = 0.25
"""Seconds between status requests of a client."""
TIMEOUT_S = 180.0
"""Time limit of a request with retries, and of accepted jobs after the last request."""
SMALL = {"width": SIDE_PX, "height": SIDE_PX, "num_frames": FRAMES, "scale": 2}


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a benchmark run."""

    clients: Sequence[int]
    """Numbers of clients that wait for images at once."""
    requests: int
    """Requests of all clients together."""
    sequential_jobs: int
    """Requests of the client that sends one after another."""
    streams: int
    polling_clients: int
    stored_jobs: int
    kills_s: float
    """Duration of the part in which processes are killed."""
    kill_interval_s: float


FULL = Size((1, 10, 100), 2_000, 200, streams=200, polling_clients=1_000, stored_jobs=100_000, kills_s=120, kill_interval_s=10)
QUICK = Size((1, 10, 100), 300, 15, streams=20, polling_clients=50, stored_jobs=5_000, kills_s=12, kill_interval_s=4)
KILL_CLIENTS = 8
IMAGES = "/v1/images/generations"
BATCHES, BATCH_LINES = 5, 2_000
POLL_INTERVAL_S = 10.0
"""Seconds between the requests of each polling client: what the server asks for if a job takes 100 s more."""
PROGRESS_INTERVAL_S = 1.0
"""Seconds between two changes of the job that the event streams follow."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Small sizes.")
    parts = [SERVE, *PARTS]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="Parts to measure. Default: all.")
    parser.add_argument("--host", choices=HOSTS, default=HOSTS[0], help="What runs the server in all parts but serve.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the results as JSON.")
    args = parser.parse_args()
    # Ray reads its variables before it starts. PYTHONPATH lets its workers find this package.
    os.environ.update(ENVIRONMENT, PYTHONPATH=str(ROOT))
    folder = Path(tempfile.mkdtemp(prefix="vidgen-online-"))
    size = QUICK if args.quick else FULL
    rows: list[dict[str, Any]] = []
    try:
        if SERVE in args.parts:
            rows += _serve(folder, size)
        if parts := [part for part in args.parts if part != SERVE]:
            # Ray prints a message for every killed process, hence muted_stderr.
            with redirect_stdout(sys.stderr), muted_stderr(), local_ray(0), _no_op_server(folder, args.host) as server:
                for part in parts:
                    rows += PARTS[part](server, size)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = Table(title="Server")
    for column in ("what", "value", "unit", "goal"):
        table.add_column(column, justify="right" if column in ("value", "goal") else "left")
    for row in rows:
        goal = GOALS.get(row["what"])
        table.add_row(row["what"], f"{row['value']:.1f}", row["unit"], "" if goal is None else f"{goal:g}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if args.json:
        write_json(args.json, {"machine": machine(("vidgen-ray", "ray", "fastapi", "sqlalchemy")), "rows": rows})
    return 0


# Server and client


@dataclass(frozen=True)
class Server:
    """A running server and its job store."""

    port: int
    store: Any


@contextmanager
def _server(profile: str, data: Path, stages: Mapping[str, Any], host: str) -> Iterator[Server]:
    """Start a server. `host`: one of `HOSTS`."""
    from vidgen_ray.online.server import serving
    from vidgen_ray.online.server_plan import parts_of, server_plan
    from vidgen_ray.online.server_settings import Limits, OnlineSettings
    from vidgen_ray.online.store.store import open_store
    from vidgen_ray.planner.cluster import this_machine

    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    unlimited = 1_000_000
    limits = Limits(open_jobs=unlimited, requests_per_minute=unlimited, streams=unlimited)
    settings = OnlineSettings(profile=profile, data=str(data), port=port, limits=limits, max_queued=unlimited)
    plan = server_plan(settings, this_machine)
    if host == SERVE_HOST:
        from ray import serve

        from vidgen_ray.online.application import application

        listening.close()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application(parts_of(plan, stages)), name="vidgen", route_prefix="/")
        yield Server(port, open_store(settings))
        serve.shutdown()
        return
    with listening, serving(plan, listening, stages) as server:
        server.wait_until_accepting(threading.Event())
        server.wait_until_ready(threading.Event())
        yield Server(port, open_store(settings))


@contextmanager
def _no_op_server(folder: Path, host: str) -> Iterator[Server]:
    weights = folder / "weights"
    weights.mkdir()
    (weights / "animevideov3.safetensors").write_bytes(b"nothing")
    actors = {stage.actor: {"weights": str(weights), "cpus": 0.5} for stage in ON_THESE_ACTORS.values()}
    profile = folder / "no-op.yaml"
    profile.write_text(yaml.safe_dump({"name": "no-op", "about": "does nothing", "cpu_workers": CPU_WORKERS, "actors": actors}))
    with _server(str(profile), folder / "no-op", ON_THESE_ACTORS, host) as server:
        yield server


class Client:
    """HTTP client with one persistent connection. Retries while the server is unavailable."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._connection: http.client.HTTPConnection | None = None

    def create(self, fields: Mapping[str, Any], key: str) -> str:
        """Create a job and return its id. A repeated `key` returns the same job."""
        return str(self._request("POST", "/v1/shots", json.dumps(fields), {"Idempotency-Key": key})["id"])

    def image(self, number: int) -> None:
        """Create an image, and wait for it."""
        fields = {"prompt": f"image {number}", "seed": number, "size": f"{SIDE_PX}x{SIDE_PX}"}
        self._request("POST", IMAGES, json.dumps(fields), {})

    def one_step(self, number: int) -> None:
        """Create an image of one step, and wait for it."""
        fields = {"prompt": f"image {number}", "seed": number, "size": "64x64", "num_inference_steps": 1}
        self._request("POST", IMAGES, json.dumps(fields), {})

    def clip(self, number: int) -> None:
        """Create a clip, and wait for it."""
        fields = {"prompt": f"clip {number}", "seed": number, **SMALL}
        self._request("POST", "/v1/videos/sync", json.dumps(fields), {})

    def status(self, job_id: str) -> str:
        return str(self._request("GET", f"/v1/shots/{job_id}", None, {})["status"])

    def healthz(self) -> None:
        self._request("GET", "/healthz", None, {})

    def _request(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> dict[str, Any]:
        started = time.monotonic()
        while True:
            try:
                return self._request_once(method, path, body, headers)
            except (OSError, http.client.HTTPException, _Retryable) as error:
                self._connection = None
                if time.monotonic() - started > TIMEOUT_S:
                    raise RuntimeError(f"{method} {path}: no response within {TIMEOUT_S:g} s") from error
                time.sleep(POLL_S)

    def _request_once(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> dict[str, Any]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=30)
        self._connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        response = self._connection.getresponse()
        content = response.read()
        if response.status in (429, 500, 502, 503, 504):
            raise _Retryable(response.status)
        if response.status >= 400:
            raise RuntimeError(f"{method} {path}: {response.status} {content.decode()[:500]}")
        is_json = response.headers.get_content_type() == "application/json"
        fields: dict[str, Any] = json.loads(content) if is_json else {}
        return fields


class _Retryable(Exception):
    """HTTP status that asks for a retry."""


def _row(what: str, value: float, unit: str) -> dict[str, Any]:
    return {"system": "vidgen", "what": what, "value": round(value, 3), "unit": unit}


def _quantiles(what: str, milliseconds: list[float]) -> list[dict[str, Any]]:
    ordered = sorted(milliseconds)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return [_row(f"{what}, p50", statistics.median(ordered), "ms"), _row(f"{what}, p95", p95, "ms")]


# The parts


def _serve(folder: Path, size: Size) -> list[dict[str, Any]]:
    """Measure `vidgen serve --profile tiny`."""
    unlimited = 1_000_000
    limits = {"open_jobs": unlimited, "requests_per_minute": unlimited, "streams": unlimited}
    settings = {"profile": "tiny", "data": str(folder / "tiny"), "limits": limits, "max_queued": unlimited}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vidgen_ray", "serve", "--settings", str(folder / "settings.yaml"), "--port", str(port)]
    started, rows = time.monotonic(), []
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT} | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for what, text in (("until it accepts jobs", "Serving profile"), ("until models are loaded", "Models loaded")):
            while text not in (line := process.stderr.readline()):
                sys.stderr.write(line)
                if not line:
                    raise RuntimeError("vidgen serve has ended")
            rows.append(_row(f"start, {what}", time.monotonic() - started, "s"))
        rows.append(_row("start, CPU time of all processes", _cpu_s()["all"], "s"))
        server = Server(port, None)
        for _ in range(3):
            Client(server).one_step(next(_seeds))
        time.sleep(SETTLE_S)
        memory = [(_kind(process), process.memory_full_info()) for process in _processes("")]
        for kind in sorted({kind for kind, _ in memory}):
            rows.append(_row(f"memory, {kind}, PSS", sum(each.pss for name, each in memory if name == kind) / 2**20, "MB"))
        rows.append(_row("memory, all, RSS", sum(each.rss for _, each in memory) / 2**20, "MB"))
        rows.append(_row("memory, all, PSS", sum(each.pss for _, each in memory) / 2**20, "MB"))
        for clients in size.clients[:2]:
            rows += _clients_at_once(server, size.requests // 3, clients, Client.one_step)
        process.send_signal(signal.SIGTERM)
        process.wait()
    return rows


SETTLE_S = 5.0
"""Seconds after the first images until memory is measured."""


def _kind(process: psutil.Process) -> str:
    """Return a name of a process of `vidgen serve`."""
    words = process.cmdline()
    if (title := words[0]).startswith("ray::"):
        return title.removeprefix("ray::").partition(".")[0].partition("(")[0]
    return next(
        (
            kind
            for kind in ("raylet", "gcs_server", "dashboard/agent", "runtime_env", "vidgen_ray")
            if any(kind in word for word in words)
        ),
        title,
    )


def _cpu_s() -> dict[str, float]:
    """Return the CPU seconds so far of each kind of process."""
    used: Counter[str] = Counter()
    for process in _processes(""):
        with suppress(psutil.NoSuchProcess):
            used[_kind(process)] += sum(process.cpu_times()[:2])
    return {**used, "all": used.total()}


_seeds = itertools.count(1)
"""Seeds of all requests: no two are the same shot."""


def _one_by_one(server: Server, size: Size) -> list[dict[str, Any]]:
    client = Client(server)
    return [
        *_latencies("image, 1 client", client.image, size.sequential_jobs),
        *_latencies("clip, 1 client", client.clip, size.sequential_jobs),
    ]


def _latencies(what: str, request: Callable[[int], None], count: int) -> list[dict[str, Any]]:
    """Send one request after another. Skip the first two, which initialise routes, connections and the upscaler."""
    return _quantiles(what, [_request_ms(request) for _ in range(count + 2)][2:])


def _request_ms(request: Callable[[int], None]) -> float:
    started = time.perf_counter()
    request(next(_seeds))
    return 1000 * (time.perf_counter() - started)


def _with_streams(server: Server, size: Size) -> list[dict[str, Any]]:
    """Measure while event streams follow a job in progress."""
    connections, job = Connections(server.port), _endless_job(server)
    clients = [connections.stream(f"/v1/videos/{job.id}/events") for _ in range(size.streams)]
    steps = itertools.count(1)

    def change() -> None:
        server.store.queue.progress(OTHER_DIRECTOR, [JobProgress(job.id, "flux", next(steps), 1_000, 0, 0.0)])

    with running(connections, clients), _run_periodically(PROGRESS_INTERVAL_S, change):
        rows = _latencies(f"image, {size.streams} streams", Client(server).image, size.sequential_jobs)
        rows.append(_health(server, f"{size.streams} streams"))
    return [*rows, _row(f"events received by {size.streams} streams", connections.events, "events")]


def _with_polling_clients(server: Server, size: Size) -> list[dict[str, Any]]:
    """Measure while clients poll a job in progress."""
    connections, job = Connections(server.port), _endless_job(server)
    clients = [
        connections.poll(f"/v1/videos/{job.id}", POLL_INTERVAL_S * number / size.polling_clients, POLL_INTERVAL_S)
        for number in range(size.polling_clients)
    ]
    what = f"{size.polling_clients} polling clients"
    with running(connections, clients):
        rows = _latencies(f"image, {what}", Client(server).image, size.sequential_jobs)
        rows.append(_health(server, what))
    return [*rows, *_quantiles(f"poll, {what}", connections.latencies_ms or [0.0])]


def _beside_a_batch(server: Server, size: Size) -> list[dict[str, Any]]:
    """Measure without and with a batch of images in progress, in turns."""
    alone, beside = list[float](), list[float]()
    request, fields = Client(server).image, {"prompt": "a line", "size": f"{SIDE_PX}x{SIDE_PX}"}
    with BatchClient(f"http://127.0.0.1:{server.port}") as batches:
        for _ in range(BATCHES):
            alone += [_request_ms(request) for _ in range(size.sequential_jobs // BATCHES)]
            bodies = ({**fields, "seed": next(_seeds)} for _ in range(BATCH_LINES))
            lines = ({"custom_id": f"{n}", "method": "POST", "url": IMAGES, "body": body} for n, body in enumerate(bodies))
            file = batches.upload_batch("\n".join(map(json.dumps, lines)).encode())
            batch = batches.create_batch(file, endpoint=IMAGES)
            while not batches.get_batch(batch).request_counts.completed:
                time.sleep(POLL_S)
            beside += [_request_ms(request) for _ in range(size.sequential_jobs // BATCHES)]
            if batches.cancel_batch(batch).is_final:
                raise RuntimeError("the batch ended before the last image beside it")
            batches.wait_for_batch(batch)
    return [*_quantiles("image, without a batch", alone), *_quantiles(f"image, beside {BATCH_LINES} lines of a batch", beside)]


def _with_stored_jobs(server: Server, size: Size) -> list[dict[str, Any]]:
    fill(server.store, size.stored_jobs)
    return _latencies(f"image, {size.stored_jobs} stored jobs", Client(server).image, size.sequential_jobs)


def _endless_job(server: Server) -> Any:
    """Store a job that another director has in progress."""
    shot = Shot(id="online-0", prompt="endless", seed=1)
    values = {"state": JobState.IN_PROGRESS, "created_at": time.time(), "started_at": time.time()}
    job, _ = server.store.create(
        Job(id=new_id("video"), tenant="local", kind=JobKind.VIDEO, shot=shot, key="endless", **values)
    )
    with server.store.engine.begin() as connection:
        connection.execute(update(JOBS).where(JOBS.c.id == job.id).values(owner=OTHER_DIRECTOR))
    return job


def _health(server: Server, what: str) -> dict[str, Any]:
    """Return the slowest of ten health checks."""
    client, slowest_ms = Client(server), 0.0
    for _ in range(10):
        started = time.perf_counter()
        client.healthz()
        slowest_ms = max(slowest_ms, 1000 * (time.perf_counter() - started))
    return _row(f"/healthz, {what}, slowest of 10", slowest_ms, "ms")


def _many_clients(server: Server, size: Size) -> list[dict[str, Any]]:
    return [row for clients in size.clients for row in _clients_at_once(server, size.requests, clients, Client.image)]


def _clients_at_once(
    server: Server, requests: int, clients: int, request: Callable[[Client, int], None]
) -> list[dict[str, Any]]:
    """Let several clients wait for images at once."""

    def send(index: int) -> list[float]:
        client = Client(server)
        return [_request_ms(partial(request, client)) for _ in range(index, requests, clients)]

    before, started = _cpu_s(), time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        milliseconds = [each for batch in pool.map(send, range(clients)) for each in batch]
    images_per_s = requests / (time.monotonic() - started)
    at_once = "1 client" if clients == 1 else f"{clients} clients"
    rows = [*_quantiles(f"image, {at_once}", milliseconds), _row(f"images per second, {at_once}", images_per_s, "1/s")]
    for name, after_s in _cpu_s().items():
        cpu_ms = 1000 * (after_s - before.get(name, 0.0)) / requests
        rows.append(_row(f"CPU time per image, {name}, {at_once}", cpu_ms, "ms"))
    return rows


@dataclass
class AcceptedJobs:
    """Ids of accepted jobs. Thread-safe."""

    ids: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, job_id: str) -> None:
        with self.lock:
            self.ids.append(job_id)


def _kills(server: Server, size: Size) -> list[dict[str, Any]]:
    accepted, end = AcceptedJobs(), time.monotonic() + size.kills_s

    def submit(index: int) -> None:
        client, number = Client(server), 0
        while time.monotonic() < end:
            number += 1
            fields = {"prompt": f"client {index}, job {number}", "seed": number, **SMALL}
            job_id = client.create(fields, f"kills-{index}-{number}")
            accepted.add(job_id)
            while time.monotonic() < end and client.status(job_id) not in ("completed", "failed", "cancelled"):
                time.sleep(POLL_S)

    with _run_periodically(size.kill_interval_s, _kill_a_process) as killed, ThreadPoolExecutor(KILL_CLIENTS) as clients:
        for future in [clients.submit(submit, index) for index in range(KILL_CLIENTS)]:
            future.result()
    ended = _final_states(server, accepted.ids)
    return [
        _row(f"accepted, {KILL_CLIENTS} clients for {size.kills_s:g} s", len(accepted.ids), "jobs"),
        _row(f"processes killed, one every {size.kill_interval_s:g} s", len(killed), "processes"),
        _row("accepted jobs that failed", ended["failed"], "jobs"),
        _row("accepted jobs lost", len(accepted.ids) - sum(ended.values()), "jobs"),
    ]


def _final_states(server: Server, ids: list[str]) -> dict[str, int]:
    """Count the jobs by final state. Jobs that do not end within `TIMEOUT_S` are not counted."""
    counts, unfinished, started = {"completed": 0, "failed": 0, "cancelled": 0}, set(ids), time.monotonic()
    while unfinished and time.monotonic() - started < TIMEOUT_S:
        for job_id in list(unfinished):
            job = server.store.get(job_id, "local")
            if job is not None and job.state.is_final:
                counts[job.state.value] += 1
                unfinished.discard(job_id)
        time.sleep(POLL_S)
    return counts


SERVE = "serve"
PARTS: dict[str, Callable[[Server, Size], list[dict[str, Any]]]] = {
    "latency": _one_by_one,
    "streams": _with_streams,
    "polling": _with_polling_clients,
    "batch": _beside_a_batch,
    "stored": _with_stored_jobs,
    "clients": _many_clients,
    "kills": _kills,
}
"""Parts, in order. Jobs that `stored` adds stay for the next ones."""


@contextmanager
def _run_periodically(interval_s: float, action: Callable[[], object]) -> Iterator[list[object]]:
    """Call `action` periodically during the block. Yields the list of its results, without `None`."""
    results: list[object] = []
    stopped = threading.Event()

    def run() -> None:
        while not stopped.wait(interval_s):
            if (result := action()) is not None:
                results.append(result)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield results
    finally:
        stopped.set()
        thread.join()


def _kill_a_process() -> str | None:
    """Kill a random process of the server and return its title, or `None` if there is none."""
    processes = _processes(*PROCESSES)
    if not processes:
        return None
    process = random.choice(processes)
    title = str(process.cmdline()[0])
    process.kill()
    return title


def _processes(*titles: str) -> list[psutil.Process]:
    """Return the processes on this machine whose titles start with one of these."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if (title := process.cmdline()[:1]) and title[0].startswith(titles):
                processes.append(process)
    return processes


if __name__ == "__main__":
    raise SystemExit(main())
