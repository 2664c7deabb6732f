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


def test_failures_of_different_shots_quarantine_a_process_and_count_against_no_shot(health):
    due, attempts = fail(health, "a")
    assert due == [False] * (FAILURES - 1) + [True]
    assert {each.verdict for each in attempts} == {Verdict.OPEN}
    health.quarantine("a")
    assert {each.verdict for each in attempts} == {Verdict.SICK}
    health.started("a", "node")
    assert not health.failed("a", "shot", attempts[0]), "reported late, when another process has rendered the shot"
    copy = attempt()
    _, (lost,) = fail(health, "b", 1)
    health.lost("b")
    assert lost.verdict is Verdict.SICK
    assert [health.failed("b", shot, copy) for shot in range(FAILURES)] == [False] * FAILURES, "of the process that is gone"
    assert copy.verdict is Verdict.SICK


def test_failures_of_one_shot_and_forgiven_ones_do_not_quarantine(health):
    assert [health.failed("a", "shot", attempt()) for _ in range(2 * FAILURES)] == [False] * (2 * FAILURES)
    _, (first, _) = fail(health, "b", FAILURES - 1)
    first.forgiven = True
    assert not health.failed("b", "other", attempt())
    assert health.failed("b", "a third", attempt())


def test_finished_call_of_another_shot_counts_failures_against_their_shots(health):
    _, (first, second) = fail(health, "a", 2)
    health.succeeded("a", 1)
    assert (first.verdict, second.verdict) == (Verdict.WELL, Verdict.OPEN), "the second is of the same shot"
    health.succeeded("a", 2)
    assert second.verdict is Verdict.WELL
    assert not any(fail(health, "a", FAILURES - 1)[0])


def test_single_failure_on_probation_quarantines_again_unless_the_first_quarantine_was_for_wrong_shots(health):
    _, attempts = quarantine(health, "a")
    late = attempt()
    assert not health.failed("a", "shot", late), "it is in quarantine already"
    assert late.verdict is Verdict.SICK
    health.started("a", "node")
    assert health.is_on_probation("a")
    assert health.failed("a", "shot", attempt())
    health.lost("a")
    for each in attempts:
        each.forgiven = True
    assert not health.is_on_probation("a")
    assert not health.failed("a", "other", attempt())
    quarantine(health, "b")
    health.started("b", "node")
    health.succeeded("b", "shot")
    assert not health.is_on_probation("b")


def test_back_off_doubles(health):
    delays = [quarantine(health, "a")[0] for _ in range(20)]
    assert delays[:3] == [BACK_OFF_S, 2 * BACK_OFF_S, 4 * BACK_OFF_S]
    assert health.quarantines("a") == 20
    assert max(delays) == MAX_BACK_OFF_S


def test_node_is_sick_if_half_of_its_processes_and_more_than_one_are(health):
    for process in "abc":
        quarantine(health, process)
        assert health.node_to_quarantine(process) is None
    quarantine(health, "d")
    assert health.node_to_quarantine("d") == "node"
    health.started("a", "other node")
    assert health.node_to_quarantine("d") is None, "it has moved"
    quarantine(health, "a")
    assert health.node_to_quarantine("a") is None, "it is the only one"
