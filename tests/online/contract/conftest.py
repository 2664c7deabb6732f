"""`vidgen serve` with the tiny models, started as a process, for tests of released clients."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest
import yaml

from vidgen_ray.online.auth import hash_key

KEYS = {name: f"vg-{name}-key" for name in ("ada", "amy", "eve")}
LIMITS = {"eve": {"open_jobs": 1}}
ROOT = Path(__file__).parents[3]
START_S = 240
"""Seconds to wait for the server. Ray starts slowly on a busy machine."""


# Not for the whole session: its processes would compete with the tests of other files.
@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Start a server and return its URL."""
    folder = tmp_path_factory.mktemp("serve")
    keys = [{"tenant": name, "sha256": hash_key(key), "limits": LIMITS.get(name, {})} for name, key in KEYS.items()]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = {"profile": "tiny", "data": str(folder / "out"), "keys_file": str(folder / "keys.yaml")}
    (folder / "settings.yaml").write_text(yaml.safe_dump({**settings, "port": port}))
    log = folder / "log.txt"
    command = [sys.executable, "-m", "vidgen_ray", "serve", "--settings", str(folder / "settings.yaml")]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": str(ROOT)})
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_S
        while not _is_ready(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        yield url
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in psutil.wait_procs(children, timeout=5)[1]:
            child.kill()


def _is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/readyz", timeout=10) as response:
            return json.load(response) == {"status": "ok"}
    except (URLError, OSError):
        return False
