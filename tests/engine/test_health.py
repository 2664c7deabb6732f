"""Health rules: when a process or a node is quarantined, and for how long."""

import pytest

from vidgen_ray.engine.supervisor import BACK_OFF_S, FAILURES, MAX_BACK_OFF_S, MAX_QUARANTINES, ProcessHealth


@pytest.fixture
def health():
    health = ProcessHealth()
    for name in "abcdefgh":
        health.started(name, "node")
    return health


def fail(health, process, shots=FAILURES):
    return [health.failed(process, shot) for shot in range(shots)]


def quarantine(health, process):
    fail(health, process)
    return health.quarantine(process)


def test_failures_of_different_shots_quarantine_a_process(health):
    assert fail(health, "a") == [False] * (FAILURES - 1) + [True]


def test_failures_of_one_shot_count_once(health):
    assert [health.failed("a", "shot") for _ in range(2 * FAILURES)] == [False] * (2 * FAILURES)


def test_success_and_discarded_failures_do_not_count(health):
    fail(health, "a", FAILURES - 1)
    health.succeeded("a")
    assert not any(fail(health, "a", FAILURES - 1))
    health.discard_failure("a", 0)
    assert not health.failed("a", "other")


def test_quarantine_after_the_failure_of_a_wrong_shot_does_not_count(health):
    quarantine(health, "a")
    health.discard_failure("a", 0)
    health.started("a", "node")
    assert not health.is_on_probation("a")
    assert not health.failed("a", "other")


def test_single_failure_on_probation_quarantines_again(health):
    quarantine(health, "a")
    assert not health.failed("a", "shot"), "it is in quarantine already"
    health.started("a", "node")
    assert health.is_on_probation("a")
    assert health.failed("a", "shot")
    health.quarantine("a")
    health.started("a", "node")
    health.succeeded("a")
    assert not health.is_on_probation("a")
    assert not health.failed("a", "shot")


def test_back_off_doubles_until_the_process_is_given_up(health):
    assert [quarantine(health, "a") for _ in range(MAX_QUARANTINES)] == [BACK_OFF_S * 2**n for n in range(MAX_QUARANTINES)]
    assert not health.is_given_up("a"), "the shots may be wrong"
    health.ended(0)
    assert health.is_given_up("a")
    assert max(quarantine(health, "a") for _ in range(20)) == MAX_BACK_OFF_S


def test_process_whose_failures_stay_in_doubt_is_not_restarted_more_often(health):
    for _ in range(MAX_QUARANTINES):
        quarantine(health, "a")
        health.started("a", "node")
    assert not health.failed("a", "shot")
    health.ended(0)
    assert health.failed("a", "other"), "it is given up"


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
