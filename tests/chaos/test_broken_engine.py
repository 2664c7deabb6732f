"""Break the engine on purpose: the rule that is meant for it finds each broken place within 200 seeds.

OFF switches mechanisms off, one by one."""

import asyncio
import math
from bisect import insort
from dataclasses import replace

import pytest

from tests.chaos.history import check
from tests.chaos.model import SURVIVED, worlds
from vidgen_ray.batch import director
from vidgen_ray.batch.director import Director
from vidgen_ray.batch.results import RunResults
from vidgen_ray.batch.shot_queue import ContinuedShots
from vidgen_ray.engine import (
    actor_client,
    calls,
    retries,
    scheduler,
    shot_runner,
    supervisor,
    worker_checks,
    worker_pool,
)
from vidgen_ray.engine.actor_client import ActorClient
from vidgen_ray.engine.encoder import Encoder
from vidgen_ray.engine.engine import Engine, Window
from vidgen_ray.engine.retries import AttemptFailed, Candidate, Kind
from vidgen_ray.engine.scheduler import Scheduler, Work
from vidgen_ray.engine.shot_runner import ShotRunner
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.engine.supervisor import ProcessHealth, Supervisor
from vidgen_ray.engine.worker_checks import Canary
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


class Unforgiven(AttemptFailed):
    """Failure that always counts against its process."""

    forgiven = property(lambda self: False, nothing)


class Forgiven(AttemptFailed):
    """Failure that, once forgiven, never counts against its process."""

    _forgiven = False

    @property
    def forgiven(self):
        return self._forgiven

    @forgiven.setter
    def forgiven(self, value):
        self._forgiven |= value


def keep_open(self, process, shot, succeeded=ProcessHealth.succeeded):
    """Forget the failures of other shots before a success, without a verdict."""
    self._records[process].failures.clear()
    succeeded(self, process, shot)


def together(work, alone=False, **changes):
    return replace(work, **changes)


def confirm_nothing(failed, candidates, limit, where=retries._next):
    return None if failed and all(each.kind is Kind.INPUT for each in failed) else where(failed, candidates, limit)


def on_any_node(failed, candidates, limit, where=retries._next):
    return where(failed, [each._replace(node=failed[0].process.node) for each in candidates], limit)


def anywhere(failed, candidates, limit, where=retries._next):
    return None if where(failed, candidates, limit) is None else frozenset()


def youngest_first(self, work, add=Scheduler.add):
    add(self, work)
    queue = self._queues[work.stage]
    order, number, _ = entry = self._entries[work]
    queue.remove(entry)
    self._entries[work] = younger = -order, number, work
    insort(queue, younger)


def earliest_stage_first(self, worker, add=Scheduler.add_worker):
    add(self, worker)
    self._stages[worker].reverse()


def prefetch_always(self, alike, max_load):
    fitting = {stage: [each for each in self._loads[stage] if alike[0] + each <= max_load] for stage in alike[1]}
    return {stage: max(loads) for stage, loads in fitting.items() if loads}


async def run_each(self, plan, order, steps, artefacts, on_progress):
    return await self._run_call(plan, order, steps, artefacts, on_progress)


async def never_ping(self, client):
    await asyncio.Event().wait()


OFF = {
    "quarantine": (supervisor, "FAILURES", 10**9),
    "quarantine of nodes": (supervisor, "NODE_SHARE", math.inf),
    "back-off before a restart": (supervisor, "BACK_OFF_S", 0.0),
    "probation: one call at a time": (Scheduler, "set_probation", nothing),
    "probation: one failure is enough": (ProcessHealth, "is_on_probation", nothing),
    "giving up": (supervisor, "MAX_QUARANTINES", 10**9),
    "pings": (Supervisor, "_ping", never_ping),
    "deadline of cancelled calls": (actor_client, "CANCEL_S", 1e9),
    "grace after a stopped driver": (actor_client, "LATE_S", 1e9),
    "replanning": (Engine, "needs_other_layout", False),
    "attempts in doubt": (retries, "IN_DOUBT_FACTOR", 1),
    "waiting for evidence": (WorkerPool, "_evidence", always(None)),
    "verdict: sick": (retries, "_counting", list),
    "verdict: well": (ProcessHealth, "succeeded", keep_open),
    "forgiving confirmed errors": (retries, "_is_confirmed", nothing),
    "forgiving refusals": (worker_pool, "AttemptFailed", Unforgiven),
    "counting forgiven errors later": (worker_pool, "AttemptFailed", Forgiven),
    "confirming a refusal": (retries, "_next", confirm_nothing),
    "next attempt on another worker": (retries, "_next", anywhere),
    "next attempt on another node": (retries, "_next", on_any_node),
    "next attempt on a larger GPU": (worker_pool, "_process", lambda worker: Candidate(worker, worker.node)),
    "shared crash: runs alone": (worker_pool, "replace", together),
    "reserved worker for calls alone": (Scheduler, "_assign_suspects", lambda *_: set()),
    "outages add up": (StoragePause, "written", nothing),
    "unfinished files of cancelled shots": (Encoder, "cancel", nothing),
    "canary": (Canary, "finished", nothing),
    "copy of a slow call": (worker_checks, "COPY_FACTOR", math.inf),
    "recall behind a slow call": (WorkerPool, "_recall", nothing),
    "oldest shot first": (Scheduler, "add", youngest_first),
    "latest stage first": (Scheduler, "add_worker", earliest_stage_first),
    "prefetch": (scheduler, "MAX_PREFETCH_LOAD", 1.0),
    "prefetch only if enough waits": (Scheduler, "_fitting", prefetch_always),
    "LoRA affinity": (Work, "loras_active", lambda *_: True),
    "near data": (Work, "mismatch", lambda self, worker: (not self.loras_active(worker), 2)),
    "announced sharing": (ShotRunner, "_shares_features", lambda *_: False),
    "sharing of equal steps": (ShotRunner, "_shared_steps", run_each),
}
"""Mechanism -> what switches it off."""

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
