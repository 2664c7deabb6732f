"""Output folder: finished shots, manifest, failures and garbage collection."""

import io
import json
import os
import pickle
import re
import shutil
import threading
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vidgen_ray.cli.folder_commands import gc
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs import manifest_writer
from vidgen_ray.outputs.cleanup import collect_garbage
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import REJECTED, SCHEMA, SETTINGS, VERSION, ManifestRow, manifest_batches, read_manifest
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.object_storage import without_credentials
from vidgen_ray.outputs.records import Failure, StepRecord, key_path, shot_path
from vidgen_ray.outputs.stage_cache import job_path
from vidgen_ray.outputs.storage import LocalStorage
from vidgen_ray.shot import Shot
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
    def test_committed_shot_is_found_with_its_record_while_its_files_are_whole(self, outputs, plan_of):
        plan = plan_of("x")
        record = commit(outputs, plan, ("image.png", "video.mp4", "base.png"))
        assert outputs.find_finished(plan, with_stages=True)
        record = commit(outputs, plan)
        assert sorted(os.listdir(outputs.shot_folder("x"))) == ["image.png", "shot.json", "video.mp4"]
        assert outputs.find_finished(plan) == record
        done = ManifestRow.of_shot("r", "s", plan.shot, 1, record, "rendered")
        assert (done.seconds, done.gpu_seconds, done.lora_loads) == (4, 2, 2)
        assert outputs.find_finished(plan, with_stages=True) is None
        assert outputs.find_finished(plan.model_copy(update={"key": "0" * 64})) is None
        clip = outputs.shot_folder("x") / "video.mp4"
        clip.write_bytes(clip.read_bytes()[:-1])
        assert outputs.find_finished(plan) is None
        clip.unlink()
        assert outputs.find_finished(plan) is None

    def test_damaged_record_or_key_file_counts_as_missing(self, outputs, plan_of):
        plan = plan_of("x")
        commit(outputs, plan)
        key_file, record = outputs.root / key_path(plan.key), outputs.shot_folder("x") / "shot.json"
        for content in (b"", b"\xff", b"../..", b"missing", b"x/../x"):
            key_file.write_bytes(content)
            assert outputs.find_by_key(plan.key) is None, content
        key_file.write_text("x")
        for text in ("", "[]", "{}", '{"key": 1}', '{"key": "%s"}', '{"key": "%s", "files": {"image.png": 9}, "stages": []}'):
            record.write_text(text.replace("%s", plan.key))
            assert outputs.find_finished(plan) is None, text
        shutil.copytree(outputs.shot_folder(commit(outputs, plan).shot.id), outputs.shot_folder("y"))
        assert outputs.find_by_id("y") is None, "the record of another shot"
        record.unlink()
        record.mkdir()
        with pytest.raises(IsADirectoryError):
            outputs.find_finished(plan)
        assert outputs.find_by_key(plan.key) is None, "a server renders the shot again"

    def test_shot_is_found_by_key_under_another_id(self, outputs, plan_of):
        mine, other = plan_of("mine"), plan_of("other", prompt="another")
        record = commit(outputs, mine)
        assert outputs.find_by_key(plan_of("theirs").key) == record
        assert outputs.find_by_key(other.key) is None
        # Another shot replaces the first one under the same id.
        commit(outputs, plan_of("mine", prompt="another"))
        assert outputs.find_by_key(mine.key) is None
        assert outputs.find_by_key(other.key).shot.id == "mine"

    def test_delete_shot_deletes_its_files_key_and_cache_entries(self, outputs, plan_of):
        mine, other = plan_of("mine"), plan_of("other", prompt="another")
        for plan in (mine, other):
            commit(outputs, plan)
            for step in plan.steps:
                outputs.stage_cache.put(step.key, {"image": np.zeros((2, 2, 3), np.uint8)})
        outputs.delete_shot("mine")
        outputs.delete_shot("missing")
        assert not (outputs.root / key_path(mine.key)).exists()
        assert not outputs.shot_folder("mine").exists()
        assert not any(outputs.stage_cache.has(step.key) for step in mine.steps)
        assert outputs.find_by_key(other.key)
        assert all(outputs.stage_cache.has(step.key) for step in other.steps)

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
        for url, expected in {
            "s3://clips/a/b?region=x": "s3://clips/a/b",
            "s3://K:S/E+C@clips/a": "s3://clips/a",
            "s3://clips/a@b": "s3://clips/a@b",
            "abfs://box@account.dfs.core.windows.net/a": "abfs://box@account.dfs.core.windows.net/a",
            "abfs://:word@account/box": "abfs://account/box",
        }.items():
            assert without_credentials(url) == expected

    def test_url_errors_do_not_leak_credentials(self):
        for root in ("ftp://u:SECRET@h/x", "s3://u:SEC/RET@h/x", "s3:///x", "s3://u:SECRET@h/x?nonsense=1"):
            with pytest.raises(SetupError, match="output folder") as error:
                OutputFolder(root).prepare()
            assert "RET" not in str(error.value)
            assert error.value.__cause__ is None
        with pytest.raises(SetupError, match="pass it as a string"):
            OutputFolder(Path("s3://clips/a"))


