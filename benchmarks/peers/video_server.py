"""Fake video server with the asynchronous job API of vLLM-Omni and SGLang, on one simulated GPU. Jobs are kept in memory.

POST /v1/videos -> {"id", "status"}; GET /v1/videos/ID -> {"status"}; GET /v1/videos/ID/content -> the clip.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from benchmarks.simulated import CHAIN, CLIP_BYTES, Models, Payload

Job = dict[str, Any]


def clip_of(content: bytes) -> bytes:
    """Return a clip that shows a prompt or a start image, so that wrong and short clips can be found."""
    digest = hashlib.sha256(content).digest()
    return digest * (CLIP_BYTES // len(digest))


def _text_of(job: Job) -> bytes:
    return json.dumps({name: value for name, value in job.items() if name != "clip"}).encode()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, run_folder: Path, gpu: int) -> None:
        self.jobs: dict[str, Job] = {}
        self.queue: SimpleQueue[Job] = SimpleQueue()
        self.models = Models(run_folder, CHAIN, gpu)
        super().__init__(("127.0.0.1", port), Handler)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            job = self.queue.get()
            job["status"] = "in_progress"
            try:
                payload: Payload = {}
                for stage in CHAIN:
                    payload = self.models.run(stage, job["shot"], payload)
                job["status"] = "completed"
            except RuntimeError as error:
                job |= {"status": "failed", "error": {"message": str(error)}}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = base64.b64decode(request["input_reference"]) if "input_reference" in request else request["prompt"].encode()
        job = {"id": uuid.uuid4().hex, "status": "queued", "shot": request["user"], "clip": clip_of(content)}
        self.server.jobs[job["id"]] = job
        self.server.queue.put(job)
        self._answer(200, _text_of(job))

    def do_GET(self) -> None:
        job = self.server.jobs.get(self.path.split("/")[3])
        if job is None:
            self._answer(404, b"{}")
        elif self.path.endswith("/content"):
            self._answer(200, job["clip"])
        else:
            self._answer(200, _text_of(job))

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


if __name__ == "__main__":
    Server(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])).serve_forever()
