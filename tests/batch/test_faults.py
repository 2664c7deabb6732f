"""Failure handling of the batch executor, on a real Ray with two simulated GPUs: GPU placement, retries, isolation of lines."""

import json
import os
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from unittest.mock import Mock

import pytest
import ray

from tests.batch.test_batch import Events, write_lines
from tests.conftest import ASTRONAUT
from tests.fake_stages import FAKES, profile_of_fakes, with_actor
from tests.outputs.test_trace import read_trace
from vidgen_ray.batch.line_planner import LaterLines
from vidgen_ray.batch.render_script import render_shots
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.cli.app import run_command
from vidgen_ray.engine import fleet
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.processes import CoreLimits
from vidgen_ray.engine.ray_cluster import expect_gpus
from vidgen_ray.engine.recording import replay
from vidgen_ray.errors import ScriptError, SetupError, UsageError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import read_manifest
from vidgen_ray.planner.cluster import parse_gpus
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.stages.flux import FluxStage

pytestmark = pytest.mark.usefixtures("local_ray", "short_waits")

GPUS, ONE_GPU = "2x80GB", "1x80GB"
POLL_S = 0.02
"""Seconds between two calls of a process that starts."""


@pytest.fixture(scope="module")
def profile(tiny):
    return profile_of_fakes(tiny)


def render_lines(tmp_path, profile, lines, listener=None, gpus=GPUS, stop=None, fakes=FAKES, folder=OutputFolder, **options):
    out = tmp_path / "out"
    report = render_shots(
        ScriptSettings(write_lines(tmp_path / "s.jsonl", lines), profile_defaults=profile.defaults),
        profile,
        folder(out),
        RenderOptions(cluster=parse_gpus(gpus) if isinstance(gpus, str) else gpus, stages=fakes, **options),
        listener=listener or Events(),
        stop=stop,
    )
    return report, {row.id: row for row in read_manifest(out)}


def records(tmp_path):
    """Return id -> record of all finished shots."""
    return {file.parent.name: json.loads(file.read_text()) for file in (tmp_path / "out").glob("shots/*/*/shot.json")}


def shots(count):
    return [{"id": f"s{n:02}", "prompt": f"shot {n}"} for n in range(count)]


def places_of_workers():
    """Return worker -> its place."""
    return {name.split("/", 1)[1]: place_of(ray.get_actor(name)) for name in ray.util.list_named_actors() if "/worker/" in name}


def kill_workers():
    """Kill each worker process. Return the places of the workers before, and those of their new processes."""
    before = places_of_workers()
    for place in before.values():
        os.kill(place.pid, signal.SIGKILL)
    # A killed process may still answer a call before its successor does.
    while (after := places_of_workers()).keys() != before.keys() or any(after[name].pid == before[name].pid for name in before):
        time.sleep(POLL_S)
    return before, after


def place_of(worker):
    while True:
        with suppress(ray.exceptions.ActorUnavailableError):
            return ray.get(worker.place.remote())
        time.sleep(POLL_S)


def test_workers_keep_their_gpus_after_all_processes_were_killed(tmp_path, tiny, own_cache):
    """Seconds that other tests have measured are not used: the plan would depend on them."""
    places, staged = [], profile_of_fakes(tiny, ("flux", "svd"), layout="staged")
    lines = [{**line, "upscale_video": False} for line in shots(12)]
    report, rows = render_lines(tmp_path, staged, lines, Events(lambda: places.extend(kill_workers())))
    assert (report.done, report.failed, report.layout) == (12, 0, "staged"), [r.failure_message for r in rows.values()]
    before, after = places
    assert {name: place.gpus for name, place in before.items()} == {name: place.gpus for name, place in after.items()}
    by_slot = {}
    for name, place in before.items():
        assert len(place.gpus) == 1
        by_slot.setdefault(name.split("/")[-2], set()).update(place.gpus)
    assert sorted(gpu for gpus in by_slot.values() for gpu in gpus) == ["0", "1"], "each slot has one GPU of its own"


