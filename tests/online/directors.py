"""API server without Ray, for tests: the app, and a thread that renders queued jobs: as noise of the right sizes, or with the
stages of a pipeline.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
import yaml
from fastapi import FastAPI
from starlette.testclient import TestClient

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.status import Progress
from vidgen_ray.errors import Cancelled
from vidgen_ray.graph import chunked_stages_of, clip_length
from vidgen_ray.online.asgi_app import make_app
from vidgen_ray.online.auth import hash_key, load_keys
from vidgen_ray.online.job_service import plan_job
from vidgen_ray.online.queue_estimate import ProgressEstimator
from vidgen_ray.online.server_settings import Limits, OnlineSettings
from vidgen_ray.online.serving_profile import ServingProfile, serving_profile
from vidgen_ray.online.store.jobs import Job, JobError, JobProgress, JobState
from vidgen_ray.online.store.store import JobStore, open_store
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import StepRecord
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.profile import Profile
from vidgen_ray.render.shot_files import ShotFiles
from vidgen_ray.render.step_runner import StepFailed
from vidgen_ray.stages.base import Item, progress_callback
from vidgen_ray.system.http_limits import LimitedHttp

LOCAL: dict[str, Any] = {"base_url": "http://127.0.0.1", "client": ("127.0.0.1", 50_000)}
"""Arguments of a TestClient that connects from this machine."""
SMALL = {"prompt": "a man", "size": "64x64", "num_frames": 2, "upscale": False}
"""Fields of a video that takes no time."""
ProgressCallback = Callable[[str, int, int], None]
RenderShot = Callable[[ShotPlan, ProgressCallback], None]
"""Function that renders a shot and reports its progress. Raises StepFailed or Cancelled."""


class LocalDirector:
    """Runs one job at a time. While `held` is set, no job starts.

    While `paused` is set, a job waits in its step. It also waits in the stage `pause_at`, until that is another one or `None`.
    """

    def __init__(
        self,
        settings: OnlineSettings,
        store: JobStore,
        serving_profile: ServingProfile,
        outputs: OutputFolder,
        render: RenderShot,
    ) -> None:
        self._settings = settings
        self._store, self._serving_profile, self._outputs, self._render = store, serving_profile, outputs, render
        self._closing = threading.Event()
        self._woken = threading.Event()
        self.rendered: list[str] = []
        """Content keys of the rendered shots, in order."""
        self.held = threading.Event()
        self.paused = threading.Event()
        self.pause_at: str | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wake(self, *, has_cancels: bool = False) -> None:
        self._woken.set()

    def close(self) -> None:
        self._closing.set()
        self._woken.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._woken.clear()
            jobs = [] if self.held.is_set() else self._store.queue.claim("director", 60, 1)
            for job in jobs:
                self._run_job(job)
            if not jobs:
                self._woken.wait(0.05)

    def _run_job(self, job: Job) -> None:
        try:
            plan = plan_job(job, self._serving_profile, self._settings)
            estimator = ProgressEstimator(plan, self._serving_profile.profile)

            def on_progress(stage: str, step: int, steps: int) -> None:
                percent = estimator.percent(Progress(stage, step, steps))
                self._store.queue.progress("director", [JobProgress(job.id, stage, step, steps, percent, job.gpu_seconds)])
                while not self._is_cancelled(job) and (self.paused.is_set() or stage == self.pause_at):
                    time.sleep(0.03)
                if self._is_cancelled(job):
                    raise Cancelled

            if self._outputs.find_by_key(plan.key) is None:
                self._render(plan, on_progress)
                self.rendered.append(plan.key)
            done = self._outputs.find_by_key(plan.key)
            assert done is not None
            seconds = {step.stage: step.seconds for step in done.stages}
            gpu_seconds = self._serving_profile.gpu_seconds(seconds)
            values = {"shot_id": done.shot.id or "", "stage_seconds": seconds, "gpu_seconds": gpu_seconds}
            self._store.queue.end(job.id, "director", JobState.COMPLETED, **values)
        except Cancelled:
            self._store.queue.end(job.id, "director", JobState.CANCELLED)
        except StepFailed as failed:
            error = JobError(code="stage_failed", message=str(failed), stage=failed.stage)
            self._store.queue.end(job.id, "director", JobState.FAILED, error=error.model_dump(mode="json"))

    def _is_cancelled(self, job: Job) -> bool:
        return self._closing.is_set() or bool(self._store.queue.heartbeat("director", [job.id]))


def noise_renderer(profile: Profile, outputs: OutputFolder, step_s: float = 0.0, steps: int = 2) -> RenderShot:
    """Return a function that writes noise. Each step takes `step_s` seconds. The prompt `fail` fails."""

    def render(plan: ShotPlan, on_progress: ProgressCallback) -> None:
        shot = plan.shot
        for step in range(steps):
            on_progress("flux", step + 1, steps)
            time.sleep(step_s)
        if shot.prompt == "fail":
            raise StepFailed("flux", ValueError("the prompt asked for it"))
        noise = np.random.default_rng(shot.seed)
        artefacts = {"image": noise.integers(0, 255, (shot.height, shot.width, 3), np.uint8)}
        if shot.generate_video:
            artefacts["frames"] = noise.integers(0, 255, (shot.clip_frames, shot.height, shot.width, 3), np.uint8)
        with closing(ShotFiles(plan, Item(shot, artefacts), outputs, profile.encode, provenance=profile.provenance)) as files:
            if chunked := {stage.writes[0] for stage in chunked_stages_of(shot)}:
                n_frames, _ = clip_length(shot)
                frames = artefacts["frames"][np.arange(n_frames) * shot.clip_frames // n_frames]
                clips = {"frames": frames, "hd_frames": frames.repeat(shot.scale, 1).repeat(shot.scale, 2)}
                files.add({**{name: clips[name] for name in chunked}, "chunk": (0, n_frames)})
            spent = {"seconds": 0.5, "gpu_seconds": 0, "cached": False}
            files.commit([StepRecord(stage=s.stage, key=s.key, weights=s.weights, **spent) for s in plan.steps])

    return render


def renderer(pipeline: VideoGenerationPipeline) -> RenderShot:
    """Return a function that renders a shot with the stages of a pipeline."""

    def render(plan: ShotPlan, on_progress: ProgressCallback) -> None:
        with progress_callback(on_progress):
            pipeline.render(plan.shot)

    return render


@dataclass(frozen=True)
class LocalServer:
    """Server and its parts, for assertions."""

    app: FastAPI
    settings: OnlineSettings
    store: JobStore
    outputs: OutputFolder
    director: LocalDirector
    serving_profile: ServingProfile


def settings_with_keys(folder: Path, tenants: Mapping[str, Mapping[str, Any]], **settings: Any) -> OnlineSettings:
    """Return the settings of a server with the key `vg-TENANT` for each tenant. `tenants`: name -> fields of its key."""
    keys = [{"tenant": name, "sha256": hash_key(f"vg-{name}"), **fields} for name, fields in tenants.items()]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    return OnlineSettings(profile="tiny", data=str(folder / "out"), keys_file=folder / "keys.yaml", **settings)


def client_of(server: LocalServer, tenant: str | None = "ada") -> TestClient:
    """Return a client with the key of a tenant."""
    headers = {"Authorization": f"Bearer vg-{tenant}"} if tenant else {}
    return TestClient(server.app, base_url="http://videos.example", headers=headers, raise_server_exceptions=False)


@contextmanager
def local_server(
    profile: Profile,
    settings: OnlineSettings,
    render: RenderShot | None = None,
    step_s: float = 0.0,
    served: ServingProfile | None = None,
) -> Iterator[LocalServer]:
    """Start a server. `render` replaces the renderer of noise, `served` the stages of the profile."""
    served = served or serving_profile(profile)
    if "limits" not in settings.model_fields_set:
        # The tests ask for results more often than users do.
        settings = settings.model_copy(update={"limits": Limits(requests_per_minute=1_000_000)})
    outputs = OutputFolder(settings.data)
    store = open_store(settings)
    outputs.prepare()
    director = LocalDirector(settings, store, served, outputs, render or noise_renderer(served.profile, outputs, step_s))
    try:
        keys = load_keys(settings.keys_file, settings.limits)
        app = make_app(settings, store, outputs, served, keys, changed=lambda: asyncio.sleep(0.01), jobs_changed=director.wake)
        yield LocalServer(app, settings, store, outputs, director, served)
    finally:
        director.close()
        store.close()


@contextmanager
def listening_on_a_port(app: FastAPI, port: int = 0) -> Iterator[str]:
    """Serve the app on a local port, by default a free one, and yield its URL."""
    with socket.create_server(("127.0.0.1", port)) as bound:
        config = uvicorn.Config(app, http=LimitedHttp, log_level="critical", lifespan="on", timeout_graceful_shutdown=0)
        server = uvicorn.Server(config)
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