def row(run, shot_id, status="done", script="s.jsonl", **columns):
    return ManifestRow(run=run, script=script, id=shot_id, line=1, status=status, **columns)


def failure(stage="svd"):
    return Failure(stage=stage, error="E", message="m", attempts=1, worker="w")


def failed(run, shot_id, stage="svd", script="s.jsonl"):
    return {"row": row(run, shot_id, "failed", script, failure_stage=stage), "fields": {"prompt": shot_id}}


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

    @pytest.mark.parametrize(
        ("options", "new_id", "gone", "replaced"),
        [
            ({"whole_script": False}, "new", set(), set()),
            ({}, "new", {"typo"}, set()),
            ({"every_line_has_a_row": True}, "new", {"typo", "failed"}, {"done", "failed-again"}),
            ({"every_line_has_a_row": True}, "done", {"typo", "failed"}, {"failed-again"}),
            ({"replaces": "failed"}, "new", {"typo", "failed"}, set()),
            ({"script": "z.jsonl", "every_line_has_a_row": True}, "new", set(), set()),
            ({"script": "z.jsonl"}, "done", set(), set()),
        ],
        ids=["interrupted", "a line is rejected", "removed lines", "line again", "corrected line", "other script", "its id"],
    )
    def test_fate_of_the_rows_of_earlier_runs(self, outputs, options, new_id, gone, replaced):
        (outputs.root / shot_path("failed-again")).mkdir(parents=True)
        lines = {"done": "done", "failed": "failed", "failed-again": "failed", "typo": "failed", "other": "failed"}
        entries = [
            failed("r1", id_, script="other.jsonl" if id_ == "other" else "s.jsonl")
            for id_ in ("failed", "failed-again", "other")
        ]
        write(outputs, "r1", row("r1", "done"), failed("r1", "typo", REJECTED), *entries)
        script, replaces = options.pop("script", "s.jsonl"), options.pop("replaces", None)
        write(outputs, "r2", {"row": row("r2", new_id, script=script), "replaces": replaces}, script=script, **options)
        expected = {id_: ("r1", "replaced" if id_ in replaced else status) for id_, status in lines.items() if id_ not in gone}
        assert table(outputs) == {**expected, new_id: ("r2", "done")}
        assert set(failures(outputs)) == {id_ for id_, (_, status) in expected.items() if status == "failed" and id_ != new_id}

    @pytest.mark.parametrize("operation", ["delete", "new_file"])
    def test_next_run_repeats_an_interrupted_merge(self, tmp_path, monkeypatch, operation):
        """The merge is interrupted at each call of the operation."""
        monkeypatch.setattr(manifest_writer, "PART_ROWS", 2)
        monkeypatch.setattr(manifest_writer, "FILE_ROWS", 3)
        expected = {
            "a0": ("r1", "done"),
            "b": ("r2", "done"),
            "c": ("r1", "failed"),
            "d": ("r2", "failed"),
            "z": ("r3", "done"),
        }
        expected |= {f"a{n}": ("r2", "done") for n in (1, 2)}
        original, completed, interrupted = getattr(LocalStorage, operation), 0, True
        while interrupted:
            outputs, calls, interrupted = OutputFolder(tmp_path / str(completed)), 0, False
            write(outputs, "r1", row("r1", "a0"), row("r1", "a1"), failed("r1", "b"), failed("r1", "c"))
            later = (row("r2", "a1"), row("r2", "a2"), row("r2", "b"), failed("r2", "d"))
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

    def test_write_that_hangs_keeps_no_row_from_being_added(self, outputs, monkeypatch):
        monkeypatch.setattr(manifest_writer, "PART_ROWS", 1)
        hangs, released, flushed, flush = threading.Event(), threading.Event(), threading.Semaphore(0), os.fsync

        def fsync(number):
            assert threading.current_thread() is not threading.main_thread(), "the caller of `add` waits for the storage"
            hangs.set()
            assert released.wait(60)
            flush(number)
            flushed.release()

        writer = ManifestWriter(outputs, "r1", "s.jsonl")
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fsync)
            writer.add(row("r1", "a"))
            assert hangs.wait(60)
            for entry in (row("r1", "b"), failed("r1", "c")):
                writer.add(**entry) if isinstance(entry, dict) else writer.add(entry)
            released.set()
            # The first part, then one with the other rows, and their failed lines.
            assert all(flushed.acquire(timeout=60) for _ in range(3))
        writer.close()
        assert {id_: status for id_, (_, status) in table(outputs).items()} == {"a": "done", "b": "done", "c": "failed"}

    def test_merge_during_a_read_hides_no_rows(self, outputs, monkeypatch):
        monkeypatch.setattr(manifest_writer, "PART_ROWS", 1)
        writer = ManifestWriter(outputs, "r1", "s.jsonl")
        for shot_id in "abc":
            writer.add(row("r1", shot_id))
            writer.flush()
        reading = manifest_batches(outputs.storage)
        assert next(reading).column("id").to_pylist() == ["c"]
        writer.close()
        assert sorted(id_ for batch in reading for id_ in batch.column("id").to_pylist()) == ["a", "b"]

    def test_foreign_files_and_lines_are_kept(self, outputs):
        folder = outputs.root / "manifest"
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
        pq.write_table(pa.table({"id": ["a"], "colour": ["red"]}), folder / "other.parquet")
        (outputs.root / "failures.jsonl").write_text('{"prompt": "mine"}\n\nnot json\n')
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        write(outputs, "r1", row("r1", "a"))
        assert {name: (folder / name).read_bytes() for name in before} == before
        assert [r.id for r in read_manifest(outputs.root)] == ["a"]
        assert (outputs.root / "failures.jsonl").read_text() == '{"prompt": "mine"}\nnot json\n'

    def test_damaged_manifest_file_is_named_and_hidden(self, tmp_path):
        for number, damage in enumerate((lambda _: b"", lambda file: file[:-9], lambda _: b"PAR1" * 100, damaged_prompts)):
            outputs = OutputFolder(tmp_path / str(number))
            write(outputs, "r1", row("r1", "a"))
            (file,) = (outputs.root / "manifest").iterdir()
            file.write_bytes(content := damage(file.read_bytes()))
            writer = ManifestWriter(outputs, "r2", "s")
            writer.add(row("r2", "b"))
            assert writer.close() == [f"manifest/.damaged-{file.name}"], number
            assert (outputs.root / "manifest" / f".damaged-{file.name}").read_bytes() == content
            assert pq.read_table(outputs.root / "manifest").column("id").to_pylist() == ["b"], number

    def test_merged_files_are_limited_in_size_and_full_ones_are_not_rewritten(self, outputs, monkeypatch):
        for name, rows in (("PART_ROWS", 2), ("FILE_ROWS", 10), ("SMALL_FILE_ROWS", 6)):
            monkeypatch.setattr(manifest_writer, name, rows)
        write(outputs, "r1", *(row("r1", f"a{n:03d}") for n in range(25)))
        files = sorted((outputs.root / "manifest").iterdir())
        assert [pq.read_metadata(file).num_rows for file in files] == [10, 10, 5]
        before = files[0].stat().st_mtime_ns
        write(outputs, "r2", row("r2", "a015"), row("r2", "b"))
        assert files[0].stat().st_mtime_ns == before
        assert sorted(pq.read_metadata(file).num_rows for file in (outputs.root / "manifest").iterdir()) == [6, 10, 10]
        assert len(table(outputs)) == 26

    def test_lone_surrogates_and_unserializable_fields_are_written_escaped(self, outputs):
        rejected = ManifestRow.of_rejected_line("r1", "s", "x", 3, "a\udc80b", failure(REJECTED))
        lines = [{"prompt": "a\udc80b"}, {("no", "key"): 1}]
        write(outputs, "r1", {"row": rejected, "fields": lines[0]}, {"row": row("r1", "y", "failed"), "fields": lines[1]})
        assert {r.id: r.prompt for r in read_manifest(outputs.root)}["x"] == "a\\udc80b"
        first, second = (outputs.root / "failures.jsonl").read_bytes().decode("utf-8").splitlines()
        assert json.loads(first)["prompt"] == "a\udc80b"
        assert "no" in json.loads(second)["unreadable"]


