"""Break the engine on purpose: the rule that is meant for it finds each broken place within 200 seeds."""

import asyncio

import pytest

from tests.chaos.history import check
from tests.chaos.model import SURVIVED, worlds
from vidgen_ray.batch import director
from vidgen_ray.batch.director import Director
from vidgen_ray.batch.results import RunResults
from vidgen_ray.batch.shot_queue import ContinuedShots
from vidgen_ray.engine import actor_client, calls, retries, shot_runner, worker_checks, worker_pool
from vidgen_ray.engine.actor_client import ActorClient
from vidgen_ray.engine.engine import Window
from vidgen_ray.engine.retries import AttemptFailed, Kind
from vidgen_ray.engine.shot_runner import ShotRunner
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.engine.supervisor import Supervisor
from vidgen_ray.engine.worker_pool import RemoteArtefacts, WorkerPool
from vidgen_ray.outputs.lease import Fence, Lease
from vidgen_ray.outputs.records import CLIP_FILES
from vidgen_ray.render import shot_files, step_runner

SEEDS = 200


def nothing(*_, **__):
    return None


async def swapped(chunks, process, ordered=calls.ordered_window):
    """Yield chunks in the wrong order."""
    made = [chunk async for chunk in ordered(chunks, process)]
    for chunk in made[::-1]:
        yield chunk._replace(is_last=chunk is made[0])


def add_any(self, chunk):
    for name, file in CLIP_FILES.items():
        if name in chunk:
            self._draft.path(file)(chunk[name])


def record_twice(self, task, result, record=Director._record):
    record(self, task, result)
    record(self, task, result)


def drop_failures(self, line, failure):
    self.counts["failed"] += 1


def done_instead(self, row, *args, enter=RunResults._enter):
    enter(self, row.model_copy(update={"status": "done"}), *args)


async def write_twice(self, *args, write=ShotRunner._write):
    await write(self, *args)
    return await write(self, *args)


def limited(limit, original=retries.run_with_retries):
    return lambda *args, **options: original(*args, **{**options, "limit": limit})


async def call_unchecked(self, requested, timeout_s, method, plan, stages, *args, share=1.0, num_returns=2, on_progress=None):
    async def call(client, number):
        options = {"stage": requested.stage, "timeout_s": timeout_s, "num_returns": num_returns}
        return await client.call(method, number, plan, *args, **options)

    (result, artefacts, *clip), worker = await self.run(requested, call, on_progress)
    return result, RemoteArtefacts(artefacts, worker, *clip)


def blame_all(self, kind, *args, init=AttemptFailed.__init__):
    init(self, Kind.ERROR if kind in (Kind.SHARED_CRASH, Kind.NOT_RUN) else kind, *args)


async def no_timeout(self, call, response):
    return await response


def always(value):
    async def return_value(*_):
        return value

    return return_value


def start_once(self, client, delay_s=0.0, start=Supervisor._start):
    if client.place is None:
        start(self, client, delay_s)


def use_one(self, client, up=WorkerPool._worker_up):
    if "/0/0" in client.name or "encoder" in client.name:
        up(self, client)


async def ignore_stop(self):
    await asyncio.Event().wait()


BROKEN = {
    "fence": ("lease", (Fence, "check", nothing)),
    "lost lease": ("lease", (Lease, "is_sure", True)),
    "timeout of calls": ("ends", (ActorClient, "_response", no_timeout)),
    "timeout of loads": ("ends", (actor_client, "LOAD_SILENCE_S", 1e9)),
    "restart": ("ends", (Supervisor, "_start", start_once)),
    "all workers": ("idle", (WorkerPool, "_worker_up", use_one)),
    "retries": ("fine", (worker_pool, "run_with_retries", limited(1))),
    "bounded retries": ("ends", (worker_pool, "run_with_retries", limited(10**6))),
    "shared crashes": ("fine", (AttemptFailed, "__init__", blame_all)),
    "restart of a shot": ("fine", (shot_runner, "MAX_RESTARTS", 1)),
    "cause is the storage": ("fine", (StoragePause, "is_cause", always(False))),
    "end of a pause": ("stopped", (StoragePause, "problem", always("broken"))),
    "identity": (
        "content",
        (step_runner, "check_made_by", nothing),
        (shot_files, "check_made_by", nothing),
        (WorkerPool, "call", call_unchecked),
    ),
    "size": ("content", (step_runner, "_wrong_pixels", nothing)),
    "single colour": ("content", (step_runner, "_is_single_colour", nothing)),
    "likeness": ("content", (shot_runner, "check_likeness", nothing)),
    "order of chunks": ("order", (shot_runner, "ordered_window", swapped), (shot_files.ShotFiles, "add", add_any)),
    "window": ("window", (Window, "_has_room", lambda *_: True)),
    "one result": ("one_row", (Director, "_record", record_twice)),
    "every result": ("one_row", (RunResults, "failed", drop_failures)),
    "failed or done": ("committed", (RunResults, "_enter", done_instead)),
    "one commit": ("commit_once", (ShotRunner, "_write", write_twice)),
    "copies at the end only": ("rework", (worker_checks, "COPY_FACTOR", 0.0), (worker_checks, "MIN_SLOW_S", 0.01)),
    "sick workers": ("fine", (retries, "_counting", list)),
    "circuit breaker": ("breaker", (director, "BREAKER_FAILURES", 10**6)),
    "chain of shots": ("one_row", (ContinuedShots, "failed", lambda *_: [])),
    "stop request": ("stop", (Director, "_watch_stop", ignore_stop)),
}
"""Place -> rule that finds it if it is broken, and what breaks it."""


@pytest.mark.very_slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("place", BROKEN)
def test_broken_place_is_found(monkeypatch, place):
    rule, *changes = BROKEN[place]
    for change in changes:
        monkeypatch.setattr(*change)
    found = set()
    for world in worlds(range(SEEDS), SURVIVED):
        found |= {name for name, _ in check(world)}
        if rule in found:
            return
    pytest.fail(f"not found by {rule}, only by: {', '.join(sorted(found)) or 'none'}")
