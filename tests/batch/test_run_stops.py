"""Stopped runs: their causes, and what the next run does.

Scripts, planning, the engine's core and shell, and the manifest are the real ones. Workers and encoders are fakes in this
process, in simulated time. tests/chaos/test_model.py has random faults.
"""

import asyncio
import errno
import json
import math
import re
import shutil
import threading
from collections import Counter
from contextlib import nullcontext
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray

from benchmarks.fake_actors import FakeActor, kill, run_in_simulated_time
from tests.batch.test_batch import Events, write_lines
from tests.fake_stages import profile_of_fakes
from vidgen_ray.batch import director as director_module
from vidgen_ray.batch import render_script as render_module
from vidgen_ray.batch.director import BREAKER_FAILURES
from vidgen_ray.batch.render_script import render_shots
from vidgen_ray.batch.results import RunResults
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.engine.calls import ENCODER, CallResult
from vidgen_ray.engine.engine import Engine, Window
from vidgen_ray.engine.messages import Kind
from vidgen_ray.engine.processes import CoreLimits
from vidgen_ray.engine.shell import Shell
from vidgen_ray.engine.shots import Shots
from vidgen_ray.engine.status import Utilization
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.errors import SetupError, TooExpensive
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.lease import Lease
from vidgen_ray.outputs.manifest import read_manifest
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.records import Failure, StepRecord
from vidgen_ray.planner.cluster import parse_gpus
from vidgen_ray.script.lines import ScriptSettings


class FakeProcess(FakeActor):
    """Fake worker or encoder. The prompts `poison` and `refused` fail. `call_s`: seconds of each call."""

    outage_s = 0.0
    """Nothing can be written before this simulated time."""
    unloadable = None
    """Error of each load of weights."""
    committed = None
    """Shot -> commits, counted by each test."""

    def __init__(self, name, outputs, call_s):
        super().__init__(name, lambda method, *_: call_s or (20 if method == "write" else 2), self.respond, load_s=1)
        self.outputs = outputs

    async def load_failure(self):
        await super().load_failure()
        if self.unloadable is None or "encoder" in self.name:
            return None
        return Failure(stage="loading", error="RuntimeError", message=self.unloadable, attempts=1, worker=self.name)

    def failure(self, kind):
        failure = Failure(stage="flux", error="RuntimeError", message=f"{kind.value}, as always", attempts=1, worker=self.name)
        return CallResult(failure=failure, kind=kind), None

    def respond(self, method, number, plan, *args):
        is_encoder = method == "write"
        if is_encoder and asyncio.get_running_loop().time() < self.outage_s:
            return self.failure(Kind.WRITE)
        if not is_encoder and plan.shot.prompt in ("poison", "refused"):
            return self.failure(Kind.ERROR if plan.shot.prompt == "poison" else Kind.INPUT)
        if not is_encoder:
            return CallResult(tuple(self.record(step) for step in plan.steps if step.stage in args[0])), None
        with self.outputs.draft(plan) as draft:
            for name in ["image.png", *(["video.mp4"] if plan.shot.generate_video else [])]:
                draft.path(name).write_bytes(name.encode())
            self.committed[plan.shot.id] += 1
            return CallResult(), draft.commit(args[1])

    @staticmethod
    def record(step):
        return StepRecord(stage=step.stage, key=step.key, weights=step.weights, seconds=1, gpu_seconds=1, cached=False)


def engine_class(call_s):
    class FakeEngine(Engine):
        """Engine whose actors are fakes in this process."""

        def __init__(self, config, layout, observer, storage, more_slots, on_waiting, recorder):
            self._layout, self._outputs, self._waiting_for = layout, config.outputs, None
            self._shell = Shell(config, layout, observer, storage)
            self._core = self._shell.core
            self._shots = Shots(config, layout, self._shell, {}, observer, storage)
            self._utilization = Utilization()
            self.window = Window(layout.window, math.inf)

        async def start(self, labels):
            for number, spec in enumerate(self._layout.workers):
                self._shell.add(f"worker-{number}", spec, FakeProcess(f"worker-{number}", self._outputs, call_s))
            for number in range(4):
                self._shell.add(f"encoder-{number}", ENCODER, FakeProcess(f"encoder-{number}", self._outputs, call_s))

        async def stop(self):
            self._shell.close()

        @property
        def held_gpus(self):
            return sum(slot.gpus for slot in self._layout.slots)

    return FakeEngine


