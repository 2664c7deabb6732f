"""Status and log of a run in its output folder, on a disk and in an object store (moto)."""

import json
import threading
from contextlib import suppress
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
from starlette.testclient import TestClient

from vidgen_ray.batch.progress import RunRecorder
from vidgen_ray.cli.app import run_command
from vidgen_ray.engine.status import Attempt, Snapshot
from vidgen_ray.outputs import run_log
from vidgen_ray.outputs.manifest import SCHEMA, ManifestRow
from vidgen_ray.outputs.reviews import Opinion, ReviewSession
from vidgen_ray.outputs.run_log import RunLabels, StageStatus, read_log, read_status
from vidgen_ray.outputs.storage import LocalStorage, storage_at
from vidgen_ray.report.gallery_page import gallery_app

RUN = "000001-film"
LABELS = RunLabels(run=RUN, name="film", profile="tiny", script="s.jsonl", team="blue", submission_id="job-1")
BUSY = Snapshot({"svd": StageStatus(14, 2, 2, 0.98)}, 0.93, 21, waiting_for="waiting for 2 GPUs: run b holds them")
NO_LISTENER = SimpleNamespace(
    **{f"on_{name}": lambda *_: None for name in ("lines", "finished", "status", "message", "rejected")}
)


def recorder(storage, is_sure=True, labels=LABELS):
    return RunRecorder(storage, SimpleNamespace(is_sure=is_sure), labels, NO_LISTENER)


def attempt(shot, number=1, outcome="done", **fields):
    return Attempt(shot, "svd", number, outcome, 1.8e9, 1.5, 0.25, f"{RUN}/1/worker/0/0", "node-a", **fields)


def record(recorder):
    """Report a run of ten lines, one of which is finished."""
    recorder.on_lines(10, 1, 0, complete=True)
    recorder.on_status(BUSY)
    recorder.on_message("a worker is quarantined")
    recorder.on_attempt(attempt("a", outcome="error", error="TimedOut", message="too slow"))
    recorder.on_attempt(attempt("a", 2))
    recorder.on_attempt(attempt("b"))
    recorder.on_finished(ManifestRow(run=RUN, script="s.jsonl", id="a", line=1, status="done"))


def test_status_and_log_are_on_disks_and_in_object_stores(tmp_path, url, capsys):
    for out in (str(tmp_path), url):
        storage = storage_at(out)
        running = recorder(storage)
        record(running)
        going = running._status()
        running.__exit__(KeyboardInterrupt, None, None)
        assert (going.waiting_for, going.in_progress) == (BUSY.waiting_for, 21)
        status = read_status(storage)
        assert status.model_dump().items() >= {**LABELS.model_dump(), "ended": True, "error": "KeyboardInterrupt"}.items()
        assert (status.total, status.done, status.skipped, status.remaining, status.complete) == (10, 1, 1, 8, True)
        assert going.model_dump()["stages"] == {"svd": {"queued": 14, "running": 2, "workers": 2, "busy": 0.98}}
        assert (status.stages, status.in_progress, status.gpus_busy) == ({}, 0, None)
        assert status.messages == ("a worker is quarantined",)
        assert [line["outcome"] for line in read_log(storage, "a")] == ["error", "done"]
        assert run_command(["logs", out, "a"]) == run_command(["status", out]) == 0
        printed = capsys.readouterr().out
        assert "TimedOut: too slow" in printed
        assert "team blue, job job-1" in printed
        assert "2/10 shots" in printed
        assert run_command(["logs", out, "a", "--json"]) == 0
        assert (
            json.loads(capsys.readouterr().out)[1].items() >= {"run": RUN, "worker": "1/worker/0/0", "node": "node-a"}.items()
        )
        assert run_command(["status", out, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["run"]["name"] == "film"
        assert run_command(["logs", out, "unknown"]) == 4


def test_damaged_status_and_logs_are_left_out(tmp_path, capsys):
    storage = LocalStorage(tmp_path)
    with recorder(storage) as running:
        record(running)
        content = running._status().model_dump(mode="json")
    (log,) = storage.files("logs")
    storage.write(f"logs/{log}", storage.read(f"logs/{log}") + b'["a"]\n{"shot": "a"}\n{"shot": "a"')
    assert run_command(["logs", str(tmp_path), "a"]) == 0
    storage.write("run.json", json.dumps({"run": RUN, "seconds": 75, "gpu_seconds": 9, "cost": 0.004, "currency": None}))
    assert run_command(["status", str(tmp_path)]) == 0
    assert "Last run that ended: 1 min 15 s, 0.004 (in the currency" in capsys.readouterr().out
    for fields in ({"at": "2026-11-29T12:00:00"}, {"stages": {"svd": {"queued": 1}}}, {"total": "many"}):
        storage.write("status.json", json.dumps({**content, **fields}))
        assert read_status(storage) is None, fields
    storage.write("run.json", '{"seconds": "x"}')
    assert run_command(["status", str(tmp_path)]) == 4


def test_status_has_the_cost_of_clips_accepted_clips_scripts_and_characters(tmp_path, capsys):
    rows = []
    session = ReviewSession(LocalStorage(tmp_path), "ann")
    for number, (script, character, cost, status, verdict) in enumerate(
        [
            ("a.jsonl", "ann", 0.5, "done", "accept"),
            ("a.jsonl", "ann", 1.5, "done", "reject"),
            ("b.jsonl", None, 3.0, "done", "accept"),
            ("b.jsonl", None, None, "done", None),
            ("b.jsonl", None, 9.0, "replaced", "accept"),
        ]
    ):
        fields = {"id": f"s-{number}", "status": status, "script": script, "cost": cost, "currency": "USD"}
        rows.append({**fields, "metadata": json.dumps({"character": character}), "video_sha256": f"{number:064}"})
        session.add(Opinion(clip_sha256=f"{number:064}", verdict=verdict), f"s-{number}")
    (tmp_path / "manifest").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "manifest" / "r-00001.parquet")
    assert run_command(["status", str(tmp_path), "--json"]) == 0
    names = ("of", "name", "currency", "cost", "clips", "accepted", "cost_per_clip", "cost_per_accepted")
    assert [tuple(each[name] for name in names) for each in json.loads(capsys.readouterr().out)["costs"]] == [
        ("all", None, "USD", 5.0, 3, 2, 1.666667, 2.5),
        ("script", "b.jsonl", "USD", 3.0, 1, 1, 3.0, 3.0),
        ("script", "a.jsonl", "USD", 2.0, 2, 1, 1.0, 2.0),
        ("character", "ann", "USD", 2.0, 2, 1, 1.0, 2.0),
    ]
    assert run_command(["status", str(tmp_path)]) == 0
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if "character ann" in line]
    assert line == ["character", "ann", "2", "1", "2.00", "USD", "1.00", "USD", "2.00", "USD"]


