"""Core of an engine with simulated processes: retries, quarantine, verdicts, timeouts, copies, loads, servers and checks."""

import math
from dataclasses import replace
from itertools import count, pairwise, repeat

import numpy as np
import pytest

from benchmarks import core_events
from tests.engine.farm import CALL_S, FLUX, SILENT_S, START_S, Farm, Proc, instructions
from vidgen_ray.engine import messages as m
from vidgen_ray.engine.attempts import RECENT_CALLS, Durations
from vidgen_ray.engine.canary import MAX_BLOCK_DIFFERENCE
from vidgen_ray.engine.core import Core
from vidgen_ray.engine.messages import OUTPUT, Call, Result, StepTime
from vidgen_ray.engine.processes import CoreLimits
from vidgen_ray.engine.supervision import NODE_LOST
from vidgen_ray.engine.worker import difference
from vidgen_ray.planner.layout import WorkerSpec

LIMITS = CoreLimits()
FACE, SVD, BOTH = WorkerSpec(("instantid",), 1, 1), WorkerSpec(("svd",), 1, 1), WorkerSpec(("flux", "svd"), 1, 1)
ENCODER = WorkerSpec((OUTPUT,), 1, 0)
ONE_NODE, TWO_NODES, ALONE = ("n1", "n1", "n1"), ("n1", "n1", "n2"), ("n1",)


def outcomes(*faults, first=0):
    """Return a fault for processes that share it: how their calls end, one after another, then with successes.

    `first`: order of the first shot that it counts for.
    """
    left = iter(faults)
    return lambda call: next(left, "") if call.order >= first else ""


def of_shot(order, fault):
    return lambda call: fault if call.order == order else ""


def ready(*processes, **options):
    """Return a farm whose processes have loaded."""
    farm = Farm(*processes, **options)
    farm.run(until=5)
    return farm


def render(farm, orders):
    """Ask for a call of each shot at once. Return the processes that have made the results, `None` for failures."""
    calls = [farm.ask(order) for order in orders]
    farm.run()
    return [farm.by(call) for call in calls]


# Where the next attempt runs, and what it means


@pytest.mark.parametrize(
    ("nodes", "faults", "tried", "blamed"),
    [
        pytest.param(ONE_NODE, ["error", ""], "ab", "a", id="an error is retried on another worker"),
        pytest.param(ONE_NODE, ["error"] * 3, "abc", "", id="an error of three workers is that of the shot"),
        pytest.param(ONE_NODE, ["error", "error", ""], "abc", "ab", id="unless a third worker renders the shot"),
        pytest.param(ALONE, ["error"] * 3, "aaa", "a", id="an error that one worker repeats is its own"),
        pytest.param(("n1", "n1", "n1", "n2"), ["error"] * 4, "abdc", "", id="errors on one node are confirmed on another"),
        pytest.param(TWO_NODES, ["refused"] * 2, "ac", "", id="a refusal is confirmed on another node"),
        pytest.param(TWO_NODES, ["refused", ""], "ac", "a", id="a refusal that another node does not have counts"),
        pytest.param(ONE_NODE, ["refused"] * 2, "ab", "", id="without another node, another worker confirms a refusal"),
        pytest.param(ALONE, ["refused"], "a", "", id="without another worker, a refusal is final"),
        pytest.param(ONE_NODE, ["unwritten", ""], "ab", "a", id="a failed write is an error if the storage is not the cause"),
        pytest.param(ONE_NODE, ["wrong", ""], "ab", "a", id="a result of another shot is an error"),
        pytest.param(ONE_NODE, ["too large"] * 2, "ab", "", id="too little memory is confirmed once"),
        pytest.param(ALONE, ["too large"], "a", "", id="without another worker, too little memory is final"),
        pytest.param(ONE_NODE, ["foreign"], "a", "", id="lost inputs are the matter of the caller"),
        pytest.param(ALONE, ["unloaded", ""], "aa", "", id="a process without weights loads them again"),
    ],
)
def test_next_attempt_and_cause(nodes, faults, tried, blamed):
    fault = outcomes(*faults)
    farm = ready(*(Proc(name, node, fault=fault) for name, node in zip("abcd", nodes, strict=False)))
    (by,) = render(farm, [1])
    assert "".join(farm.sent[1]) == tried
    assert by == (None if faults[-1] else tried[-1])
    assert by or farm.failure(1).attempts == len(faults)
    rows = farm.core.table.rows.values()
    assert {row.name for row in rows if any(not each.is_forgiven for each in row.failures)} == set(blamed)
    assert farm.quarantined == []
    assert not any(process.kills for process in farm.procs.values())


@pytest.mark.parametrize("fault", ["unloaded", "broken"])
def test_process_without_weights_or_with_a_broken_context_is_replaced_and_only_the_second_costs_an_attempt(fault):
    farm = ready(Proc("a", fault=outcomes(fault)), Proc("b", seconds=300))
    farm.ask(2, near="b")
    assert render(farm, [1]) == ["a" if fault == "unloaded" else "b"]
    assert len(farm.commands(m.Start)) == 3
    assert farm.procs["a"].kills == (fault == "broken")


def test_one_node_cannot_make_an_error_final():
    """Although other shots show that its processes are well."""
    farm = ready(Proc("a"), Proc("b"), Proc("c", "n2", load_s=60), flaws={0: "error"}, attempts=2)
    assert render(farm, range(30)).count(None) == 1
    assert farm.sent[0] == ["a", "b", "c"]


