"""Retries: where the next attempt runs, and when a failure is final."""

import asyncio

import pytest

from vidgen_ray.engine.retries import AttemptFailed, Candidate, Kind, ShotFailed, Verdict, run_with_retries
from vidgen_ray.outputs.records import Failure


class Observer:
    """Counts failed attempts and retries."""

    def __init__(self):
        self.failed = self.retries = 0

    def step_failed(self, stage, error_class):
        self.failed += 1

    def retried(self, stage):
        self.retries += 1


class Workers:
    """Processes on nodes. `outcomes` are those of the attempts: `None` is a success. `gpus`: GB of GPU memory by process."""

    def __init__(self, nodes, *outcomes, gpus=None):
        self.nodes = nodes
        self.gpus = gpus or {}
        self.outcomes = list(outcomes)
        self.tried = []
        self.alone = []
        self.failed = []
        self.sick = []
        """Processes that are found to be sick, one for each wait for evidence."""
        self.waits = 0
        self.storage_fails = False
        self.observer = Observer()

    async def attempt(self, avoid, alone):
        worker = next((name for name in self.nodes if name not in avoid), min(self.nodes))
        self.tried.append(worker)
        self.alone.append(alone)
        kind = self.outcomes.pop(0)
        if kind is None:
            return "done"
        failure = Failure(stage="flux", error="RuntimeError", message="it broke", attempts=1, worker=worker)
        raise AttemptFailed(kind, failure, self.process(worker))

    def process(self, name):
        return Candidate(name, self.nodes[name], self.gpus.get(name, 0))

    def run(self, limit=3):
        def candidates():
            return [self.process(name) for name in self.nodes]

        async def evidence(failed):
            self.waits += 1
            sick = self.sick.pop(0) if self.sick else None
            for each in failed:
                each.verdict = Verdict.SICK if each.process.key == sick else Verdict.WELL

        async def storage_is_cause(_):
            return self.storage_fails

        return asyncio.run(
            run_with_retries(
                self.attempt, candidates, self.failed.append, evidence, storage_is_cause, limit=limit, observer=self.observer
            )
        )

    @property
    def blamed(self):
        """Processes against which failures count."""
        return [each.process.key for each in dict.fromkeys(self.failed) if not each.forgiven]

    def failure(self, limit=3):
        with pytest.raises(ShotFailed) as raised:
            self.run(limit)
        return raised.value


ONE_NODE = {"a": "n1", "b": "n1", "c": "n1"}
TWO_NODES = {"a": "n1", "b": "n1", "c": "n2"}
ERROR, INPUT, SHARED, NOT_RUN, MEMORY = Kind.ERROR, Kind.INPUT, Kind.SHARED_CRASH, Kind.NOT_RUN, Kind.MEMORY


@pytest.mark.parametrize("kind", [Kind.WRITE, Kind.DISK_FULL])
def test_failed_write_costs_no_attempt_if_the_storage_is_the_cause(kind):
    workers = Workers(ONE_NODE, *[kind] * 5, None)
    workers.storage_fails = True
    assert workers.run() == "done"
    assert (workers.failed, workers.observer.failed) == ([], 0)


def test_failed_write_is_the_fault_of_its_process_if_the_storage_is_not_the_cause():
    workers = Workers(ONE_NODE, Kind.WRITE, None)
    assert workers.run() == "done"
    assert (workers.tried, workers.blamed) == (["a", "b"], ["a"])


def test_error_is_retried_on_another_worker():
    workers = Workers(ONE_NODE, ERROR, None)
    assert workers.run() == "done"
    assert workers.tried == ["a", "b"]
    assert workers.blamed == ["a"]
    assert (workers.observer.failed, workers.observer.retries, workers.waits) == (1, 1, 0)


