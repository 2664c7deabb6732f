"""Health rules: when a process or a node is quarantined, and for how long."""

import pytest

from vidgen_ray.engine.retries import AttemptFailed, Candidate, Kind, Verdict
from vidgen_ray.engine.supervisor import BACK_OFF_S, FAILURES, MAX_BACK_OFF_S, ProcessHealth
from vidgen_ray.outputs.records import Failure


@pytest.fixture
def health():
    health = ProcessHealth()
    for name in "abcdefgh":
        health.started(name, "node")
    return health


def attempt():
    failure = Failure(stage="flux", error="RuntimeError", message="it broke", attempts=1, worker="a")
    return AttemptFailed(Kind.ERROR, failure, Candidate("a", "node"))


def fail(health, process, shots=FAILURES):
    """Return for each shot whether the process must be quarantined after it, and the failed attempts."""
    attempts = [attempt() for _ in range(shots)]
    return [health.failed(process, shot, failed) for shot, failed in enumerate(attempts)], attempts


def quarantine(health, process):
    _, attempts = fail(health, process)
    return health.quarantine(process), attempts


def test_failures_of_different_shots_quarantine_a_process(health):
    due, attempts = fail(health, "a")
    assert due == [False] * (FAILURES - 1) + [True]
    assert {each.verdict for each in attempts} == {Verdict.OPEN}
    health.quarantine("a")
    assert {each.verdict for each in attempts} == {Verdict.SICK}, "they do not count against their shots"


def test_failures_of_one_shot_count_once(health):
    assert [health.failed("a", "shot", attempt()) for _ in range(2 * FAILURES)] == [False] * (2 * FAILURES)


def test_finished_call_of_another_shot_counts_failures_against_their_shots(health):
    _, (first, second) = fail(health, "a", 2)
    health.succeeded("a", 1)
    assert (first.verdict, second.verdict) == (Verdict.WELL, Verdict.OPEN), "the second is of the same shot"
    health.succeeded("a", 2)
    assert second.verdict is Verdict.WELL
    assert not any(fail(health, "a", FAILURES - 1)[0])


def test_failures_of_a_lost_process_do_not_count_against_their_shots(health):
    _, attempts = fail(health, "a", 1)
    health.lost("a")
    assert attempts[0].verdict is Verdict.SICK


def test_failure_of_a_process_that_was_quarantined_since_does_not_count_against_its_successor(health):
    _, attempts = quarantine(health, "a")
    health.started("a", "node")
    assert not health.failed("a", "shot", attempts[0]), "reported late, when another process has rendered the shot"


def test_forgiven_failures_do_not_quarantine(health):
    _, (first, _) = fail(health, "a", FAILURES - 1)
    first.forgiven = True
    assert not health.failed("a", "other", attempt())
    assert health.failed("a", "a third", attempt())


def test_quarantine_for_wrong_shots_does_not_count(health):
    _, attempts = quarantine(health, "a")
    health.started("a", "node")
    assert health.is_on_probation("a")
    for each in attempts:
        each.forgiven = True
    assert not health.is_on_probation("a")
    assert not health.failed("a", "other", attempt())


def test_single_failure_on_probation_quarantines_again(health):
    quarantine(health, "a")
    late = attempt()
    assert not health.failed("a", "shot", late), "it is in quarantine already"
    assert late.verdict is Verdict.SICK
    health.started("a", "node")
    assert health.is_on_probation("a")
    assert health.failed("a", "shot", attempt())
    health.quarantine("a")
    health.started("a", "node")
    health.succeeded("a", "shot")
    assert not health.is_on_probation("a")
    assert not health.failed("a", "shot", attempt())


def test_back_off_doubles(health):
    delays = [quarantine(health, "a")[0] for _ in range(20)]
    assert delays[:3] == [BACK_OFF_S, 2 * BACK_OFF_S, 4 * BACK_OFF_S]
    assert health.quarantines("a") == 20
    assert max(delays) == MAX_BACK_OFF_S


def test_node_is_sick_if_half_of_its_processes_are(health):
    for process in "abc":
        quarantine(health, process)
        assert health.node_to_quarantine(process) is None
    quarantine(health, "d")
    assert health.node_to_quarantine("d") == "node"
    health.started("a", "node")
    assert health.node_to_quarantine("d") is None


def test_node_with_one_process_is_not_sick(health):
    health.started("alone", "other node")
    quarantine(health, "alone")
    assert health.node_to_quarantine("alone") is None


def test_restart_on_another_node_moves_the_process(health):
    for process in "abcd":
        health.started(process, "small node")
    quarantine(health, "a")
    quarantine(health, "b")
    assert health.node_to_quarantine("b") == "small node"
    health.started("a", "node")
    assert health.node_to_quarantine("b") is None