def test_shot_that_runs_out_of_memory_is_retried_on_a_larger_gpu():
    small, large = (WorkerSpec(("flux",), 1, 1, gpu_gb=gb) for gb in (24, 80))
    farm = ready(Proc("a", spec=small, fault="too large"), Proc("b", spec=small), Proc("c", spec=large))
    assert (render(farm, [1]), farm.sent[1]) == (["c"], ["a", "c"])


@pytest.mark.parametrize("kind", ["storage", "disk full", "node"])
def test_attempt_that_the_shot_has_not_caused_does_not_count(kind):
    spec = ENCODER if kind == "storage" else FLUX
    farm = ready(Proc("a", spec=spec, fault=outcomes(kind.replace("storage", ""))), Proc("b", spec=spec, load_s=30), attempts=1)
    farm.storage_down_until = 0 if kind == "node" else 100
    call = farm.ask(1, *spec.stages)
    farm.run()
    assert farm.by(call) is not None
    assert farm.ended_at[call] > farm.storage_down_until
    assert farm.quarantined == (["a"] if kind == "node" else [])


def test_crash_with_several_calls_runs_each_alone_and_fails_only_its_cause():
    """They do not wait for long: other processes take no more calls until one is idle. Those that crash start slowly."""
    farm = Farm(*(Proc(name, loads=iter(["", "hang"])) for name in "abc"), flaws={3: "crash"}, attempts=1)
    assert [order for order, by in enumerate(render(farm, range(60))) if by is None] == [3]
    assert farm.failure(4).error == "WorkerDied"
    (suspects,) = (event.suspects for _, event, _ in farm.log if isinstance(event, m.Died) and len(event.suspects) > 1)
    calls = [send.call.id for _, send in farm.commands(m.Send) if send.number in suspects]
    assert max(when for when, send in farm.commands(m.Send) if send.call.id in calls) < 6 * CALL_S
    assert not any("different shots" in report.reason for _, report in farm.commands(m.Report))


# Quarantine


def test_three_failures_in_a_row_quarantine_a_process_and_count_against_no_shot():
    """Three of four fail at once with the same error: more than a shot has attempts."""
    farm = Farm(*(Proc(name, fault="error", seconds=0.1) for name in "abc"), Proc("sound"))
    assert set(render(farm, range(6))) == {"sound"}
    assert set(farm.quarantined) == {"a", "b", "c"}


def test_failures_of_one_shot_those_before_a_success_and_refusals_do_not_quarantine():
    farm = Farm(Proc("a", fault=outcomes(*["error", "error", ""] * 4)), attempts=9)
    assert ([render(farm, [order]) for order in range(4)], farm.quarantined) == ([["a"]] * 4, [])
    farm = Farm(Proc("a"), Proc("b"), flaws=dict.fromkeys(range(12), "refused"))
    assert (set(render(farm, range(12))), farm.quarantined) == ({None}, [])


@pytest.mark.parametrize(
    ("calls", "is_quarantined"),
    [
        ([(1, "photo"), (2, "photo"), (3, "photo")], False),
        ([(1, "photo"), (1, "image"), (1, "clip")], False),
        ([(1, "photo"), (2, "photo"), (2, "image"), (3, "image")], False),
        ([(1, "photo"), (2, "image"), (3, "clip")], True),
        ([(1, ""), (2, ""), (3, "")], True),
    ],
)
def test_failures_of_a_call_that_shots_share_are_those_of_one_shot(calls, is_quarantined):
    """When it has failed for one of them, it runs again for the others."""
    farm = ready(Proc("a", fault="error", seconds=1), Proc("b", load_s=100), attempts=1)
    for order, key in calls:
        farm.ask(order, keys=(key,), is_shared=bool(key))
    farm.run(until=90)
    assert bool(farm.quarantined) == is_quarantined


def test_finished_call_of_the_same_shot_shows_nothing():
    farm = ready(Proc("a", fault=outcomes("error", "", "error", "error")), Proc("b", load_s=100), attempts=1)
    assert None not in render(farm, [1, 1, 2, 3])
    assert farm.quarantined == ["a"]


def test_finished_call_of_another_shot_counts_failures_against_their_shots():
    """They have waited for what it shows."""
    farm = Farm(Proc("a", fault=outcomes("error", "error")), Proc("b", load_s=250), attempts=1)
    assert render(farm, range(3)) == [None, None, "a"]
    assert farm.ended_at[1] == farm.ended_at[2] == farm.ended_at[3]
    assert farm.quarantined == []


def test_one_failure_after_a_quarantine_is_enough_until_the_process_is_given_up():
    farm = Farm(Proc("a", fault="error"), Proc("b", seconds=1))
    assert set(render(farm, range(400))) == {"b"}
    assert farm.quarantined == ["a"] * LIMITS.max_quarantines
    # The call behind the one that fails was sent, too.
    assert sum(names.count("a") for names in farm.sent.values()) <= LIMITS.failures + 2 * LIMITS.max_quarantines
    kills, starts = ([when for when, each in farm.commands(kind) if each.process == "a"] for kind in (m.Kill, m.Start))
    assert [start - kill for kill, start in zip(kills, starts[1:], strict=False)] == [LIMITS.restart_s] * 2
    assert (list(farm.core.table.rows), list(farm.core.given_up)) == (["b"], ["a"])


