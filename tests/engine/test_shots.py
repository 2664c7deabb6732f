"""Shots with fake actors in simulated time: the calls that a shot takes, and a storage that responds again."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from benchmarks.fake_actors import FakeActor, run_in_simulated_time
from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine import callbacks, route, storage_pause
from vidgen_ray.engine import messages as m
from vidgen_ray.engine import shell as shell_module
from vidgen_ray.engine.calls import ENCODER, CallResult
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.core import Core
from vidgen_ray.engine.messages import Kind
from vidgen_ray.engine.shell import Shell
from vidgen_ray.engine.shots import Shots
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.errors import EngineFailed, SetupError
from vidgen_ray.graph import STAGE_BY_NAME, stages_of
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import ShotRecord, StepRecord
from vidgen_ray.planner.layout import Layout, Slot, WorkerSpec
from vidgen_ray.profile import ActorProfile, Profile
from vidgen_ray.shot import PRIORITY_STEP, Shot

ALL = ("flux", "svd", "realesrgan")
FRAMES = 8
CHUNK_FRAMES = 4


def calls_of_clips(workers, shots=1, ends=None, gpus=1, on_event=lambda *_: None):
    """Return the methods that are called to render clips on workers with these stages, and the steps of their records.

    `gpus`: those of each worker. `on_event`: all callbacks of the engine's users.
    `ends` gets the stage and the outcome of each attempt. With it, the first worker is taken for lost during its call.
    """
    steps = tuple(Step(stage=stage, key=stage, weights=()) for stage in ALL)
    plans = [
        ShotPlan(shot=Shot(id=f"s{n}", prompt="a ball", seed=1, num_frames=FRAMES, scale=2), steps=steps, key=f"shot {n}")
        for n in range(shots)
    ]
    assert [stage.name for stage in stages_of(plans[0].shot)] == list(ALL)
    slots = tuple(Slot((WorkerSpec(stages, cpus=1, gpus=gpus),), 0.0) for stages in workers)
    layout = Layout("fused", slots, encoders=1, window=1)
    actors = {stage.actor: ActorProfile(weights="tiny") for stage in STAGE_BY_NAME.values()}
    config = EngineConfig("run", Profile(name="p", about="", actors=actors), OutputFolder(Path("unused")), STAGE_BY_NAME)
    called = []

    def respond(method, *args):
        called.append(method)
        if method in ("begin", "add"):
            return CallResult()
        if method in ("write", "commit"):
            (records,) = (arg for arg in args if isinstance(arg, tuple))
            return CallResult(), ShotRecord.model_construct(stages=records)
        names = (*args[2], *args[3]) if method == "run_clip" else args[2]
        records = (StepRecord(stage=n, key=n, weights=(), seconds=1, gpu_seconds=1, price=0.5, cached=False) for n in names)
        return CallResult(tuple(records)), *(["output"] * (2 if method == "run_clip" else 1))

    async def render():
        observer, storage = Mock(side_effect=on_event), StoragePause(lambda: None, 0.0, on_event)
        for name in ("attempt_ended", "step_ended", "adapter_loads", "frames_upscaled"):
            getattr(observer, name).side_effect = on_event
        if ends is not None:
            observer.attempt_ended = lambda attempt: ends.append((attempt.stage, attempt.outcome))
            asyncio.get_running_loop().call_later(0.5, lambda: shell.tell(died(shell.core.table.rows["worker-0"])))
        shell = Shell(config, layout, observer, storage)
        for number, slot in enumerate(slots):
            shell.add(f"worker-{number}", slot.workers[0], FakeActor(f"worker-{number}", lambda *_: 1.0, respond))
        shell.add("encoder", ENCODER, FakeActor("encoder", lambda *_: 1.0, respond))
        rendering = Shots(config, layout, shell, {"realesrgan": CHUNK_FRAMES}, observer, storage)
        try:
            records = await asyncio.gather(*(rendering.render(plan, on_event) for plan in plans))
        finally:
            shell.close()
        return records

    records, _ = run_in_simulated_time(render())
    return called, [record.stages for record in records]


@pytest.mark.parametrize(
    ("workers", "calls"),
    [
        pytest.param([ALL, ALL], ["run_clip", "write"], id="all stages on each worker"),
        pytest.param([ALL, ("flux",)], ["run", "run_clip", "write"], id="another worker takes FLUX"),
        pytest.param([ALL, ("realesrgan",)], ["run", "run_chunk", "write"], id="another worker takes upscaling"),
    ],
)
def test_clip_of_one_chunk_takes_one_call_unless_workers_share_the_stages(workers, calls):
    called, (steps,) = calls_of_clips(workers)
    assert (called, [step.stage for step in steps]) == (calls, list(ALL))


def test_chunks_run_in_calls_of_their_own(monkeypatch):
    monkeypatch.setattr(route, "CHUNK_BYTES", 1)
    called, (steps,) = calls_of_clips([ALL])
    assert sorted(called) == ["add", "begin", "commit", "run", "run_chunk", "run_chunk"]
    assert [step.stage for step in steps] == list(ALL)
    # Two GPUs share the calls of a network for a chunk.
    assert calls_of_clips([ALL], gpus=2)[0] == ["run_clip", "write"]


def test_equal_shots_are_computed_once_and_cost_once():
    called, (first, second) = calls_of_clips([ALL], shots=2)
    assert sorted(called) == ["run_clip", "write", "write"]
    assert [[step.cached for step in steps] for steps in (first, second)] == [[False] * 3, [True] * 3]
    assert [{step.price for step in steps} for steps in (first, second)] == [{0.5}, {None}]


def test_later_shots_pass_those_of_the_lowest_priority_for_some_time(monkeypatch):
    orders = {}

    async def with_restarts(_, plan, order, __):
        orders[order] = plan.shot.priority
        return order

    async def render(*priorities):
        for priority in priorities:
            await shots.render(ShotPlan(shot=Shot(id="s", prompt="a", seed=1, priority=priority), steps=(), key=""))
        return [orders[order] for order in sorted(orders)]

    monkeypatch.setattr(Shots, "_with_restarts", with_restarts)
    shots = Shots(Mock(), Mock(slots=(), workers=()), Mock(), {}, Mock(), Mock())
    assert asyncio.run(render("low", "normal", "low", "high")) == ["normal", "high", "low", "low"]
    later = asyncio.run(render(*["normal"] * PRIORITY_STEP))
    assert (later.index("low"), later[-1]) == (PRIORITY_STEP - 1, "normal")


def died(row):
    return m.Died(row.name, row.life, tuple(row.calls), "no connection")


def test_result_that_comes_after_its_process_was_taken_for_lost_counts_and_is_logged():
    ends = []
    called, (steps,) = calls_of_clips([ALL], ends=ends)
    assert [step.stage for step in steps] == list(ALL)
    assert called.count("write") == 1
    assert [end for end in ends if end[0] != "loading"] == [
        ("flux", "error"), *((stage, "done") for stage in ALL), ("output", "done")
    ]  # fmt: skip


def test_write_that_times_out_during_a_pause_is_not_the_fault_of_its_encoder(monkeypatch):
    """The storage responds again when the write has been given up."""

    async def causes():
        pause = StoragePause(lambda: None, 60, lambda reason: None)
        pause.begin("no response")
        return [await pause.is_cause(Kind.WRITE, "it hangs") for _ in range(2)]

    monkeypatch.setattr(storage_pause, "PROBE_INTERVAL_S", 0)
    assert asyncio.run(causes()) == [True, False]


def test_pause_begins_again_with_a_file_that_was_written_in_it(monkeypatch):
    """A write may succeed that began before the pause."""
    probes = []

    async def failed():
        def probe():
            probes.append(None)
            if len(probes) == 3:
                loop.call_soon_threadsafe(pause.written)
            return "read-only"

        loop, changes = asyncio.get_running_loop(), []
        # The clock advances by a second with each probe.
        monkeypatch.setattr(loop, "time", lambda: float(len(probes)))
        pause = StoragePause(probe, 5, changes.append)
        with pytest.raises(SetupError, match="for 6 s"):
            await pause.wait("read-only")
        return changes

    monkeypatch.setattr(storage_pause, "PROBE_INTERVAL_S", 0)
    assert asyncio.run(failed()) == ["read-only"]
    assert len(probes) == 9


@pytest.fixture
def logged(monkeypatch):
    """Messages of the engine's log, and whether they have a traceback."""
    lines = []
    log = SimpleNamespace(**dict.fromkeys(("warning", "error"), lambda text, exc_info: lines.append((text, bool(exc_info)))))
    monkeypatch.setattr(callbacks, "_log", log)
    monkeypatch.setattr(shell_module, "_log", log)
    return lines


