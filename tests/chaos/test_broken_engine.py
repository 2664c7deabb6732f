"""Break the engine on purpose: the rule that is meant for it finds each broken place within 400 seeds."""

import asyncio
import math
from dataclasses import replace

import pytest

from tests.chaos import model
from tests.chaos.history import check
from tests.chaos.model import LIMITS, SURVIVED, worlds
from vidgen_ray.batch import director
from vidgen_ray.batch.director import Director
from vidgen_ray.batch.results import RunResults
from vidgen_ray.batch.shot_queue import ContinuedShots
from vidgen_ray.engine import core, shell, shots
from vidgen_ray.engine.actor_start import Ping
from vidgen_ray.engine.attempts import Durations, next_place
from vidgen_ray.engine.core import Core
from vidgen_ray.engine.encoder import Encoder
from vidgen_ray.engine.engine import Engine, Window
from vidgen_ray.engine.messages import Kind
from vidgen_ray.engine.processes import State, Table, Where
from vidgen_ray.engine.queues import Lane
from vidgen_ray.engine.shots import Shots
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.outputs.lease import Fence, Lease
from vidgen_ray.outputs.records import CLIP_FILES
from vidgen_ray.render import shot_files, step_runner

SEEDS = 400


def nothing(*_, **__):
    return None


def always(value):
    async def return_value(*_):
        return value

    return return_value


def limits(**changes):
    """Return what gives the core other limits."""
    return model, "LIMITS", replace(LIMITS, **changes)


async def swapped(self, *args, processed=Shots._processed):
    """Yield chunks in the wrong order."""
    for chunk in [chunk async for chunk in processed(self, *args)][::-1]:
        yield chunk


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


async def write_twice(self, *args, write=Shots._write):
    await write(self, *args)
    return await write(self, *args)


def with_attempts(attempts):
    def init(self, *args, make=Core.__init__, **options):
        make(self, *args, **{**options, "attempts": attempts})

    return init


def with_kinds(**kinds):
    """Return a method that takes failures of some kinds for failures of other kinds."""

    def attempt_failed(self, running, request, kind, failure, decide=Core._attempt_failed):
        decide(self, running, request, kinds.get(kind.name, kind), failure)

    return attempt_failed


def no_timeouts(self, process):
    if process.is_live:
        process.deadline = math.inf


def no_late_results(self, event, take=Core._on_Returned):
    if self._running(event) is not None:
        take(self, event)


def start_once(self, process, *, is_first=False, start=Core._start):
    if is_first:
        start(self, process, is_first=True)
    else:
        self._enter(process, State.STARTING)


def use_one(self, event, ready=Core._on_Ready):
    if "/0/0" in event.process or "encoder" in event.process:
        ready(self, event)


async def ignore_stop(self):
    await asyncio.Event().wait()


def anywhere(*args):
    return None if next_place(*args) is None else Where()


def youngest_first(self, entry, push=Lane.push):
    order, number, request = entry
    request.entry = -order, number, request
    push(self, request.entry)


def earliest_stage_first(self, name, spec, add=Table.add):
    process = add(self, name, spec)
    process.pool.stages = tuple(sorted(spec.stages, key=self.positions.__getitem__))
    return process


BROKEN = {
    "fence": ("lease", (Fence, "check", nothing)),
    "lost lease": ("lease", (Lease, "is_sure", True)),
    "timeout of calls": ("ends", (Core, "_check_calls", no_timeouts)),
    "timeout of loads": ("ends", limits(load_silence_s=1e9)),
    "restart": ("ends", (Core, "_start", start_once)),
    "all workers": ("idle", (Core, "_on_Ready", use_one)),
    "retries": ("fine", (Core, "__init__", with_attempts(1))),
    "bounded retries": ("ends", (Core, "__init__", with_attempts(10**6)), limits(max_failures=10**9)),
    "shared crashes": ("fine", (Core, "_attempt_failed", with_kinds(SHARED_CRASH=Kind.ERROR, NOT_RUN=Kind.ERROR))),
    "restart of a shot": ("fine", (shots, "MAX_RESTARTS", 1)),
    "cause is the storage": ("fine", (StoragePause, "is_cause", always(False))),
    "end of a pause": ("stopped", (StoragePause, "problem", always("broken"))),
    "identity": (
        "content",
        (step_runner, "check_made_by", nothing),
        (shot_files, "check_made_by", nothing),
        (Core, "_has_keys", lambda *_: True),
        (Durations, "add", nothing),
    ),
    "size": ("content", (step_runner, "_wrong_pixels", nothing)),
    "single colour": ("content", (step_runner, "_is_single_colour", nothing)),
    "likeness": ("content", (shots, "check_likeness", nothing)),
    "order of chunks": ("order", (Shots, "_processed", swapped), (shot_files.ShotFiles, "add", add_any)),
    "window": ("window", (Window, "_has_room", lambda *_: True)),
    "one result": ("one_row", (Director, "_record", record_twice)),
    "every result": ("one_row", (RunResults, "failed", drop_failures)),
    "failed or done": ("committed", (RunResults, "_enter", done_instead)),
    "one commit": ("commit_once", (Shots, "_write", write_twice)),
    "copies at the end only": ("rework", limits(copy_factor=0.0, min_slow_s=0.01)),
    "circuit breaker": ("breaker", (director, "BREAKER_FAILURES", 10**6)),
    "chain of shots": ("one_row", (ContinuedShots, "failed", lambda *_: [])),
    "stop request": ("stop", (Director, "_watch_stop", ignore_stop)),
    "quarantine": ("sick", limits(failures=10**9)),
    "pings": ("frozen", (shell, "ping", always(Ping.UP))),
    "replanning": ("stopped", (Engine, "needs_other_layout", False)),
    "late results": ("commit_once", (Core, "_on_Returned", no_late_results)),
    "next attempt on another process": ("fine", (core, "next_place", anywhere)),
    "unfinished files of cancelled shots": ("leftovers", (Encoder, "cancel", nothing)),
    "oldest shot first": ("overtaken", (Lane, "push", youngest_first)),
    "latest stage first": ("overtaken", (Table, "add", earliest_stage_first)),
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