def test_shot_fails_on_one_process_a_limited_number_of_times_although_it_is_found_sick_each_time():
    limits = replace(LIMITS, max_quarantines=99)
    farm = Farm(Proc("a", fault="node"), limits=limits)
    assert render(farm, [1]) == [None]
    assert (farm.sent[1], farm.quarantined) == (["a"] * limits.max_failures, ["a"] * limits.max_failures)


@pytest.mark.parametrize("circuit_breaker", [True, False])
def test_last_process_is_given_up_unless_a_circuit_breaker_stops_the_run(circuit_breaker):
    farm = Farm(Proc("a", fault=lambda call: "error" if call.order < 30 else ""), circuit_breaker=circuit_breaker)
    assert render(farm, range(40))[30:] == ["a" if circuit_breaker else None] * 10
    if not circuit_breaker:
        assert farm.core.fatal_failure.error == "Quarantined"
        assert farm.failure(40) == farm.core.fatal_failure


def test_process_that_is_given_up_by_a_result_of_another_one_fails_no_finished_call():
    """The other one does not hold all its stages, so the engine is lost."""
    farm = Farm(Proc("a", spec=BOTH, fault="refused", seconds=1), Proc("b"))
    while farm.core.fatal_failure is None:
        farm.ask(len(farm.calls))
        farm.run(until=farm.now + CALL_S / 2)
    farm.run()
    assert {farm.by(call) for call in farm.calls} <= {"b", None}


def test_nodes_that_cannot_store_results_fail_no_shot_while_another_can():
    """One failure quarantines. A process that is given up is killed, too, so that its GPU has free memory."""
    farm = Farm(*(Proc(name, fault="node", seconds=0.1) for name in "abcdef"), Proc("sound"))
    assert set(render(farm, range(6))) == {"sound"}
    farm = Farm(*(Proc(name, fault="node", seconds=0.1) for name in "ab"))
    assert set(render(farm, range(6))) == {None}
    assert {process.kills for process in farm.procs.values()} == {LIMITS.max_quarantines}
    assert all("node" in ended.failure.message for ended in farm.ended.values())


def test_refusals_before_a_success_do_not_quarantine_if_others_finish_the_calls_later():
    refuses = Proc("a", seconds=1, fault=lambda call: "refused" if call.order < 3 else "")
    farm = ready(refuses, *(Proc(name, "n2", load_s=30, seconds=40) for name in "bcd"))
    calls = [farm.ask(order) for order in range(3)]
    farm.run(until=50)
    farm.ask(9, near="a")
    farm.run()
    assert (sorted(map(farm.by, calls)), farm.sent[9], farm.quarantined) == (["b", "c", "d"], ["a"], [])


# Verdicts


@pytest.mark.parametrize(("attempts", "most"), [(3, 6), (1, 1)])
def test_shot_has_more_attempts_while_nothing_shows_whether_the_processes_are_sick(attempts, most):
    farm = ready(*(Proc(name) for name in "abcdefgh"), flaws={1: "error"}, attempts=attempts)
    assert render(farm, [1]) == [None]
    assert len(set(farm.sent[1])) == len(farm.sent[1]) == farm.failure(1).attempts == most


def test_bad_lines_at_the_end_of_a_script_are_tried_side_by_side():
    """The further attempts of one are no evidence for another one."""
    farm = ready(*(Proc(name) for name in "abcdefghijkl"), flaws=dict.fromkeys(range(12, 18), "error"))
    assert [order for order, by in enumerate(render(farm, range(18))) if by is None] == list(range(12, 18))
    assert {len(farm.sent[order]) for order in range(12, 18)} == {6}
    assert farm.now - max(farm.ended_at[call] for call in farm.calls if farm.by(call)) < 7 * CALL_S


def test_event_costs_the_same_with_any_number_of_bad_lines(monkeypatch):
    def cost(processes):
        costs = []

        class CountingCore(Core):
            def handle(self, event, now):
                commands = []
                # The function is traced in each 16th event, because it is slow then.
                handle = lambda: commands.extend(super(CountingCore, self).handle(event, now))  # noqa: E731
                handle() if next(numbers) % 16 else costs.append(instructions(handle))
                return commands

        numbers, shots = count(), 6 * processes
        monkeypatch.setattr(core_events, "Core", CountingCore)
        core_events.Run(processes, shots, bad=core_events.spread(shots, 12)).run()
        return sum(costs) / len(costs)

    assert cost(80) < 1.25 * cost(8)


def test_errors_of_a_process_that_is_quarantined_later_do_not_count():
    farm = ready(Proc("a", fault="error", seconds=1), Proc("b", load_s=20), attempts=1)
    assert render(farm, range(3)) == ["b"] * 3


def test_failures_of_a_process_that_is_gone_count_against_neither_its_successor_nor_their_shots():
    """It refuses three shots, which another one renders later, or is quarantined while the storage is checked."""
    farm = ready(Proc("a", fault=outcomes(*["refused"] * 3), seconds=1), Proc("b"))
    farm.after(3.5, lambda: farm.crash("a", node="n2"))
    assert render(farm, range(6)).count("b") >= 3
    assert farm.quarantined == []
    farm = ready(Proc("a", spec=ENCODER, fault=outcomes("unwritten", "node")), attempts=1)
    calls = [farm.ask(order, OUTPUT) for order in (1, 2)]
    farm.run()
    assert ([farm.by(call) for call in calls], farm.quarantined) == (["a", "a"], ["a"])
    farm = ready(Proc("a", fault=outcomes(*["error"] * 3)), Proc("b", load_s=100))
    for order in (1, 2):
        farm.ask(order)
    farm.run(until=25)
    farm.crash("a", node="n2")
    farm.run(until=30)
    farm.ask(3, near="a")
    farm.run()
    assert ("a" in farm.sent[3], farm.quarantined) == (True, [])