def files_in(outputs):
    """Return the files of the folder, except that with the number of the last lease."""
    return {path for path in outputs.root.rglob("*") if path.is_file() and not path.name.startswith(".lease-")}


def test_collect_garbage_removes_only_old_files_that_nothing_refers_to(outputs, plan_of, capsys):
    commit(outputs, plan_of("y", prompt="before"))
    record = commit(outputs, plan_of("x"))
    commit(outputs, plan_of("y", prompt="other"))
    used, unused = record.stages[0].key, "ab" * 32
    for path in (f"cache/{used[:2]}/{used}/image.png", f"cache/ab/{unused}/image.png"):
        write_atomically(outputs.root / path, b"123")
    for path in (f"{shot_path('partial')}/image.png", f"{shot_path('mine')}/holiday.jpg", "cache/readme/notes"):
        write_atomically(outputs.root / path, b"12345")
    prefix = temporary_prefix(this_process()._replace(started=1))
    write_atomically(outputs.root / "shots" / f"{prefix}x" / "hd.mp4", b"1234567")
    temporary_folder(outputs.root / "shots")
    for folder in ("manifest", "scores/faces@1", "reviews"):
        write_atomically(outputs.root / folder / f"{prefix}y", b"1")
    # The job of a finished step is not needed, that of another one is.
    for key in (f"{used}-1", unused):
        outputs.remote_jobs[key] = json.dumps({"key": key}).encode()
    job = outputs.remote_jobs.get(f"{used}-1")

    before = files_in(outputs)
    gc(str(outputs.root), dry_run=True, as_json=True)
    young = json.loads(capsys.readouterr().out)
    assert (young["dry_run"], young["left_young"]) == (True, 4)
    assert young["counts"] == {"cache entries": 0, "partial shots": 0, "stale keys": 0, "temporaries": 4}
    dry_run = collect_garbage(outputs, dry_run=True, grace_s=-1)
    assert files_in(outputs) == before
    gc(str(outputs.root), dry_run=False, as_json=False)
    removed = "removed 0 cache entries, 0 partial shots, 0 stale keys, 4 temporaries: 10 bytes\n4 younger"
    assert capsys.readouterr().out.startswith(removed)
    assert all(".tmp-" in path.as_posix() for path in before - files_in(outputs))
    report = collect_garbage(outputs, grace_s=-1)
    assert report.counts == {"cache entries": 1, "partial shots": 1, "stale keys": 1, "temporaries": 1}
    assert report.bytes == dry_run.bytes - 10 == 3 + 5 + 1 + len(job)
    assert outputs.remote_jobs.get(unused)
    gone = {path.relative_to(outputs.root).as_posix() for path in before - files_in(outputs)}
    assert {name for name in gone if ".tmp-" not in name} == {
        f"cache/ab/{unused}/image.png",
        f"{shot_path('partial')}/image.png",
        key_path(plan_of("y", prompt="before").key),
        job_path(f"{used}-1"),
    }
    assert outputs.find_by_key(plan_of("z", prompt="other").key).shot.id == "y"
    assert outputs.find_finished(plan_of("x")) == record
    assert sum(collect_garbage(outputs, grace_s=-1).counts.values()) == 0


