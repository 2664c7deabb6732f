"""Queues: assignment of waiting calls to processes."""

import statistics
from itertools import count

import pytest

from benchmarks.simulated_scheduling import LAYOUTS, NAMES, Simulation
from vidgen_ray.engine.attempts import Request, Running
from vidgen_ray.engine.messages import Call
from vidgen_ray.engine.processes import MAX_PREFETCH_LOAD, State, Table, Where
from vidgen_ray.engine.queues import MAX_LORA_SKIPS, Queues
from vidgen_ray.engine.route import CHUNK_LOAD
from vidgen_ray.planner.layout import WorkerSpec


class Rows:
    """Queues with live processes that hold these stages, named by their positions."""

    def __init__(self, *stages, nodes=(), swap_groups=(), adapters_kept=2):
        self.table = Table(NAMES, adapters_kept)
        self.queues = Queues(self.table)
        self._numbers = count()
        self.all = [self.add(held, swap_groups) for held in stages]
        for row, node in zip(self.all, nodes, strict=False):
            self.table.place(row, node, 1)
        self.assign()

    def add(self, stages, swap_groups=()):
        row = self.table.add(str(len(self.table.rows)), WorkerSpec(stages, 1, 1, swap_groups))
        self.table.enter(row, State.LIVE)
        return row

    def ask(self, stage, *orders, where=None, alone=False, **fields):
        for order in orders:
            call = Call(0, order, "", (stage,), **fields)
            self.queues.add(Request(call, [call], where=where, runs_alone=alone))

    def assign(self):
        """Return row and order of each call that is assigned now."""
        sent = []

        def send(row, request):
            number = next(self._numbers)
            row.calls[number] = Running(number, request, row, request.call.load, request.call.stage)
            sent.append((int(row.name), request.call.order))

        self.queues.assign(send)
        return sent

    def finish(self, row):
        """End the first call of a row."""
        running = row.calls.pop(next(iter(row.calls)))
        self.queues.ended(row, running.load)
        return running.request.call.order

    def drain(self, row):
        while row.calls:
            self.finish(row)


def test_later_stages_go_first_then_older_shots():
    rows = Rows(NAMES)
    for stage, order in (("flux", 3), ("flux", 2), ("svd", 1), ("realesrgan", 0)):
        rows.ask(stage, order)
    done = []
    while rows.assign() or rows.all[0].calls:
        done.append(rows.finish(rows.all[0]))
    assert done == [0, 1, 2, 3]


def test_shots_are_prefetched_only_if_enough_is_queued_and_chunks_always():
    rows = Rows(("svd",), ("svd",))
    rows.ask("svd", 0, 1, 2)
    assert [order for _, order in rows.assign()] == [0, 1]
    rows.ask("svd", 3)
    assert [order for _, order in rows.assign()] == [2]
    assert sorted(row.load for row in rows.all) == [1, 2]
    rows = Rows(("realesrgan",))
    rows.ask("realesrgan", *range(20), load=CHUNK_LOAD)
    assert len(rows.assign()) == MAX_PREFETCH_LOAD / CHUNK_LOAD


# LoRAs, groups of stages and places


def test_shots_go_to_the_process_with_their_loras_until_it_crashes():
    rows = Rows(("flux",), ("flux",))
    first, second = rows.all
    rows.ask("flux", 0, adapters=("a",))
    rows.ask("flux", 1, adapters=("b",))
    assert len(rows.assign()) == 2
    for row in rows.all:
        rows.drain(row)
    of_a, of_b = (rows.all.index(next(row for row in rows.all if row.adapters == [lora])) for lora in "ab")
    rows.ask("flux", 2, adapters=("b",))
    rows.ask("flux", 3, adapters=("a",))
    assert set(rows.assign()) == {(of_a, 3), (of_b, 2)}
    rows.queues.reset(first)
    assert (first.load, first.adapters, second.load) == (0, [], 1)


def test_lora_preference_does_not_starve_a_shot():
    rows = Rows(("flux",), adapters_kept=1)
    (row,) = rows.all
    rows.table.set_adapters(row, ["a"])
    rows.ask("flux", -1, adapters=("a",))
    rows.assign()
    rows.drain(row)
    rows.ask("flux", 0, adapters=("b",))
    rows.ask("flux", *range(1, 2 * MAX_LORA_SKIPS), adapters=("a",))
    done = []
    while rows.assign() or row.calls:
        done.append(rows.finish(row))
    assert done[:MAX_LORA_SKIPS] == [*range(1, MAX_LORA_SKIPS + 1)]
    assert done[MAX_LORA_SKIPS] == 0


def test_process_swaps_groups_before_others_run_out_of_work():
    rows = Rows(("flux", "svd"), swap_groups=(("flux",), ("svd",)))
    both, _ = rows.all[0], rows.add(("svd",))
    both.group, both.turn = ("svd",), 1
    rows.ask("svd", 0)
    rows.ask("flux", 1)
    assert set(rows.assign()) == {(0, 1), (1, 0)}


