"""Sites under test, with fakes or with the tiny models, and windows of Chromium. The tests of a file share a browser."""

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.browser import running_browser
from tests.fake_stages import FakeRealESRGAN, FakeStage
from tests.online.directors import LocalDirector, listening_on_a_port, local_server, renderer, settings_with_keys
from tests.online.scripted_stages import SCRIPTED
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.online.store.jobs import Job, JobKind, JobState, new_id
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.script.check import check_shot
from vidgen_ray.stages.base import report_progress
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.weights import resolve

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")
playwright.expect.set_options(timeout=60_000)
CHECK_PAGE = (Path(__file__).parent / "check_page.js").read_text()


class FakeHunyuanDiT(FakeStage, HunyuanDiTStage):
    def one(self, shot, artefacts):
        return {"image": artefacts["image"]}


class FakeUpscaler(FakeRealESRGAN):
    def run_chunk(self, shot, frames, chunk=None):
        report_progress(self.name, len(frames), len(frames))
        return super().run_chunk(shot, frames, chunk)


FAKES = {**SCRIPTED, "hunyuan": FakeHunyuanDiT, "realesrgan": FakeUpscaler}


def with_fakes(profile: str, folder: Path) -> VideoGenerationPipeline:
    """Return a pipeline that draws noise instead of loading models, for tests of the page."""
    pipeline = VideoGenerationPipeline.from_profile(profile, folder)
    pipeline._loaded.update({name: fake(pipeline.profile.params(fake)) for name, fake in FAKES.items()})
    return pipeline


@dataclass
class Site:
    """Server under test, with its store and director."""

    url: str
    store: JobStore
    director: LocalDirector
    pipeline: VideoGenerationPipeline
    start: Callable[[], None]
    stop: Callable[[], None]
    key: str = ""

    def jobs(self, tenant: str = "local") -> list[Job]:
        return self.store.list(tenant, limit=100).jobs

    def wait_for_jobs(self, count: int, tenant: str = "local") -> None:
        """Wait until the tenant has `count` jobs and all have ended. Limited by pytest's timeout only."""
        while len(jobs := self.jobs(tenant)) != count or not all(job.state.is_final for job in jobs):
            time.sleep(0.02)

    def add(
        self, prompt: str, state: JobState = JobState.COMPLETED, tenant: str = "local", seed: int = 1, **fields: Any
    ) -> Job:
        """Store a job without rendering it. All such jobs share the files of one shot."""
        template = {"prompt": "a template", "seed": 1, "num_frames": 4, "upscale_video": False}
        shot = check_shot(template, "test", self.pipeline.profile.defaults)
        record, now = self.pipeline.render(shot), time.time()
        done = state is JobState.COMPLETED
        job = Job(
            id=new_id("video"),
            tenant=tenant,
            kind=JobKind.VIDEO,
            state=state,
            shot=shot.model_copy(update={"prompt": prompt, "seed": seed}),
            key=self.pipeline.plan(shot).key,
            progress=100 if done else 0,
            created_at=now,
            started_at=now - 41,
            completed_at=now if state.is_final else None,
            shot_id=record.shot.id if done else None,
            **fields,
        )
        self.store.create(job)
        return job


@pytest.fixture(scope="session")
def quick(tmp_path_factory) -> VideoGenerationPipeline:
    return with_fakes("tiny", tmp_path_factory.mktemp("out"))


@pytest.fixture
def new_site(quick, tmp_path) -> Iterator[Callable[..., Site]]:
    """Start a site. `served` replaces the serving profile of the pipeline."""
    wash = tmp_path / "wash.safetensors"
    shutil.copy(resolve("builtin:tiny/lora.safetensors"), wash)
    with ExitStack() as sites:

        def make(
            key: str = "", pipeline: VideoGenerationPipeline = quick, served: ServingProfile | None = None, **settings: Any
        ) -> Site:
            server_settings = OnlineSettings(
                profile=pipeline.profile.name,
                data=str(pipeline.outputs.root),
                database=f"sqlite:///{tmp_path}/jobs.db",
                loras={"ink": "builtin:tiny/lora.safetensors", "wash": str(wash)},
                # The director of these tests does not know tenants.
                share_results_between_tenants=True,
                **settings,
            )
            server = sites.enter_context(local_server(pipeline.profile, server_settings, renderer(pipeline), served=served))
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            running = sites.enter_context(ExitStack())

            def start() -> None:
                running.enter_context(listening_on_a_port(server.app, port))

            start()
            return Site(f"http://127.0.0.1:{port}", server.store, server.director, pipeline, start, running.close, key)

        yield make


@pytest.fixture
def site(new_site) -> Site:
    return new_site()


@pytest.fixture
def site_with_keys(new_site, tmp_path) -> Site:
    """Server with the keys of two tenants, ann and ben."""
    return new_site(key="vg-ann", keys_file=settings_with_keys(tmp_path, {"ann": {}, "ben": {}}).keys_file)


# Not for the whole session: Playwright keeps an event loop running in this thread, and tests of other folders call asyncio.run.
@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    with running_browser() as browser:
        yield browser


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Any]]:
    """Open browser windows. Fails if their consoles have messages, e.g. violations of the Content-Security-Policy."""
    contexts, messages = [], []

    def open_(url: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(f"{message.text} ({message.location['url']})"))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(url)
        return page

    open_.messages = messages
    yield open_
    for context in contexts:
        context.close()
    assert messages == []


def generate(page: Any, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Generate").click()


def cards(page: Any, list_id: str) -> Any:
    return page.locator(f"#{list_id} > li")


def open_menu(page: Any, title: str) -> Any:
    """Open the actions of an ended job's card. Returns the card."""
    card = page.locator("#clips > li").filter(has=page.get_by_role("heading", name=title, exact=True)).first
    card.locator(".menu > summary").click()
    return card