def test_failing_lines_do_not_affect_other_lines_and_transient_failures_are_retried(tmp_path, profile, monkeypatch):
    # Without the seconds that other tests have measured, which change the layout.
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path / "cache"))
    failing = {
        "raises": ("raise", "RuntimeError", 3),
        "crashes": ("crash", "WorkerDied", 3),
        "oom": ("oom", "OutOfMemory", 2),
    }
    lines = shots(12)
    for n, (name, (prompt, _, _)) in enumerate(failing.items()):
        lines.insert(3 * n, {"id": name, "prompt": prompt})
    for name in ("raise", "crash", "hang", "cuda-error", "oom"):
        lines.append({"id": f"{name}-once", "prompt": f"{name} once {tmp_path / name}"})
    timeout_s = EngineConfig.timeout_s

    def short_if_it_hangs(config, shot, *stages):
        """On a loaded machine, other calls may take seconds, too."""
        return 3.0 if shot.prompt.startswith("hang") else timeout_s(config, shot, *stages)

    monkeypatch.setattr(EngineConfig, "timeout_s", short_if_it_hangs)
    monkeypatch.setenv("VIDGEN_CHECK_ENGINE", "1")
    report, rows = render_lines(tmp_path, profile, lines, record=tmp_path / "events.jsonl")
    assert (report.done, report.failed) == (17, 3), {row.id: row.failure_message for row in rows.values()}
    for name, (_, error, attempts) in failing.items():
        row = rows[name]
        assert (row.status, row.failure_stage, row.failure_error) == ("failed", "flux", error)
        # At the end of the run, no other call shows that the workers are well.
        assert attempts <= row.failure_attempts <= CoreLimits.in_doubt_factor * attempts
        assert "worker" in row.failure_worker or ":" in row.failure_worker
    failed = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert {line["id"]: line["failure"]["error"] for line in failed} == {name: error for name, (_, error, _) in failing.items()}
    check_trace(tmp_path, rows)
    assert replay(tmp_path / "events.jsonl") == []


def check_trace(tmp_path, rows):
    """Check that the trace of the run has the steps of all records and the failed attempts."""
    assert run_command(["trace", str(tmp_path / "out"), "-o", str(tmp_path / "trace.json")]) == 0
    traced = read_trace(tmp_path / "trace.json")
    seconds, failures = Counter(), Counter()
    for each in (each["args"] for row in traced.values() for each in row):
        if each["outcome"] in ("done", "cached"):
            seconds[each["shot"], each["stage"]] += each["seconds"]
        else:
            failures[each["shot"]] += 1
    done = records(tmp_path)
    recorded = {(name, step["stage"]): step["seconds"] for name, record in done.items() for step in record["stages"]}
    steps = {key: seconds[key] for key in seconds if key[1] not in ("loading", "output", "canary")}
    assert steps.keys() == recorded.keys()
    assert steps == pytest.approx(recorded, abs=2e-3)
    assert {shot for shot, stage in seconds if stage in ("loading", "output")} == {"", *done}
    # The worker of `oom-once` has freed memory.
    assert failures.keys() >= {name for name in rows if not name.startswith("s") and name != "oom-once"}
    assert all(failures[name] >= rows[name].failure_attempts for name in rows if rows[name].status == "failed")
    assert {worker.split("/")[1] for _, worker in traced} == {"worker", "encoder"}


@pytest.mark.slow
def test_shot_of_several_gpus_is_finished_on_one_after_a_crash(tmp_path, profile, own_cache):
    """Two GPUs divide the work of the only shot. Seconds that other tests have measured are not used."""
    # Large, because several GPUs start the kernels of a small image as slowly as one.
    size = {"width": 2048, "height": 2048}
    line = {"id": "s", "prompt": f"crash once {tmp_path / 'crashed'}", "generate_video": False, "steps": {"flux": 200}, **size}
    report, rows = render_lines(tmp_path, profile, [line])
    assert report.done == 1, rows
    assert (tmp_path / "crashed").exists()
    (step,) = records(tmp_path)["s"]["stages"]
    assert step["gpu_seconds"] == pytest.approx(2 * step["seconds"], abs=1e-3)