@pytest.fixture(autouse=True)
def simulated(without_ray, monkeypatch):
    """Run in simulated time."""
    monkeypatch.setattr(ray, "kill", kill)
    monkeypatch.setattr(render_module.asyncio, "run", lambda main: run_in_simulated_time(main)[0])

    async def problem(_):
        # Simulated time does not wait for a thread.
        return "gone" if asyncio.get_running_loop().time() < FakeProcess.outage_s else None

    async def visible(*_):
        """Do not look in a thread whether the folder is shared."""

    monkeypatch.setattr(FakeProcess, "committed", Counter())
    monkeypatch.setattr(StoragePause, "problem", problem)
    monkeypatch.setattr(director_module.Director, "_check_folder", visible)


@pytest.fixture
def events():
    return Events()


@pytest.fixture
def run_prompts(tiny, tmp_path, monkeypatch, events):
    """Return a function that runs lines with these prompts or fields. `call_s`: seconds of every call.

    The run is stopped after `stop_after` results. The function returns the report, or the error that stopped the run, and
    line -> status in the manifest.
    """
    profile = profile_of_fakes(tiny, ("flux", "svd"))

    def run(prompts, gpus="1x80GB", call_s=None, stop_after=math.inf, **options):
        fields = (prompt if isinstance(prompt, dict) else {"prompt": prompt} for prompt in prompts)
        lines = [{"id": f"s-{n}", **each} for n, each in enumerate(fields, start=1)]
        script, out = write_lines(tmp_path / "s.jsonl", lines), tmp_path / gpus
        monkeypatch.setattr(director_module, "Engine", engine_class(call_s))
        options = RenderOptions(**{"cluster": parse_gpus(gpus), "cache": "none", "grace_s": 1e9, **options})
        settings = ScriptSettings(script, profile_defaults={**profile.defaults, "upscale_video": False})
        stop, results = threading.Event(), []

        def finished(row):
            results.append(row)
            if len(results) >= stop_after:
                stop.set()

        monkeypatch.setattr(events, "on_finished", finished)
        try:
            result = render_shots(settings, profile, OutputFolder(out), options, listener=events, stop=stop)
        except (SetupError, TooExpensive) as error:
            result = error
        return result, {row.line: row.status for row in read_manifest(out)}

    return run


def test_every_line_ends_once_if_the_run_is_stopped_many_times(run_prompts, tmp_path):
    """Some lines are rejected, and some fail, but fewer than stop a run."""
    rng, out = np.random.default_rng(0), tmp_path / "2x2x80GB"
    kinds = [{}] * 40 + [{"generate_video": False}] * 30 + [{"fps": 0}, {"id": "s-1"}, {"prompt": "poison"}] * 4
    lines = [{"prompt": "a ball", **kind} for kind in rng.permutation(kinds)]
    for stop_after in (*rng.integers(1, 40, 4), math.inf):
        report, _ = run_prompts(lines, out.name, stop_after=stop_after)
        assert report.done + report.failed + report.skipped + report.left == len(lines)
    assert report.left == 0
    rows = read_manifest(out)
    assert Counter(row.line for row in rows) == dict.fromkeys(range(1, len(lines) + 1), 1)
    is_wrong = {n: line["prompt"] == "poison" or "fps" in line or ("id" in line and n > 1) for n, line in enumerate(lines, 1)}
    wrong = [n for n in is_wrong if is_wrong[n]]
    assert sorted(row.line for row in rows if row.status == "failed") == wrong
    assert FakeProcess.committed == {row.id: 1 for row in rows if row.status == "done"}
    failures = [json.loads(text) for text in (out / "failures.jsonl").read_text().splitlines()]
    assert sorted(failure["failure"]["line"] for failure in failures) == wrong
    assert not list(out.rglob(".tmp-*"))


def test_run_stops_if_the_only_worker_is_sick_and_the_next_run_renders_its_lines(run_prompts):
    """The shot before it became sick is still written when the first ones fail: it does not show that the worker is healthy."""
    error, statuses = run_prompts(["a ball", *["poison"] * 20])
    assert isinstance(error, SetupError)
    assert statuses.pop(1) == "done"
    assert set(statuses.values()) == {"failed"}
    report, statuses = run_prompts(["a ball"] * 21)
    assert (report.failed, report.skipped) == (0, 1)
    assert statuses == dict.fromkeys(range(1, 22), "done")


