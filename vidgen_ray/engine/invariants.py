"""Invariants of an engine's core: they hold after each event."""

from __future__ import annotations

import math

from vidgen_ray.engine.attempts import Evidence, Request
from vidgen_ray.engine.core import Core
from vidgen_ray.engine.processes import MAX_PREFETCH_LOAD, Process, State


def check_invariants(core: Core) -> None:
    """Raise AssertionError unless the state is one that an event must leave. Looks at all rows and calls."""
    for row in core.table.rows.values():
        _check_row(core, row)
    for pool in core.table.pools.values():
        assert pool.live == sum(row.is_live for row in pool.rows) == sum(map(len, pool.shelves.values())), pool.spec
    for request in core.requests:
        _check_request(core, request)
    _check_registers(core)
    _check_timers(core)
    _check_nothing_waits_for_an_idle_row(core)


def _check_row(core: Core, row: Process) -> None:
    name, calls = row.name, row.calls.values()
    assert core.table.rows[name] is row
    assert row.state is not State.GONE, name
    assert (row in row.pool.rows) == (row.state is not State.LEAVING), (name, row.state)
    assert row in core.table.on_node[row.node], (name, row.node)
    assert abs(row.load - sum(each.load for each in calls)) < 1e-6, (name, row.load)
    assert row.load <= MAX_PREFETCH_LOAD + 1e-6, (name, row.load)
    assert not calls or row.is_live or row.state is State.LEAVING, (name, row.state)
    assert row.state is not State.QUARANTINED or row.deadline < math.inf, name
    assert not row.runs_alone or len(calls) == 1, name
    shelf = row.load if row.is_live else None
    assert row.shelf == shelf, (name, row.shelf, shelf)
    assert shelf is None or row in row.pool.shelves[shelf], (name, shelf)
    for number, running in row.calls.items():
        assert running.process is row, name
        assert running.request is None or running.request.running[number] is running, (name, number)
        assert row.deadline <= min(running.deadline, running.check), (name, number, row.deadline)


def _check_request(core: Core, request: Request) -> None:
    states = (
        request.entry is not None,
        bool(request.running),
        request.doubt_until is not None,
        request.unwritten is not None and not request.running,
    )
    assert sum(states) == 1, (request.call, states)
    assert len(request.running) <= 2, request.call
    assert all(core.table.rows[each.process.name] is each.process for each in request.running.values()), request.call
    assert request.askers or request.repetition is not None, request.call
    assert (request in core.canary.checks) == (request.repetition is not None), request.call
    assert (request in core._doubtful) == (request.doubt_until is not None), request.call


def _check_registers(core: Core) -> None:
    """What is known of calls and rows is known of those that there are, and of all of them."""
    assert not core.table.touched
    assert not core.queues.added
    for request in (*core._lost.values(), *core._shared.values(), *core._asked.values(), *core._doubtful, *core.canary.checks):
        assert request in core.requests, request.call
    assert {asker.id for request in core.requests for asker in request.askers} == core._asked.keys()
    assert sum(core.queues.waiting.values()) == sum(request.entry is not None for request in core.requests)
    for row in core.canary._due:
        assert row.is_live, (row.name, row.state)
    evidence = Evidence()
    for request in core.requests:
        if not request.failures:
            evidence.add(request.call)
    assert vars(evidence) == vars(core._evidence)


def _check_timers(core: Core) -> None:
    """The core wakes for each deadline."""
    entries = {(owner, when) for when, _, owner in core._timers}
    for row in core.table.rows.values():
        assert row.deadline == math.inf or row.timer <= row.deadline, (row.name, row.timer, row.deadline)
        assert row.timer == math.inf or (row, row.timer) in entries, (row.name, row.timer)
    for request in core._doubtful:
        assert (request, request.doubt_until) in entries, (request.call, request.doubt_until)


def _check_nothing_waits_for_an_idle_row(core: Core) -> None:
    queues = core.queues
    idle = [row for row in core.table.rows.values() if row.is_live and not row.calls]
    for request in core.requests if idle else ():
        if request.entry is not None and not request.runs_alone:
            able = [row for row in idle if request.call.stage in row.spec.stages and queues.may_run(row, request)]
            free = [row.name for row in able if not any(queues.alone[stage] for stage in row.spec.stages)]
            assert not free, (request.call, "waits, and these are idle:", free)
