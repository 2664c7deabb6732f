"""Output folder: finished shots, manifest, failures, leases and garbage collection."""

import io
import json
import os
import pickle
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vidgen_ray.cli.folder_commands import gc
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs import manifest, manifest_writer
from vidgen_ray.outputs.cleanup import collect_garbage
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import REJECTED, SCHEMA, ManifestRow, manifest_batches, read_manifest
from vidgen_ray.outputs.manifest_writer import FailedLine, ManifestWriter
from vidgen_ray.outputs.object_storage import without_credentials
from vidgen_ray.outputs.records import Failure, StepRecord, key_path, shot_path
from vidgen_ray.outputs.stage_cache import job_path
from vidgen_ray.outputs.storage import LocalStorage
from vidgen_ray.report.gallery_page import gallery_rows, write_gallery
from vidgen_ray.system.files import temporary_folder, temporary_prefix, this_process, write_atomically


@pytest.fixture
def outputs(tmp_path):
    return OutputFolder(tmp_path / "out")


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


class TestFinishedShots:
    def test_committed_shot_is_found_with_its_summary_and_record(self, outputs, plan_of):
        plan = plan_of("x")
        record = commit(outputs, plan)
        done = outputs.find_finished(plan)
        assert done.record() == record
        assert done == record.done
        assert (done.seconds, done.gpu_seconds, done.lora_loads) == (4, 2, 2)

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "null", "{}", '{"key": 1}', '{"key": "%s"}', '{"key": "%s", "files": [], "stages": []}',
                 '{"key": "%s", "files": {"image.png": 9}, "stages": []}', '{"key": "%s", "files": {}, "stages": {"a": 1}}']
    )  # fmt: skip
    def test_shot_with_a_damaged_record_is_not_finished(self, outputs, plan_of, text):
        plan = plan_of("x")
        commit(outputs, plan)
        (outputs.shot_folder("x") / "shot.json").write_text(text.replace("%s", plan.key))
        assert outputs.find_finished(plan) is None

    def test_shot_with_missing_or_truncated_files_is_not_finished(self, outputs, plan_of):
        plan = plan_of("x")
        commit(outputs, plan)
        assert outputs.find_finished(plan, with_stages=True) is None
        commit(outputs, plan, ("image.png", "video.mp4", "base.png"))
        assert outputs.find_finished(plan, with_stages=True)
        clip = outputs.shot_folder("x") / "video.mp4"
        clip.write_bytes(clip.read_bytes()[:-1])
        assert outputs.find_finished(plan) is None
        clip.unlink()
        assert outputs.find_finished(plan) is None

    def test_shot_is_found_by_key_under_another_id(self, outputs, plan_of):
        mine, other = plan_of("mine"), plan_of("other", prompt="another")
        record = commit(outputs, mine)
        assert outputs.find_by_key(plan_of("theirs").key).record() == record
        assert outputs.find_by_key(other.key) is None
        # Another shot replaces the first one under the same id.
        commit(outputs, plan_of("mine", prompt="another"))
        assert outputs.find_by_key(mine.key) is None
        assert outputs.find_by_key(other.key).record().shot.id == "mine"

    def test_delete_shot_deletes_its_files_key_and_cache_entries(self, outputs, plan_of):
        mine, other = plan_of("mine"), plan_of("other", prompt="another")
        for plan in (mine, other):
            commit(outputs, plan)
            for step in plan.steps:
                outputs.stage_cache.put(step.key, {"image": np.zeros((2, 2, 3), np.uint8)})
        outputs.delete_shot("mine")
        outputs.delete_shot("missing")
        assert outputs.find_by_key(mine.key) is None
        assert outputs.find_finished(mine) is None
        assert not outputs.shot_folder("mine").exists()
        assert not any(outputs.stage_cache.has(step.key) for step in mine.steps)
        assert outputs.find_by_key(other.key)
        assert all(outputs.stage_cache.has(step.key) for step in other.steps)

    def test_storage_errors_are_raised_by_find_finished_and_ignored_by_find_by_key(self, outputs, plan_of):
        plan = plan_of("x")
        (outputs.shot_folder("x") / "shot.json").mkdir(parents=True)
        with pytest.raises(IsADirectoryError):
            outputs.find_finished(plan)
        assert outputs.find_by_key(plan.key) is None

    @pytest.mark.parametrize("text", [b"", b"\xff", b"../..", b"missing", b"mine/../mine"])
    def test_damaged_key_file_is_ignored(self, outputs, plan_of, text):
        plan = plan_of("mine")
        commit(outputs, plan)
        (outputs.root / key_path(plan.key)).write_bytes(text)
        assert outputs.find_by_key(plan.key) is None

    def test_commit_without_its_record_is_not_found_by_key(self, outputs, plan_of, monkeypatch):
        plan = plan_of("mine")
        publish = type(outputs.storage).publish
        monkeypatch.setattr(type(outputs.storage), "publish", lambda *args: None if "shot.json" in args[-1] else publish(*args))
        commit(outputs, plan)
        assert outputs.find_by_key(plan.key) is None
        monkeypatch.undo()
        record = commit(outputs, plan)
        assert outputs.find_by_key(plan.key).record() == record

    def test_commit_killed_between_files_leaves_the_shot_unfinished(self, outputs, plan_of, monkeypatch):
        plan = plan_of("x")
        commit(outputs, plan)
        replaced = []

        def interrupt_at_the_second_call(source, target, *, replace=os.replace):
            if replaced:
                raise KeyboardInterrupt
            replaced.append(target)
            replace(source, target)

        monkeypatch.setattr(os, "replace", interrupt_at_the_second_call)
        with pytest.raises(KeyboardInterrupt):
            commit(outputs, plan)
        assert outputs.find_finished(plan) is None

    def test_output_folder_can_be_pickled_and_hides_credentials(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        packed = pickle.dumps(OutputFolder("out"))
        monkeypatch.chdir("/")
        assert pickle.loads(packed).root == tmp_path / "out"
        remote = OutputFolder("s3://KEY:SECRET@clips/a?endpoint=http://h:1")
        # Creates the storage, which is not pickled.
        assert remote.place("a b", "hd.mp4") == f"s3://clips/a/{shot_path('a b').replace(' ', '%20')}/hd.mp4"
        unpickled = pickle.loads(pickle.dumps(remote))
        assert (unpickled.url, repr(unpickled)) == ("s3://clips/a", "OutputFolder(s3://clips/a)")
        with pytest.raises(SetupError, match="s3://clips/a: is in an object store"):
            _ = unpickled.root

    @pytest.mark.parametrize(
        ("url", "expected"),
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
    def test_without_credentials_removes_credentials_from_urls(self, url, expected):
        assert without_credentials(url) == expected

    @pytest.mark.parametrize("root", ["ftp://u:SECRET@h/x", "s3://u:SEC/RET@h/x", "s3:///x", "s3://u:SECRET@h/x?nonsense=1"])
    def test_url_errors_do_not_leak_credentials(self, root):
        with pytest.raises(SetupError, match="output folder") as error:
            OutputFolder(root).prepare()
        assert "RET" not in str(error.value)
        assert error.value.__cause__ is None

    def test_url_in_a_path_is_rejected(self):
        with pytest.raises(SetupError, match="pass it as a string"):
            OutputFolder(Path("s3://clips/a"))


def row(run, shot_id, status="done", script="s.jsonl", **columns):
    return ManifestRow(run=run, script=script, id=shot_id, line=1, status=status, **columns)


def failure(stage="svd"):
    return Failure(stage=stage, error="E", message="m", attempts=1, worker="w")


def failed(run, shot_id, stage="svd", script="s.jsonl"):
    line = FailedLine(shot_id, script, 1, {"prompt": shot_id}, failure(stage))
    return {"row": row(run, shot_id, "failed", script, failure_stage=stage), "failed": line}


def write(outputs, run, *entries, script="s.jsonl", close=True, **close_options):
    """Write rows, and dictionaries of arguments for `ManifestWriter.add`, as one run."""
    writer = ManifestWriter(outputs, run, script)
    for entry in entries:
        writer.add(**entry) if isinstance(entry, dict) else writer.add(entry)
    writer.flush()
    if close:
        writer.close(**close_options)
    return writer


def table(outputs):
    """Return id -> (run, status) of the manifest folder, read as one table."""
    rows = pq.read_table(outputs.root / "manifest").to_pylist()
    assert len({r["id"] for r in rows}) == len(rows), "duplicate ids"
    return {r["id"]: (r["run"], r["status"]) for r in rows}


def failures(outputs):
    path = outputs.root / "failures.jsonl"
    return [json.loads(line)["failure"]["id"] for line in path.read_text().splitlines()] if path.exists() else []


def damaged_prompts(content):
    """Return a Parquet file whose column `prompt` cannot be read."""
    columns = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0)
    column = columns.column(SCHEMA.get_field_index("prompt"))
    start = column.dictionary_page_offset or column.data_page_offset
    return content[:start] + b"\xff" * column.total_compressed_size + content[start + column.total_compressed_size :]


class TestManifest:
    def test_rows_of_later_runs_replace_rows_of_earlier_runs(self, outputs):
        write(outputs, "r1", row("r1", "a"), failed("r1", "b"), row("r1", "c"))
        assert failures(outputs) == ["b"]
        write(outputs, "r2", row("r2", "b"), failed("r2", "c"), row("r2", "d"))
        assert table(outputs) == {"a": ("r1", "done"), "b": ("r2", "done"), "c": ("r2", "failed"), "d": ("r2", "done")}
        assert failures(outputs) == ["c"]
        write(outputs, "r3", row("r3", "c"))
        assert failures(outputs) == []
        assert not (outputs.root / "failures.jsonl").exists()
        assert sorted(path.name for path in outputs.root.iterdir()) == ["manifest"]

    @pytest.mark.parametrize("close", [False, True])
    def test_rows_of_a_run_that_was_cut_off_do_not_replace_those_of_the_next_run(self, outputs, close):
        """The clock was set back between the runs: the number of the lease orders them."""
        stale, later = "000001-20260102T000000-aaaaaa", "000002-20260101T000000-bbbbbb"
        write(outputs, later, row(later, "a"), failed(later, "b"))
        write(outputs, stale, failed(stale, "a"), row(stale, "b"), row(stale, "c"), close=close)
        expected = {"a": (later, "done"), "b": (later, "failed"), "c": (stale, "done")}
        assert {r.id: (r.run, r.status) for r in read_manifest(outputs.root)} == expected
        write(outputs, "000003-20260101T000000-cccccc", script="other")
        assert table(outputs) == expected
        assert failures(outputs) == ["b"]

    def test_rejections_are_dropped_when_the_script_is_read_to_its_end_again(self, outputs):
        write(outputs, "r1", failed("r1", "s-line-7", REJECTED), failed("r1", "x", REJECTED, "other.jsonl"))
        write(outputs, "r2", row("r2", "a"), whole_script=False)
        assert set(table(outputs)) == {"a", "s-line-7", "x"}
        assert sorted(failures(outputs)) == ["s-line-7", "x"]
        write(outputs, "r3", row("r3", "a"))
        assert set(table(outputs)) == {"a", "x"}
        assert failures(outputs) == ["x"]

    def test_line_replaces_its_row_under_another_id(self, outputs):
        write(outputs, "r1", failed("r1", "s-line-1", REJECTED))
        write(outputs, "r2", {"row": row("r2", "a", script="failures.jsonl"), "replaces": "s-line-1"}, script="failures.jsonl")
        assert (set(table(outputs)), failures(outputs)) == ({"a"}, [])

    def test_next_run_merges_the_parts_of_a_killed_run(self, outputs):
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

    @pytest.mark.parametrize("operation", ["delete", "delete_folder", "new_file"])
    def test_next_run_repeats_an_interrupted_merge(self, tmp_path, monkeypatch, operation):
        """The merge is interrupted at each call of the operation."""
        monkeypatch.setattr(manifest_writer, "PART_ROWS", 2)
        monkeypatch.setattr(manifest_writer, "FILE_ROWS", 3)
        expected = {f"a{n}": ("r1", "done") for n in range(2)} | {f"a{n}": ("r2", "done") for n in range(2, 6)}
        expected |= {"b": ("r2", "done"), "c": ("r1", "failed"), "d": ("r2", "failed"), "z": ("r3", "done")}
        original, completed, interrupted = getattr(LocalStorage, operation), 0, True
        while interrupted:
            outputs, calls, interrupted = OutputFolder(tmp_path / str(completed)), 0, False
            write(outputs, "r1", *(row("r1", f"a{n}") for n in range(4)), failed("r1", "b"), failed("r1", "c"))
            later = (*(row("r2", f"a{n}") for n in range(2, 6)), row("r2", "b"), failed("r2", "d"))
            writer = write(outputs, "r2", *later, close=False)

            def interrupt(self, *args, completed=completed):
                nonlocal calls, interrupted
                calls += 1
                if interrupted := calls > completed:
                    raise KeyboardInterrupt
                return original(self, *args)

            with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
                patched.setattr(LocalStorage, operation, interrupt)
                writer.close()
            write(outputs, "r3", row("r3", "z", script="other"), script="other")
            assert table(outputs) == expected, completed
            assert sorted(failures(outputs)) == ["c", "d"]
            assert not list(outputs.root.rglob(".tmp-*"))
            completed += 1
        assert completed > 1, "the merge does not call the operation"

    def test_manifest_can_be_read_during_a_run(self, outputs, monkeypatch):
        monkeypatch.setattr(manifest_writer, "FLUSH_S", 0.02)
        writer = ManifestWriter(outputs, "r1", "s.jsonl")
        try:
            for shot_id in ("a", "b"):
                writer.add(row("r1", shot_id))
                deadline = time.monotonic() + 20
                while shot_id not in {r.id for r in read_manifest(outputs.root)}:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)  # no notification is available
            assert [path.name for path in (outputs.root / "manifest").iterdir()] == ["r1-00001.parquet"]
        finally:
            writer.close()

    def test_part_replaced_during_a_read_is_read_in_its_old_state(self, outputs, monkeypatch):
        writer, read_rows = write(outputs, "r1", row("r1", "a"), close=False), manifest._rows

        def read_after_a_flush(*args):
            writer.add(row("r1", "after"))
            writer.flush()
            return read_rows(*args)

        monkeypatch.setattr(manifest, "_rows", read_after_a_flush)
        assert [r.id for r in read_manifest(outputs.root)] == ["a"]
        monkeypatch.undo()
        writer.close()

    def test_merge_during_a_read_hides_no_rows(self, outputs, monkeypatch):
        monkeypatch.setattr(manifest_writer, "PART_ROWS", 1)
        writer = write(outputs, "r1", row("r1", "a"), row("r1", "b"), row("r1", "c"), close=False)
        reading = manifest_batches(outputs.storage)
        assert next(reading).column("id").to_pylist() == ["c"]
        writer.close()
        assert sorted(id_ for batch in reading for id_ in batch.column("id").to_pylist()) == ["a", "b"]

    def test_foreign_files_in_the_manifest_folder_are_kept(self, outputs):
        folder = outputs.root / "manifest"
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
        pq.write_table(pa.table({"id": ["a"], "colour": ["red"]}), folder / "other.parquet")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        write(outputs, "r1", row("r1", "a"))
        assert {name: (folder / name).read_bytes() for name in before} == before
        assert [r.id for r in read_manifest(outputs.root)] == ["a"]

    @pytest.mark.parametrize("damage", [lambda _: b"", lambda file: file[:-9], lambda _: b"PAR1" * 100, damaged_prompts])
    def test_damaged_manifest_file_is_named_and_no_longer_read(self, outputs, damage):
        write(outputs, "r1", row("r1", "a"))
        (file,) = (outputs.root / "manifest").iterdir()
        file.write_bytes(content := damage(file.read_bytes()))
        writer = ManifestWriter(outputs, "r2", "s")
        writer.add(row("r2", "b"))
        assert writer.close() == [f"manifest/.damaged-{file.name}"]
        assert (outputs.root / "manifest" / f".damaged-{file.name}").read_bytes() == content
        assert pq.read_table(outputs.root / "manifest").column("id").to_pylist() == ["b"]

    def test_merged_files_are_limited_in_size_and_full_ones_are_not_rewritten(self, outputs, monkeypatch):
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

    def test_lone_surrogates_and_unserializable_fields_are_written_escaped(self, outputs):
        rejected = ManifestRow.of_rejected_line("r1", "s", "x", 3, "a\udc80b", failure(REJECTED))
        lines = [
            FailedLine("x", "s", 1, {"prompt": "a\udc80b"}, failure()),
            FailedLine("y", "s", 2, {("no", "key"): 1}, failure()),
        ]
        write(outputs, "r1", {"row": rejected, "failed": lines[0]}, {"row": row("r1", "y", "failed"), "failed": lines[1]})
        assert {r.id: r.prompt for r in read_manifest(outputs.root)}["x"] == "a\\udc80b"
        first, second = (outputs.root / "failures.jsonl").read_bytes().decode("utf-8").splitlines()
        assert json.loads(first)["prompt"] == "a\udc80b"
        assert "no" in json.loads(second)["unreadable"]

    def test_lines_added_to_failures_jsonl_by_hand_are_kept(self, outputs):
        outputs.root.mkdir()
        (outputs.root / "failures.jsonl").write_text('{"prompt": "mine"}\n\nnot json\n')
        write(outputs, "r1", row("r1", "a"))
        assert (outputs.root / "failures.jsonl").read_text() == '{"prompt": "mine"}\nnot json\n'

    def test_manifest_row_matches_the_shot_record(self, outputs, plan_of):
        plan = plan_of("x", metadata={"k": [1]})
        record = commit(outputs, plan)
        rows = [
            ManifestRow.of_shot("r", "s", plan.shot, 3, result, "rendered") for result in (record, outputs.find_finished(plan))
        ]
        assert vars(rows[0]) | {"ended_at": ""} == vars(rows[1]) | {"ended_at": ""}
        checked = ManifestRow.model_validate(vars(rows[0]))
        assert (checked.video, checked.hd_video) == (f"{shot_path('x')}/video.mp4", None)
        assert (checked.seconds, checked.lora_loads, checked.video_bytes) == (4, 2, len("video.mp4"))
        assert (checked.image_sha256, checked.metadata) == (record.files["image.png"].sha256, '{"k": [1]}')
        failed = ManifestRow.model_validate(vars(ManifestRow.of_shot("r", "s", plan.shot, 3, failure(), "failed")))
        assert (failed.failure_stage, failed.failure_worker, failed.key) == ("svd", "w", None)

    def test_gallery_lists_failed_shots_first_and_counts_all(self, outputs):
        write(outputs, "r1", *(row("r1", f"a{n}", prompt="p") for n in range(600)), failed("r1", "broken"))
        rows, counts = gallery_rows(outputs.storage, limit=500)
        assert counts == {"done": 600, "failed": 1}
        assert len(rows) == 500
        assert rows[0]["id"] == "broken"
        assert "601 shots" in write_gallery(outputs.root).read_text()

    def test_manifest_memory_does_not_grow_with_the_rows(self, tmp_path):
        """Peak memory of 40,000 rows, 10,000 of them replaced by a second run, is close to that of 4,000 rows.

        As Python objects, 40,000 rows take 200 MB.
        """
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