def test_lost_ray_leaves_one_row_for_each_finished_line(run_prompts, events, monkeypatch, tmp_path):
    """Also for lines with a row of an earlier run. The process of the run ends then, so its folder is copied."""
    run_prompts(["poison", "a ball", "a ball"])
    out, lost = tmp_path / "1x80GB", tmp_path / "lost"
    on_lost = []

    def connected(*_, **hooks):
        on_lost.append(hooks["on_lost"])
        return nullcontext()

    finished = iter(range(1, 100))

    def end():
        if next(finished) == 3:
            with pytest.raises(SetupError, match="lost connection to Ray"):
                on_lost[0]("lost connection to Ray")
            shutil.copytree(out, lost)

    monkeypatch.setattr(director_module, "connected", connected)
    monkeypatch.setattr(RunResults, "_enter", lambda self, *args, enter=RunResults._enter: (enter(self, *args), end()))
    run_prompts(["a ball"] * 20)
    ids = pq.read_table(lost / "manifest").column("id").to_pylist()
    assert sorted(ids) == ["s-1", "s-2", "s-3"]
    assert "lost connection to Ray" in json.loads((lost / "run.json").read_text())["error"]
    status = json.loads((lost / "status.json").read_text())
    assert (status["ended"], status["error"]) == (True, "SetupError")


def test_run_stops_if_no_worker_can_load_its_weights(run_prompts, monkeypatch):
    monkeypatch.setattr(FakeProcess, "unloadable", "the weights are damaged")
    error, statuses = run_prompts(["a ball"] * 3, "2x80GB")
    assert isinstance(error, SetupError)
    assert (str(error), statuses) == ("the weights are damaged", {})


def test_run_stops_if_nearly_all_shots_fail_on_every_gpu(run_prompts):
    """The next run renders the lines that are left, also if those that have failed fail again."""
    error, first = run_prompts(["poison"] * 60, "2x80GB")
    stopped = rf"stopped, because {BREAKER_FAILURES} of the last \d+ shots failed on every worker that was tried"
    assert re.match(rf"{stopped}, the last one in flux: error, as always", str(error))
    failed = dict.fromkeys(first, "failed")
    # Of the others, only one GPU was tried, or none.
    assert 0 < len(failed) < 60
    assert first == failed
    report, second = run_prompts(["poison" if n in failed else "a ball" for n in range(1, 61)], "2x80GB")
    assert (report.done, report.failed) == (60 - len(failed), len(failed))
    assert second == {**dict.fromkeys(range(1, 61), "done"), **failed}


@pytest.mark.parametrize(
    ("prompts", "gpus", "counts", "quarantines"),
    [
        pytest.param(["poison", *["a ball"] * 6, "poison"], "1x80GB", (6, 2), None, id="another line succeeds"),
        # No other worker can confirm their failures. The worker is reloaded three times, then continues with later lines.
        pytest.param(
            [*["poison"] * 10, *["a ball"] * 5], "1x80GB", (5, 10), CoreLimits.max_quarantines, id="wrong lines first"
        ),
        pytest.param(["poison" if n % 3 else "a ball" for n in range(25)], "2x80GB", (9, 16), None, id="most lines wrong"),
        pytest.param(["refused"] * 30, "2x80GB", (0, 30), 0, id="wrong photos only"),
    ],
)
def test_wrong_lines_keep_no_worker_from_the_rest(run_prompts, events, tmp_path, prompts, gpus, counts, quarantines):
    report, _ = run_prompts(prompts, gpus)
    assert (report.done, report.failed, report.left) == (*counts, 0)
    assert quarantines in (None, len(report.quarantined))
    assert list(report.quarantined) == events.messages
    assert list(report.quarantined) == json.loads((tmp_path / gpus / "run.json").read_text())["quarantined"]
    assert all(re.match(r"worker-\d .* failed for flux on different shots", message) for message in events.messages)
    assert bool(events.quarantined) == bool(report.quarantined)


def test_run_waits_while_nothing_can_be_written_and_stops_if_that_takes_too_long(run_prompts, monkeypatch):
    monkeypatch.setattr(FakeProcess, "outage_s", 2000)
    # Neither can the manifest.
    with monkeypatch.context() as patch:
        patch.setattr(ManifestWriter, "close", Mock(side_effect=OSError("gone")))
        error, statuses = run_prompts(["a ball"] * 30)
    assert re.match(r"stopped, because no file could be written to the output folder for 180\d s \(gone\)", str(error))
    assert statuses == {}
    monkeypatch.setattr(FakeProcess, "outage_s", 1000)
    report, statuses = run_prompts(["a ball"] * 30)
    assert (report.done, report.failed, report.left, report.quarantined) == (30, 0, 0, ())
    assert set(statuses.values()) == {"done"}