def test_lines_after_the_first_ones_stream_through_ray_data_and_a_lost_planning_task_is_repeated(
    in_process, tmp_path, profile, monkeypatch
):
    monkeypatch.setattr("vidgen_ray.batch.line_planner.FIRST_LOOK_LINES", 2)
    monkeypatch.setattr("vidgen_ray.batch.line_planner.BLOCK_LINES", 2)
    crashed = tmp_path / "crashed"

    def crash_once(block, **arguments):
        from vidgen_ray.batch.line_planner import _plan_block

        if not crashed.exists():
            crashed.touch()
            os._exit(1)
        return _plan_block(block, **arguments)

    lines = shots(9)
    # A wrong line and a repeated id among the streamed lines.
    lines[5] = {"id": "wrong", "prompt": "a", "fps": 0}
    lines[7] = {"id": "s01", "prompt": "a"}
    with monkeypatch.context() as patched:
        patched.setattr("vidgen_ray.batch.line_planner._plan_block", crash_once)
        report, rows = render_lines(tmp_path, profile, lines, gpus=ONE_GPU)
    assert crashed.exists()
    assert (report.done, report.failed, report.rejected, report.left, len(rows)) == (7, 2, 2, 0, 9)
    assert rows["s01"].status == "done"
    assert "line 2 has the same id" in rows["s.jsonl:8"].failure_message
    assert render_lines(tmp_path, profile, lines, gpus=ONE_GPU)[0].skipped == 7


def test_script_that_changes_during_the_run_is_an_error_and_replaces_no_shot(in_process, tmp_path, profile, monkeypatch):
    monkeypatch.setattr("vidgen_ray.batch.line_planner.FIRST_LOOK_LINES", 2)
    assert render_lines(tmp_path, profile, shots(6), gpus=ONE_GPU)[0].done == 6
    finished = LaterLines.finished

    def change_before(*args):
        write_lines(tmp_path / "new.jsonl", shots(6)[2:]).rename(tmp_path / "s.jsonl")
        return finished(*args)

    with monkeypatch.context() as changing:
        changing.setattr(LaterLines, "finished", change_before)
        with pytest.raises(ScriptError, match="changed while it was read") as error:
            render_lines(tmp_path, profile, shots(6), gpus=ONE_GPU)
    assert error.value.exit_code == 3
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["error"].startswith("ScriptError: s.jsonl: got a script that was changed while it was read")
    assert {(row.status, row.last_run) for row in read_manifest(tmp_path / "out")} == {("done", "rendered"), ("done", "reused")}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "job-1"}}')
    with monkeypatch.context() as without_ray:
        without_ray.setattr("vidgen_ray.batch.director.Director.connected", None)
        report, rows = render_lines(tmp_path, profile, shots(6), gpus=ONE_GPU, name="film", team="blue")
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert (report.skipped, run["error"]) == (6, None)
    assert (run["name"], run["team"], run["submission_id"]) == ("film", "blue", "job-1")
    assert {(row.run, row.team, row.submission_id) for row in rows.values()} == {(run["run"], "blue", "job-1")}
    assert "-film-" in run["run"]
    with pytest.raises(UsageError, match="--team: got 'a b', must be"):
        render_lines(tmp_path, profile, shots(6), team="a b")


def test_run_stopped_while_reading_the_script_renders_nothing(in_process, tmp_path, profile, monkeypatch):
    stop, read = threading.Event(), threading.Event()
    stop.set()

    def unread_lines(*args):
        read.wait()
        yield from ()

    with monkeypatch.context() as patched:
        patched.setattr("vidgen_ray.batch.line_planner.FIRST_LOOK_LINES", 4)
        patched.setattr(LaterLines, "rest", unread_lines)
        report, rows = render_lines(tmp_path, profile, shots(9), gpus=ONE_GPU, stop=stop)
    read.set()
    assert (report.done, report.layout, rows) == (0, None, {})
    assert (report.left, report.complete) == (4, False)
    report, _ = render_lines(tmp_path, profile, shots(9), gpus=ONE_GPU)
    assert (report.done, report.complete) == (9, True)


