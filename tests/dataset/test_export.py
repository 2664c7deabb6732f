"""Exported data sets: read by the libraries that people use, updated, killed, refused."""

import hashlib
import io
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from shutil import copytree, rmtree
from types import SimpleNamespace
from unittest.mock import patch

import boto3
import duckdb
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.conftest import EXAMPLES
from tests.dataset.conftest import make_folder, moving, texture, write_scores
from tests.outputs.conftest import endpoint  # noqa: F401  # a fixture
from vidgen_ray.cli import main
from vidgen_ray.dataset import export
from vidgen_ray.dataset.export import _Export, export_folder
from vidgen_ray.dataset.export_formats import encode_again, write_block
from vidgen_ray.dataset.export_rows import ExportSettings, assign_splits, parse_splits
from vidgen_ray.dataset.tables import open_tables
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.media.decode import open_video
from vidgen_ray.media.encode import Mp4Settings, Mp4Writer
from vidgen_ray.outputs.cleanup import remove_person
from vidgen_ray.outputs.lease import lease
from vidgen_ray.outputs.manifest import read_manifest
from vidgen_ray.outputs.reviews import Review
from vidgen_ray.outputs.storage import storage_at
from vidgen_ray.provenance.record import ProvenanceRecord, read_provenance
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import read_script
from vidgen_ray.system.cache_dir import sha256_of
from vidgen_ray.system.files import this_process
from vidgen_ray.trainers import SourceClip

SCORES = ("score_caption", "score_split", "hashes", "motion")
CAPTION = "{metadata.scene}{character}: {prompt}"
PROMPTS = ("a\tb\nc", 'He said "go", it\'s 🚤', "שלום \u202eעולם", "{braces}, 'quotes'", "plain", "last")
IDS = ("a.b", "a_b", "-c", "D", "d", "e.mp4")


HALVES = {"train": 0.5, "test": 0.5}


def run_inline(blocks, target):
    for block in blocks:
        yield write_block(block, target)


def work_inline(patch, *, with_card=False):
    """Do the tasks in this process. One round trip has them done by Ray Data."""
    if not with_card:
        patch.setattr(export, "write_card", lambda *_: None)
    patch.setattr(export, "_run_tasks", run_inline)
    patch.setattr(export, "connected", lambda *_, **__: nullcontext())
    patch.setattr(export, "own_context", nullcontext)


FOLDERS = ("videofolder", "captions")
"""Formats with a file for each clip."""


def export_to(dest, out, **settings):
    return export_folder(str(out), str(dest), ExportSettings(**settings))


def valid_rows(dest):
    """Return id -> digest of the clips that the metadata names. Each of them must be in its place."""
    rows = {}
    for metadata in Path(dest).glob("*/metadata.parquet"):
        for row in pyarrow.parquet.read_table(metadata, use_threads=False).to_pylist():
            clip = (metadata.parent / row["file_name"]).read_bytes()
            assert hashlib.sha256(clip).hexdigest() == row["sha256"], f"{row['id']} has another clip than its row says"
            rows[row["id"]] = row["sha256"]
    return rows


@pytest.fixture
def inline(monkeypatch):
    work_inline(monkeypatch)


def reject(out, shot_id):
    (row,) = [row for row in read_manifest(out) if row.id == shot_id]
    digest = row.video_sha256 or row.image_sha256
    review = Review(clip_sha256=digest, id=shot_id, verdict="reject", at=datetime.now(UTC))
    storage_at(out).write("reviews/1.jsonl", review.model_dump_json() + "\n")