def test_run_whose_lease_is_not_refreshed_stops_after_the_same_time_if_no_shot_is_written(run_prompts, monkeypatch):
    monkeypatch.setattr(FakeProcess, "outage_s", 600)
    loops = asyncio.events._get_running_loop
    monkeypatch.setattr(Lease, "is_sure", property(lambda _: (loop := loops()) is None or not 5 < loop.time() < 600))
    error, statuses = run_prompts(["a ball"], call_s=500, wait_storage_s=60)
    assert re.match(r"stopped, because no file could be written to the output folder for 6\d s \(gone\)", str(error))
    assert statuses == {}


def test_run_stops_at_its_maximum_cost_and_the_next_run_resumes(run_prompts, tmp_path, monkeypatch):
    """A second of the GPU costs 1. Each of 20 clips takes 8 of them, and has 2 in its record."""
    # Without the seconds that other tests have measured.
    monkeypatch.setattr(director_module, "load_calibration", lambda *_: {})
    out = tmp_path / "1x80GB"

    def run(price, grace_s=40, max_cost=70):
        result, _ = run_prompts(["a ball"] * 20, call_s=8, price=price, grace_s=grace_s, max_cost=max_cost)
        return result, json.loads((out / "run.json").read_text())

    # Without a grace period, the run uses all of the limit; the calls in progress are cancelled.
    for grace_s, least, most in ((0, 70, 71), (40, 15, 70)):
        error, written = run(3600, grace_s)
        assert isinstance(error, TooExpensive)
        assert least <= written["cost"] <= most
        assert 0 < written["done"] < 20 - written["skipped"]
        assert written["done"] + written["skipped"] + written["left"] == 20
        stated = f"stopped by --max-cost 70.00: the run has cost {written['cost']:.2f} (in the currency of the price). "
        assert str(error).startswith(f"{stated}{written['left']} line")
        assert written["error"] == f"TooExpensive: {error}"
    assert run(3600, max_cost=1000)[0].left == 0
    assert {(row.cost, row.currency) for row in read_manifest(out)} == {(2.0, None)}
    run(7200)
    assert {(row.last_run, row.cost) for row in read_manifest(out)} == {("reused", 2.0)}
    # The cost of a shot without a row is that at the price of the run that finds it.
    shutil.rmtree(out / "manifest")
    run(7200)
    assert {(row.last_run, row.cost) for row in read_manifest(out)} == {("reused", 4.0)}


def test_listener_that_always_raises_costs_nothing_and_is_named_in_the_status(run_prompts, events, tmp_path, monkeypatch):
    for name in ("on_lines", "on_message", "on_rejected", "on_status"):
        broken = Mock(side_effect=OSError(errno.EIO, "Input/output error"), __qualname__=name)
        monkeypatch.setattr(events, name, broken)
    # The lines that fail quarantine a worker, which is a message.
    report, _ = run_prompts([*["poison"] * 5, *["a ball"] * 5, {"fps": 0}])
    assert (report.done, report.failed, report.left) == (5, 6, 0)
    messages = json.loads((tmp_path / "1x80GB" / "status.json").read_text())["messages"]
    failed = [message.partition(" failed: ")[0] for message in messages if "Input/output error" in message]
    assert sorted(failed) == ["on_lines", "on_message", "on_rejected", "on_status"]


def test_error_of_the_watch_ends_the_run_with_its_message(run_prompts, monkeypatch):
    for failure in (SetupError("of the watch"), KeyError("of the watch")):
        with monkeypatch.context() as patch:
            patch.setattr(StoragePause, "check", Mock(side_effect=[None] * 5 + [failure]))
            try:
                error, _ = run_prompts(["a ball"] * 3)
            except KeyError as bug:
                error = bug
        assert error is failure


def test_error_of_reading_lines_ends_the_run(simulated):
    """The event loop would log it, and the run would wait for the lines."""
    failure = KeyError("a bug")

    async def error():
        director = director_module.Director.__new__(director_module.Director)
        director._changed, director._error = asyncio.Event(), None
        director.accept = Mock(side_effect=failure)
        director._start_reader(lambda: iter([[]]))
        await director._changed.wait()
        return director._error

    assert asyncio.run(error()) is failure