# The lines of docs/outputs.md that read the manifest with other libraries, and its schema

PAGE = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text()
LORA = "builtin:tiny/lora.safetensors"
LIBRARIES = ("pyarrow", "pandas", "duckdb", "datasets")
RUNS = ("1-r", "2-r")


@pytest.fixture
def out(tmp_path, plan_of):
    """Two shots that a second run has reused, and one that has failed in both."""
    outputs = OutputFolder(tmp_path / "out")
    fields = {
        "lora": [{"path": LORA, "weight": 0.5}],
        "steps": {"flux": 3, "lora": 4, "svd": 2},
        "scale": 2,
        "upscale_video": True,
    }
    plans = [plan_of(name, num_frames=10, fps=4, width=128, height=64, **fields) for name in "ab"]
    records = [commit(outputs, plan) for plan in plans]
    for run, last_run in zip(RUNS, ("rendered", "reused"), strict=True):
        writer = ManifestWriter(outputs, run, "s.jsonl")
        for number, (plan, record) in enumerate(zip(plans, records, strict=True), start=1):
            writer.add(ManifestRow.of_shot(run, "s.jsonl", plan.shot, number, record, last_run))
        writer.add(ManifestRow.of_shot(run, "s.jsonl", plan_of("c").shot, 3, failure(), "failed"))
        writer.close()
    return tmp_path / "out"