assert write(sys.argv[1] + "/small", "r1", 4_000) == 4_000
before = peak_mb()
assert write(sys.argv[1] + "/large", "r1", 40_000) == 40_000
assert write(sys.argv[1] + "/large", "r2", 10_000) == 40_000
print(peak_mb() - before)
"""
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        grown_mb = float(done.stdout)
        assert grown_mb < 80, f"{grown_mb:.0f} MB"


class TestGarbage:
    def _fill(self, outputs, plan_of):
        """Write two shots (one rendered twice, with different keys), a partial shot, and used and unused cache entries."""
        commit(outputs, plan_of("y", prompt="before"))
        record = commit(outputs, plan_of("x"))
        commit(outputs, plan_of("y", prompt="other"))
        for key in [*(step.key for step in record.stages), "ab" * 32]:
            write_atomically(outputs.root / "cache" / key[:2] / key / "image.png", b"123")
        for path in (f"{shot_path('partial')}/image.png", f"{shot_path('mine')}/holiday.jpg", "cache/readme/notes"):
            write_atomically(outputs.root / path, b"12345")
        prefix = temporary_prefix(this_process()._replace(started=1))
        write_atomically(outputs.root / "shots" / f"{prefix}x" / "hd.mp4", b"1234567")
        temporary_folder(outputs.root / "shots")
        for folder in ("manifest", "scores/faces@1", "reviews"):
            write_atomically(outputs.root / folder / f"{prefix}y", b"1")
        # The job of a finished step is not needed, that of another one is.
        for key in (f"{record.stages[0].key}-1", "ab" * 32):
            outputs.remote_jobs[key] = json.dumps({"key": key}).encode()
        return record

    def test_collect_garbage_removes_only_unreferenced_files(self, outputs, plan_of):
        record = self._fill(outputs, plan_of)
        job = outputs.remote_jobs.get(f"{record.stages[0].key}-1")
        before = {path for path in outputs.root.rglob("*") if path.is_file()}
        dry_run = collect_garbage(outputs, dry_run=True, grace_s=-1)
        (outputs.root / ".lease-000001").unlink()
        assert {path for path in outputs.root.rglob("*") if path.is_file()} == before
        report = collect_garbage(outputs, grace_s=-1)
        assert report == dry_run
        assert report.counts == {"cache entries": 1, "partial shots": 1, "stale keys": 1, "temporaries": 5}
        assert report.bytes == 3 + 5 + 1 + 7 + 3 + len(job)
        assert outputs.remote_jobs.get("ab" * 32)
        removed = {str(path.relative_to(outputs.root)) for path in before - {p for p in outputs.root.rglob("*") if p.is_file()}}
        assert {name for name in removed if ".tmp-" not in name} == {
            f"cache/ab/{'ab' * 32}/image.png", f"{shot_path('partial')}/image.png",
            key_path(plan_of("y", prompt="before").key), job_path(f"{record.stages[0].key}-1"),
        }  # fmt: skip
        assert outputs.find_by_key(plan_of("z", prompt="other").key).record().shot.id == "y"
        assert outputs.find_finished(plan_of("x")).record() == record
        assert sum(collect_garbage(outputs, grace_s=-1).counts.values()) == 0

    def test_gc_command_prints_counts_and_size_and_keeps_young_files(self, outputs, plan_of, capsys):
        self._fill(outputs, plan_of)
        gc(str(outputs.root), dry_run=True, as_json=True)
        report = json.loads(capsys.readouterr().out)
        assert (report["dry_run"], report["left_young"]) == (True, 4)
        assert report["counts"] == {"cache entries": 0, "partial shots": 0, "stale keys": 0, "temporaries": 4}
        gc(str(outputs.root), dry_run=False, as_json=False)
        removed = "removed 0 cache entries, 0 partial shots, 0 stale keys, 4 temporaries: 10 bytes\n4 younger"
        assert capsys.readouterr().out.startswith(removed)
