"""The output folder: what is done, what became of each line, who may work in it and what is swept out of it."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vidgen_ray.atomic_files import temporary_folder, temporary_prefix, write_atomically
from vidgen_ray.cli.gc import gc
from vidgen_ray.content_keys import ShotPlan, ShotPlanner, params_of
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import stages_of
from vidgen_ray.outputs import lease as leases
from vidgen_ray.outputs import manifest_writer
from vidgen_ray.outputs.failures import FailedLine
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.garbage import collect_garbage
from vidgen_ray.outputs.id_index import IdIndex
from vidgen_ray.outputs.local_storage import LocalStorage
from vidgen_ray.outputs.manifest import REFUSED, SCHEMA, ManifestRow, manifest_batches, read_manifest
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.object_storage import without_credentials
from vidgen_ray.outputs.records import Failure, StepRecord
from vidgen_ray.report.gallery import write_gallery


@pytest.fixture
def outputs(tmp_path):
    return OutputFolder(tmp_path / "out")


@pytest.fixture
def plan_of(tiny, make_shot):
    def make(shot_id: str, **fields) -> ShotPlan:
        shot = make_shot(id=shot_id, **{"upscale_video": False, **fields})
        return ShotPlanner(params_of(tiny, stages_of(shot)), tiny.encode)(shot)

    return make


def commit(outputs, plan, names=("image.png", "video.mp4")):
    with outputs.draft(plan) as draft:
        for name in names:
            draft.path(name).write_bytes(name.encode())
        return draft.commit(
            [
                StepRecord(stage=s.stage, key=s.key, weights=s.weights, seconds=2, gpu_seconds=1, cached=False, adapter_loads=1)
                for s in plan.steps
            ]
        )


class TestDone:
    def test_what_was_committed_is_found_with_its_summary_and_its_record(self, outputs, plan_of):
        plan = plan_of("x")
        record = commit(outputs, plan)
        done = outputs.done(plan)
        assert done.record() == record
        assert done.summary == record.summary
        assert (done.summary.seconds, done.summary.gpu_seconds, done.summary.lora_loads) == (4, 2, 2)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", "{}", '{"key": 1}', '{"key": "%s"}', '{"key": "%s", "files": [], "stages": []}',
                 '{"key": "%s", "files": {"image.png": 9}, "stages": []}', '{"key": "%s", "files": {}, "stages": {"a": 1}}']
    )  # fmt: skip
    def test_a_damaged_record_is_no_record(self, outputs, plan_of, text):
        plan = plan_of("x")
        commit(outputs, plan)
        (outputs.shot_folder("x") / "shot.json").write_text(text.replace("%s", plan.key))
        assert outputs.done(plan) is None

    def test_files_must_be_there_at_their_full_length_and_with_the_stages_where_asked(self, outputs, plan_of):
        plan = plan_of("x")
        commit(outputs, plan)
        assert outputs.done(plan, with_stages=True) is None
        commit(outputs, plan, ("image.png", "video.mp4", "base.png"))
        assert outputs.done(plan, with_stages=True)
        clip = outputs.shot_folder("x") / "video.mp4"
        clip.write_bytes(clip.read_bytes()[:-1])
        assert outputs.done(plan) is None
        clip.unlink()
        assert outputs.done(plan) is None

    def test_a_shot_is_found_by_its_key_whatever_its_id(self, outputs, plan_of):
        mine, other = plan_of("mine"), plan_of("other", prompt="another")
        record = commit(outputs, mine)
        assert outputs.find(plan_of("theirs").key).record() == record
        assert outputs.find(other.key) is None
        # The id stands for another shot now, which is what its key leads to.
        commit(outputs, plan_of("mine", prompt="another"))
        assert outputs.find(mine.key) is None
        assert outputs.find(other.key).record().shot.id == "mine"

    def test_a_shot_that_is_forgotten_leaves_nothing_by_which_its_person_could_be_seen(self, outputs, plan_of):
        mine, other = plan_of("mine"), plan_of("other", prompt="another")
        for plan in (mine, other):
            commit(outputs, plan)
            for step in plan.steps:
                outputs.stage_cache.put(step.key, {"image": np.zeros((2, 2, 3), np.uint8)})
        outputs.forget("mine")
        outputs.forget("nobody")
        assert (outputs.find(mine.key), outputs.done(mine), outputs.shot_folder("mine").exists()) == (None, None, False)
        assert not any(outputs.stage_cache.has(step.key) for step in mine.steps)
        assert outputs.find(other.key)
        assert all(outputs.stage_cache.has(step.key) for step in other.steps)

    def test_a_storage_that_does_not_answer_is_no_answer(self, outputs, plan_of):
        plan = plan_of("x")
        (outputs.shot_folder("x") / "shot.json").mkdir(parents=True)
        with pytest.raises(IsADirectoryError):
            outputs.done(plan)
        assert outputs.find(plan.key) is None

    @pytest.mark.parametrize("text", [b"", b"\xff", b"../..", b"nobody", b"mine/../mine"])
    def test_a_damaged_key_leads_nowhere(self, outputs, plan_of, text):
        plan = plan_of("mine")
        commit(outputs, plan)
        (outputs.root / "keys" / plan.key).write_bytes(text)
        assert outputs.find(plan.key) is None

    def test_a_commit_that_dies_at_its_last_file_is_not_found_and_the_next_one_is(self, outputs, plan_of, monkeypatch):
        plan = plan_of("mine")
        publish = type(outputs.storage).publish
        monkeypatch.setattr(
            type(outputs.storage), "publish", lambda *args: None if args[-1] == ["shot.json"] else publish(*args)
        )
        commit(outputs, plan)
        assert outputs.find(plan.key) is None
        monkeypatch.undo()
        record = commit(outputs, plan)
        assert outputs.find(plan.key).record() == record

    def test_each_plan_is_answered_in_order(self, outputs, plan_of):
        plans = [plan_of(f"s{number}") for number in range(5)]
        for plan in plans[::2]:
            commit(outputs, plan)
        assert [(plan.shot.id, found is not None) for plan, found in outputs.done_each(iter(plans))] == [
            (f"s{number}", number % 2 == 0) for number in range(5)
        ]

    def test_a_commit_that_is_killed_between_files_leaves_nothing_done(self, outputs, plan_of, monkeypatch):
        plan = plan_of("x")
        commit(outputs, plan)
        replaced = []

        def dies_at_the_second(source, target, *, replace=os.replace):
            if replaced:
                raise KeyboardInterrupt
            replaced.append(target)
            replace(source, target)

        monkeypatch.setattr(os, "replace", dies_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            commit(outputs, plan)
        assert outputs.done(plan) is None

    def test_an_output_folder_travels_and_shows_no_credentials(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        packed = pickle.dumps(OutputFolder("out"))
        monkeypatch.chdir("/")
        here = pickle.loads(packed)
        assert here.root == tmp_path / "out"
        far = OutputFolder("s3://KEY:SECRET@clips/a?endpoint_override=h:1&scheme=http")
        far.storage  # noqa: B018  # made, and not carried along
        again = pickle.loads(pickle.dumps(far))
        assert (again.url, repr(again)) == ("s3://clips/a", "OutputFolder(s3://clips/a)")
        with pytest.raises(SetupError, match="s3://clips/a: lies in an object store"):
            _ = again.root

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("s3://clips/a/b?region=x", "s3://clips/a/b"),
            ("s3://K:S@clips/a", "s3://clips/a"),
            ("s3://K:S/E+C@clips/a", "s3://clips/a"),
            ("s3://clips/a@b", "s3://clips/a@b"),
            ("gs://clips", "gs://clips"),
            ("abfs://box@account.dfs.core.windows.net/a", "abfs://box@account.dfs.core.windows.net/a"),
            ("abfs://:word@account/box", "abfs://account/box"),
        ],
    )
    def test_credentials_are_cut_out_of_urls(self, url, shown):
        assert without_credentials(url) == shown

    @pytest.mark.parametrize("root", ["ftp://u:SECRET@h/x", "s3://u:SEC/RET@h/x", "s3:///x", "s3://u:SECRET@h/x?nonsense=1"])
    def test_a_url_that_cannot_be_opened_is_told_without_its_secret(self, root):
        with pytest.raises(SetupError, match="output folder") as told:
            OutputFolder(root).prepare()
        assert "RET" not in str(told.value)
        assert told.value.__cause__ is None

    def test_a_url_as_a_path_is_refused(self):
        with pytest.raises(SetupError, match="give it as text"):
            OutputFolder(Path("s3://clips/a"))


def row(run, shot_id, status="done", script="s.jsonl", **columns):
    return ManifestRow(run=run, script=script, id=shot_id, line=1, status=status, **columns)


def failure(stage="svd"):
    return Failure(stage=stage, error="E", message="m", attempts=1, worker="w")


def failed(run, shot_id, stage="svd", script="s.jsonl"):
    line = FailedLine(shot_id, script, {"prompt": shot_id}, failure(stage))
    return {"row": row(run, shot_id, "failed", script, failure_stage=stage), "failed": line}


def write(outputs, run, *entries, script="s.jsonl", close=True, **how):
    writer = ManifestWriter(outputs, run, script)
    for entry in entries:
        writer.add(**entry) if isinstance(entry, dict) else writer.add(entry)
    writer.flush()
    if close:
        writer.close(**how)
    return writer


def table(outputs):
    """Id -> (run, status), as whoever reads the folder as one table sees it."""
    rows = pq.read_table(outputs.root / "manifest").to_pylist()
    assert len({r["id"] for r in rows}) == len(rows), "an id twice"
    return {r["id"]: (r["run"], r["status"]) for r in rows}


def failures(outputs):
    path = outputs.root / "failures.jsonl"
    return [json.loads(line)["failure"]["id"] for line in path.read_text().splitlines()] if path.exists() else []


class TestManifest:
    def test_later_runs_replace_the_rows_of_earlier_ones(self, outputs):
        write(outputs, "r1", row("r1", "a"), failed("r1", "b"), row("r1", "c"))
        assert failures(outputs) == ["b"]
        write(outputs, "r2", row("r2", "b"), failed("r2", "c"), row("r2", "d"))
        assert table(outputs) == {"a": ("r1", "done"), "b": ("r2", "done"), "c": ("r2", "failed"), "d": ("r2", "done")}
        assert failures(outputs) == ["c"]
        write(outputs, "r3", row("r3", "c"))
        assert failures(outputs) == []
        assert not (outputs.root / "failures.jsonl").exists()
        assert sorted(path.name for path in outputs.root.iterdir()) == ["manifest"]

    def test_what_a_script_was_refused_for_is_void_when_it_is_read_again_to_its_end(self, outputs):
        write(outputs, "r1", failed("r1", "s-line-7", REFUSED), failed("r1", "x", REFUSED, "other.jsonl"))
        write(outputs, "r2", row("r2", "a"), whole_script=False)
        assert set(table(outputs)) == {"a", "s-line-7", "x"}
        assert sorted(failures(outputs)) == ["s-line-7", "x"]
        write(outputs, "r3", row("r3", "a"))
        assert set(table(outputs)) == {"a", "x"}
        assert failures(outputs) == ["x"]

    def test_a_line_may_replace_one_of_another_name(self, outputs):
        write(outputs, "r1", failed("r1", "s-line-1", REFUSED))
        write(outputs, "r2", {"row": row("r2", "a", script="failures.jsonl"), "replaces": "s-line-1"}, script="failures.jsonl")
        assert (set(table(outputs)), failures(outputs)) == ({"a"}, [])

    def test_rows_of_a_killed_run_count_and_the_next_run_makes_one_account(self, outputs):
        write(outputs, "r1", row("r1", "a"), row("r1", "b"), failed("r1", "c"), failed("r1", "d"))
        write(outputs, "r2", failed("r2", "a"), row("r2", "c"), close=False)
        assert {r.id: (r.run, r.status) for r in read_manifest(outputs.root)}["a"] == ("r2", "failed")
        assert (outputs.root / "failures" / "r2-00001.jsonl").exists()
        write(outputs, "r3", row("r3", "e", script="other"), script="other")
        assert table(outputs) == {
            "a": ("r2", "failed"), "b": ("r1", "done"), "c": ("r2", "done"), "d": ("r1", "failed"), "e": ("r3", "done")
        }  # fmt: skip
        assert sorted(failures(outputs)) == ["a", "d"]
        assert not (outputs.root / "failures").exists()

    @pytest.mark.parametrize("operation", ["write", "delete", "new_file"])
    @pytest.mark.parametrize("survived", range(6))
    def test_a_close_that_is_killed_anywhere_is_made_good_by_the_next(self, outputs, monkeypatch, operation, survived):
        monkeypatch.setattr(manifest_writer, "PART_ROWS", 2)
        monkeypatch.setattr(manifest_writer, "FILE_ROWS", 3)
        write(outputs, "r1", *(row("r1", f"a{n}") for n in range(4)), failed("r1", "b"), failed("r1", "c"))
        writer = write(
            outputs, "r2", *(row("r2", f"a{n}") for n in range(2, 6)), row("r2", "b"), failed("r2", "d"), close=False
        )
        calls, original = [], getattr(LocalStorage, operation)

        def dies(self, *args):
            calls.append(args)
            if len(calls) > survived:
                raise KeyboardInterrupt
            return original(self, *args)

        with monkeypatch.context() as patched:
            patched.setattr(LocalStorage, operation, dies)
            try:
                writer.close()
            except KeyboardInterrupt:
                pass
            else:
                assert len(calls) <= survived
        write(outputs, "r3", row("r3", "z", script="other"), script="other")
        expected = {f"a{n}": ("r1", "done") for n in range(2)} | {f"a{n}": ("r2", "done") for n in range(2, 6)}
        expected |= {"b": ("r2", "done"), "c": ("r1", "failed"), "d": ("r2", "failed"), "z": ("r3", "done")}
        assert table(outputs) == expected
        assert sorted(failures(outputs)) == ["c", "d"]
        assert not list(outputs.root.rglob(".tmp-*"))

    def test_a_running_run_can_be_looked_at(self, outputs, monkeypatch):
        monkeypatch.setattr(manifest_writer, "FLUSH_S", 0.02)
        writer = ManifestWriter(outputs, "r1", "s.jsonl")
        try:
            for shot_id in ("a", "b"):
                writer.add(row("r1", shot_id))
                deadline = time.monotonic() + 20
                while shot_id not in {r.id for r in read_manifest(outputs.root)}:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)  # the file system tells nobody
            assert [path.name for path in (outputs.root / "manifest").iterdir()] == ["r1-00001.parquet"]
        finally:
            writer.close()

    def test_a_part_that_grows_while_it_is_read_is_read_as_it_was(self, outputs, monkeypatch):
        writer, add_new = write(outputs, "r1", row("r1", "a"), close=False), IdIndex.add_new

        def add_new_and_grow(self, ids):
            writer.add(row("r1", f"after {ids}"))
            writer.flush()
            return add_new(self, ids)

        monkeypatch.setattr(IdIndex, "add_new", add_new_and_grow)
        assert [r.id for r in read_manifest(outputs.root)] == ["a"]
        monkeypatch.undo()
        writer.close()

    def test_a_run_that_ends_while_it_is_looked_at_hides_no_row(self, outputs, monkeypatch):
        monkeypatch.setattr(manifest_writer, "PART_ROWS", 1)
        writer = write(outputs, "r1", row("r1", "a"), row("r1", "b"), row("r1", "c"), close=False)
        reading = manifest_batches(outputs.storage)
        assert next(reading).column("id").to_pylist() == ["c"]
        writer.close()
        assert sorted(id_ for batch in reading for id_ in batch.column("id").to_pylist()) == ["a", "b"]

    def test_files_that_are_no_manifest_of_ours_are_left_alone(self, outputs):
        folder = outputs.root / "manifest"
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
        (folder / "broken.parquet").write_bytes(b"PAR1")
        pq.write_table(pa.table({"id": ["a"], "colour": ["red"]}), folder / "other.parquet")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        write(outputs, "r1", row("r1", "a"))
        assert {name: (folder / name).read_bytes() for name in before} == before
        assert [r.id for r in read_manifest(outputs.root)] == ["a"]

    def test_a_manifest_from_before_a_column_was_added_is_brought_up_to_date(self, outputs):
        (outputs.root / "manifest").mkdir(parents=True)
        old = pa.Table.from_pylist([vars(row("r0", "old"))], schema=SCHEMA).drop_columns(["lora_loads"])
        pq.write_table(old, outputs.root / "manifest" / "r0.parquet")
        write(outputs, "r1", row("r1", "a", lora_loads=2))
        assert {r.id: r.lora_loads for r in read_manifest(outputs.root)} == {"old": None, "a": 2}
        assert pq.read_schema(next((outputs.root / "manifest").iterdir())).equals(SCHEMA)

    def test_files_hold_so_many_rows_at_most_and_full_ones_are_not_written_again(self, outputs, monkeypatch):
        for name, rows in (("PART_ROWS", 20), ("FILE_ROWS", 100), ("SMALL_FILE_ROWS", 60)):
            monkeypatch.setattr(manifest_writer, name, rows)
        write(outputs, "r1", *(row("r1", f"a{n:03d}") for n in range(250)))
        files = sorted((outputs.root / "manifest").iterdir())
        assert [pq.read_metadata(file).num_rows for file in files] == [100, 100, 50]
        before = files[0].stat().st_mtime_ns
        write(outputs, "r2", row("r2", "a150"), row("r2", "b"))
        assert files[0].stat().st_mtime_ns == before
        assert sorted(pq.read_metadata(file).num_rows for file in (outputs.root / "manifest").iterdir()) == [51, 100, 100]
        assert len(table(outputs)) == 251

    def test_text_that_is_no_text_is_written_down_all_the_same(self, outputs):
        refused = ManifestRow.of_refused_line("r1", "s", "x", 3, "a\udc80b", failure(REFUSED))
        lines = [FailedLine("x", "s", {"prompt": "a\udc80b"}, failure()), FailedLine("y", "s", {("no", "key"): 1}, failure())]
        write(outputs, "r1", {"row": refused, "failed": lines[0]}, {"row": row("r1", "y", "failed"), "failed": lines[1]})
        assert {r.id: r.prompt for r in read_manifest(outputs.root)}["x"] == "a\\udc80b"
        first, second = (outputs.root / "failures.jsonl").read_bytes().decode("utf-8").splitlines()
        assert json.loads(first)["prompt"] == "a\udc80b"
        assert "no" in json.loads(second)["unreadable"]

    def test_lines_somebody_wrote_into_failures_by_hand_stay(self, outputs):
        outputs.root.mkdir()
        (outputs.root / "failures.jsonl").write_text('{"prompt": "mine"}\n\nnot json\n')
        write(outputs, "r1", row("r1", "a"))
        assert (outputs.root / "failures.jsonl").read_text() == '{"prompt": "mine"}\nnot json\n'

    def test_a_row_of_a_shot_says_what_its_record_says(self, outputs, plan_of):
        plan = plan_of("x", metadata={"k": [1]})
        record = commit(outputs, plan)
        rows = [ManifestRow.of_shot("r", "s", plan.shot, 3, what, "done") for what in (record, outputs.done(plan))]
        assert vars(rows[0]) | {"ended_at": ""} == vars(rows[1]) | {"ended_at": ""}
        checked = ManifestRow.model_validate(vars(rows[0]))
        assert (checked.video, checked.hd_video, checked.seconds, checked.lora_loads) == ("shots/x/video.mp4", None, 4, 2)
        assert (checked.image_sha256, checked.metadata) == (record.files["image.png"].sha256, '{"k": [1]}')
        failed = ManifestRow.model_validate(vars(ManifestRow.of_shot("r", "s", plan.shot, 3, failure(), "failed")))
        assert (failed.failure_stage, failed.failure_worker, failed.key) == ("svd", "w", None)

    def test_the_gallery_shows_the_failed_first_and_counts_all(self, outputs):
        write(outputs, "r1", *(row("r1", f"a{n}", prompt="p") for n in range(600)), failed("r1", "broken"))
        page = write_gallery(outputs.root).read_text()
        assert "601 shots" in page
        assert "600 done, 0 already done, 1 failed. Showing the first 500;" in page
        assert page.count("<article>") == 500
        assert page.index("broken") < page.index("a0")

    def test_memory_does_not_grow_with_the_rows(self, tmp_path):
        """200,000 rows, and then 50,000 of them by another run, take little more than 10,000 do. As objects they are 400 MB."""
        code = """