def test_error_that_follows_the_shot_through_all_workers_is_final():
    workers = Workers(ONE_NODE, ERROR, ERROR, ERROR)
    failed = workers.failure()
    assert (failed.failure.attempts, failed.kind) == (3, ERROR)
    assert workers.tried == ["a", "b", "c"]
    assert workers.blamed == []
    assert workers.waits == 1


def test_errors_of_sick_workers_do_not_count_against_the_shot():
    """Two of them fail with one error before their quarantine. A third attempt fails as well, by chance."""
    workers = Workers(dict.fromkeys("abcd", "n1"), ERROR, ERROR, ERROR, ERROR, None)
    workers.sick = ["a", "b"]
    assert workers.run() == "done"
    assert workers.waits == 2
    assert workers.observer.failed == 4


def test_error_that_two_workers_have_is_theirs_if_a_third_renders_the_shot():
    workers = Workers(ONE_NODE, ERROR, ERROR, None)
    assert workers.run() == "done"
    assert set(workers.blamed) == {"a", "b"}


def test_error_that_one_worker_repeats_is_its_own():
    workers = Workers({"a": "n1"}, ERROR, ERROR, ERROR)
    workers.failure()
    assert workers.blamed == ["a"] * 3


def test_errors_on_one_node_are_confirmed_on_another():
    workers = Workers(TWO_NODES, ERROR, ERROR, ERROR)
    assert workers.failure().failure.attempts == 3
    assert workers.tried == ["a", "b", "c"]
    workers = Workers(TWO_NODES, ERROR, ERROR, ERROR)
    assert workers.failure(limit=2).failure.attempts == 3, "one node cannot make an error final"


def test_refused_input_is_confirmed_on_another_node():
    workers = Workers(TWO_NODES, INPUT, INPUT)
    assert workers.failure().kind is INPUT
    assert workers.tried == ["a", "c"]
    assert workers.blamed == []


def test_refused_input_is_confirmed_by_another_worker_if_there_is_one_node():
    workers = Workers(ONE_NODE, INPUT, INPUT)
    assert workers.failure().failure.attempts == 2
    assert workers.tried == ["a", "b"]


def test_refused_input_is_final_if_there_is_one_worker():
    workers = Workers({"a": "n1"}, INPUT)
    assert workers.failure().failure.attempts == 1


def test_refused_input_that_another_node_accepts_is_a_failure_of_the_first():
    workers = Workers(TWO_NODES, INPUT, None)
    assert workers.run() == "done"
    assert workers.blamed == ["a"]


def test_shared_crash_is_repeated_alone_and_costs_no_attempt():
    workers = Workers(ONE_NODE, SHARED, None)
    assert workers.run() == "done"
    assert workers.alone == [False, True]
    assert workers.observer.failed == 0


def test_call_that_was_not_run_costs_no_attempt():
    workers = Workers(ONE_NODE, *[NOT_RUN] * 10, None)
    assert workers.run(limit=1) == "done"
    assert workers.observer.failed == 0


@pytest.mark.parametrize("limit", [1, 3])
def test_attempts_lost_with_a_node_do_not_count(limit):
    workers = Workers(TWO_NODES, *[ERROR] * 5, None)
    workers.sick = ["a"] * 5
    assert workers.run(limit) == "done"


def test_shot_that_runs_out_of_memory_is_retried_on_larger_gpus_only():
    workers = Workers(ONE_NODE, MEMORY, None, gpus={"a": 24, "b": 24, "c": 80})
    assert workers.run() == "done"
    assert workers.tried == ["a", "c"]
    assert workers.blamed == []


def test_out_of_memory_on_the_largest_gpu_is_confirmed_once():
    workers = Workers(ONE_NODE, MEMORY, MEMORY, gpus=dict.fromkeys(ONE_NODE, 24))
    assert workers.failure().kind is MEMORY
    assert workers.tried == ["a", "b"]
    alone = Workers({"a": "n1"}, MEMORY, gpus={"a": 24})
    assert alone.failure().failure.attempts == 1
