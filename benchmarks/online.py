"""What the server adds to the stages' own work, and whether it loses a job: the real API, store and Serve, asked over HTTP.

Three parts. Requests: many clients at once ask for pictures by stages that do nothing, which counts how many are accepted a
second. Added: one client asks for one thing after another; of the time from the creation of a job to its completion the
seconds that its stages say they took are taken off. Kills: many clients ask for as long as it lasts, while every few seconds a
random replica of the server (API, director, encoder, stages) is killed with SIGKILL.

Said beside the numbers: clients, server and all replicas share this machine; what is added holds encoding and writing the
files, which are tiny, but written and committed as always.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.local_ray import ENVIRONMENT, local_ray
from benchmarks.machine import machine, write_json
from benchmarks.noop_stages import FRAMES, ON_THESE_ACTORS, SIDE_PX
from vidgen_ray.engine.ray_cluster import muted_stderr

ROOT = Path(__file__).parent.parent
GOALS = {"no-op picture, added, p95": 50.0, "accepted jobs lost": 0.0}
REPLICA = "ray::ServeReplica:vidgen:"
"""How the titles of a server's processes begin."""
CPU_WORKERS = 2
LOOK_S = 0.25
"""Between a client's questions how far its job is."""
PATIENCE_S = 180.0
"""For what was accepted to end, after the last request."""
SMALL = {"width": SIDE_PX, "height": SIDE_PX, "num_frames": FRAMES, "scale": 2}


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    clients: int
    requests: int
    """Of all clients together."""
    one_by_one: int
    """Jobs of the client that asks for one thing after another."""
    kills_s: float
    """How long replicas are killed."""
    every_s: float


