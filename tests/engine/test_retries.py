"""Retries: where the next attempt runs, and when a failure is final."""

import asyncio
from dataclasses import dataclass, field
from unittest.mock import Mock

import pytest

from vidgen_ray.engine import storage_pause
from vidgen_ray.engine.retries import AttemptFailed, Candidate, Kind, ShotFailed, Verdict, run_with_retries
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.outputs.records import Failure

ERROR, INPUT, MEMORY = Kind.ERROR, Kind.INPUT, Kind.MEMORY
ONE_NODE = {"a": "n1", "b": "n1", "c": "n1"}
TWO_NODES = {"a": "n1", "b": "n1", "c": "n2"}
ALONE = {"a": "n1"}


@dataclass
class Run:
    """Attempts on processes of nodes."""

    nodes: dict[str, str]
    outcomes: list[Kind | None]
    """Outcome of each attempt. `None` is a success."""
    gpus: dict[str, int] = field(default_factory=dict)
    """Process -> GB of GPU memory."""
    sick: list[str] = field(default_factory=list)
    """Processes that are found to be sick, one for each wait for evidence."""
    storage_fails: bool = False
    tried: list[str] = field(default_factory=list)
    alone: list[bool] = field(default_factory=list)
    failed: list[AttemptFailed] = field(default_factory=list)
    waits: int = 0
    observer: Mock = field(default_factory=Mock)
    error: ShotFailed | None = None
    """Error of the shot. `None` if it is done."""

    def process(self, name):
        return Candidate(name, self.nodes[name], self.gpus.get(name, 0))

    def candidates(self):
        return [self.process(name) for name in self.nodes]

    async def attempt(self, avoid, alone):
        worker = next((name for name in self.nodes if name not in avoid), min(self.nodes))
        self.tried.append(worker)
        self.alone.append(alone)
        kind = self.outcomes[len(self.tried) - 1]
        if kind is not None:
            failure = Failure(stage="flux", error="RuntimeError", message="it broke", attempts=1, worker=worker)
            raise AttemptFailed(kind, failure, self.process(worker))

    async def evidence(self, failed):
        self.waits += 1
        sick = self.sick.pop(0) if self.sick else None
        for each in failed:
            each.verdict = Verdict.SICK if each.process.key == sick else Verdict.WELL

    async def storage_is_cause(self, _):
        return self.storage_fails

    @property
    def blamed(self):
        """Processes against which failures count."""
        return [each.process.key for each in dict.fromkeys(self.failed) if not each.forgiven]


def run(nodes, *outcomes, limit=3, **options):
    """Run a shot whose attempts have these outcomes. All of them must be made."""
    made = Run(nodes, list(outcomes), **options)
    retries = run_with_retries(
        made.attempt,
        made.candidates,
        made.failed.append,
        made.evidence,
        made.storage_is_cause,
        limit=limit,
        observer=made.observer,
    )
    try:
        asyncio.run(retries)
    except ShotFailed as error:
        made.error = error
    assert len(made.tried) == len(outcomes)
    return made


@pytest.mark.parametrize(
    ("nodes", "outcomes", "tried", "blamed"),
    [
        pytest.param(ONE_NODE, [ERROR, None], "ab", "a", id="an error is retried on another worker"),
        pytest.param(ONE_NODE, [ERROR, ERROR, ERROR], "abc", "", id="an error of three workers is that of the shot"),
        pytest.param(ONE_NODE, [ERROR, ERROR, None], "abc", "abab", id="unless a third worker renders the shot"),
        pytest.param(ALONE, [ERROR, ERROR, ERROR], "aaa", "aaa", id="an error that one worker repeats is its own"),
        pytest.param(TWO_NODES, [ERROR, ERROR, ERROR], "abc", "", id="errors on one node are confirmed on another"),
        pytest.param(TWO_NODES, [INPUT, INPUT], "ac", "", id="a refusal is confirmed on another node"),
        pytest.param(TWO_NODES, [INPUT, None], "ac", "a", id="a refusal that another node does not have counts"),
        pytest.param(ONE_NODE, [INPUT, INPUT], "ab", "", id="without another node, a refusal is confirmed by another worker"),
        pytest.param(ALONE, [INPUT], "a", "", id="without another worker, a refusal is final"),
        pytest.param(ONE_NODE, [Kind.WRITE, None], "ab", "a", id="a failed write is an error if the storage is not the cause"),
    ],
)
def test_next_attempt_and_cause(nodes, outcomes, tried, blamed):
    made = run(nodes, *outcomes)
    if outcomes[-1] is None:
        assert made.error is None
    else:
        assert (made.error.failure.attempts, made.error.kind) == (len(outcomes), outcomes[-1])
    assert ("".join(made.tried), set(made.blamed)) == (tried, set(blamed))


def test_one_node_cannot_make_an_error_final():
    assert run(TWO_NODES, ERROR, ERROR, ERROR, limit=2).tried == ["a", "b", "c"]


def test_errors_of_sick_workers_do_not_count_against_the_shot():
    """Two of them fail with one error before their quarantine. A third attempt fails as well, by chance."""
    made = run(dict.fromkeys("abcd", "n1"), ERROR, ERROR, ERROR, ERROR, None, sick=["a", "b"])
    assert (made.error, made.waits) == (None, 2)
    for limit in (1, 3):
        assert run(TWO_NODES, *[ERROR] * 5, None, sick=["a"] * 5, limit=limit).error is None, "lost with a node"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Kind.NOT_RUN, {"limit": 1}),
        (Kind.SHARED_CRASH, {}),
        (Kind.WRITE, {"storage_fails": True}),
        (Kind.DISK_FULL, {"storage_fails": True}),
    ],
)
def test_attempts_that_the_shot_has_not_caused_do_not_count(kind, options):
    made = run(ONE_NODE, *[kind] * 5, None, **options)
    assert (made.error, made.failed) == (None, [])
    made.observer.step_failed.assert_not_called()
    assert made.alone[1:] == [kind is Kind.SHARED_CRASH] * 5


def test_write_that_times_out_during_a_pause_is_not_the_fault_of_its_encoder(monkeypatch):
    """The storage responds again when the write has been given up."""

    async def causes():
        pause = StoragePause(lambda: None, 60, lambda reason: None)
        pause.begin("no response")
        return [await pause.is_cause(Mock(kind=Kind.WRITE)) for _ in range(2)]

    monkeypatch.setattr(storage_pause, "PROBE_INTERVAL_S", 0)
    assert asyncio.run(causes()) == [True, False]


def test_shot_that_runs_out_of_memory_is_retried_on_larger_gpus_or_confirmed_once():
    made = run(ONE_NODE, MEMORY, None, gpus={"a": 24, "b": 24, "c": 80})
    assert (made.tried, made.failed) == (["a", "c"], [])
    made = run(ONE_NODE, MEMORY, MEMORY, gpus=dict.fromkeys(ONE_NODE, 24))
    assert (made.tried, made.error.failure.attempts) == (["a", "b"], 2)
    assert run(ALONE, MEMORY, gpus={"a": 24}).error.failure.attempts == 1