def content_of(dest):
    """Return path -> content and time of all files but that with the number of the last lease."""
    found = [path for path in Path(dest).rglob("*") if path.is_file() and not path.name.startswith(".lease-")]
    return {str(path.relative_to(dest)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def load_with_datasets(load, cache):
    import datasets

    # torchcodec, which `datasets` imports to store the path of a video, needs FFmpeg on the machine.
    decoders = SimpleNamespace(VideoDecoder=type("VideoDecoder", (), {}), AudioDecoder=type("AudioDecoder", (), {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchcodec", SimpleNamespace(decoders=decoders))
        patch.setitem(sys.modules, "torchcodec.decoders", decoders)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        found = load(datasets)
    assert all(isinstance(rows.features["video"], datasets.Video) for rows in found.values())
    found = found.cast_column("video", datasets.Video(decode=False))
    return {
        split: [{**row, "content": row["video"]["bytes"] or Path(row["video"]["path"]).read_bytes()} for row in rows]
        for split, rows in found.items()
    }


def read_by_format(kind, dest, cache):
    return load_with_datasets(lambda datasets: datasets.load_dataset(kind, data_dir=str(dest)), cache)


def read_webdataset(dest, cache):
    import webdataset

    found = {}
    for shard in sorted(dest.glob("*.tar")):
        samples = list(webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False).decode())
        rows = [{**each["json"], "content": each["mp4"]} for each in samples]
        assert [each["txt"] for each in samples] == [row["caption"] for row in rows]
        found.setdefault(shard.name.split("-")[0], []).extend(rows)
    return found


def read_lance(dest, cache):
    import lance

    found = {}
    for path in dest.glob("*.lance"):
        rows = lance.dataset(path)
        table = rows.to_table(columns=[name for name in rows.schema.names if name != "video"]).to_pylist()
        clips = rows.take_blobs("video", indices=list(range(len(table))))
        found[path.stem] = [{**row, "content": clip.read()} for row, clip in zip(table, clips, strict=True)]
    return found


def read_captions(dest, cache):
    ids = (*IDS, "new")
    clips = sorted(dest.glob("*/*.mp4"))
    assert len(list(dest.glob("*/*.txt"))) == len(clips)
    found = {}
    for path in clips:
        caption = path.with_suffix(".txt").read_bytes().decode()
        id_, _, digits = path.stem.rpartition("-")
        assert id_ in ids
        assert re.fullmatch("[0-9a-f]{8}", digits)
        found.setdefault(path.parent.name, []).append({"id": id_, "caption": caption, "content": path.read_bytes()})
    return found


READERS = {
    "videofolder": partial(read_by_format, "videofolder"),
    "webdataset": read_webdataset,
    "parquet": partial(read_by_format, "parquet"),
    "lance": read_lance,
    "captions": read_captions,
}


@pytest.fixture(scope="module")
def six_clips(tmp_path_factory):
    out = tmp_path_factory.mktemp("six") / "out"
    clips = []
    for number, (name, prompt) in enumerate(zip(IDS, PROMPTS, strict=True)):
        metadata = {"scene": f"{number}é\n", **({"character": "Ada"} if number == 1 else {})}
        fields = {"id": name, "prompt": prompt, "seed": number, "metadata": metadata}
        clips.append((fields, moving(3, seed=number, size=(64, 128))))
    make_folder(out, clips)
    # Of two clips, and with names that data sets have.
    digests = [row.video_sha256 for row in read_manifest(out)][:2]
    scores = {"caption": ["a", "b"], "split": [1, 2], "hashes": [[1, 2], None], "motion": [0.5, math.nan]}
    write_scores(storage_at(out), "x@1", {"clip_sha256": digests, **scores})
    return out


def test_shipped_data_set_is_read_by_the_command_of_its_card(tmp_path):
    folder = EXAMPLES / "people"
    [command] = re.findall(r"`(datasets\.load_dataset\([^`]+\))`", (folder / "README.md").read_text())
    read = load_with_datasets(lambda datasets: eval(command.replace("PATH", str(folder))), tmp_path)  # noqa: S307  # of this repository
    assert {split: len(rows) for split, rows in read.items()} == {"train": 19, "validation": 5}
    for row in [*read["train"], *read["validation"]]:
        assert hashlib.sha256(row["content"]).hexdigest() == row["sha256"]
        assert row["caption"].startswith(f"{row['character']}, ")


@pytest.mark.usefixtures("local_ray")
def test_ray_data_exports_clips_and_updates_them(six_clips, tmp_path):
    export_and_update("parquet", six_clips, tmp_path)


@pytest.mark.parametrize("form", [form for form in READERS if form != "parquet"])
def test_clips_and_texts_survive_and_later_calls_update_them(form, six_clips, tmp_path, monkeypatch):
    # tests/dataset/test_data_card.py has cards of all formats.
    work_inline(monkeypatch, with_card=form == "videofolder")
    export_and_update(form, six_clips, tmp_path)


def export_and_update(form, six_clips, tmp_path):
    import decord
    import mlcroissant

    out, dest = tmp_path / "out", tmp_path / "dest"
    copytree(six_clips, out)
    settings = {"format": form, "splits": HALVES, "split_by": ("prompt",), "caption": CAPTION}
    report = export_to(dest, out, **settings)
    assert report.counts == {"added": 6, "changed": 0, "removed": 0, "unchanged": 0, "rejected": 0, "failed": 0}

    with open_tables(storage_at(out)) as tables:
        found = tables.execute("SELECT clip_sha256, caption, split, hashes::JSON::VARCHAR, motion FROM scores").fetchall()
    scores = {digest: [*rest, None if math.isnan(motion) else motion] for digest, *rest, motion in found}

    def check(expected, step):
        clips = {row.id: row for row in read_manifest(out)}
        found = READERS[form](dest, tmp_path / f"cache-{step}")
        assert {name: len(rows) for name, rows in found.items()} == {name: n for name, n in report.splits.items() if n}
        rows = {row["id"]: (split, row) for split, rows in found.items() for row in rows}
        assert rows.keys() == expected.keys()
        for id_, (split, row) in rows.items():
            assert row["caption"] == expected[id_], id_
            assert hashlib.sha256(row["content"]).hexdigest() == clips[id_].video_sha256
            assert row.get("split", split) == split
            if form != "captions" and clips[id_].video_sha256 in scores:
                assert [row[name] for name in SCORES] == scores[clips[id_].video_sha256]
            assert row.get("prompt", clips[id_].prompt) == clips[id_].prompt
        assert decord.VideoReader(io.BytesIO(row["content"])).get_batch([0, 1]).shape == (2, 64, 128, 3)
        if form in ("videofolder", "parquet"):
            assert f"\n{len(expected)} clips, " in (dest / "README.md").read_text()
            records = mlcroissant.Dataset(jsonld=str(dest / "croissant.json")).records("clips")
            assert {each["clips/id"].decode() for each in records} == expected.keys()
        return {id_: split for id_, (split, _) in rows.items()}

    captions = {
        name: f"{number}é\n{'Ada' if number == 1 else ''}: {prompt}"
        for number, (name, prompt) in enumerate(zip(IDS, PROMPTS, strict=True))
    }
    splits = check(captions, 1)
    assert set(splits.values()) == {"train", "test"}

    before = content_of(dest)
    report = export_to(dest, out, **settings)
    assert report.up_to_date
    assert content_of(dest) == before
    # A file of the data set was deleted. Shards get another name.
    if form != "lance":
        deleted = next(
            path for path in sorted(dest.glob("train*/**/*") if form in FOLDERS else dest.glob("train-*")) if path.is_file()
        )
        deleted.unlink()
        assert not export_to(dest, out, **settings).up_to_date
        assert check(captions, "deleted") == splits

    # One clip has other frames, one is rejected, one is new. The others stay as they are.
    reject(out, "a_b")
    lost = (out / next(row.video for row in read_manifest(out) if row.id == "a_b")).read_bytes()
    changed = {"id": "D", "prompt": PROMPTS[3], "metadata": {"scene": "other "}}
    clips = [moving(3, seed=seed, size=(64, 128)) for seed in (50, 51)]
    make_folder(out, [(changed, clips[0]), ({"id": "new", "prompt": PROMPTS[0]}, clips[1])])
    report = export_to(dest, out, **settings)
    assert report.counts == {"added": 1, "changed": 1, "removed": 1, "unchanged": 4, "rejected": 1, "failed": 0}
    assert report.removed == [{"id": "a_b", "reason": "rejected"}]
    del captions["a_b"]
    later = check(captions | {"D": f"other : {PROMPTS[3]}", "new": f": {PROMPTS[0]}"}, 2)
    assert later == {id_: split for id_, split in splits.items() if id_ != "a_b"} | {"new": splits["a.b"]}
    assert not any(lost in content for content, _ in content_of(dest).values())
    state = json.loads((dest / ".vidgen/export.json").read_text())
    assert (state["counts"], state["removed"]) == (report.counts, report.removed)


@pytest.mark.usefixtures("inline")
def test_killed_export_is_valid_and_completed_by_the_next_call(six_clips, tmp_path, monkeypatch):
    """A killed export leaves what the data set is before a change of a file, with the lease of a process that has ended."""
    out, dest, complete = copytree(six_clips, tmp_path / "out"), tmp_path / "dest", tmp_path / "complete"
    settings = {"splits": HALVES, "split_by": ("prompt",)}
    for each in (dest, complete):
        export_to(each, out, **settings)
    before, copies = valid_rows(dest), []
    reject(out, "a_b")
    clip = moving(3, seed=50, size=(64, 128))
    make_folder(out, [({"id": "D", "prompt": PROMPTS[3]}, clip), ({"id": "new", "prompt": PROMPTS[0]}, clip)])
    export_to(complete, out, **settings)
    after = valid_rows(complete)

    def copying(change):
        def copy_and_change(*arguments, **options):
            if str(dest) in str(arguments) and ".running" not in str(arguments):
                copies.append(copytree(dest, tmp_path / f"killed-{len(copies)}"))
            return change(*arguments, **options)

        return copy_and_change

    ended = this_process()._replace(started=1)
    with monkeypatch.context() as patched:
        for module in ("system.files", "outputs.lease"):
            patched.setattr(f"vidgen_ray.{module}.this_process", lambda: ended)
        for name in ("rename", "replace", "link", "remove", "unlink"):
            patched.setattr(os, name, copying(getattr(os, name)))
        export_to(dest, out, **settings)
    assert len(copies) > 8
    for number, copy in enumerate(copies):
        assert all(digest in (before.get(id_), after.get(id_)) for id_, digest in valid_rows(copy).items())
        if number % 8 == 0:
            export_to(copy, out, **settings)
            assert valid_rows(copy) == after
            assert {path.name for path in copy.rglob("*.mp4")} == {path.name for path in complete.rglob("*.mp4")}


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("form", [form for form in READERS if form != "parquet"])
def test_next_call_takes_back_what_an_interrupted_export_wrote(form, six_clips, tmp_path):
    """The clips are the first ones again by then, as the stored rows of the data set have them."""
    out, dest = copytree(six_clips, tmp_path / "out"), tmp_path / "dest"

    def content(name):
        found = READERS[form](dest, tmp_path / name).items()
        rows = {row["id"]: (split, row["caption"], row["content"]) for split, rows in found for row in rows}
        return rows, {path.name for path in dest.rglob("*") if path.suffix in (".mp4", ".txt", ".tar")}

    export_to(dest, out, format=form)
    first = content("first")
    kept = copytree(out, tmp_path / "kept")
    reject(out, "a_b")
    clip = moving(3, seed=50, size=(64, 128))
    make_folder(out, [({"id": "D", "prompt": "other"}, clip), ({"id": "new"}, clip)])
    with patch.object(_Export, "_save", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        export_to(dest, out, format=form)
    rmtree(out)
    kept.rename(out)
    export_to(dest, out, format=form)
    assert content("last") == first


@pytest.mark.usefixtures("inline")
def test_full_disk_leaves_a_valid_data_set(six_clips, tmp_path, small_disk):
    dest = small_disk.folder / "dest"
    export_to(dest, six_clips, where="id <> 'D'")
    before = valid_rows(dest)
    small_disk.fill()
    with pytest.raises(SetupError, match="the disk is full"):
        export_to(dest, six_clips)
    assert valid_rows(dest) == before
    small_disk.make_room()
    export_to(dest, six_clips)
    assert len(valid_rows(dest)) == 6


@pytest.mark.usefixtures("inline")
def test_settings_that_do_not_fit_are_refused(six_clips, tmp_path, capsys):
    dest, other = tmp_path / "dest", tmp_path / "other"
    export_to(dest, six_clips)
    (clip,) = [row.video for row in read_manifest(six_clips) if row.id == "D"]
    assert os.path.samefile(dest / "train/D.mp4", six_clips / clip)
    other.mkdir()
    (other / "notes").touch()
    with lease(storage_at(dest), "export-other"), pytest.raises(SetupError, match="is working in it"):
        export_to(dest, six_clips)
    for match, place, settings in (
        ("was exported with format videofolder, got lance", dest, {"format": "lance"}),
        ("has other files, such as 'notes'", other, {}),
        ("must not be inside", six_clips / "data", {}),
        ("no clip to export: of 6 finished shots, 6 are not selected", tmp_path / "new", {"where": "seed > 100"}),
        ("6 have no hd", tmp_path / "new", {"files": "hd"}),
        (r"unknown name \{place\}, must be one of metadata.character, ", tmp_path / "new", {"caption": "{place}"}),
        ("no clip has sharpness yet; run: vidgen score ", tmp_path / "new", {"where": "sharpness > 1"}),
    ):
        with pytest.raises(UsageError, match=match):
            export_to(place, six_clips, **settings)
    assert list(other.iterdir()) == [other / "notes"]
    assert main(["export", str(six_clips), str(dest), "--resize", "64x63"]) == 2
    assert "--resize: got '64x63', must be WIDTHxHEIGHT in even numbers of pixels" in capsys.readouterr().err
    export_to(tmp_path / "named", six_clips, caption="{character}: {metadata.scene}")
    printed = capsys.readouterr().err
    assert "--caption: {character} is empty for 5 clips, such as -c\n" in printed
    assert "metadata.scene" not in printed


@pytest.mark.usefixtures("inline")
def test_uncleared_clips_are_refused_with_the_reason(tmp_path):
    photo = tmp_path / "face.png"
    photo.write_bytes(b"face")
    licence = {"weights": "w", "licence": "Strict", "commercial_use": "conditional"}
    clip = moving(2, size=(64, 64))
    declared = {"subject": "Ada", "basis": "written"}
    face = {"face_image": [str(photo)]}
    fields = {"free": {}, "strict": {"licences": (licence,)}, "face": face, "cleared": {**face, "consent": declared}}
    out = make_folder(tmp_path / "out", [({"id": name, **each}, clip) for name, each in fields.items()])
    dest = tmp_path / "dest"
    assert export_to(dest, out.url, cleared="commercial").refused == [
        {"id": "face", "reason": "shows a person (face photo) without declared consent"}
    ]
    report = export_to(dest, out.url, cleared="unconditional")
    strict = {"id": "strict", "reason": "commercial use: conditional; licences: Strict"}
    assert strict in report.refused
    assert report.removed == [strict]
    assert valid_rows(dest).keys() == {"free", "cleared"}
    assert [json.loads(line) for line in (dest / "refused.jsonl").read_text().splitlines()] == report.refused
    remove_person(out, {sha256_of(photo)}, None, with_shots=True)
    removed = export_to(dest, out.url, cleared="unconditional").removed
    assert removed == [{"id": "cleared", "reason": "the output folder does not have the shot"}]
    assert [path.name for path in dest.rglob("*.mp4")] == ["free.mp4"]


@pytest.mark.usefixtures("inline")
def test_stored_rows_tell_persons_apart_by_names_of_files(tmp_path):
    photos = [tmp_path / name for name in ("ada/face.png", "bob/face.png", "eve.png")]
    clips = []
    for number, photo in enumerate(photos):
        photo.parent.mkdir(exist_ok=True)
        photo.write_bytes(b"face")
        fields = {"face_image": [str(photo), str(photos[2])], "image": str(photos[2])}
        clips += [({"id": f"{number}-{seed}", **fields}, moving(2, seed=seed, size=(64, 64))) for seed in range(2)]
    out = make_folder(tmp_path / "out", clips)
    export_to(tmp_path / "dest", out.url)
    columns = ["face_image", "start_image", "last_image", "person"]
    rows = pyarrow.parquet.read_table(tmp_path / "dest/.vidgen/rows.parquet", columns=columns).to_pylist()
    assert rows[::2] == rows[1::2]
    ada, bob, eve = rows[::2]
    assert eve == {"face_image": ["eve.png"] * 2, "start_image": "eve.png", "last_image": None, "person": "eve.png+eve.png"}
    assert ada["person"] != bob["person"]
    assert all(each["person"].endswith("-face.png+eve.png") and "/" not in each["person"] for each in (ada, bob))


@pytest.mark.usefixtures("inline")
def test_missing_files_and_images_are_left_out(tmp_path):
    shots = [({"id": f"clip-{n}", "seed": n}, moving(2, seed=n, size=(64, 64))) for n in range(3)]
    out = make_folder(tmp_path / "out", [*shots, ({"id": "image", "crop_width": 48, "crop_height": 32}, texture(64, 64))])
    (tmp_path / "out" / next(row.video for row in read_manifest(out.url) if row.id == "clip-1")).unlink()
    for form in ("videofolder", "webdataset"):
        dest = tmp_path / form
        report = export_to(dest, out.url, format=form, shard_mb=1)
        assert [each["id"] for each in report.missing] == ["clip-1", "image"]
        assert (report.splits, report.counts["failed"]) == ({"train": 2}, 1)
        assert export_to(dest, out.url, format=form, shard_mb=1).up_to_date
    export_to(tmp_path / "images", out.url, files="image")
    assert len(list((tmp_path / "images/train").glob("*.png"))) == 4
    rows = pyarrow.parquet.read_table(tmp_path / "images/train/metadata.parquet", columns=["width", "height"]).to_pylist()
    assert [(row["width"], row["height"]) for row in rows] == [(64, 64)] * 3 + [(48, 32)]


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_shards_have_deterministic_bytes_and_only_those_with_changes_are_written(form, tmp_path):
    clips = [({"id": f"clip-{n}", "seed": n}, moving(2, seed=n, size=(64, 64))) for n in range(4)]
    out = make_folder(tmp_path / "out", clips[:3])

    def shards(dest):
        return {name: file for name, file in content_of(dest).items() if name.startswith("train")}

    for dest in ("one", "two"):
        export_to(tmp_path / dest, out.url, format=form, shard_mb=0)
    first = shards(tmp_path / "one")
    assert len(first) == 3
    assert {name: content for name, (content, _) in first.items()} == {
        name: content for name, (content, _) in shards(tmp_path / "two").items()
    }
    reject(out.url, "clip-1")
    make_folder(tmp_path / "out", clips[3:])
    export_to(tmp_path / "one", out.url, format=form, shard_mb=0)
    names = sorted(first)
    after = shards(tmp_path / "one")
    assert after.keys() == {names[0], names[2], names[2].replace("2", "3")}
    assert {name: after[name] for name in (names[0], names[2])} == {name: first[name] for name in (names[0], names[2])}


def split_of(rows, splits=HALVES, by=("prompt", "character"), done=None, chain=(), places=None, **settings):
    """Return id -> split of rows (id, prompt, character). `places`: those of earlier calls, which this call updates."""
    with duckdb.connect() as database:
        columns = "id VARCHAR, prompt VARCHAR, character VARCHAR, face_image VARCHAR[], script VARCHAR DEFAULT 's'"
        more = "metadata JSON, line BIGINT, line_prompt VARCHAR AS (prompt)"
        database.execute(f"CREATE TABLE clips ({columns}, continue_from VARCHAR, {more})")
        database.execute("CREATE TABLE done (id VARCHAR, split VARCHAR)")
        database.executemany("INSERT INTO clips (id, prompt, character) VALUES (?, ?, ?)", rows)
        for id_, before in dict(chain).items():
            database.execute("UPDATE clips SET continue_from = ? WHERE id = ?", [before, id_])
        for item in (done or {}).items():
            database.execute("INSERT INTO done VALUES (?, ?)", item)
        database.execute("CREATE TABLE chosen AS SELECT id FROM clips WHERE prompt <> 'not chosen'")
        known = {} if places is None else places
        known |= assign_splits(database, splits, by, known, **settings)
        return dict(database.execute("SELECT id, split FROM splits").fetchall())


def test_groups_are_never_divided_and_keep_their_split():
    rows = [(f"{person}-{number}", f"prompt {person}", f"person {person}") for person in range(40) for number in range(5)]
    found = split_of(rows, {"train": 0.8, "val": 0.2})
    assert all(len({found[f"{person}-{number}"] for number in range(5)}) == 1 for person in range(40))
    assert 0.1 < sum(split == "val" for split in found.values()) / len(found) < 0.4
    # More clips change no split, in any order.
    more = [*rows, *((f"z-{number}", f"other {number}", None) for number in range(50))][::-1]
    assert split_of(more, {"train": 0.8, "val": 0.2}).items() >= found.items()
    # Chains, also through a shot that is not chosen.
    chained = [("a", "one", None), ("b", "not chosen", None), ("c", "three", None), *rows]
    for other in ("one", "two", "three"):
        found = split_of(chained, done={"a": "train"} if other == "two" else None, chain=(("b", "a"), ("c", "b")))
        assert found["a"] == found["c"]
        chained[0] = ("a", other, None)


def rows_of_groups(sizes):
    return [(f"{group}-{number}", f"prompt {group}", None) for group, size in enumerate(sizes) for number in range(size)]


def off_by(sizes, places, splits):
    """Return how far a division of groups is from the shares: empty splits, and the sum of differences in clips."""
    loads = [sum(size for size, each in zip(sizes, places, strict=True) if each == name) for name in splits]
    differences = (abs(load - share * sum(sizes)) for load, share in zip(loads, splits.values(), strict=True))
    return loads.count(0), round(sum(differences), 6)


@pytest.mark.parametrize("splits", [{"train": 0.8, "val": 0.2}, {"a": 0.5, "b": 0.3, "c": 0.2}])
def test_small_sets_get_the_nearest_division_and_clips_never_move(splits):
    random = np.random.default_rng(len(splits))
    for n_groups in (2, 4, 6):
        sizes = random.integers(1, 6, max(n_groups, len(splits))).tolist()
        rows, places = rows_of_groups(sizes), {}
        found = split_of(rows, splits, places=places)
        division = [found[f"{group}-0"] for group in range(len(sizes))]
        assert found == {id_: division[int(id_.split("-")[0])] for id_ in found}
        nearest = min(off_by(sizes, other, splits) for other in product(splits, repeat=len(sizes)))
        assert off_by(sizes, division, splits) == nearest
        # Clips are added to old and to new groups, some are removed, and come back.
        for step in range(3):
            kept = {id_: split for id_, split in found.items() if random.random() < 0.5}
            left = [row for row in rows if row[0] in kept]
            if left:
                split_of(left, splits, done=kept, places=places)
            rows += [(f"{group}-{step}+", f"prompt {group}", None) for group in range(len(sizes))][:: step + 1]
            rows += [(f"{step}+{number}", f"other {step} {number}", None) for number in range(20 * step)]
            later = split_of(rows[:: random.choice([-1, 1])], splits, done=kept, places=places)
            assert later.items() >= found.items()
            found = later


def test_division_of_many_groups_is_near_if_their_hashes_miss_it():
    """Half of all clips are those of one person."""
    sizes = [200, *[1] * 200]
    for number in range(3):
        rows = [(id_, f"{prompt} of {number}", None) for id_, prompt, _ in rows_of_groups(sizes)]
        assert Counter(split_of(rows, {"train": 0.8, "val": 0.2}).values()) == pytest.approx({"train": 320, "val": 80}, abs=40)


def test_removed_clips_keep_their_split_in_a_set_that_was_large():
    rows, places = rows_of_groups([1] * 60), {}
    before = split_of(rows, places=places)
    split_of(rows[:5], done={id_: before[id_] for id_, *_ in rows[:5]}, places=places)
    for others in (rows[:25], rows[5:30], rows[35:]):
        assert split_of(others, places=dict(places)) == {id_: before[id_] for id_, *_ in others}


def test_each_person_has_clips_in_the_training_split():
    """If groups are of a prompt each, the few prompts of a person can all be drawn for validation."""
    persons = [("ada", 60), *((f"person {number}", 2) for number in range(20))]
    rows = [(f"{name} {number}", f"{name} {number}", name) for name, prompts in persons for number in range(prompts)]

    def trained(found):
        return {name for name, _ in persons if "train" in {found[id_] for id_, _, person in rows if person == name}}

    splits, places = {"val": 0.3, "train": 0.7}, {}
    assert len(trained(split_of(rows, splits, by=("prompt",)))) < len(persons)
    found = split_of(rows, splits, by=("prompt",), train_all=True, places=places)
    assert len(trained(found)) == len(persons)
    assert 20 < Counter(found.values())["val"] < 40
    # The next call knows who was moved.
    again = split_of(rows[::-1], splits, by=("prompt",), train_all=True, places=places, done=dict([*found.items()][::2]))
    assert again == found


def test_splits_that_cannot_hold_are_refused(capsys):
    rows = [(f"a{number}", f"p{number}", "Ada") for number in range(9)] + [("b", "p", "Bo")]
    assert sorted(Counter(split_of(rows).values()).values()) == [1, 9]
    printed = capsys.readouterr().err
    assert "1 of 10 clips. Clips of the same prompt or character, or of a continued chain, are never divided" in printed
    assert "with 'character Ada', has 9 clips. Try --split-by prompt, --split-by character, or other shares" in printed
    with pytest.raises(UsageError, match=r"would have 0 of 9 clips.*with 'character Ada', has 9 clips. Try --split-by prompt"):
        split_of(rows[:-1])
    assert Counter(split_of(rows, by=("prompt",)).values()) == {"train": 5, "test": 5}
    assert not capsys.readouterr().err
    joined = [("a", "one", "Ada"), ("b", "two", "Bo"), ("new", "one", "Bo")]
    with pytest.raises(UsageError, match="new connects b of test and a of train, through 'character Ada' or other keys"):
        split_of(joined, done={"a": "train", "b": "test"})
    for text, match in (("train=0.9", "add up to 0.9"), ("a=1,a=1", "got 'a=1'"), ("a/b=1", "a/b=1"), ("a=x", "got 'a=x'")):
        with pytest.raises(UsageError, match=match):
            parse_splits(text)


def test_clips_of_one_prompt_are_in_one_split_whoever_they_show(tmp_path, capsys, monkeypatch):
    """Forty prompts of two persons with triggers, half of them with the name of the person in the prompt, half with choices."""
    work_inline(monkeypatch, with_card=True)
    people = "characters: {ada: {trigger: adax}, bob: {trigger: bobx, description: a man}}\nshots:\n"
    texts = [f"a walk {number} {{by day|by night}}" if number % 2 else f"{{}} at {number}" for number in range(40)]
    lines = [{"prompt": text.replace("{}", f"{{{name}}}"), "character": name} for text in texts for name in ("ada", "bob")]
    script = tmp_path / "script.yaml"
    script.write_text(people + "".join(f"  - {json.dumps(line)}\n" for line in lines))
    shots = read_script(ScriptSettings(script, defaults={"generate_video": False})).shots
    assert len({shot.prompt for shot in shots}) == 120
    picture = texture(64, 64)

    def splits_of(name, metadata):
        fields = [{**shot.model_dump(exclude_defaults=True), "metadata": metadata(shot)} for shot in shots]
        out, dest = make_folder(tmp_path / name, [(each, picture) for each in fields]), tmp_path / f"set of {name}"
        export_to(dest, out.url, splits={"train": 0.8, "val": 0.2}, split_by=("prompt",))
        rows = duckdb.sql(f"SELECT id, split, line_prompt FROM '{dest}/.vidgen/rows.parquet'").fetchall()
        found = defaultdict(set)
        for id_, split, _ in rows:
            found[re.sub("{ada}|{bob}", "{}", prompts[id_])].add(split)
        return found

    prompts = {shot.id: shot.metadata["line_prompt"] for shot in shots}
    assert {re.sub("{ada}|{bob}", "{}", text) for text in prompts.values()} == {*texts}
    found = splits_of("recorded", lambda shot: shot.metadata)
    assert {len(splits) for splits in found.values()} == {1}
    assert "without the prompt of the line" not in capsys.readouterr().err
    card = (tmp_path / "set of recorded/README.md").read_text()
    assert "120 images" in card
    assert "of 40 prompts and 2 persons" in card
    # Folders of earlier versions have the rendered prompts only.
    splits_of("old", lambda shot: {name: value for name, value in shot.metadata.items() if name != "line_prompt"})
    assert "120 clips without the prompt of the line" in capsys.readouterr().err


def test_clips_are_encoded_again_as_asked_with_their_marks(tmp_path):
    record = ProvenanceRecord(source_type="trainedAlgorithmicMedia", key="k")
    frames = moving(12, px=6, size=(64, 96))
    with Mp4Writer(tmp_path / "in.mp4", 96, 64, 12, Mp4Settings(crf=5), record.metadata()) as clip:
        clip.write(frames)
    to = tmp_path / "out.mp4"
    found = encode_again(tmp_path / "in.mp4", to, None, SourceClip(4, 6, 48, 32))
    size = {"width": 48, "height": 32, "num_frames": 4, "fps": 6.0, "duration_s": 4 / 6}
    assert found == {**size, "sha256": sha256_of(to), "bytes": to.stat().st_size}
    with open_video(to) as video:
        small = frames.reshape(12, 32, 2, 48, 2, 3).mean((2, 4))
        errors = np.abs(video.frames(0, 4)[:, None] - small).mean((2, 3, 4))
    # The colours of so small a texture do not survive half the resolution of colours.
    assert errors.argmin(1).tolist() == [0, 2, 4, 6]
    assert errors.min(1).max() < 16 < errors[errors > errors.min(1, keepdims=True)].min()
    assert read_provenance(to).record == record
    assert encode_again(tmp_path / "in.mp4", to, "32").items() >= {"width": 48, "num_frames": 12, "fps": 12.0}.items()
    # The last frame is repeated.
    encode_again(tmp_path / "in.mp4", to, None, SourceClip(26, 24, 96, 64))
    with open_video(to) as video:
        errors = np.abs(video.frames(0, 26)[:, None] - frames.astype(float)).mean((2, 3, 4))
    assert errors.argmin(1).tolist() == [min(number // 2, 11) for number in range(26)]


@pytest.mark.usefixtures("inline")
def test_object_stores(six_clips, tmp_path, endpoint, capsys):  # noqa: F811
    bucket = boto3.resource("s3", endpoint_url=endpoint).Bucket("clips")
    for path in six_clips.rglob("*"):
        if path.is_file():
            bucket.put_object(Key=f"out/{path.relative_to(six_clips)}", Body=path.read_bytes())
    source, dest = (f"s3://clips/{name}?endpoint={endpoint}" for name in ("out", "dest"))
    for where, clips in (("true", 6), ("id <> 'D'", 5)):
        assert main(["export", source, dest, "--where", where, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["splits"] == {"train": clips}
        copy = tmp_path / f"copy-{clips}"
        for item in bucket.objects.filter(Prefix="dest/train/"):
            target = copy / item.key
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(item.get()["Body"].read())
        assert len(valid_rows(copy / "dest")) == clips == len(list(copy.rglob("*.mp4")))