import sys
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow, manifest_batches
from vidgen_ray.outputs.manifest_writer import ManifestWriter
row = ManifestRow(run="r", script="s", id="x", line=1, status="done", prompt="a photo of a man " * 4)

def peak_mb():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024

def write(out, run, count):
    outputs = OutputFolder(out)
    writer = ManifestWriter(outputs, run, "s")
    for number in range(count):
        writer.add(row.model_copy(update={"run": run, "id": f"a-shot-of-a-long-script-{number:07d}"}))
    writer.close()
    return sum(len(batch) for batch in manifest_batches(outputs.storage))

assert write(sys.argv[1] + "/small", "r1", 10_000) == 10_000
before = peak_mb()
assert write(sys.argv[1] + "/large", "r1", 200_000) == 200_000
assert write(sys.argv[1] + "/large", "r2", 50_000) == 200_000
print(peak_mb() - before)
"""
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        grown_mb = float(done.stdout)
        assert grown_mb < 120, f"{grown_mb:.0f} MB"


def test_an_index_of_ids_tells_the_first_of_each():
    ids = IdIndex()
    assert ids.add_new(["a", "b", "a"]) == [True, True, False]
    ids.add(["c", "ü"])
    assert ids.add_new(["c", "d", "b"]) == [False, True, False]
    assert ids.known(["a", "x", "ü"]) == {"a", "ü"}
    assert ids.known([]) == set()
    ids.close()


class TestLease:
    def test_a_second_run_is_refused_by_the_name_of_the_first(self, outputs):
        with outputs.lease("r1"):
            with pytest.raises(SetupError, match=rf"run r1 is working in it \(process {os.getpid()} on ") as told:
                outputs.lease("r2").__enter__()
            assert "another folder" in str(told.value)
            assert sorted(path.name for path in outputs.root.iterdir()) == [".running-r1"]
        assert not list(outputs.root.iterdir())
        with outputs.lease("r2"):
            pass

    def _leave(self, outputs, host, pid, age_s):
        path = outputs.root / ".running-r0"
        write_atomically(path, json.dumps({"run": "r0", "host": host, "pid": pid, "since": "then"}))
        os.utime(path, (time.time() - age_s,) * 2)
        return path

    def test_a_run_whose_process_is_gone_holds_nothing(self, outputs):
        dead = subprocess.Popen(["true"])
        dead.wait()
        left = self._leave(outputs, os.uname().nodename, dead.pid, age_s=0)
        with outputs.lease("r1"):
            assert not left.exists()

    def test_a_run_of_another_machine_holds_the_folder_until_it_is_stale(self, outputs):
        self._leave(outputs, "elsewhere", 1, age_s=100)
        with pytest.raises(SetupError, match=r"process 1 on elsewhere, since then.*free in (19|20|21) s"), outputs.lease("r1"):
            pass
        self._leave(outputs, "elsewhere", 1, age_s=121)
        with outputs.lease("r1"):
            pass

    def test_a_damaged_lease_counts_by_its_age(self, outputs):
        write_atomically(outputs.root / ".running-r0", "{")
        with pytest.raises(SetupError, match="run r0 is working"), outputs.lease("r1"):
            pass

    def test_a_lease_is_kept_fresh(self, outputs, monkeypatch):
        monkeypatch.setattr(leases, "REFRESH_S", 0.02)
        path = outputs.root / ".running-r1"
        with outputs.lease("r1"):
            os.utime(path, (0, 0))
            deadline = time.monotonic() + 20
            while not path.stat().st_mtime:
                assert time.monotonic() < deadline
                time.sleep(0.01)  # the file system tells nobody


class TestGarbage:
    def _fill(self, outputs, plan_of):
        """Two shots, one made anew with another key, and a partial one; entries of the cache, of which one is not used."""
        commit(outputs, plan_of("y", prompt="before"))
        record = commit(outputs, plan_of("x"))
        commit(outputs, plan_of("y", prompt="other"))
        for key in [*(step.key for step in record.stages), "ab" * 32]:
            write_atomically(outputs.root / "cache" / key[:2] / key / "image.png", b"123")
        for path in ("shots/partial/image.png", "shots/mine/holiday.jpg", "cache/readme/notes", "spool/r0/000000.jsonl"):
            write_atomically(outputs.root / path, b"12345")
        dead = subprocess.Popen(["true"])
        dead.wait()
        left = temporary_prefix().replace(f"-{os.getpid()}-", f"-{dead.pid}-")
        write_atomically(outputs.root / "shots" / f"{left}x" / "hd.mp4", b"1234567")
        temporary_folder(outputs.root / "shots")
        write_atomically(outputs.root / "manifest" / f"{left}y", b"1")
        return record

    def test_what_nothing_refers_to_goes_and_the_rest_stays(self, outputs, plan_of):
        record = self._fill(outputs, plan_of)
        before = {path for path in outputs.root.rglob("*") if path.is_file()}
        foreseen = collect_garbage(outputs, dry_run=True, grace_s=-1)
        assert {path for path in outputs.root.rglob("*") if path.is_file()} == before
        report = collect_garbage(outputs, grace_s=-1)
        assert report == foreseen
        assert report.counts == {"cache entries": 1, "partial shots": 1, "stale keys": 1, "temporaries": 2, "spools": 1}
        assert report.bytes == 3 + 5 + 1 + 5 + 7 + 1
        gone = {str(path.relative_to(outputs.root)) for path in before - {p for p in outputs.root.rglob("*") if p.is_file()}}
        assert {name for name in gone if ".tmp-" not in name} == {
            f"cache/ab/{'ab' * 32}/image.png", "shots/partial/image.png", "spool/r0/000000.jsonl",
            f"keys/{plan_of('y', prompt='before').key}",
        }  # fmt: skip
        assert outputs.find(plan_of("z", prompt="other").key).record().shot.id == "y"
        assert outputs.done(plan_of("x")).record() == record
        assert sum(collect_garbage(outputs, grace_s=-1).counts.values()) == 0

    def test_what_is_young_is_left_alone(self, outputs, plan_of):
        self._fill(outputs, plan_of)
        report = collect_garbage(outputs)
        assert report.counts == {"cache entries": 0, "partial shots": 0, "stale keys": 0, "temporaries": 2, "spools": 1}
        assert report.left_young == 3

    def test_nothing_goes_while_a_run_is_working(self, outputs, plan_of):
        self._fill(outputs, plan_of)
        with outputs.lease("r1"), pytest.raises(SetupError, match="run r1 is working in it"):
            collect_garbage(outputs, grace_s=-1)
        assert (outputs.root / "spool" / "r0").exists()

    def test_a_folder_that_is_not_there_is_not_made(self, outputs):
        with pytest.raises(SetupError, match="there is none"):
            collect_garbage(outputs)
        assert not outputs.root.exists()

    def test_the_command_says_how_much(self, outputs, plan_of, capsys):
        self._fill(outputs, plan_of)
        gc(str(outputs.root), dry_run=True, as_json=True)
        said = json.loads(capsys.readouterr().out)
        assert (said["dry_run"], said["counts"]["spools"], said["left_young"]) == (True, 1, 3)
        gc(str(outputs.root), dry_run=False, as_json=False)
        assert capsys.readouterr().out.startswith(
            "removed 0 cache entries, 0 partial shots, 0 stale keys, 2 temporaries, 1 spools: 0.0 MB\n3 y"
        )