def test_retry_waits_for_no_younger_call_and_for_no_process_that_starts():
    """The other process always has a call that it has prefetched."""
    farm = Farm(Proc("a", fault=outcomes("error")), Proc("b"), Proc("late", load_s=280))
    assert render(farm, range(60)).count("b") > 20
    (retried,) = (order for order, names in farm.sent.items() if len(names) > 1)
    assert farm.sent[retried] == ["a", "b"]
    assert farm.ended_at[retried + 1] < 6 * CALL_S


# Processes that are lost, hang or do not respond


@pytest.mark.parametrize("is_lost", [True, False])
def test_lost_node_or_connection_costs_no_attempt(is_lost):
    """The next process is on another node, or is the same one."""
    farm = Farm(Proc("a"), attempts=1)
    call = farm.ask(1)
    for number in range(5):
        farm.run(until=5 * number + 4)
        farm.crash("a", f"n{number + 2}" if is_lost else None, same_process=not is_lost)
    farm.run()
    assert (farm.by(call), farm.quarantined) == ("a", [])


def test_timeout_follows_from_the_expected_seconds_and_kills_the_process():
    farm = Farm(Proc("a", fault=of_shot(9, "hang"), seconds=100), attempts=1)
    render(farm, [1])
    begun = farm.now
    assert render(farm, [9, 10]) == [None, "a"]
    assert farm.failure(2).error == "TimedOut"
    assert [when for when, _ in farm.commands(m.Kill)] == [begun + LIMITS.factor * 100]


def test_process_that_does_not_respond_is_killed_and_its_running_call_is_the_cause():
    farm = ready(Proc("a"), Proc("b", load_s=250), attempts=1)
    farm.after(1, lambda: farm.freeze("a"))
    assert render(farm, [1, 2]) == [None, "a"]
    assert farm.failure(1).message == "the process has not responded for 60 s"
    assert (farm.procs["a"].kills, farm.quarantined) == (1, ["a"])


def test_calls_of_a_process_that_does_not_respond_run_again_alone():
    """Any of those that it ran may be the cause. None is charged with an attempt for the others."""
    farm = ready(server("job", 3, seconds=100), attempts=1)
    calls = [farm.ask(order, "svd", load=1 / 4) for order in range(4)]
    farm.after(1, lambda: farm.freeze("job"))
    farm.run()
    assert {farm.by(call) for call in calls} == {"job"}
    repeated = [when for when, send in farm.commands(m.Send) if when > SILENT_S and send.call.order < 3]
    assert [later - when for when, later in pairwise(repeated)] == [100, 100]


@pytest.mark.parametrize("stop", [Farm.stop_driver, Farm.suspend])
def test_driver_that_was_suspended_alone_or_with_all_processes_kills_nothing(stop):
    """Timers end before it has read the results that came meanwhile."""
    farm = ready(Proc("a", seconds=590), Proc("b", load_s=290), Proc("encoder", spec=ENCODER, seconds=590), attempts=1)
    for when in (1, 400):
        farm.after(when, lambda: stop(farm, 5000))
    calls = [farm.ask(1), farm.ask(2, OUTPUT, timeout_s=600)]
    farm.run()
    assert [farm.by(call) for call in calls] == ["a", "encoder"]
    assert [process.kills for process in farm.procs.values()] == [0, 0, 0]
    assert farm.core.table.rows["b"].is_live


@pytest.mark.parametrize("suspended_s", [0, 5000])
@pytest.mark.parametrize("is_bad", [False, True])
def test_shot_waits_for_evidence_until_the_last_call_of_another_shot_has_ended_or_failed(suspended_s, is_bad):
    flaws = {1: "error", 2: "error" if is_bad else ""}
    farm = ready(*(Proc(name, seconds=3) for name in "abc"), Proc("long", seconds=300), flaws=flaws, attempts=2)
    farm.ask(2, near="long")
    farm.after(10, lambda: farm.suspend(suspended_s))
    assert render(farm, [1]) == [None]
    (long,) = (send.number for _, send in farm.commands(m.Send) if send.process == "long" and send.call.order == 2)
    (ended,) = (when for when, each in farm.commands(m.Ended) if each.number == long)
    _, _, third, *_ = (when for when, send in farm.commands(m.Send) if send.call.order == 1)
    assert third == pytest.approx(ended, abs=1)


def test_shot_fails_as_soon_as_its_processes_have_finished_calls_of_others_though_more_evidence_may_come():
    farm = ready(
        *(Proc(name, seconds=3) for name in "ab"), *(Proc(name, seconds=300) for name in "cd"), flaws={1: "error"}, attempts=2
    )
    long = [farm.ask(order, near=name, costs=(100.0,)) for order, name in ((2, "c"), (3, "d"))]
    bad = farm.ask(1)
    farm.run(until=20)
    for order in (4, 5):
        farm.ask(order)
    farm.run(until=100)
    assert (farm.by(bad), farm.open) == (None, {*long})