def test_steps_are_fused_only_if_they_need_the_same_group_on_the_gpu():
    worker = WorkerSpec(NAMES, 1, 1, (("flux", "lora"), ("svd",)))
    assert worker.can_run("flux", "lora", "image_likeness")
    assert not worker.can_run("instantid", "flux"), "instantid may start while the group of svd is on the GPU"
    assert not worker.can_run("lora", "svd")


def test_calls_go_to_active_loras_then_inputs_then_their_node_but_load_goes_first():
    rows = Rows(*[("flux", "svd")] * 4, nodes="abbc")
    rows.table.set_adapters(rows.all[0], ["x"])
    rows.ask("flux", 0, adapters=("x",), near="1")
    rows.ask("svd", 1, 2, near="1")
    assert {order: row for row, order in rows.assign()} == {0: 0, 1: 1, 2: 2}
    rows = Rows(("svd",), ("svd",))
    rows.ask("svd", 0, 1, near="0")
    assert rows.assign() == [(0, 0), (1, 1)]


# Probation, retries and calls that must run alone


def test_process_on_probation_gets_one_call_at_a_time_and_is_chosen_last():
    rows = Rows(("svd",), ("svd",))
    probed, healthy = rows.all
    rows.table.enter(probed, State.PROBATION)
    rows.assign()
    rows.ask("svd", 0)
    assert rows.assign() == [(1, 0)]
    rows.ask("svd", 1)
    assert rows.assign() == [(0, 1)], "no healthy process can start it now"
    rows.ask("svd", 2, 3, 4, 5)
    assert rows.assign() == [(1, 2)]
    rows.finish(probed)
    assert rows.assign() == [(0, 3)]
    rows.table.enter(probed, State.LIVE)
    assert rows.assign() == [(0, 4)]
    assert healthy.load == MAX_PREFETCH_LOAD


def test_failed_call_waits_for_another_process_and_is_not_sent_back_for_its_loras():
    rows = Rows(*[("flux",)] * 3)
    sick, healthy, down = rows.all
    rows.table.set_adapters(sick, ["x"])
    rows.table.enter(down, State.STARTING)
    rows.ask("flux", 0, 1)
    rows.assign()
    rows.finish(sick)
    rows.ask("flux", 0, where=Where(frozenset([sick.name])), adapters=("x",))
    assert rows.assign() == [], "the healthy process is busy, and too little waits to prefetch"
    rows.ask("flux", 9)
    assert rows.assign() == [(0, 9)]
    rows.finish(healthy)
    assert rows.assign() == [(1, 0)]


def test_call_that_must_run_alone_gets_the_first_process_that_is_idle():
    """The others take nothing meanwhile, so it does not wait for long."""
    rows = Rows(*[("svd",)] * 3)
    rows.ask("svd", *range(100, 112))
    rows.assign()
    assert [row.load for row in rows.all] == [MAX_PREFETCH_LOAD] * 3
    rows.ask("svd", 0, alone=True)
    for row in (rows.all[0], rows.all[1], rows.all[2]):
        rows.finish(row)
        assert rows.assign() == []
    rows.finish(rows.all[1])
    assert rows.assign()[0] == (1, 0)
    assert [row.load for row in rows.all] == [MAX_PREFETCH_LOAD, 1, MAX_PREFETCH_LOAD]
    rows.ask("svd", 1)
    assert rows.assign() == []
    rows.finish(rows.all[1])
    assert rows.assign()[0] == (1, 1)


REFERENCE = {
    ("fused", 16, 12): (376.2, 180.3, 40.75, 0, 422.25),
    ("staged", 4, 3): (563.2, 161.8, 3, 0, 384),
    ("hybrid", 4, 3): (392.9, 162.8, 3, 0, 275.5),
    ("swapping", 4, 3): (393.2, 393.2, 9, 15.25, 258),
}
"""Layout, slots and LoRAs -> seconds, those of the slowest shot, LoRA loads, swaps and inputs from other nodes.

Of an assignment that compares all calls with all processes in each decision."""
ALLOWED = (1.03, 1.2, 1.15, 1.1, 1.1)


@pytest.mark.parametrize(("layout", "slots", "loras"), REFERENCE)
def test_runs_as_well_as_an_assignment_that_compares_everything(layout, slots, loras):
    results = [Simulation(LAYOUTS[layout](slots), 12 * slots, loras=loras, seed=seed).run() for seed in range(4)]
    assert all(len(result.latency_s) == 12 * slots for result in results)
    figures = ((r.makespan_s, max(r.latency_s), r.lora_loads, r.swaps, r.remote_inputs) for r in results)
    means = map(statistics.mean, zip(*figures, strict=True))
    for mean, reference, allowed in zip(means, REFERENCE[layout, slots, loras], ALLOWED, strict=True):
        assert mean <= allowed * reference
