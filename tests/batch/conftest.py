"""An engine in this process, for tests of what is around it: lines, finished shots, order, manifest and commands."""

import asyncio
import json
from contextlib import nullcontext
from functools import partial

import pytest

from tests.fake_stages import FINDS_FACES
from vidgen_ray.batch import director
from vidgen_ray.cli import main
from vidgen_ray.engine import fleet
from vidgen_ray.engine.calls import ShotFailed
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.engine import Engine
from vidgen_ray.engine.messages import Kind
from vidgen_ray.engine.processes import CoreLimits
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.render.step_runner import StepFailed


class InProcessEngine(Engine):
    """Renders one shot after another with the library and the stages of the run, without actors of Ray."""

    fatal_failure = None
    held_gpus = 1

    def __init__(self, config, layout, *_):
        self._layout = layout
        self._pipeline = VideoGenerationPipeline(
            config.profile, config.outputs._root, keep_stages=config.keep_stages, cache=config.cache.mode
        )
        self._pipeline._stages = self._stages
        self._config = config
        self._turn = asyncio.Lock()

    def _stages(self, classes, shot):
        loaded = self._pipeline._loaded
        for stage in classes:
            if stage.name not in loaded:
                loaded[stage.name] = self._config.stages[stage.name](self._config.profile.params(stage))
                loaded[stage.name].load()
        return [loaded[stage.name] for stage in classes]

    async def start(self, labels):
        pass

    async def stop(self):
        self._pipeline.close()

    def snapshot(self):
        return Snapshot({}, None, 0)

    async def run(self, plan, on_progress, on_admitted):
        async with self._turn:
            on_admitted()
            try:
                return await asyncio.to_thread(self._pipeline._render_unfinished, plan)
            except StepFailed as failed:
                raise ShotFailed(failed.failure(), Kind.INPUT) from None


def change_limits(monkeypatch, **limits):
    """Let the engines of later runs have these limits, and start processes that have failed again soon."""
    limited = partial(EngineConfig, limits=CoreLimits(**{"restart_s": 0.1, **limits}))
    monkeypatch.setattr(director, "EngineConfig", limited)


@pytest.fixture
def short_waits(monkeypatch):
    """Let a fleet look at its cluster often, and processes that have failed start again soon."""
    monkeypatch.setattr(fleet, "POLL_S", 0.5)
    change_limits(monkeypatch)


@pytest.fixture
def without_ray(monkeypatch):
    """Let a run connect to no Ray."""
    monkeypatch.setattr(director, "connected", lambda *_, **__: nullcontext())
    monkeypatch.setattr(director, "expect_gpus", lambda _: None)


@pytest.fixture
def in_process(without_ray, monkeypatch):
    monkeypatch.setattr(director, "Engine", InProcessEngine)


@pytest.fixture
def command(in_process, monkeypatch, capsys):
    """Return a function that runs a command with fakes, and returns its exit code and its report, if it prints one.

    It keeps what the last one has written to standard error as `messages`.
    """
    monkeypatch.setattr("vidgen_ray.batch.run_options.STAGE_BY_NAME", FINDS_FACES)

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        printed, run.messages = capsys.readouterr()
        return code, json.loads(printed) if "--json" in arguments else printed

    return run