def test_suspended_call_is_neither_copied_nor_taken_for_late_before_its_result_was_read():
    farm = Farm(Proc("a", seconds=12), Proc("b", seconds=12))
    render(farm, range(5))
    farm.ask(5)
    farm.after(2, lambda: farm.suspend(5000))
    farm.run()
    assert len(farm.sent[5]) == 1
    farm = ready(Proc("a", fault="hang"))
    farm.ask(1)
    ((running,),) = (row.calls.values() for row in farm.core.table.rows.values())
    farm.after(LIMITS.floor_s - 1, lambda: farm.ask(2))
    farm.after(LIMITS.floor_s - 0.5, lambda: farm.stop_driver(1000))
    running.deadline = farm.core.now + LIMITS.floor_s
    farm.run(until=farm.now + LIMITS.floor_s + 1000)
    assert running.deadline >= farm.now + LIMITS.late_s - 1


@pytest.mark.parametrize(("fault", "kills"), [("slow", 0), ("hang", 1)])
def test_slow_call_runs_on_an_idle_process_too(fault, kills):
    """It stops at its next step. Otherwise its process is killed."""
    fault = outcomes(fault, first=5)
    farm = Farm(*(Proc(name, fault=fault) for name in "abc"))
    render(farm, range(5))
    begun = farm.now
    (by,) = render(farm, [5])
    slow, copy = farm.sent[5]
    assert by == copy != slow
    assert farm.now - begun <= 2 * LIMITS.min_slow_s + CALL_S
    farm.run(until=farm.now + LIMITS.cancel_s + 30)
    assert (farm.procs[slow].kills, farm.core.table.rows[slow].load) == (kills, 0)


def test_copy_of_a_call_that_hangs_is_not_copied():
    """Also not when the first process was killed."""
    farm = Farm(Proc("a"), *(Proc(name, load_s=100) for name in "bcd"), flaws={5: "hang"})
    render(farm, range(5))
    farm.ask(5)
    farm.run(until=farm.now + LIMITS.floor_s + 30)
    assert (len(farm.sent[5]), len(farm.commands(m.Kill))) == (2, 1)


def test_slow_call_whose_process_is_lost_does_not_run_a_third_time():
    fault = outcomes("slow", first=5)
    farm = Farm(*(Proc(name, fault=fault) for name in "abc"))
    render(farm, range(5))
    farm.ask(5)
    while len(farm.sent[5]) < 2:
        farm.run(until=farm.now + 1)
    name = farm.sent[5][0]
    farm.tell(m.Died(name, farm.procs[name].life, (), "its connection is lost"))
    farm.run()
    assert len(farm.sent[5]) == 2


def test_next_attempt_of_a_call_that_was_copied_is_copied_too():
    fault = outcomes("hang", "error", "slow", first=5)
    farm = Farm(*(Proc(name, fault=fault) for name in "abcd"))
    render(farm, range(5))
    begun = farm.now
    (by,) = render(farm, [5])
    assert len(farm.sent[5]) == 4
    assert by == farm.sent[5][-1]
    assert farm.now < begun + LIMITS.floor_s + 10 * CALL_S


def test_calls_behind_a_long_one_go_to_an_idle_process():
    farm = Farm(Proc("a", seconds=500), Proc("b", seconds=500, load_s=100))
    assert render(farm, range(2)) == ["a", "b"]
    assert farm.sent[1] == ["a", "b"]
    assert farm.now < 650


@pytest.mark.parametrize(("fault", "seconds", "kills"), [("", 1, 0), ("hang", LIMITS.cancel_s, 1)])
def test_cancelled_call_frees_its_process(fault, seconds, kills):
    farm = ready(Proc("a", fault=of_shot(1, fault), seconds=200))
    cancelled = farm.ask(1)
    farm.after(5, lambda: farm.withdraw(cancelled))
    assert render(farm, [2]) == ["a"]
    assert farm.now == pytest.approx(10 + seconds + 200, abs=3)
    assert farm.procs["a"].kills == kills


def test_result_that_comes_late_is_accepted_but_not_that_of_another_shot():
    farm = Farm(Proc("a"))
    call = farm.ask(1)
    farm.run(until=5)
    ((_, send),) = farm.commands(m.Send)
    farm.crash("a")
    farm.run(until=5.5)
    for key in ("of another shot", "1 flux"):
        assert call in farm.open
        farm.tell(m.Returned("a", send.life, send.number, Result((StepTime("flux", key, 8.0),))))
    assert farm.by(call) == "a"
    farm.run(until=100)
    assert farm.sent[1] == ["a"]


# Calls with the same keys


def test_shared_call_is_computed_once_and_fails_only_the_first_asker():
    fields = {"keys": ("photo",), "is_shared": True}
    farm = Farm(Proc("a", spec=FACE))
    calls = [farm.ask(order, "instantid", **fields) for order in (3, 1, 2)]
    farm.run()
    assert [(farm.by(call), farm.ended[call].is_first) for call in calls] == [("a", True), ("a", False), ("a", False)]
    assert farm.sent == {1: ["a"]}, "the age of the oldest shot counts"
    farm = Farm(Proc("a", spec=FACE, fault=outcomes(*["error"] * 3)))
    calls = [farm.ask(order, "instantid", **fields) for order in (1, 3, 2, 4)]
    farm.withdraw(calls[3])
    farm.run()
    assert [farm.by(call) for call in calls[:3]] == [None, "a", "a"]
    assert list(farm.sent) == [1, 2], "the age of the oldest of the others counts"
    fields["is_prefetched"] = False
    before = farm.ask(4, "instantid", keys=("another",))
    first, *others = (farm.ask(order, "instantid", **fields) for order in (5, 7, 6))
    farm.withdraw(first)
    farm.run()
    assert [farm.by(call) for call in (before, *others)] == ["a"] * 3
    assert list(farm.sent)[2:] == [4, 6]


