"""Core of an engine with random faults at random times. Hypothesis shrinks what fails to a short list of them."""

from collections import Counter
from itertools import count

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.engine.farm import FAULTS, STAGES, Farm, Proc
from vidgen_ray.engine import messages as m
from vidgen_ray.engine.messages import OUTPUT, Kind
from vidgen_ray.engine.processes import CoreLimits
from vidgen_ray.engine.recording import Recorder, replay
from vidgen_ray.planner.layout import WorkerSpec

LIMITS = CoreLimits(first_checked_call=2, checked_calls=6)
ALL = ("instantid", "flux", "svd")
SPECS = {
    "all": WorkerSpec(ALL, 1, 1, gpu_gb=80),
    "swaps": WorkerSpec(ALL, 1, 1, (("instantid", "flux"), ("svd",)), gpu_gb=80),
    "image": WorkerSpec(("instantid", "flux"), 1, 1, gpu_gb=24),
    "clip": WorkerSpec(("svd",), 1, 1, gpu_gb=80),
    "server": WorkerSpec(("svd",), 1, 0, server="it", parallel=3),
    "encoder": WorkerSpec((OUTPUT,), 1, 0),
}
HITS = ("fault", "crash", "freeze")
"""Actions that can cost a call an attempt."""
ACTIONS = {
    "fault": st.tuples(st.integers(0, 8), st.sampled_from(FAULTS)),
    "sick": st.sampled_from(("error", "refused", "crash", "node", "wrong")),
    "load": st.lists(st.sampled_from(("", "RuntimeError", "hang")), min_size=1, max_size=4),
    "crash": st.booleans(),
    "freeze": st.none(),
    "remove": st.booleans(),
    "add": st.sampled_from(sorted(SPECS)),
    "withdraw": st.integers(0, 8),
    "stop driver": st.sampled_from((3.0, 30.0, 700.0)),
    "suspend": st.sampled_from((30.0, 700.0, 5000.0)),
    "storage": st.sampled_from((10.0, 400.0)),
}
"""Kind -> its details."""
TIMES = st.floats(0, 120).map(lambda s: round(s, 1))
PLANS = st.fixed_dictionaries(
    {
        "specs": st.lists(st.sampled_from(sorted(SPECS)), min_size=1, max_size=4),
        "flaws": st.dictionaries(
            st.integers(0, 8), st.sampled_from(("error", "refused", "too large", "crash", "hang")), max_size=3
        ),
        "shots": st.integers(1, 9),
        "actions": st.lists(
            st.one_of(*(st.tuples(st.just(kind), TIMES, st.integers(0, 3), what) for kind, what in ACTIONS.items())), max_size=8
        ),
        "attempts": st.sampled_from((1, 3)),
        "circuit_breaker": st.booleans(),
    }
)
"""Actions have a kind, a time, the number of a process and details."""


class RandomFarm(Farm):
    """A farm in which actions happen to its processes, but not to the last two, which hold all stages."""

    def __init__(self, specs, shots, actions, **options):
        specs = [*specs, "all", "encoder"]
        processes = [Proc(f"{n} {name}", f"n{n % 2}", SPECS[name], seconds=4 + n) for n, name in enumerate(specs)]
        self.sound, self.late = processes[-2:], count()
        for process in processes[:-2]:
            mine = [action for action in actions if processes[action[2] % (len(processes) - 2)] is process]
            process.loads = iter([load for kind, *_, loads in mine if kind == "load" for load in loads])
            process.fault = self._fault([each for each in mine if each[0] in ("fault", "sick")])
        super().__init__(*processes, limits=LIMITS, needed=STAGES, **options)
        for kind, when, number, what in actions:
            process = processes[number % (len(processes) - 2)]
            self.after(when, lambda kind=kind, name=process.name, what=what: self._act(kind, name, what))
        for order in range(shots):
            self.open.add(-1000 - order)
            self.after(3 * order, lambda order=order: (self.open.discard(-1000 - order), self.render(order)))

    def _fault(self, mine):
        numbers = count()

        def fault(call):
            number = next(numbers)
            sick = [what for kind, when, _, what in mine if kind == "sick" and self.now >= when]
            return next(iter(sick), "") or dict(what for kind, *_, what in mine if kind == "fault").get(number, "")

        return fault

    def _act(self, kind, name, what):
        if kind == "crash":
            self.crash(name, node="n9" if what else None)
        elif kind == "freeze":
            self.freeze(name)
        elif kind == "remove":
            self.tell(m.Removed(name, what))
        elif kind == "add":
            self.add(Proc(f"late {next(self.late)}", "n3", SPECS[what]))
        elif kind == "withdraw":
            for call in [call for call in self.open if call > 0 and self.calls[call].order == what]:
                self.withdraw(call)
        elif kind == "stop driver":
            self.stop_driver(what)
        elif kind == "suspend":
            self.suspend(what)
        elif kind == "storage":
            self.storage_down_until = self.now + what


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return tmp_path_factory.mktemp("recording") / "events.jsonl"


UNWRITTEN = [("freeze", 25.0, 0, None), ("fault", 0.0, 1, (1, "unwritten")), ("storage", 0.0, 0, 400.0)]
"""A call and its copy fail, one of them while the storage is checked for the other."""


@given(PLANS)
@example({"specs": ["clip"] * 2, "flaws": {}, "shots": 4, "actions": UNWRITTEN, "attempts": 1, "circuit_breaker": False})
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_call_ends_once_after_few_attempts_and_a_replay_gives_the_same_commands(recording, plan):
    """The farm checks that a call ends once, and the invariants after each event."""
    farm = RandomFarm(**plan)
    farm.run()
    farm.run(until=farm.now + 10_000)
    assert not farm.core.requests
    assert [row.name for row in farm.core.table.rows.values() if row.calls] == []
    calls = {send.number: send.call.id for _, send in farm.commands(m.Send)}
    counted = [ended for _, ended in farm.commands(m.Ended) if ended.kind not in (None, Kind.NOT_RUN, Kind.SHARED_CRASH)]
    attempts = Counter(calls[ended.number] for ended in counted)
    assert max(attempts.values(), default=0) <= LIMITS.max_failures * len(farm.procs)
    ends = [(farm.calls[call].order, ended) for call, ended in farm.ended.items()]
    failed = {order: ended.failure for order, ended in ends if isinstance(ended, m.Fail) and ended.kind is not Kind.FOREIGN}
    assert max((failure.attempts for failure in failed.values()), default=0) <= LIMITS.in_doubt_factor * plan["attempts"]
    kinds = [kind for kind, *_ in plan["actions"]]
    # A driver that is stopped again before it has read the responses takes processes for hung.
    if not plan["flaws"] and kinds.count("stop driver") < 2:
        assert [process.name for process in farm.sound if process.kills] == []
    is_safe = plan["attempts"] == 3 and "sick" not in kinds and sum(kind in HITS for kind in kinds) <= 1
    if is_safe and (plan["circuit_breaker"] or not plan["flaws"]):
        assert set(failed) <= set(plan["flaws"])
    recorder = Recorder(recording)
    recorder.begin(farm.core)
    for when, event, commands in farm.log:
        recorder.add(when, event, commands)
    recorder.close()
    assert replay(recording) == []