def test_watch_serves_the_shots_and_the_run_of_an_object_store(url):
    storage = storage_at(url)
    with recorder(storage) as running:
        record(running)
        going = running._status()
    storage.write("status.json", going.model_dump_json())
    storage.write("shots/ab/a/video.mp4", bytes(100))
    storage.write("jobs.db", "secret")
    client = TestClient(gallery_app(url))
    assert client.get("/rows.json").json()["run"]["waiting_for"] == BUSY.waiting_for
    assert len(client.get("/shots/ab/a/video.mp4", headers={"Range": "bytes=0-9"}).content) == 10
    for path in ("/jobs.db", "/shots/%2e%2e/jobs.db", "/shots/ab/a/hd.mp4", "/status.json"):
        assert client.get(path).status_code == 404, path


def test_run_without_its_lease_does_not_replace_the_status_of_another(tmp_path):
    storage = storage_at(tmp_path)
    with recorder(storage, is_sure=False) as running:
        record(running)
    assert read_status(storage) is None
    assert len(list(read_log(storage, "a"))) == 2


def test_storage_that_hangs_does_not_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "CLOSE_S", 0.01)
    answers = threading.Event()

    class Hanging(LocalStorage):
        def write(self, path, content):
            answers.wait()
            super().write(path, content)

    with recorder(Hanging(tmp_path)) as running:
        record(running)
    assert not list(tmp_path.iterdir())
    answers.set()
    running._log._thread.join()
    assert len(list(read_log(storage_at(tmp_path), "a"))) == 2


def test_log_continues_in_further_files_and_drops_lines_when_it_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "PART_BYTES", 1)
    storage = storage_at(tmp_path)
    with recorder(storage) as running:
        running._log.close()
        for number in range(3):
            running.on_attempt(attempt("a", number))
            # A full disk is tried again.
            with monkeypatch.context() as patched, suppress(OSError):
                patched.setattr(LocalStorage, "write", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
                running._log._write()
            running._log._write()
    assert len(storage.files("logs")) >= 3
    assert [line["attempt"] for line in read_log(storage, "a")] == [0, 1, 2]
    monkeypatch.setattr(run_log, "MAX_UNWRITTEN_BYTES", 1)
    with recorder(storage, labels=LABELS.model_copy(update={"run": "000002"})) as running:
        running._log.close()
        for number in range(5):
            running.on_attempt(attempt("b", number))
        assert running._log._dropped == 4