def test_shared_call_whose_first_asker_is_withdrawn_while_the_storage_is_down_runs_for_the_others():
    farm = ready(server("job", fault=outcomes("disk full")))
    farm.storage_down_until = 100
    first, second = (farm.ask(order, "svd", keys=("clip",), costs=(), is_shared=True) for order in (1, 2))
    farm.run(until=50)
    farm.withdraw(first)
    farm.run()
    assert (farm.by(second), farm.ended_at[second] > 100) == ("job", True)


# Loads, and processes that come and go


@pytest.mark.parametrize("load", ["RuntimeError", "hang"])
def test_process_that_cannot_load_three_times_is_given_up(load):
    farm = Farm(Proc("a", loads=repeat(load)), Proc("b", loads=iter([load] * 2)))
    assert render(farm, [1]) == ["b"]
    farm.run(until=2000)
    assert (list(farm.core.given_up), farm.core.fatal_failure) == (["a"], None)
    assert [each.process for _, each in farm.commands(m.Start)].count("a") == LIMITS.load_attempts


def test_failed_loads_before_a_success_do_not_count():
    farm = ready(Proc("a", loads=iter(["RuntimeError"] * 2 + ["", "RuntimeError"])))
    farm.run(until=20)
    farm.crash("a")
    assert (render(farm, [1]), farm.core.given_up) == (["a"], {})


def test_setup_error_of_the_first_load_is_fatal_and_fails_the_calls_that_wait():
    farm = Farm(Proc("a", loads=iter(["MissingWeights"])))
    assert (render(farm, range(3)), render(farm, [4])) == ([None] * 3, [None])
    assert {ended.failure.error for ended in farm.ended.values()} == {"MissingWeights"}
    farm = ready(Proc("a", loads=iter(["", "MissingWeights"])))
    farm.crash("a")
    assert render(farm, [1]) == ["a"], "it could load before"


def test_lost_stage_is_fatal_until_all_stages_are_held_again():
    farm = ready(Proc("a"), Proc("b", spec=SVD), needed=("flux", "svd"))
    calls = [farm.ask(order) for order in range(2)]
    farm.tell(m.Removed("a"))
    assert {farm.failure(call).stage for call in calls} == {NODE_LOST}
    farm.tell(m.Removed("b"))
    farm.add(Proc("c"))
    assert farm.core.fatal_failure is not None
    farm.add(Proc("d", spec=SVD))
    assert farm.core.fatal_failure is None
    assert render(farm, [3]) == ["c"]


def test_released_process_ends_its_calls_and_leaves_no_row():
    farm = ready(Proc("leaves"), Proc("stays"))
    farm.after(1, lambda: farm.tell(m.Removed("leaves", released=True)))
    farm.after(2, lambda: farm.ask(9))
    assert set(render(farm, range(4))) == {"leaves", "stays"}
    table = farm.core.table
    assert (list(table.rows), [row.name for rows in table.on_node.values() for row in rows]) == (["stays"], ["stays"])
    assert (farm.core.given_up, farm.procs["leaves"].kills, farm.sent[9]) == ({}, 0, ["stays"])


@pytest.mark.parametrize("ends", ["result", "withdrawn"])
def test_released_process_ends_its_calls_also_if_all_others_are_lost_meanwhile(ends):
    spec = FLUX if ends == "result" else ENCODER
    farm = ready(Proc("leaves", spec=spec), Proc("lost", spec=spec))
    call, waits = (farm.ask(1, *spec.stages, near="leaves"), farm.ask(2, *spec.stages, near="lost"))
    farm.tell(m.Removed("leaves", released=True))
    farm.tell(m.Removed("lost"))
    assert farm.failure(waits).stage == NODE_LOST
    if ends == "withdrawn":
        farm.withdraw(call)
    farm.run()
    assert ends == "withdrawn" or farm.by(call) == "leaves"
    assert farm.core.table.rows == {}


def test_retry_does_not_wait_for_a_process_that_takes_no_more_calls():
    farm = ready(Proc("a", fault=outcomes("error", first=1)), Proc("leaves", seconds=300))
    farm.ask(0, costs=(100.0,), near="leaves")
    farm.tell(m.Removed("leaves", released=True))
    retried = farm.ask(1)
    farm.run()
    assert (farm.by(retried), farm.ended_at[retried] < 5 * CALL_S) == ("a", True)


def test_retry_runs_where_it_has_failed_once_the_only_other_process_has_left():
    farm = ready(*(Proc(name, fault=of_shot(1, "error"), seconds=1) for name in "ab"), Proc("leaves", seconds=300))
    farm.ask(2, near="leaves")
    farm.ask(1)
    farm.run(until=20)
    farm.tell(m.Removed("leaves"))
    assert farm.sent[1] == ["a", "b", "a"]


def test_retry_runs_where_it_has_failed_once_the_only_other_process_has_started_on_the_same_node():
    farm = ready(Proc("a", fault="error"), Proc("b", fault="error"))
    # It starts shortly before the second error.
    farm.after(2 * CALL_S - START_S / 2, lambda: farm.add(Proc("c", load_s=100)))
    farm.ask(1)
    farm.run(until=50)
    assert farm.sent[1][:3] == ["a", "b", "a"]