FULL = Size(clients=64, requests=2_000, one_by_one=200, kills_s=120, every_s=10)
QUICK = Size(clients=8, requests=100, one_by_one=15, kills_s=12, every_s=4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a little of everything, within a minute, without `tiny`")
    parser.add_argument("--json", type=Path, metavar="FILE")
    told = parser.parse_args()
    # Ray reads these before it starts, its workers where they find this package.
    os.environ.update(ENVIRONMENT, PYTHONPATH=str(ROOT))
    folder = Path(tempfile.mkdtemp(prefix="vidgen-online-"))
    size = QUICK if told.quick else FULL
    rows: list[dict[str, Any]] = []
    try:
        # Ray tells of every process that is killed, which here are many.
        for part in (_no_op,) if told.quick else (_no_op, _tiny):
            # A Ray for each: Serve's controller of the first may still be about to end when the second server starts.
            with redirect_stdout(sys.stderr), muted_stderr(), local_ray(0):
                rows += part(size, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = Table(title="The server's own cost")
    for column in ("what", "value", "unit", "goal"):
        table.add_column(column, justify="right" if column in ("value", "goal") else "left")
    for row in rows:
        goal = GOALS.get(row["what"])
        table.add_row(row["what"], f"{row['value']:.1f}", row["unit"], "" if goal is None else f"{goal:g}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if told.json:
        write_json(told.json, {"machine": machine(("vidgen-ray", "ray", "fastapi", "sqlalchemy")), "rows": rows})
    return 0


def _no_op(size: Size, folder: Path) -> list[dict[str, Any]]:
    weights = folder / "weights"
    weights.mkdir()
    (weights / "animevideov3.safetensors").write_bytes(b"nothing")
    actors = {stage.actor: {"weights": str(weights), "cpus": 0.5} for stage in ON_THESE_ACTORS.values()}
    profile = folder / "no-op.yaml"
    profile.write_text(yaml.safe_dump({"name": "no-op", "about": "does nothing", "cpu_workers": CPU_WORKERS, "actors": actors}))
    with _server(str(profile), folder / "no-op", ON_THESE_ACTORS) as server:
        rows = _added("no-op", server, size.one_by_one, SMALL)
        rows += _requests(server, size)
        return rows + _kills(server, size)


def _tiny(size: Size, folder: Path) -> list[dict[str, Any]]:
    from vidgen_ray.graph import STAGE_BY_NAME

    with _server("tiny", folder / "tiny", STAGE_BY_NAME) as server:
        return _added("tiny", server, size.one_by_one // 4, {})


# The server, and who asks it


@dataclass(frozen=True)
class Server:
    port: int
    store: Any

    def ended(self, job_id: str) -> Any:
        """The job, once it has ended; asked of the store, whose times are exact."""
        while not (job := self.store.get(job_id, "local")).state.is_final:
            time.sleep(0.02)
        return job


@contextmanager
def _server(profile: str, data: Path, stages: Mapping[str, Any]) -> Iterator[Server]:
    from vidgen_ray.online.application import server_plan
    from vidgen_ray.online.server import serving
    from vidgen_ray.online.settings import Limits, OnlineSettings
    from vidgen_ray.online.store.store import open_store
    from vidgen_ray.planner import this_machine

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    plenty = 1_000_000
    limits = Limits(open_jobs=plenty, requests_per_minute=plenty)
    settings = OnlineSettings(profile=profile, data=str(data), port=port, limits=limits, max_queued=plenty)
    with serving(server_plan(settings, this_machine), stages) as server:
        server.wait_until_it_answers(threading.Event())
        server.wait_until_it_renders(threading.Event())
        yield Server(port, open_store(settings))


class Client:
    """One connection, kept open. Asks again where the server is gone for a moment."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._connection: http.client.HTTPConnection | None = None

    def create(self, fields: Mapping[str, Any], key: str) -> str:
        """The id of an accepted job. The same key again is the same job."""
        return str(self._asked("POST", "/v1/shots", json.dumps(fields), {"Idempotency-Key": key})["id"])

    def status(self, job_id: str) -> str:
        return str(self._asked("GET", f"/v1/shots/{job_id}", None, {})["status"])

    def _asked(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> dict[str, Any]:
        begun = time.monotonic()
        while True:
            try:
                return self._once(method, path, body, headers)
            except (OSError, http.client.HTTPException, _TryLater) as error:
                self._connection = None
                if time.monotonic() - begun > PATIENCE_S:
                    raise RuntimeError(f"{method} {path}: no answer in {PATIENCE_S:g} s") from error
                time.sleep(LOOK_S)

    def _once(self, method: str, path: str, body: str | None, headers: dict[str, str]) -> dict[str, Any]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=30)
        self._connection.request(method, path, body, {"Content-Type": "application/json", **headers})
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status in (429, 500, 502, 503, 504):
            raise _TryLater(answer.status)
        if answer.status >= 400:
            raise RuntimeError(f"{method} {path}: {answer.status} {content.decode()[:500]}")
        found: dict[str, Any] = json.loads(content)
        return found


class _TryLater(Exception):
    """What Serve answers while a replica of the API is being replaced."""


def _row(what: str, value: float, unit: str) -> dict[str, Any]:
    return {"system": "vidgen", "what": what, "value": round(value, 3), "unit": unit}


def _quantiles(what: str, milliseconds: list[float]) -> list[dict[str, Any]]:
    ordered = sorted(milliseconds)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return [_row(f"{what}, p50", statistics.median(ordered), "ms"), _row(f"{what}, p95", p95, "ms")]


# The parts


def _added(system: str, server: Server, count: int, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    client, rows = Client(server), []
    for kind, more in (("picture", {"generate_video": False}), ("clip", {})):
        asked, added = [], []
        for number in range(count + 2):
            begun = time.perf_counter()
            job_id = client.create(
                {"prompt": f"{kind} {number}", "seed": number, **fields, **more}, f"{system}-{kind}-{number}"
            )
            asked.append(1000 * (time.perf_counter() - begun))
            job = server.ended(job_id)
            if job.state != "completed":
                raise RuntimeError(f"{job_id}: {job.error}")
            added.append(1000 * (job.completed_at - job.created_at - sum(job.stage_seconds.values())))
        # The first ones find nothing ready: routes, connections, networks of the upscaler.
        rows += _quantiles(f"{system} {kind}, added", added[2:])
        rows += _quantiles(f"{system} {kind}, request", asked[2:])
    return rows


def _requests(server: Server, size: Size) -> list[dict[str, Any]]:
    def ask(client: int) -> list[str]:
        asking = Client(server)
        numbers = range(client, size.requests, size.clients)
        return [
            asking.create({"prompt": f"request {n}", "seed": n, **SMALL, "generate_video": False}, f"request-{n}")
            for n in numbers
        ]

    begun = time.monotonic()
    with ThreadPoolExecutor(size.clients) as clients:
        ids = [job_id for some in clients.map(ask, range(size.clients)) for job_id in some]
    accepted_s = time.monotonic() - begun
    for job_id in ids:
        server.ended(job_id)
    ended_s = time.monotonic() - begun
    return [
        _row(f"requests accepted, {size.clients} clients", len(ids) / accepted_s, "1/s"),
        _row("no-op pictures done", len(ids) / ended_s, "1/s"),
    ]


@dataclass
class Tally:
    """What clients were told, written by several threads."""

    accepted: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, job_id: str) -> None:
        with self.lock:
            self.accepted.append(job_id)


def _kills(server: Server, size: Size) -> list[dict[str, Any]]:
    tally, end = Tally(), time.monotonic() + size.kills_s

    def ask(client: int) -> None:
        asking, number = Client(server), 0
        while time.monotonic() < end:
            number += 1
            fields = {"prompt": f"client {client}, job {number}", "seed": number, **SMALL}
            job_id = asking.create(fields, f"kills-{client}-{number}")
            tally.add(job_id)
            while time.monotonic() < end and asking.status(job_id) not in ("completed", "failed", "cancelled"):
                time.sleep(LOOK_S)

    with _every(size.every_s, _kill_a_replica) as killed, ThreadPoolExecutor(size.clients) as clients:
        for asked in [clients.submit(ask, client) for client in range(size.clients)]:
            asked.result()
    ended = _in_the_end(server, tally.accepted)
    return [
        _row(f"accepted, {size.clients} clients for {size.kills_s:g} s", len(tally.accepted), "jobs"),
        _row(f"replicas killed, one every {size.every_s:g} s", len(killed), "processes"),
        _row("accepted jobs that failed", ended["failed"], "jobs"),
        _row("accepted jobs lost", len(tally.accepted) - sum(ended.values()), "jobs"),
    ]


def _in_the_end(server: Server, ids: list[str]) -> dict[str, int]:
    """How the jobs ended. What has not within PATIENCE_S is in none of the counts."""
    counts, left, begun = {"completed": 0, "failed": 0, "cancelled": 0}, set(ids), time.monotonic()
    while left and time.monotonic() - begun < PATIENCE_S:
        for job_id in list(left):
            job = server.store.get(job_id, "local")
            if job is not None and job.state.is_final:
                counts[job.state.value] += 1
                left.discard(job_id)
        time.sleep(LOOK_S)
    return counts


@contextmanager
def _every(seconds: float, what: Callable[[], str | None]) -> Iterator[list[str]]:
    """Do it at intervals while the block runs; what it gave each time."""
    given: list[str] = []
    over = threading.Event()

    def run() -> None:
        while not over.wait(seconds):
            if (one := what()) is not None:
                given.append(one)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield given
    finally:
        over.set()
        thread.join()


def _kill_a_replica() -> str | None:
    replicas = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = process.cmdline()[:1]
        except psutil.NoSuchProcess:
            continue
        if title and title[0].startswith(REPLICA):
            replicas.append((process.pid, title[0]))
    if not replicas:
        return None
    pid, title = random.choice(replicas)
    os.kill(pid, signal.SIGKILL)
    return title


if __name__ == "__main__":
    raise SystemExit(main())
