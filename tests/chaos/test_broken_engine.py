"""Break the engine on purpose: the rule that is meant for it finds each broken place within 200 seeds."""

import asyncio

import pytest

from tests.chaos.history import check
from tests.chaos.model import SURVIVED, simulate
from vidgen_ray.batch import director
from vidgen_ray.batch.director import Director
from vidgen_ray.batch.results import RunResults
from vidgen_ray.batch.shot_queue import ContinuedShots
from vidgen_ray.engine import (
    actor_client,
    calls,
    retries,
    shot_runner,
    shot_writer,
    slow_calls,
    step_runner,
    worker_pool,
)
from vidgen_ray.engine.actor_client import ActorClient
from vidgen_ray.engine.engine import Window
from vidgen_ray.engine.retries import AttemptFailed, Kind
from vidgen_ray.engine.shot_runner import ShotRunner
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.engine.supervisor import Supervisor
from vidgen_ray.outputs.lease import Fence, Lease

SEEDS = 200


def nothing(*_, **__):
    return None


async def swapped(chunks, process, ordered=calls.ordered_window):
    """Yield chunks in the wrong order."""
    made = [chunk async for chunk in ordered(chunks, process)]
    for chunk in made[::-1]:
        yield chunk._replace(is_last=chunk is made[0])


def add_any(self, chunk):
    for name, file in shot_writer.CLIP_FILES.items():
        if name in chunk:
            shot_writer.Mp4Writer(self._draft.path(file)).write(chunk[name])


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


def once(*args, original=retries.run_with_retries, **options):
    return original(*args, **{**options, "limit": 1})


def without_end(*args, original=retries.run_with_retries, **options):
    return original(*args, **{**options, "limit": 10**6})


async def call_unchecked(self, requested, timeout_s, method, plan, stages, *args, share=1.0, num_returns=2, on_progress=None):
    async def call(client, number):
        options = {"stage": requested.stage, "timeout_s": timeout_s, "num_returns": num_returns}
        return await client.call(method, number, plan, *args, **options)

    (result, artefacts, *clip), worker = await self.run(requested, call, on_progress)
    return result, worker_pool.RemoteArtefacts(artefacts, worker, *clip)


def blame_all(self, kind, *args, init=AttemptFailed.__init__):
    init(self, Kind.ERROR if kind in (Kind.SHARED_CRASH, Kind.NOT_RUN) else kind, *args)


async def no_timeout(self, call, response):
    return await response


async def not_the_storage(self, failed):
    return False


async def never_writable(self):
    return "broken"


def start_once(self, client, delay_s=0.0, start=Supervisor._start):
    if client.place is None:
        start(self, client, delay_s)


def use_one(self, client, up=worker_pool.WorkerPool._worker_up):
    if "/0/0" in client.name or "encoder" in client.name:
        up(self, client)


async def ignore_stop(self):
    await asyncio.Event().wait()


BROKEN = {
    "fence": ("lease", lambda patch: patch.setattr(Fence, "check", nothing)),
    "lost lease": ("lease", lambda patch: patch.setattr(Lease, "is_sure", True)),
    "timeout of calls": ("ends", lambda patch: patch.setattr(ActorClient, "_response", no_timeout)),
    "timeout of loads": ("ends", lambda patch: patch.setattr(actor_client, "LOAD_SILENCE_S", 1e9)),
    "restart": ("ends", lambda patch: patch.setattr(Supervisor, "_start", start_once)),
    "all workers": ("idle", lambda patch: patch.setattr(worker_pool.WorkerPool, "_worker_up", use_one)),
    "retries": ("fine", lambda patch: patch.setattr(worker_pool, "run_with_retries", once)),
    "bounded retries": ("ends", lambda patch: patch.setattr(worker_pool, "run_with_retries", without_end)),
    "shared crashes": ("fine", lambda patch: patch.setattr(AttemptFailed, "__init__", blame_all)),
    "restart of a shot": ("fine", lambda patch: patch.setattr(shot_runner, "MAX_RESTARTS", 1)),
    "cause is the storage": ("fine", lambda patch: patch.setattr(StoragePause, "is_cause", not_the_storage)),
    "end of a pause": ("stopped", lambda patch: patch.setattr(StoragePause, "problem", never_writable)),
    "identity": (
        "content",
        lambda patch: (
            patch.setattr(step_runner, "check_made_by", nothing),
            patch.setattr(shot_writer, "check_made_by", nothing),
            patch.setattr(worker_pool.WorkerPool, "call", call_unchecked),
        ),
    ),
    "size": ("content", lambda patch: patch.setattr(step_runner, "_wrong_size", nothing)),
    "single colour": ("content", lambda patch: patch.setattr(step_runner, "_is_single_colour", nothing)),
    "likeness": ("content", lambda patch: patch.setattr(shot_runner, "check_likeness", nothing)),
    "order of chunks": (
        "order",
        lambda patch: (
            patch.setattr(shot_runner, "ordered_window", swapped),
            patch.setattr(shot_writer.ShotFiles, "add", add_any),
        ),
    ),
    "window": ("window", lambda patch: patch.setattr(Window, "_has_room", lambda *_: True)),
    "one result": ("one_row", lambda patch: patch.setattr(Director, "_record", record_twice)),
    "every result": ("one_row", lambda patch: patch.setattr(RunResults, "failed", drop_failures)),
    "failed or done": ("committed", lambda patch: patch.setattr(RunResults, "_enter", done_instead)),
    "one commit": ("commit_once", lambda patch: patch.setattr(ShotRunner, "_write", write_twice)),
    "copies at the end only": (
        "rework",
        lambda patch: (patch.setattr(slow_calls, "COPY_FACTOR", 0.0), patch.setattr(slow_calls, "MIN_SLOW_S", 0.01)),
    ),
    "sick workers": ("fine", lambda patch: patch.setattr(retries, "_counting", list)),
    "circuit breaker": ("breaker", lambda patch: patch.setattr(director, "BREAKER_FAILURES", 10**6)),
    "chain of shots": ("one_row", lambda patch: patch.setattr(ContinuedShots, "failed", lambda *_: [])),
    "stop request": ("stop", lambda patch: patch.setattr(Director, "_watch_stop", ignore_stop)),
}
"""Place -> rule that finds it if it is broken, and how it is broken."""


@pytest.mark.very_slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("place", BROKEN)
def test_broken_place_is_found(monkeypatch, place):
    rule, break_it = BROKEN[place]
    break_it(monkeypatch)
    found = set()
    for seed in range(SEEDS):
        found |= {name for name, _ in check(simulate(seed, SURVIVED))}
        if rule in found:
            return
    pytest.fail(f"not found by {rule}, only by: {', '.join(sorted(found)) or 'none'}")
