"""A server without Ray to test the API with: the app, and a thread that makes what the store has queued.

It makes shots by the pipeline, or paints them: real files of the right sizes, without any model.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.shot_writer import ShotFiles
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import Cancelled
from vidgen_ray.online.asgi_app import make_app
from vidgen_ray.online.auth import load_keys
from vidgen_ray.online.serving_profile import ServingProfile, serving_profile
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.store.jobs import Job, JobError
from vidgen_ray.online.store.leases import JobProgress
from vidgen_ray.online.store.store import JobStore, open_store
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import StepRecord
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.profile import Profile
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.progress import progress_callback

LOCAL: dict[str, Any] = {"base_url": "http://127.0.0.1", "client": ("127.0.0.1", 50_000)}
"""Of a TestClient that asks from this machine."""
ProgressCallback = Callable[[str, int, int], None]
Make = Callable[[ShotPlan, ProgressCallback], None]
"""Makes a shot's files, saying how far it is. Raises StepFailed or Cancelled."""


class LocalDirector:
    """Leads one job at a time. `hold` keeps it from beginning any."""

    def __init__(self, store: JobStore, serving_profile: ServingProfile, outputs: OutputFolder, make: Make) -> None:
        self._store, self._served, self._outputs, self._make = store, serving_profile, outputs, make
        self._ending = threading.Event()
        self._news = threading.Event()
        self.rendered: list[str] = []
        """Keys, in the order in which they were made."""
        self.held = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._news.set()

    def close(self) -> None:
        self._ending.set()
        self._news.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._ending.is_set():
            self._news.clear()
            jobs = [] if self.held.is_set() else self._store.queue.claim("director", 60, 1)
            for job in jobs:
                self._lead(job)
            if not jobs:
                self._news.wait(0.05)

    def _lead(self, job: Job) -> None:
        def told(stage: str, step: int, steps: int) -> None:
            if self._ending.is_set() or self._store.queue.heartbeat("director", [job.id], 60):
                raise Cancelled
            self._store.queue.progress("director", [JobProgress(job.id, stage, step, steps, 50)])

        try:
            plan = self._served.plan(job.shot)
            if self._outputs.find_by_key(plan.key) is None:
                self._make(plan, told)
                self.rendered.append(plan.key)
            done = self._outputs.find_by_key(plan.key)
            assert done is not None
            seconds = {step.stage: step.seconds for step in done.record().stages}
            self._store.queue.completed(job.id, "director", shot_id=done.record().shot.id or "", stage_seconds=seconds)
        except Cancelled:
            self._store.queue.cancelled(job.id, "director")
        except StepFailed as failed:
            error = JobError(code="stage_failed", message=str(failed), stage=failed.stage)
            self._store.queue.failed(job.id, "director", error)


def by_pipeline(profile: Profile, data: Path) -> Make:
    pipeline = VideoGenerationPipeline(profile, data)

    def make(plan: ShotPlan, told: ProgressCallback) -> None:
        with progress_callback(told):
            pipeline.render(plan.shot)

    return make


def painted(profile: Profile, outputs: OutputFolder, step_s: float = 0.0, steps: int = 2) -> Make:
    """Waits for `step_s` in each of the steps; a prompt of `fail` fails."""

    def make(plan: ShotPlan, told: ProgressCallback) -> None:
        shot = plan.shot
        for step in range(steps):
            told("flux", step + 1, steps)
            time.sleep(step_s)
        if shot.prompt == "fail":
            raise StepFailed("flux", ValueError("it was told to"))
        noise = np.random.default_rng(shot.seed)
        artefacts = {"image": noise.integers(0, 255, (shot.height, shot.width, 3), np.uint8)}
        if shot.generate_video:
            artefacts["frames"] = noise.integers(0, 255, (shot.num_frames, shot.height, shot.width, 3), np.uint8)
        with closing(ShotFiles(plan, Item(shot, artefacts), outputs, profile.encode)) as files:
            if shot.generate_video and shot.upscale_video:
                files.add({"hd_frames": artefacts["frames"].repeat(shot.scale, 1).repeat(shot.scale, 2)})
            files.commit(
                [
                    StepRecord(stage=s.stage, key=s.key, weights=s.weights, seconds=0.5, gpu_seconds=0, cached=False)
                    for s in plan.steps
                ]
            )

    return make


@dataclass(frozen=True)
class LocalServer:
    """What a test may look into."""

    app: FastAPI
    settings: OnlineSettings
    store: JobStore
    outputs: OutputFolder
    director: LocalDirector
    serving_profile: ServingProfile


@contextmanager
def local_server(
    profile: Profile, settings: OnlineSettings, make: Make | None = None, step_s: float = 0.0
) -> Iterator[LocalServer]:
    found = serving_profile(profile)
    outputs = OutputFolder(settings.data)
    outputs.prepare()
    store = open_store(settings)
    director = LocalDirector(store, found, outputs, make or painted(found.profile, outputs, step_s))
    try:
        app = make_app(
            settings, store, outputs, found, load_keys(settings.keys_file, settings.limits), accepted=director.wake, page=False
        )
        yield LocalServer(app, settings, store, outputs, director, found)
    finally:
        director.close()
        store.close()


@contextmanager
def listening_on_a_port(app: FastAPI) -> Iterator[str]:
    """The app behind a real socket: its address."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
