"""Requests that try to exhaust the API of a real server: memory of its process and the latency of /healthz meanwhile.

Starts `vidgen serve --profile tiny` for each row of the table and sends at the same time: images that are small files with many
pixels, JSON bodies with many values or large images, large forms. `--repository` measures another checkout.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import httpx
import psutil
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine, write_json

ROOT = Path(__file__).parent.parent
API = "ray::ServeReplica:vidgen:Api"
SIDE_PX = 6300
"""39.7 megapixels as a square, just below the limit of 40."""
JSON_BYTES = 39_000_000
TIMEOUT_S = 300.0
SAMPLE_S = 0.02
BLOCK_BYTES = 1 << 16
Request = Callable[[str, int], httpx.Response]
"""Sends the request of this number to the URL of a server."""
GOALS = {"rss_gb": 1.5, "healthz_s": 1.0}


@dataclass
class Load:
    """Largest values while requests ran."""

    rss_bytes: int = 0
    """Largest resident memory of the API's process."""
    healthz_s: float = 0.0
    """Longest response of /healthz."""
    stopped: threading.Event = field(default_factory=threading.Event)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repository", type=Path, default=ROOT, metavar="FOLDER", help="Checkout to measure. Default: this one."
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="Kinds of requests whose name contains TEXT. Default: all.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the results as JSON.")
    args = parser.parse_args()
    rows = []
    for name, count, request in _attacks():
        if args.only in name:
            # A new server for each, since memory that was freed is not returned to the system.
            with _server(args.repository) as (url, api):
                rows.append(_measure(url, api(), name, count, request))
    table = Table(title="Attacks on the API")
    for column in ("requests", "answers", "peak memory GB", "/healthz s", "seconds"):
        table.add_column(column, justify="left" if column in ("requests", "answers") else "right")
    for row in rows:
        table.add_row(row["name"], row["answers"], f"{row['rss_gb']:.2f}", f"{row['healthz_s']:.2f}", f"{row['seconds']:.1f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if args.json:
        write_json(args.json, {"machine": machine(("vidgen-ray", "ray", "pillow")), "goals": GOALS, "rows": rows})
    return 0


def _attacks() -> Iterator[tuple[str, int, Request]]:
    """Yield the name, the number of concurrent requests, and the function that sends one."""
    for mode in ("1", "RGB", "RGBA"):
        content = _image(mode)

        def upload(url: str, number: int, content: bytes = content) -> httpx.Response:
            # Different content, so that each is decoded.
            files = {"file": ("a.png", content + bytes([number]))}
            return httpx.post(f"{url}/v1/files", files=files, timeout=TIMEOUT_S)

        yield f"PNG of 39.7 megapixels, mode {mode}, {len(content) // 1000} kB", 30, upload
    face = _large_photo()

    def character(url: str, number: int) -> httpx.Response:
        photos = [("image", ("a.jpg", face + bytes([number, photo]))) for photo in range(8)]
        data = {"name": f"person {number}", "consent": "subject=Eileen Collins,basis=public-domain"}
        return httpx.post(f"{url}/v1/videos/characters", data=data, files=photos, timeout=TIMEOUT_S)

    yield "character from 8 photos of 39.7 megapixels", 4, character
    lists = b'{"prompt": [' + b"[]," * (JSON_BYTES // 3) + b"0]}"
    photo = base64.b64encode(os.urandom(24_000_000))
    image = b'{"prompt": "a", "image_reference": {"image_url": "data:image/png;base64,' + photo + b'"}}'
    echo = b'{"prompt": "a", "size": "' + b"9" * 6_000_000 + b'"}'
    for name, count, body in (
        ("JSON of 39 MB, empty lists", 1, lists),
        ("JSON of 39 MB, empty lists", 6, lists),
        ("JSON of 32 MB, one image", 12, image),
        ("JSON with a size of 6 MB", 1, echo),
    ):

        def post(url: str, _: int, body: bytes = body) -> httpx.Response:
            headers = {"Content-Type": "application/json"}
            return httpx.post(f"{url}/v1/videos", content=body, headers=headers, timeout=TIMEOUT_S)

        yield name, count, post

    text = {f"f{number}": (None, b"x" * 1_000_000) for number in range(150)}
    pairs = b"&".join(b"f%d=" % number + b"x" * 1_000_000 for number in range(150))

    def form(url: str, _: int) -> httpx.Response:
        return httpx.post(f"{url}/v1/videos", files=text, timeout=TIMEOUT_S)

    def urlencoded(url: str, _: int) -> httpx.Response:
        headers = {"Content-Type": "application/x-www-form-urlencoded", "Content-Length": str(len(pairs))}
        # In blocks: httpx copies what is left of a single one after each write, and the copies delay the other threads.
        blocks = (pairs[start : start + BLOCK_BYTES] for start in range(0, len(pairs), BLOCK_BYTES))
        return httpx.post(f"{url}/v1/videos", content=blocks, headers=headers, timeout=TIMEOUT_S)

    yield "form with 150 MB of text", 6, form
    yield "urlencoded form of 150 MB", 6, urlencoded


def _image(mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (SIDE_PX, SIDE_PX), 1 if mode == "1" else "teal").save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()


def _large_photo() -> bytes:
    """Return a photo of a face, enlarged."""
    buffer = io.BytesIO()
    Image.open(ROOT / "examples" / "faces" / "astronaut.jpg").resize((SIDE_PX, SIDE_PX)).save(buffer, "JPEG", quality=50)
    return buffer.getvalue()


def _measure(url: str, api: psutil.Process, name: str, count: int, request: Request) -> dict[str, object]:
    load = Load()
    watching = [threading.Thread(target=watch, args=(load,)) for watch in (_watch_memory(api), _watch_health(url))]
    for thread in watching:
        thread.start()
    started = time.monotonic()

    def send(number: int) -> str:
        try:
            answer = request(url, number)
            return f"{answer.status_code}{f' ({len(answer.content)} bytes)' if len(answer.content) > 10_000 else ''}"
        except httpx.HTTPError as error:
            return type(error).__name__

    with ThreadPoolExecutor(count) as pool:
        answers = Counter(pool.map(send, range(count)))
    seconds = time.monotonic() - started
    load.stopped.set()
    for thread in watching:
        thread.join()
    answered = ", ".join(f"{number} x {answer}" for answer, number in answers.items())
    row = {"name": f"{count} x {name}", "answers": answered, "rss_gb": load.rss_bytes / 1e9, "healthz_s": load.healthz_s}
    return {**row, "seconds": seconds}


def _watch_memory(api: psutil.Process) -> Callable[[Load], None]:
    def watch(load: Load) -> None:
        while not load.stopped.wait(SAMPLE_S):
            try:
                load.rss_bytes = max(load.rss_bytes, api.memory_info().rss)
            except psutil.NoSuchProcess:  # killed for its memory
                return

    return watch


def _watch_health(url: str) -> Callable[[Load], None]:
    def watch(load: Load) -> None:
        while not load.stopped.wait(SAMPLE_S):
            started = time.monotonic()
            with suppress(httpx.HTTPError):
                httpx.get(f"{url}/healthz", timeout=TIMEOUT_S)
            load.healthz_s = max(load.healthz_s, time.monotonic() - started)

    return watch


@contextmanager
def _server(repository: Path) -> Iterator[tuple[str, Callable[[], psutil.Process]]]:
    """Run a server, and yield its URL and a function that returns the process of its API."""
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
    command = [sys.executable, "-m", "vidgen_ray", "serve", "--profile", "tiny", "--data", "data", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        while b"Models loaded" not in (folder / "log").read_bytes():
            if process.poll() is not None:
                raise RuntimeError((folder / "log").read_text())
            time.sleep(0.5)

        def api() -> psutil.Process:
            children = psutil.Process(process.pid).children(recursive=True)
            (replica,) = [child for child in children if " ".join(child.cmdline()).startswith(API)]
            return replica

        yield url, api
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
