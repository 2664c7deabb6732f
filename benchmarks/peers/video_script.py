"""The script that people write for a video server: lines of a JSONL file -> POST /v1/videos -> poll -> clip and manifest row.

It skips clips that exist, retries with back-off on another server, gives up a job after a timeout, writes clips atomically and
takes `--shard 0/4`. Exits with 1 if lines failed, so that it can be run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

ATTEMPTS = 5
BACK_OFF_S = 0.5
POLL_S = 0.1
JOBS_PER_SERVER = 2
"""One is rendered and one waits."""
REST_S = 10.0
"""Seconds for which a server that failed is used only if all have."""


class Servers:
    """Chooses the server with the fewest jobs among those that did not fail recently."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = urls
        self._jobs: Counter[str] = Counter()
        self._failed_at = dict.fromkeys(urls, float("-inf"))
        self._lock = threading.Lock()

    def take(self) -> str:
        with self._lock:
            now = time.monotonic()
            url = min(self._urls, key=lambda url: (now - self._failed_at[url] < REST_S, self._jobs[url]))
            self._jobs[url] += 1
            return url

    def give_back(self, url: str, *, failed: bool) -> None:
        with self._lock:
            self._jobs[url] -= 1
            if failed:
                self._failed_at[url] = time.monotonic()


def render(client: httpx.Client, url: str, line: dict[str, Any], timeout_s: float) -> bytes:
    """Return the clip. Raises RuntimeError, TimeoutError or httpx.HTTPError."""
    answer = client.post(f"{url}/v1/videos", json={"prompt": line["prompt"], "user": line["id"]}).raise_for_status()
    job = f"{url}/v1/videos/{answer.json()['id']}"
    deadline = time.monotonic() + timeout_s
    while (status := client.get(job).raise_for_status().json())["status"] != "completed":
        if status["status"] == "failed":
            raise RuntimeError(status["error"]["message"])
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job} did not end within {timeout_s:g} s")
        time.sleep(POLL_S)
    return client.get(f"{job}/content").raise_for_status().content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("script", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("servers", nargs="+")
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("--shard", default="0/1")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    index, shards = map(int, args.shard.split("/"))
    servers, client, lock = Servers(args.servers), httpx.Client(timeout=10), threading.Lock()

    def one(text: str) -> bool:
        try:
            line = json.loads(text)
            name = line["id"]
        except (ValueError, KeyError) as error:
            sys.stderr.write(f"skipped {text!r}: {error}\n")
            return False
        clip = args.out / f"{name}.mp4"
        if clip.exists():
            return True
        row = {"id": name, "prompt": line["prompt"], "status": "failed", "error": None}
        for attempt in range(ATTEMPTS):
            url = servers.take()
            try:
                partial = clip.with_suffix(".part")
                partial.write_bytes(render(client, url, line, args.timeout))
                partial.rename(clip)
                row |= {"status": "done", "error": None}
            except (httpx.HTTPError, OSError, RuntimeError) as error:
                row["error"] = str(error)
                servers.give_back(url, failed=not isinstance(error, OSError) or isinstance(error, TimeoutError))
                time.sleep(BACK_OFF_S * 2**attempt)
                continue
            servers.give_back(url, failed=False)
            break
        with lock, (args.out / "manifest.jsonl").open("a") as manifest:
            manifest.write(json.dumps(row) + "\n")
        return row["status"] == "done"

    with ThreadPoolExecutor(JOBS_PER_SERVER * len(args.servers)) as pool:
        lines = itertools.islice(args.script.read_text().splitlines(), index, None, shards)
        return 0 if all(list(pool.map(one, lines))) else 1


if __name__ == "__main__":
    raise SystemExit(main())
