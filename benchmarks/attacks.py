"""Requests that try to exhaust a real server: memory of its API, and the latency of /healthz meanwhile.

Starts `vidgen serve --profile tiny` for each row of the table and sends at the same time: images that are small files with many
pixels, JSON bodies with many values, deep nesting or large images, large forms, event streams that stay open. /healthz is
requested every 20 ms by a process of its own, on a new connection each time. `--repository` measures another checkout.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import httpx
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine, write_json

ROOT = Path(__file__).parent.parent
PROCESSES = {"api": "ray::Api"}
"""Prefix of the process title of the API."""
SIDE_PX = 6300
"""39.7 megapixels as a square, just below the limit of 40."""
JSON_BYTES = 39_000_000
FORM_BYTES = 512 << 10
"""Largest urlencoded form that the API reads."""
STREAMS = 1_000
QUICK_DIVISOR = 10
CLIENTS = 10
"""Clients that request the event streams one after another."""
STREAMS_OPEN_S = 15.0
"""Seconds for which all event streams stay open."""
TIMEOUT_S = 300.0
SAMPLE_S = 0.02
GOALS = {"api_gb": 1.5, "healthz_s": 1.0}
Request = Callable[[str, int], str]
"""Sends the request of this number to the URL of a server and returns the answer in words."""


@dataclass(frozen=True)
class Attack:
    """Requests to a new server."""

    name: str
    send: Callable[[str], Counter[str]]
    """Sends all requests to the URL of a server, and returns the number of each answer."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the server other than the defaults."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repository", type=Path, default=ROOT, metavar="FOLDER", help="Checkout to measure. Default: this one."
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="Kinds of requests whose name contains TEXT. Default: all.")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"Send a {QUICK_DIVISOR}th of the requests, all to one server: checks that the script runs. Measures nothing.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the results as JSON.")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    attacks = [attack for attack in _attacks(QUICK_DIVISOR if args.quick else 1) if args.only in attack.name]
    # A new server for each, since memory that was freed is not returned to the system.
    groups = [list(group) for _, group in groupby(attacks, key=lambda each: each.settings if args.quick else each)]
    for group in groups:
        with _server(args.repository, group[0].settings) as (url, processes):
            rows += [_measure(url, processes, attack) for attack in group]
    table = Table(title=f"Attacks on a server. Load of the machine before: {load:.1f}")
    for column in ("requests", "answers", "API GB", "/healthz s", "seconds"):
        table.add_column(column, justify="left" if column in ("requests", "answers") else "right")
    for row in rows:
        health = f"{row['healthz_s']:.2f}" + (f", {row['healthz_failed']} failed" if row["healthz_failed"] else "")
        memory = [f"{row[f'{name}_gb']:.2f}" for name in PROCESSES]
        table.add_row(row["name"], row["answers"], *memory, health, f"{row['seconds']:.1f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if args.json:
        write_json(args.json, {"machine": machine(("vidgen-ray", "ray", "pillow")), "goals": GOALS, "rows": rows})
    return 0


def _attacks(divisor: int) -> Iterator[Attack]:
    """Yield the attacks, with a fraction 1 / `divisor` of their requests."""
    at_once = partial(_at_once, divisor)
    for mode in ("1", "RGB", "RGBA"):
        content = _image(mode)

        def upload(url: str, number: int, content: bytes = content) -> str:
            # Different content, so that each is decoded.
            return _post_form(f"{url}/v1/files", {}, [("file", ("a.png", content + bytes([number])))])

        yield at_once(30, f"PNG of 39.7 megapixels, mode {mode}, {len(content) // 1000} kB", upload)
    face = _large_photo()

    def character(url: str, number: int) -> str:
        photos = [("image", ("a.jpg", face + bytes([number, photo]))) for photo in range(8)]
        data = {"name": f"person {number}", "consent": "subject=Eileen Collins,basis=public-domain"}
        return _post_form(f"{url}/v1/videos/characters", data, photos)

    yield at_once(4, "character from 8 photos of 39.7 megapixels", character)
    for count, name, body in _json_bodies():
        yield at_once(count, name, _body("/v1/videos", "application/json", body))
    text = [(f"f{number}", (None, b"x" * 1_000_000)) for number in range(150)]
    yield at_once(6, "form with 150 MB of text", lambda url, _: _post_form(f"{url}/v1/videos", {}, text))
    pairs = b"&".join(b"f%d=" % number + b"x" * 1_000_000 for number in range(150))
    for count, name, body in (
        (6, "urlencoded form of 150 MB", pairs),
        (100, "urlencoded form of 500 kB, escapes", b"prompt=" + b"%41" * (FORM_BYTES // 3 - 10)),
        (100, "urlencoded form of 500 kB, empty fields", b"a=&" * (FORM_BYTES // 3 - 10)),
    ):
        yield at_once(count, name, _body("/v1/videos", "application/x-www-form-urlencoded", body))
    streams, open_s = STREAMS // divisor, STREAMS_OPEN_S / divisor
    allowed = {"limits": {"streams": 2 * STREAMS, "requests_per_minute": 1_000_000}}
    yield Attack(f"{streams} event streams, requested at once", partial(_open_streams, streams, streams, open_s))
    name = f"{streams} event streams, all allowed, requested by {CLIENTS}"
    yield Attack(name, partial(_open_streams, streams, CLIENTS, open_s), allowed)


def _json_bodies() -> Iterator[tuple[int, str, bytes]]:
    """Yield number of requests, name and body."""
    lists = b'{"prompt": [' + b"[]," * (JSON_BYTES // 3) + b"0]}"
    photo = base64.b64encode(os.urandom(24_000_000))
    image = b'{"prompt": "a", "image_reference": {"image_url": "data:image/png;base64,' + photo + b'"}}'
    yield 1, "JSON of 39 MB, empty lists", lists
    yield 6, "JSON of 39 MB, empty lists", lists
    yield 12, "JSON of 32 MB, one image", image
    yield 1, "JSON with a size of 6 MB", b'{"prompt": "a", "size": "' + b"9" * 6_000_000 + b'"}'
    yield 6, "JSON of 39 MB, nested lists", b"[" * JSON_BYTES
    yield 200, "JSON of 100 kB, 16,000 nested objects", b'{"a":' * 16_000 + b"0" + b"}" * 16_000
    long_text = b'{"prompt": "' + b"x" * 240_000 + b'", "size": ' + b"[" * 40
    yield 200, "JSON of 240 kB, 40 nested lists in a long text", long_text


def _at_once(divisor: int, count: int, name: str, request: Request) -> Attack:
    """Return the attack of `count` / `divisor` concurrent requests."""
    count = max(1, count // divisor)

    def send(url: str) -> Counter[str]:
        with ThreadPoolExecutor(count) as pool:
            return Counter(pool.map(lambda number: request(url, number), range(count)))

    return Attack(f"{count} x {name}", send)


def _post_form(url: str, data: Mapping[str, str], files: Any) -> str:
    try:
        answer = httpx.post(url, data=data, files=files, timeout=TIMEOUT_S)
    except httpx.HTTPError as error:
        return type(error).__name__
    return _answer(answer.status_code, answer.content)


def _body(path: str, content_type: str, body: bytes) -> Request:
    """Return the request that sends this body."""

    def send(url: str, _: int) -> str:
        # httpx would copy what is left of the body after each write.
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
        try:
            connection.request("POST", path, body, {"Content-Type": content_type})
            response = connection.getresponse()
            return _answer(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            return type(error).__name__
        finally:
            connection.close()

    return send


def _answer(status: int, content: bytes) -> str:
    return f"{status}{f' ({len(content)} bytes)' if len(content) > 10_000 else ''}"


def _open_streams(count: int, at_once: int, open_s: float, url: str) -> Counter[str]:
    """Open event streams of the page, `at_once` at a time, and keep them open for `open_s` seconds.

    A clip is rendered meanwhile.
    """
    _body("/v1/videos", "application/json", json.dumps({"prompt": "a lighthouse"}).encode())(url, 0)
    return asyncio.run(_streams(urlsplit(url).netloc, count, at_once, open_s))


async def _streams(address: str, count: int, at_once: int, open_s: float) -> Counter[str]:
    host, port = address.split(":")
    answers: Counter[str] = Counter()
    turn, all_answered = asyncio.Semaphore(at_once), asyncio.Event()
    deadline = asyncio.get_running_loop().time() + TIMEOUT_S

    def answered(answer: str) -> None:
        answers[answer] += 1
        if answers.total() == count:
            all_answered.set()

    async def stream() -> None:
        async with turn:
            try:
                async with asyncio.timeout_at(deadline):
                    reader, writer = await asyncio.open_connection(host, int(port))
                    writer.write(f"GET /events HTTP/1.1\r\nHost: {address}\r\n\r\n".encode())
                    status = await reader.readline()
            except (OSError, TimeoutError) as error:
                return answered(type(error).__name__)
            code = status.decode().split(" ")[1] if status else "no answer"
            answered(code)
        try:
            reading = asyncio.create_task(reader.read())
            await all_answered.wait()
            await asyncio.sleep(open_s)
            if code == "200" and reading.done():
                answers["ended early"] += 1
            reading.cancel()
        finally:
            writer.close()

    await asyncio.gather(*(stream() for _ in range(count)))
    return answers


def _image(mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (SIDE_PX, SIDE_PX), 1 if mode == "1" else "teal").save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()


def _large_photo() -> bytes:
    """Return a photo of a face, enlarged."""
    buffer = io.BytesIO()
    Image.open(ROOT / "examples" / "faces" / "astronaut.jpg").resize((SIDE_PX, SIDE_PX)).save(buffer, "JPEG", quality=50)
    return buffer.getvalue()


def _measure(url: str, processes: Mapping[str, psutil.Process], attack: Attack) -> dict[str, Any]:
    with _memory(processes) as memory, _health(urlsplit(url).netloc) as health:
        started = time.monotonic()
        answers = attack.send(url)
        seconds = time.monotonic() - started
    slowest_s, failed = health
    return {
        "name": attack.name,
        "answers": ", ".join(f"{number} x {answer}" for answer, number in answers.items()),
        **{f"{name}_gb": size / 1e9 for name, size in memory.items()},
        "healthz_s": slowest_s,
        "healthz_failed": int(failed),
        "seconds": seconds,
    }


@contextmanager
def _memory(processes: Mapping[str, psutil.Process]) -> Iterator[dict[str, int]]:
    """Sample the memory of processes during the block. Yields the largest resident memory, in bytes."""
    largest: dict[str, int] = {}
    stopped = threading.Event()

    def sample() -> None:
        while not stopped.wait(SAMPLE_S):
            for name, process in processes.items():
                with suppress(psutil.NoSuchProcess):  # killed for its memory
                    largest[name] = max(largest.get(name, 0), process.memory_info().rss)

    sampling = threading.Thread(target=sample)
    sampling.start()
    try:
        yield largest
    finally:
        stopped.set()
        sampling.join()


@contextmanager
def _health(address: str) -> Iterator[Any]:
    """Request /healthz during the block, in another process. Yields an array: seconds of the slowest one, failed ones."""
    context = multiprocessing.get_context("spawn")
    health, stopped = context.Array("d", 2), context.Event()
    watching = context.Process(target=_watch_health, args=(address, health, stopped), daemon=True)
    watching.start()
    while not health[0] and watching.is_alive():
        time.sleep(SAMPLE_S)
    try:
        yield health
    finally:
        stopped.set()
        watching.join(TIMEOUT_S)


def _watch_health(address: str, health: Any, stopped: Any) -> None:
    while not stopped.wait(SAMPLE_S):
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
        started, succeeded = time.monotonic(), False
        try:
            connection.request("GET", "/healthz")
            response = connection.getresponse()
            response.read()
            succeeded = response.status == 200
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        health[0] = max(health[0], time.monotonic() - started)
        health[1] += not succeeded


@contextmanager
def _server(repository: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, psutil.Process]]]:
    """Run a server, and yield its URL and its processes: name in `PROCESSES` -> process."""
    folder = Path(tempfile.mkdtemp(prefix="vidgen-attacks-"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(repository),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "benchmark-only-token-of-this-process",
        "RAY_worker_niceness": "0",
    }
    (folder / "settings.yaml").write_text(json.dumps({"profile": "tiny", "data": "data", "port": port, **settings}))
    command = [sys.executable, "-m", "vidgen_ray", "serve", "--settings", "settings.yaml"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def end(number: int, _frame: FrameType | None) -> None:
        # First the server: threads that wait for its answers end with it.
        process.terminate()
        sys.exit(128 + number)

    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while b"Models loaded" not in (folder / "log").read_bytes():
            if process.poll() is not None:
                raise RuntimeError((folder / "log").read_text())
            time.sleep(0.5)

        processes: dict[str, psutil.Process] = {}
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                title = " ".join(child.cmdline())
                processes |= {name: child for name, prefix in PROCESSES.items() if title.startswith(prefix)}
        yield url, processes
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server, and kill the processes that it leaves."""
    children: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()


if __name__ == "__main__":
    sys.exit(main())
