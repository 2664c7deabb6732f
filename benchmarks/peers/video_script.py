"""The script that people write for a video server: lines of a JSONL file -> POST /v1/videos -> poll -> clip and manifest row.

It skips clips that were made from the same line, retries with back-off on another server, gives up a job after a timeout,
writes clips atomically, holds a lock and has a row for each line. Exits with 1 if lines failed, so that it can be run again.
"""

from __future__ import annotations

import argparse
import base64
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from benchmarks.peers.lines import content_of, digests_of, is_finished, parsed, run_as_command

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
    request = {"prompt": line["prompt"], "user": line["id"]}
    if line["image"]:
        request["input_reference"] = base64.b64encode(content_of(line)).decode()
    answer = client.post(f"{url}/v1/videos", json=request).raise_for_status()
    job = f"{url}/v1/videos/{answer.json()['id']}"
    deadline = time.monotonic() + timeout_s
    while (status := client.get(job).raise_for_status().json())["status"] != "completed":
        if status["status"] == "failed":
            raise RuntimeError(status["error"]["message"])
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job} did not end within {timeout_s:g} s")
        time.sleep(POLL_S)
    return client.get(f"{job}/content").raise_for_status().content


def render_script(script: Path, out: Path, urls: list[str], timeout_s: float) -> int:
    manifest = out / "manifest.jsonl"
    rows = [json.loads(text) for text in manifest.read_text().splitlines()] if manifest.exists() else []
    servers, client, lock, digests = Servers(urls), httpx.Client(timeout=10), threading.Lock(), digests_of(rows)

    def one(text: str) -> bool:
        line = parsed(text)
        if is_finished(line, out, digests):
            return True
        row = {**line, "status": "failed"}
        for attempt in range(0 if line["error"] else ATTEMPTS):
            url = servers.take()
            try:
                clip = out / f"{line['id']}.mp4"
                partial = clip.with_suffix(".part")
                partial.write_bytes(render(client, url, line, timeout_s))
                partial.rename(clip)
                row |= {"status": "done", "error": ""}
            except (httpx.HTTPError, OSError, RuntimeError) as error:
                row["error"] = str(error)
                servers.give_back(url, failed=not isinstance(error, OSError) or isinstance(error, TimeoutError))
                time.sleep(BACK_OFF_S * 2**attempt)
                continue
            servers.give_back(url, failed=False)
            break
        with lock, manifest.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row["status"] == "done"

    with ThreadPoolExecutor(JOBS_PER_SERVER * len(urls)) as pool:
        return 0 if all(list(pool.map(one, script.read_text().splitlines()))) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("script", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("servers", nargs="+")
    parser.add_argument("--timeout", type=float, required=True)
    args = parser.parse_args()
    return run_as_command(lambda: render_script(args.script, args.out, args.servers, args.timeout), args.script, args.out)


if __name__ == "__main__":
    raise SystemExit(main())