def test_idle_run_says_what_it_holds_and_shots_with_the_same_photo_share_its_features(tmp_path, profile, monkeypatch):
    monkeypatch.setattr("vidgen_ray.batch.line_planner.FIRST_LOOK_LINES", 2)
    monkeypatch.setattr("vidgen_ray.batch.director.FIRST_MESSAGE_S", 0.0)
    reported, rest = threading.Event(), LaterLines.rest

    def slow_lines(*args):
        reported.wait()
        yield from rest(*args)

    class Reported(Events):
        def on_message(self, message):
            super().on_message(message)
            if "no line has come" in message:
                reported.set()

    monkeypatch.setattr(LaterLines, "rest", slow_lines)
    events, lines = Reported(), [{**line, "face_image": str(ASTRONAUT)} for line in shots(4)]
    report, _ = render_lines(tmp_path, profile, lines, events, gpus=ONE_GPU, cache="none")
    assert report.done == 4
    message = next(message for message in events.messages if "no line has come" in message)
    assert message.startswith("all shots so far are rendered")
    assert "Rendering holds 1 GPU and" in message, message
    assert Counter(record["stages"][0]["cached"] for record in records(tmp_path).values()) == {True: 3, False: 1}


def test_shot_that_fits_on_no_gpu_fails_before_its_first_stage(in_process, tmp_path, profile):
    profile = with_actor(profile, "svd", memory_gb=0)
    large = {"width": 1024, "height": 1024, "num_frames": 256}
    # Its image would fail on every worker. The other shot has no clip, so no shot that fits needs SVD.
    lines = [{"id": "large", "prompt": "raise", **large}, {"id": "image", "prompt": "a", "generate_video": False}]
    report, rows = render_lines(tmp_path, profile, lines)
    assert (report.done, report.failed) == (1, 1)
    failed = rows["large"]
    assert (failed.failure_stage, failed.failure_error, failed.failure_attempts) == ("svd", "OutOfMemory", 1)
    assert "the largest GPU has 80; at most 1024x1024 with" in failed.failure_message
    with pytest.raises(SetupError, match="the largest GPU has 80; at most 1024x1024 with"):
        render_lines(tmp_path, profile, lines[:1])
    with pytest.raises(SetupError, match="the plan needs 3 GPUs, this machine has 2"):
        expect_gpus(3)


def test_start_images_are_written_without_a_worker(tmp_path, profile, monkeypatch):
    monkeypatch.setattr(fleet, "_log", log := Mock())
    report, _ = render_lines(tmp_path, profile, [{"id": "s", "prompt": "a", "image": str(ASTRONAUT), "generate_video": False}])
    assert report.done == 1
    log.warning.assert_not_called()


def test_run_resumed_by_another_version_mixes_no_results(in_process, tmp_path, profile, monkeypatch):
    stop = threading.Event()
    first, _ = render_lines(tmp_path, profile, shots(6), Events(stop.set), gpus=ONE_GPU, stop=stop)
    before = records(tmp_path)
    # A version that computes the same keeps what is finished. Each record names its version.
    monkeypatch.setattr("vidgen_ray.outputs.folder.software_versions", lambda: {"vidgen-ray": "next"})
    second, _ = render_lines(tmp_path, profile, shots(6), gpus=ONE_GPU)
    assert (second.skipped, second.done) == (first.done, 6 - first.done)
    assert sum(record["software"] == {"vidgen-ray": "next"} for record in records(tmp_path).values()) == second.done
    assert {name: records(tmp_path)[name] for name in before} == before
    # A version with another FLUX stage renders all shots again.
    monkeypatch.setattr(FluxStage, "version", FluxStage.version + 1)
    third, rows = render_lines(tmp_path, profile, shots(6), gpus=ONE_GPU)
    assert (third.skipped, third.done, len(rows)) == (0, 6, 6)
    assert {record["key"] for record in records(tmp_path).values()}.isdisjoint(record["key"] for record in before.values())