def test_processes_take_more_calls_as_soon_as_the_last_call_that_must_run_alone_has_begun():
    """Two calls run alone, because their process crashed. Another process works on a chunk."""
    farm = ready(Proc("a"), Proc("b", seconds=100))
    farm.ask(0, near="b", load=1 / 4)
    alone = [farm.ask(order, near="a", near_load=1.0, load=1 / 2) for order in (1, 2)]
    farm.after(1, lambda: farm.crash("a"))
    farm.after(2, lambda: farm.ask(3, load=1 / 4))
    farm.run(until=50)
    sends = [(send.call.order, send.process, when) for when, send in farm.commands(m.Send)]
    (began,) = (when for order, process, when in sends if process == "b" and order == 3)
    assert began == max(when for order, _, when in sends if order in (1, 2))
    assert [farm.by(call) for call in alone] == ["a", "a"]


# Servers and encoders


def server(name, parallel=1, **fields):
    return Proc(name, spec=WorkerSpec(("svd",), 1, 0, server=name, parallel=parallel), **fields)


def test_servers_are_filled_by_free_places_and_hold_no_calls_that_wait():
    farm = ready(server("one", 3), server("two", 3))
    for order in range(10):
        farm.ask(order, "svd", load=1 / 3, costs=())
    assert [len(row.calls) for row in farm.core.table.rows.values()] == [3, 3]
    farm.run()
    assert farm.now == 5 + 2 * CALL_S


def test_servers_that_fail_are_restarted_alone_and_slow_ones_get_no_copy():
    bad = {"fault": "error", "seconds": 0.1}
    farm = Farm(server("good"), server("slow", seconds=300), server("liar", **bad), server("down", **bad))
    for order in range(30):
        farm.ask(order, "svd", costs=())
    farm.run()
    assert {farm.by(call) for call in farm.calls} == {"good", "slow"}
    assert [bool(process.kills) for process in farm.procs.values()] == [False, False, True, True]


def test_encoder_whose_write_hangs_is_killed_but_not_while_its_session_waits():
    farm = Farm(Proc("encoder", spec=ENCODER, fault=outcomes("hang")))
    call = farm.ask(1, OUTPUT, timeout_s=300)
    farm.run(until=100)
    ((_, send),) = farm.commands(m.Send)
    farm.tell(m.Progressed("encoder", send.life, send.number, waits=True))
    farm.run(until=2000)
    assert farm.procs["encoder"].kills == 0
    farm.tell(m.Progressed("encoder", send.life, send.number))
    farm.run()
    assert (farm.procs["encoder"].kills, farm.by(call), farm.now) == (1, "encoder", pytest.approx(2300, abs=20))
    assert len(farm.commands(m.CheckStorage)) == 1, "the storage may hang"


# Checks of workers

CHECKS = CoreLimits(first_checked_call=8, checked_calls=50)


def checked(*processes, shots, limits=CHECKS):
    """Return a farm that has rendered shots, always with two for each process."""
    farm, left = Farm(*processes, limits=limits), iter(range(shots))

    def ask():
        if (order := next(left, None)) is not None:
            farm.then[farm.ask(order, is_checked=True)] = ask

    for _ in range(2 * len(processes)):
        ask()
    farm.run()
    return farm


@pytest.mark.parametrize(
    ("images", "quarantines", "given_up"),
    [
        (["wrong", "right"], 1, []),
        (["wrong", "wrong"], 2, ["sick"]),
        (["right"], 0, []),
        (["wrong", "right", "wrong", "right"], 2, []),
    ],
)
def test_third_worker_decides_which_of_two_is_sick_and_a_second_time_in_a_row_gives_it_up(images, quarantines, given_up):
    """It crashes once, so that its next process has other images."""
    right = [Proc(name, images=iter(["right"])) for name in "ab"]
    sick = Proc("sick", images=iter(images), fault=outcomes(*[""] * 50, "crash"))
    farm = checked(sick, *right, shots=6 * CHECKS.checked_calls)
    assert (farm.quarantined, list(farm.core.given_up)) == (["sick"] * quarantines, given_up)
    assert (sum(names.count("sick") for names in farm.sent.values()) > CHECKS.checked_calls) == (not given_up)


def test_worker_that_was_found_sick_is_checked_after_its_first_call():
    """Further ones begin before another worker has finished a call that it can repeat."""
    farm = checked(Proc("sick", image="wrong"), *(Proc(name, image="right") for name in "ab"), shots=2 * CHECKS.checked_calls)
    _, restarted = (when for when, start in farm.commands(m.Start) if start.process == "sick")
    sends = [send for when, send in farm.commands(m.Send) if when > restarted and send.process == "sick"]
    assert [bool(send.repetition) for send in sends].index(True) < CHECKS.first_checked_call


@pytest.mark.parametrize("circuit_breaker", [True, False])
def test_last_worker_that_is_found_sick_again_is_given_up_unless_a_circuit_breaker_stops_the_run(circuit_breaker):
    """The one whose image it repeated is lost, and the one that decides leaves."""
    workers = Proc("sick", image="wrong"), *(Proc(name, image="right") for name in "ab")
    farm, orders = Farm(*workers, limits=CHECKS, circuit_breaker=circuit_breaker), count()
    while not (farm.quarantined and any(check.first and request.running for request, check in farm.core.canary.checks.items())):
        farm.ask(next(orders), is_checked=True)
        farm.run(until=farm.now + CALL_S / 6)
    ((request, check),) = farm.core.canary.checks.items()
    farm.tell(m.Removed(check.maker.name))
    farm.tell(m.Removed(request.where.only, released=True))
    farm.run()
    assert farm.quarantined[:2] == ["sick"] * 2
    assert list(farm.core.given_up) == ([] if circuit_breaker else ["sick"])


