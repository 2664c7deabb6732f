"""Test server in a thread: the API with the page on its own port, and a director that renders one job at a time."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from tests.fake_stages import FakeRealESRGAN, FakeStage
from tests.online.scripted_stages import SCRIPTED
from vidgen_ray.engine.status import Progress
from vidgen_ray.errors import Cancelled
from vidgen_ray.online.queue_estimate import ProgressEstimator
from vidgen_ray.online.store.jobs import Job, JobError, JobProgress
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.shot import Shot
from vidgen_ray.stages.flux import FluxLoRAStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.progress import progress_callback, report_progress

CHECK_PAGE = (Path(__file__).parent / "check_page.js").read_text()
OWNER = "director"
LEASE_S = 60


class JobDirector(threading.Thread):
    """Renders queued jobs. While `gate` is cleared, rendering pauses before its next step.

    It also pauses at the stage `pause_at`, until that is another stage or `None`.
    """

    def __init__(self, store: JobStore, pipeline: VideoGenerationPipeline) -> None:
        super().__init__(daemon=True)
        self._store, self._pipeline = store, pipeline
        self.gate = threading.Event()
        self.gate.set()
        self.pause_at: str | None = None
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.is_set():
            for job in self._store.queue.claim(OWNER, LEASE_S, 1):
                self._render(job)
            time.sleep(0.02)

    def stop(self) -> None:
        self._stopping.set()
        self.gate.set()
        self.join()

    def _render(self, job: Job) -> None:
        plan = self._pipeline.plan(job.shot)
        estimator = ProgressEstimator(plan, self._pipeline.profile)

        def on_progress(stage: str, step: int, steps: int) -> None:
            percent = estimator.percent(Progress(stage, step, steps))
            self._store.queue.progress(OWNER, [JobProgress(job.id, stage, step, steps, percent)])
            while (stage == self.pause_at or not self.gate.is_set()) and not self._should_cancel(job):
                time.sleep(0.02)
            if self._should_cancel(job):
                raise Cancelled

        try:
            with progress_callback(on_progress):
                record = self._pipeline.render(job.shot)
        except Cancelled:
            self._store.queue.cancelled(job.id, OWNER)
        except Exception as error:
            reason = error.__cause__ or error
            self._store.queue.failed(job.id, OWNER, JobError(code="stage_failed", message=str(reason)))
        else:
            seconds = {step.stage: step.seconds for step in record.stages}
            self._store.queue.completed(job.id, OWNER, shot_id=record.shot.id or "", stage_seconds=seconds)

    def _should_cancel(self, job: Job) -> bool:
        return self._stopping.is_set() or bool(self._store.queue.heartbeat(OWNER, [job.id], LEASE_S))


@contextmanager
def listening_on(app: FastAPI, port: int) -> Iterator[None]:
    """Serve the app on a port of this machine until the block ends."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", timeout_graceful_shutdown=0, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


class FakeHunyuanDiT(FakeStage, HunyuanDiTStage):
    def one(self, shot, artefacts):
        return {"image": artefacts["image"]}


class FakeLoRA(FakeStage, FluxLoRAStage):
    def one(self, shot, artefacts):
        return {"image": artefacts["image"]}


class FakeUpscaler(FakeRealESRGAN):
    def run_chunk(self, shot, frames, chunk=None):
        report_progress(self.name, len(frames), len(frames))
        return super().run_chunk(shot, frames, chunk)


FAKES = {**SCRIPTED, "hunyuan": FakeHunyuanDiT, "lora": FakeLoRA, "realesrgan": FakeUpscaler}


class QuickPipeline(VideoGenerationPipeline):
    """Pipeline that draws noise instead of loading models, for tests of the page."""

    def _stages(self, classes: Sequence[type[Any]], shot: Shot) -> list[Any]:
        for stage_class in classes:
            if stage_class.name not in self._loaded:
                self._loaded[stage_class.name] = FAKES[stage_class.name](self.profile.params(stage_class))
        return [self._loaded[stage_class.name] for stage_class in classes]


assert hasattr(VideoGenerationPipeline, "_stages"), "QuickPipeline replaces this method"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def chromium() -> Path | None:
    return next((path for path in map(Path, ("/usr/bin/chromium", "/usr/bin/chromium-browser")) if path.exists()), None)