@pytest.mark.parametrize("library", LIBRARIES)
def test_documented_line_reads_the_finished_shots_of_several_runs(out, library):
    pytest.importorskip(library)
    (line,) = re.findall(rf"^(rows = .*\b{library}\b.*)$", PAGE, re.MULTILINE)
    names: dict = {}
    exec(f"import {library}\n{line.replace('OUT/', f'{out}/')}", names)
    assert len(names["rows"]) == 2


def test_columns_are_pinned():
    """A new column changes only the digest. A column that is renamed, removed or of another type needs a new version, too."""
    columns = "\n".join(sorted(f"{field.name} {field.type}" for field in SCHEMA))
    assert (VERSION, sha256(columns.encode()).hexdigest()[:16]) == (1, "aa3d5e46172155a7")


def test_every_setting_of_a_shot_is_a_typed_column(out):
    not_settings = {"id", "prompt", "mode", "seed", "width", "height", "num_frames", "fps", "consent", "metadata"}
    assert set(SETTINGS.values()) == Shot.model_fields.keys() - not_settings - {"variants", "character", "priority", "aspect"}
    columns = {name: SCHEMA.field(column).type for column, name in SETTINGS.items()}
    for name, kind in {
        "lora": pa.list_(pa.struct([("path", pa.string()), ("weight", pa.float64())])),
        "scale": pa.int64(),
        "lora_strength": pa.float64(),
        "upscale_video": pa.bool_(),
        "video_model": pa.string(),
    }.items():
        assert columns[name] == kind, name
    table = pq.read_table(out / "manifest")
    schema = ManifestRow.model_json_schema()
    assert table.schema.metadata[b"vidgen.manifest"] == str(VERSION).encode() == str(schema["version"]).encode()
    assert schema["properties"]["scale"]["description"] == Shot.model_fields["scale"].description
    # `status` is that of the shot, `last_run` that of the run.
    rows = sorted(read_manifest(out), key=lambda row: row.id)
    assert [(row.status, row.last_run) for row in rows] == [("done", "reused"), ("done", "reused"), ("failed", "failed")]
    assert (rows[0].lora, rows[0].steps["flux"], rows[0].scale) == ([{"path": LORA, "weight": 0.5}], 3, 2)
    assert (rows[0].hd_width, rows[0].hd_height, rows[0].duration_s) == (256, 128, 2.5)