@pytest.mark.parametrize("images", [("one", "other"), ("one", "other", "third")])
def test_workers_that_all_differ_stay_in_use(images):
    farm = checked(*(Proc(image, images=iter([image])) for image in images), shots=10 * CHECKS.checked_calls)
    assert farm.quarantined == []
    assert farm.checks["differs"] > 3


def test_workers_with_other_gpus_or_drivers_are_not_compared():
    farm = checked(*(Proc(device, image=device, device=device) for device in ("H100", "A100")), shots=CHECKS.checked_calls)
    assert not farm.checks


def test_worker_that_is_gone_is_not_checked_again():
    """A third worker decides whether it was sick, and its result is not comparable."""
    third = Proc("c", image="c", fault=lambda call: "" if call.is_checked else "unusual")
    farm, orders = Farm(Proc("a", image="a"), Proc("b", image="b"), third, limits=CHECKS), count()
    while not any(check.first and request.running for request, check in farm.core.canary.checks.items()):
        farm.ask(next(orders), is_checked=True)
        farm.run(until=farm.now + CALL_S / 6)
    ((_, check),) = farm.core.canary.checks.items()
    farm.tell(m.Removed(check.due.name))
    farm.run()
    assert farm.checks["not comparable"]


@pytest.mark.parametrize("fault", ["error", "crash", "hang"])
def test_check_that_fails_counts_as_an_error_of_its_worker_and_is_not_repeated_at_once(fault):
    worker = Proc("a", fault=lambda call: "" if call.is_checked else fault)
    farm = checked(worker, Proc("b"), shots=5 * CHECKS.first_checked_call, limits=replace(CHECKS, failures=1))
    farm.run(until=farm.now + LIMITS.floor_s)
    assert farm.quarantined == ["a"]


def test_check_that_waits_while_the_engine_is_lost_runs_later():
    farm, orders = Farm(Proc("a"), Proc("b"), limits=CHECKS), count()
    while not any(check.entry for check in farm.core.canary.checks):
        farm.ask(next(orders), is_checked=True)
        farm.run(until=farm.now + CALL_S / 6)
    farm.tell(m.Unplaceable("too small"))
    farm.add(Proc("c"))
    farm.run(until=farm.now + 5 * CALL_S)
    assert (farm.checks["done"], farm.core.canary.checks) == (1, {})


def test_check_that_waits_for_a_worker_that_is_released_is_dropped():
    farm, orders = Farm(Proc("a"), Proc("b"), limits=CHECKS), count()
    while not any(check.entry for check in farm.core.canary.checks):
        farm.ask(next(orders), is_checked=True)
        farm.run(until=farm.now + CALL_S / 6)
    (check,) = farm.core.canary.checks
    farm.tell(m.Removed(check.where.only, released=True))
    assert farm.core.canary.checks == {}


def test_long_runs_check_at_their_interval_and_short_ones_not_at_all():
    assert not checked(*(Proc(name) for name in "abc"), shots=3 * CHECKS.first_checked_call - 3).checks
    checks = checked(*(Proc(name) for name in "abc"), shots=12 * CHECKS.checked_calls).checks
    assert 6 <= checks["done"] == checks.total() <= 15


def test_difference_finds_a_damaged_block_and_allows_rounding():
    rng = np.random.default_rng(0)
    clip = rng.integers(10, 245, (3, 72, 100, 3), np.uint8)
    rounded, damaged = clip + rng.integers(0, 5, clip.shape, np.uint8), clip.copy()
    damaged[1, 64:, 96:] = rng.integers(0, 256, (8, 4, 3), np.uint8)
    assert difference({"frames": clip}, {"frames": clip}) == 0
    assert 1 < difference({"frames": rounded}, {"frames": clip}) < 4
    assert difference({"frames": damaged}, {"frames": clip}) > MAX_BLOCK_DIFFERENCE
    assert difference({"image": clip[0]}, {"image": clip[1]}) > MAX_BLOCK_DIFFERENCE


# Expected seconds


def call_of(timeout_s=1800, **costs):
    return Call(1, 1, "", tuple(costs), (), tuple(costs.values()), timeout_s)


def test_expected_seconds_follow_the_cost_of_a_call_and_the_usual_worker():
    durations = Durations()
    assert durations.timeout_s(call_of(flux=1.0), LIMITS) == 1800
    for number in range(RECENT_CALLS):
        durations.add(call_of(flux=0.5), Result((StepTime("flux", "", 50.0 if number % 5 == 0 else 1.0),)))
    durations.add(call_of(svd=1.0), Result((StepTime("svd", "", None),)))
    assert durations.expected_s(call_of(flux=3.0)) == pytest.approx(6.0)
    assert durations.expected_s(call_of(flux=1.0, svd=1.0)) == math.inf, "a cached result shows nothing"
    assert durations.expected_s(call_of()) == math.inf, "how long a job of a server waits is not known"
    timeouts = [durations.timeout_s(call_of(flux=1.0, timeout_s=s), LIMITS) for s in (60, 1800)]
    assert (timeouts, durations.timeout_s(call_of(flux=50.0), LIMITS)) == ([60, LIMITS.floor_s], 100 * LIMITS.factor)
    for _ in range(RECENT_CALLS):
        durations.add(call_of(flux=1.0), Result((StepTime("flux", "", 3.0),)))
    assert durations.expected_s(call_of(flux=1.0)) == pytest.approx(3.0), "old ones are forgotten"
