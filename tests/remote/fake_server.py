"""Video server with the documented shapes of vLLM-Omni and SGLang Diffusion, and faults that prompts ask for.

Jobs are kept in memory, as theirs are; `log.jsonl` says what was accepted, computed and deleted. A clip begins with the image
that was sent, and then shows a colour that prompt and seed decide. A prompt with `fault:NAME` meets the fault once.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.background import BackgroundTask

from vidgen_ray.media.encode import Mp4Settings, Mp4Writer
from vidgen_ray.media.images import encode_png, read_image
from vidgen_ray.profile import Profile

MODEL = "Lightricks/LTX-2"
WIDTH, HEIGHT, FRAMES, FPS = 128, 64, 5, 8
SIZE = {"width": WIDTH, "height": HEIGHT, "num_frames": FRAMES, "fps": FPS}
LOG = "log.jsonl"
SECONDS = 0.05
"""Seconds that a job takes."""


def colour_of(prompt: str, seed: int) -> tuple[int, int, int]:
    return tuple(hashlib.sha256(f"{prompt} {seed}".encode()).digest()[:3])  # type: ignore[return-value]


def clip_of(fields: dict[str, str], image: bytes | None, is_grey: bool) -> bytes:
    width, height = map(int, fields["size"].split("x"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        frames = np.empty((int(fields["num_frames"]), height, width, 3), np.uint8)
        if image is None:
            frames[:] = np.linspace(0, 255, width)[:, None].astype(np.uint8)
        else:
            (Path(folder) / "image.png").write_bytes(image)
            frames[:] = read_image(Path(folder) / "image.png")
        frames[1:, height // 2 :] = colour_of(fields["prompt"], int(fields.get("seed", 0)))
        if is_grey:
            frames[:] = 128
        with Mp4Writer(path, width, height, int(fields["fps"]), Mp4Settings(preset="ultrafast", threads=1)) as writer:
            writer.write(frames)
        return path.read_bytes()


class Jobs:
    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.jobs: dict[str, dict[str, Any]] = {}

    def log(self, event: str, job: dict[str, Any]) -> None:
        fields = job["fields"]
        entry = {"event": event, "id": job["id"], "prompt": fields["prompt"], "seed": fields.get("seed")}
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def meets(self, prompt: str, fault: str) -> bool:
        """Return whether the prompt asks for the fault, which it meets once, also after a restart."""
        if f"fault:{fault} " not in f"{prompt} ":
            return False
        try:
            (self.folder / hashlib.sha256(f"{fault} {prompt}".encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    async def compute(self, job: dict[str, Any], image: bytes | None) -> None:
        prompt = job["fields"]["prompt"]
        if self.meets(prompt, "never"):
            return
        await asyncio.sleep(SECONDS * (40 if self.meets(prompt, "slow") else 1))
        job["status"] = "in_progress"
        if self.meets(prompt, "failed"):
            job |= {"status": "failed", "error": {"code": "internal", "message": "out of memory"}}
            return
        is_grey = self.meets(prompt, "grey")
        job["content"] = await asyncio.to_thread(clip_of, job["fields"], image, is_grey)
        job |= {"status": "completed", "progress": 100}
        self.log("computed", job)

    def shown(self, job: dict[str, Any]) -> dict[str, Any]:
        fields = job["fields"]
        shown = {
            "id": job["id"],
            "object": "video",
            "model": fields.get("model"),
            "status": job["status"],
            "progress": job.get("progress", 0),
            "created_at": job["created_at"],
            "size": fields["size"],
            "seconds": "1",
            "error": job.get("error"),
        }
        return shown | ({"prompt": fields["prompt"], "media_type": "video/mp4"} if self.kind == "vllm-omni" else {})


def app_of(folder: Path, kind: str) -> FastAPI:
    app, jobs, tasks = FastAPI(), Jobs(folder, kind), set()

    @app.exception_handler(HTTPException)
    async def error(request: Request, error: HTTPException) -> Response:
        of_omni = {"error": {"message": error.detail, "code": error.status_code}}
        return JSONResponse(of_omni if kind == "vllm-omni" else {"detail": error.detail}, error.status_code, error.headers)

    @app.get("/v1/models")
    async def models() -> Any:
        names = json.loads((folder / "models.json").read_text())
        stable = {"object": "model", "owned_by": "vllm" if kind == "vllm-omni" else "sglang"}
        data = [{"id": name, "root": root, "created": int(time.time()), **stable} for name, root in names.items()]
        return {"object": "list", "data": data}

    @app.post("/v1/videos")
    async def create(request: Request) -> Any:
        form = await request.form()
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        prompt, upload = fields["prompt"], form.get("input_reference")
        image = None if upload is None else await upload.read()
        if jobs.meets(prompt, "busy"):
            raise HTTPException(429, "the queue is full", {"Retry-After": "0"})
        if jobs.meets(prompt, "busy-without-time"):
            raise HTTPException(429, "the queue is full")
        if "fault:refused " in f"{prompt} ":
            raise HTTPException(400, "the size is not supported")
        job = {"id": f"video_{uuid.uuid4().hex}", "status": "queued", "fields": fields, "created_at": int(time.time())}
        jobs.jobs[job["id"]] = job
        jobs.log("accepted", job)
        task = asyncio.ensure_future(jobs.compute(job, image))
        tasks.add(task)
        if jobs.meets(prompt, "500-after-success"):
            raise HTTPException(500, "internal error")
        if jobs.meets(prompt, "dies"):
            # After the response.
            asyncio.get_running_loop().call_later(0.02, os._exit, 1)
        return jobs.shown(job)

    def known(job_id: str) -> dict[str, Any]:
        if job_id not in jobs.jobs:
            raise HTTPException(404, "Video not found")
        return jobs.jobs[job_id]

    @app.get("/v1/videos")
    async def listed(limit: int = 20, order: str = "desc") -> Any:
        ordered = sorted(jobs.jobs.values(), key=lambda job: job["created_at"], reverse=order == "desc")[:limit]
        return {"object": "list", "data": [jobs.shown(job) for job in ordered]}

    @app.get("/v1/videos/{job_id}")
    async def get(job_id: str) -> Any:
        return jobs.shown(known(job_id))

    @app.delete("/v1/videos/{job_id}")
    async def delete(job_id: str) -> Any:
        job = known(job_id)
        jobs.log("deleted", jobs.jobs.pop(job_id))
        return {"id": job["id"], "deleted": True, "object": "video.deleted"}

    @app.get("/v1/videos/{job_id}/content")
    async def content(job_id: str) -> Response:
        job = known(job_id)
        clip, prompt = job["content"], job["fields"]["prompt"]
        others = [other["content"] for other in jobs.jobs.values() if "content" in other and other is not job]
        if others and jobs.meets(prompt, "foreign"):
            clip = others[-1]
        if jobs.meets(prompt, "damaged"):
            clip = clip[: len(clip) // 2]
        if jobs.meets(prompt, "truncated"):

            async def part() -> Any:
                yield clip[: len(clip) // 2]

            return StreamingResponse(part(), headers={"Content-Length": str(len(clip))}, media_type="video/mp4")
        delivered = BackgroundTask(jobs.log, "delivered", job) if clip == job["content"] else None
        return Response(clip, media_type="video/mp4", background=delivered)

    @app.post("/v1/images/generations")
    async def image(request: Request) -> Any:
        fields = await request.json()
        if jobs.meets(fields["prompt"], "500-after-success"):
            raise HTTPException(500, "internal error")
        width, height = map(int, fields["size"].split("x"))
        pixels = np.empty((height, width, 3), np.uint8)
        pixels[:] = np.linspace(0, 255, width)[:, None].astype(np.uint8)
        pixels[height // 2 :] = colour_of(fields["prompt"], fields["seed"])
        return {"created": 1, "data": [{"b64_json": base64.b64encode(encode_png(pixels)).decode()}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        """Caption a clip by its prompt. Each word is a fact, which is shown if its length is odd."""
        fields = await request.json()
        text, *images = fields["messages"][0]["content"]
        prompt = json.loads(re.findall('prompt: (".*")$', text["text"], re.MULTILINE)[0])
        job = {"id": request.headers["idempotency-key"], "fields": {"prompt": prompt}}
        await asyncio.sleep(SECONDS)
        if jobs.meets(prompt, "busy"):
            raise HTTPException(429, "too many requests", {"Retry-After": "0"})
        if jobs.meets(prompt, "500"):
            raise HTTPException(500, "internal error")
        if "fault:refused " in f"{prompt} ":
            raise HTTPException(400, "the prompt is against the rules")
        if jobs.meets(prompt, "html"):
            return HTMLResponse("<html>a proxy</html>")
        if jobs.meets(prompt, "nothing"):
            return Response()
        if jobs.meets(prompt, "hangs"):
            await asyncio.sleep(600)
        facts = [{"fact": fact, "shown": "yes" if len(fact) % 2 else "unclear"} for fact in prompt.split()]
        content: str | None = json.dumps({"caption": f"{len(images)} images of {prompt}", "facts": facts})
        caption = folder / "caption.txt"
        if caption.exists():
            content = caption.read_text()
        if jobs.meets(prompt, "prose") or "fault:only-prose " in f"{prompt} ":
            content = "What a nice clip!"
        if "fault:no-content " in f"{prompt} ":
            content = None
        message = {"role": "assistant", "content": content}
        if "fault:refusal " in f"{prompt} ":
            message = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
        if await request.is_disconnected():
            return Response()
        jobs.log("answered", job)
        model = "another" if "fault:other-model " in f"{prompt} " else fields["model"]
        return {"model": model, "choices": [{"message": message, "finish_reason": "stop"}]}

    return app


class FakeServer:
    """The server in a process of its own."""

    def __init__(self, folder: Path, kind: str = "vllm-omni", models: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.kind = folder, kind
        (folder / "models.json").write_text(json.dumps(models or {MODEL: "LTX-2@abc"}))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps({"event": "started"}) + "\n")
        command = [sys.executable, "-m", "tests.remote.fake_server", str(self.port), str(self.folder), self.kind]
        self.process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5):
                return
            assert self.process.poll() is None
            time.sleep(0.02)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def events(self, *events: str) -> list[dict[str, Any]]:
        path = self.folder / LOG
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for entry in map(json.loads, lines) if entry["event"] in events]

    def client_was_killed(self, done: Collection[str]) -> None:
        """Note that the client was killed, and has lost the clips that were delivered to it, except for these prompts."""
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps({"event": "killed", "done": [*done]}) + "\n")

    def paid(self) -> list[str]:
        """Return the prompts of the computed clips, without those that were lost by a restart or with the client."""
        at_server: dict[str, str] = {}
        at_client: dict[str, str] = {}
        for entry in self.events("started", "computed", "delivered", "killed"):
            if entry["event"] == "started":
                at_server = {}
            elif entry["event"] == "computed":
                at_server[entry["id"]] = entry["prompt"]
            elif entry["event"] == "delivered":
                at_client[entry["id"]] = entry["prompt"]
            else:
                at_client = {job: prompt for job, prompt in at_client.items() if prompt in entry["done"]}
        return list((at_server | at_client).values())

    def __enter__(self) -> FakeServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def profile_of(*urls: str, **options: Any) -> Profile:
    """Return a profile whose images and clips these servers make."""
    actor = {
        "weights": f"remote:{MODEL}",
        "cpus": 0.1,
        "timeout_s": options.pop("timeout_s", 60),
        "options": {"servers": list(urls), **options},
    }
    return Profile(
        name="remote",
        about="Clips by servers.",
        defaults={**SIZE, "video_model": "remote", "upscale_video": False},
        actors={"remote": actor, "remote_image": actor},
    )


if __name__ == "__main__":
    port, folder, kind = sys.argv[1:]
    uvicorn.run(app_of(Path(folder), kind), host="127.0.0.1", port=int(port), log_level="error")
