"""Invariants of an engine's core: they hold after each event."""

from __future__ import annotations

import math

from vidgen_ray.engine.core import Core
from vidgen_ray.engine.processes import MAX_PREFETCH_LOAD, State


def check_invariants(core: Core) -> None:
    """Raise AssertionError unless the state is one that an event must leave. Looks at all rows and calls."""
    table, queues = core.table, core.queues
    for name, row in table.rows.items():
        assert row.name == name
        assert row.state is not State.GONE, name
        assert (row in row.pool.rows) == (row.state is not State.LEAVING), (name, row.state)
        assert row in table.on_node[row.node], (name, row.node)
        assert abs(row.load - sum(each.load for each in row.calls.values())) < 1e-6, (name, row.load)
        assert row.load <= MAX_PREFETCH_LOAD + 1e-6, (name, row.load)
        assert not row.calls or row.is_live or row.state is State.LEAVING, (name, row.state)
        assert row.state is not State.QUARANTINED or row.deadline < math.inf, name
        assert row.deadline == math.inf or row.timer <= row.deadline, (name, row.timer, row.deadline)
        assert not row.runs_alone or len(row.calls) == 1, name
        shelf = row.load if row.is_live else None
        assert row.shelf == shelf, (name, row.shelf, shelf)
        assert shelf is None or row in row.pool.shelves[shelf], (name, shelf)
        for number, running in row.calls.items():
            assert running.process is row, name
            assert running.request is None or running.request.running[number] is running, (name, number)
    for pool in table.pools.values():
        assert pool.live == sum(row.is_live for row in pool.rows) == sum(map(len, pool.shelves.values())), pool.spec
    assert not table.touched
    assert not queues.added
    for request in core.requests:
        states = (
            request.entry is not None,
            bool(request.running),
            request.doubt_until is not None,
            request.unwritten is not None and not request.running,
        )
        assert sum(states) == 1, (request.call, states)
        assert len(request.running) <= 2, request.call
        assert all(table.rows[each.process.name] is each.process for each in request.running.values()), request.call
        assert request.askers or request.repetition is not None, request.call
        assert (request in core.canary.checks) == (request.repetition is not None), request.call
    idle = [row for row in table.rows.values() if row.is_live and not row.calls]
    for request in core.requests if idle else ():
        if request.entry is not None and not request.runs_alone:
            able = [row for row in idle if request.call.stage in row.spec.stages and queues.may_run(row, request)]
            free = [row.name for row in able if not any(queues.alone[stage] for stage in row.spec.stages)]
            assert not free, (request.call, "waits, and these are idle:", free)
    assert sum(queues.waiting.values()) == sum(request.entry is not None for request in core.requests)