def test_exceptions_of_callbacks_are_logged_once_and_cost_no_shot(logged):
    called, (steps,) = calls_of_clips([ALL], on_event=Mock(side_effect=OSError(28, "No space left on device")))
    assert (called, [step.stage for step in steps]) == (["run_clip", "write"], list(ALL))
    assert 3 < len(logged) < 12
    assert {text.partition(":")[2] for text, _ in logged} == {
        " OSError: [Errno 28] No space left on device. The run continues without it"
    }
    assert not any(has_traceback for _, has_traceback in logged)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        pytest.param(Core, "_on_Ready", id="the core"),
        pytest.param(Core, "_on_Returned", id="the core, after a call"),
        pytest.param(Shell, "_do_Send", id="a command"),
        pytest.param(Shell, "_ended", id="a result"),
        pytest.param(Shell, "_follow", id="a task of the shell"),
    ],
)
def test_bug_in_the_engine_ends_all_shots_with_its_message(monkeypatch, logged, place, name):
    monkeypatch.setattr(place, name, Mock(side_effect=KeyError("a bug")))
    message = "the engine has failed, which is a bug of vidgen-ray: KeyError: 'a bug'"
    with pytest.raises(EngineFailed, match=message):
        calls_of_clips([ALL], shots=3)
    assert logged == [(message, True)]


def test_failed_storage_check_is_answered_in_every_case(monkeypatch):
    """The probe raises, as a database does, and so does the listener of pauses."""

    async def cause(max_wait_s):
        pause = StoragePause(Mock(side_effect=[ValueError("not a database"), None]), max_wait_s, Mock(side_effect=OSError))
        return await pause.is_cause(Kind.WRITE, "it hangs")

    monkeypatch.setattr(storage_pause, "PROBE_INTERVAL_S", 0.01)
    assert asyncio.run(cause(60))
    with pytest.raises(SetupError, match=r"for 0 s \(ValueError: not a database\)"):
        asyncio.run(cause(-1))
