"""Finished shots found from the manifest, and ids that belong to another script."""

import os
import pickle

import pytest

from tests.outputs.test_outputs import commit, failed, write
from vidgen_ray.licences import UsedWeights
from vidgen_ray.outputs import manifest
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import FinishedShots, ManifestRow

RUNS = [f"00000{number}-abc" for number in range(1, 6)]


@pytest.fixture(params=["disk", "object store"])
def outputs(request, tmp_path):
    return OutputFolder(tmp_path / "out" if request.param == "disk" else request.getfixturevalue("url"))


@pytest.fixture
def on_disk(tmp_path):
    return OutputFolder(tmp_path / "out")


def write_run(outputs, run, *plans, script="s.jsonl", last_run="rendered", render=True, **options):
    """Write the rows of shots, which are rendered first unless `render` is false."""
    results = [commit(outputs, plan) if render else outputs.find_finished(plan) for plan in plans]
    rows = [
        ManifestRow.of_shot(run, script, plan.shot, 1, result, last_run) for plan, result in zip(plans, results, strict=True)
    ]
    return write(outputs, run, *rows, script=script, **options)


def found(outputs, *plans, **options):
    """Return for each plan whether it is finished."""
    return [done is not None for done in FinishedShots.load(outputs).find(plans, **options)]


def test_finished_shots_are_found_without_reading_records(outputs, plan_of, monkeypatch):
    plans = [plan_of(f"s{number}") for number in range(12)]
    write_run(outputs, RUNS[0], *plans[:6])
    expected = [outputs.find_finished(plan) for plan in plans[:6]]
    finished = pickle.loads(pickle.dumps(FinishedShots.load(outputs)))
    assert len(finished) == 6
    monkeypatch.setattr(OutputFolder, "find_finished", lambda *_: pytest.fail("read a record"))
    # On a disk, a missing record is found by reading it.
    new_plans = plans[6:] if outputs.storage.local is None else []
    results = finished.find([*plans[:6], *new_plans])
    assert results[6:] == [None] * len(new_plans)
    by_row, by_record = (
        [vars(ManifestRow.of_shot("r", "s", plan.shot, 1, each, "reused")) | {"ended_at": ""} for plan, each in pairs]
        for pairs in (zip(plans[:6], results[:6], strict=True), zip(plans[:6], expected, strict=True))
    )
    assert by_row == by_record


def test_columns_of_the_row_are_kept_also_if_the_record_is_read(on_disk, plan_of):
    licences = (
        UsedWeights(weights="a", licence="MIT", commercial_use="yes"),
        UsedWeights(weights="b", licence=None, commercial_use="unknown"),
    )
    plan = plan_of("x", seed=5).model_copy(update={"licences": licences})
    row = ManifestRow.of_shot(RUNS[0], "s", plan.shot, 1, commit(on_disk, plan), "rendered")
    likeness = {"image_likeness": 0.5, "clip_likeness_mean": None, "clip_likeness_worst": None, "frames_without_face": 3}
    # The seed is that of a retry.
    write(on_disk, RUNS[0], row.model_copy(update={"seed": 7, "cost": 0.25, "currency": "USD", **likeness}))
    finished = FinishedShots.load(on_disk)
    (by_row,) = finished.find([plan])
    os.utime(on_disk.shot_folder("x") / "shot.json", (0, 0))
    (by_record,) = finished.find([plan])
    assert (by_row.cost, by_row.currency) == (by_record.cost, by_record.currency) == (0.25, "USD")
    assert (by_row.seed, by_row.image_likeness, by_row.frames_without_face) == (7, 0.5, 3)
    assert (by_record.seed, by_record.committed_at) == (5, 0.0), "from the record"
    assert (by_row.licences, by_row.commercial_use) == (["MIT", None], "unknown")


def test_last_row_of_an_id_counts_and_shots_without_a_row_are_found_by_their_record(outputs, plan_of):
    old, new, failed_later, without_row = plan_of("a"), plan_of("a", prompt="new"), plan_of("b"), plan_of("c")
    write_run(outputs, RUNS[0], old, failed_later)
    write_run(outputs, RUNS[1], new)
    write(outputs, RUNS[2], failed(RUNS[2], "b"))
    commit(outputs, without_row)
    finished = FinishedShots.load(outputs)
    assert len(finished) == 1
    assert [done is not None for done in finished.find([old, new, failed_later, without_row])] == [False, True, True, True]
    assert found(outputs, new, with_stages=True) == [False], "has no debug files"


def test_shot_with_damaged_files_is_not_finished(on_disk, plan_of):
    plans = [plan_of(name) for name in "abc"]
    write_run(on_disk, RUNS[0], *plans)
    deleted, truncated, without_record = (on_disk.shot_folder(name) for name in "abc")
    (deleted / "video.mp4").unlink()
    (truncated / "video.mp4").write_bytes(b"cut")
    (without_record / "shot.json").unlink()
    assert found(on_disk, *plans) == [False] * 3


def test_stale_row_of_a_killed_run_is_not_trusted(outputs, plan_of):
    before, after = plan_of("x", prompt="before"), plan_of("x", prompt="after!")
    write_run(outputs, RUNS[0], before)
    writer = write(outputs, RUNS[1], close=False)
    commit(outputs, after)
    writer._flushing.stop()  # the run is killed before it writes the row
    assert found(outputs, before, after) == [False, True]
    # The next run writes a new row, so the marker is not needed any more.
    write_run(outputs, RUNS[2], after, last_run="reused", render=False)
    assert not list(manifest.open_writers(outputs.storage))
    assert found(outputs, before, after) == [False, True]


def test_marker_is_kept_while_an_older_row_may_be_stale(url, plan_of):
    in_store = OutputFolder(url)
    stale, changed, other = plan_of("x", prompt="before"), plan_of("x", prompt="after!"), plan_of("y")
    write_run(in_store, RUNS[0], stale)
    write(in_store, RUNS[1], close=False)._flushing.stop()
    commit(in_store, changed)
    write_run(in_store, RUNS[2], other, script="other.jsonl")
    assert list(manifest.open_writers(in_store.storage)) == [RUNS[1]]
    assert found(in_store, stale, changed, other) == [False, True, True]
    # An interrupted run may have written shots that no row describes.
    write_run(in_store, RUNS[3], other, every_shot_has_a_row=False)
    assert list(manifest.open_writers(in_store.storage)) == [RUNS[1], RUNS[3]]


def test_shot_of_a_writer_without_rows_is_not_hidden_by_an_older_row(outputs, plan_of):
    row_plan, new = plan_of("x", prompt="before"), plan_of("x", prompt="after!")
    write_run(outputs, RUNS[0], row_plan)
    with manifest.shot_without_row(outputs.storage):
        commit(outputs, new)
    assert found(outputs, row_plan, new) == [False, True]


def test_id_of_another_script_is_owned_unless_the_key_is_the_same(outputs, plan_of):
    plan, changed = plan_of("x"), plan_of("x", prompt="a dog")
    write_run(outputs, RUNS[0], plan, script="episode1.jsonl")
    write(outputs, RUNS[1], failed(RUNS[1], "y", script="episode1.jsonl"), script="episode1.jsonl")
    commit(outputs, plan_of("z"))
    finished = FinishedShots.load(outputs)
    for shot_id, key, script, owner in (
        ("x", plan.key, "episode2.jsonl", None),
        ("x", changed.key, "episode1.jsonl", None),
        ("x", changed.key, "episode2.jsonl", "episode1.jsonl"),
        ("x", None, "episode2.jsonl", "episode1.jsonl"),
        ("y", changed.key, "episode2.jsonl", None),
        ("z", changed.key, "episode2.jsonl", None),
    ):
        assert finished.other_owner(shot_id, key, script) == owner, (shot_id, key, script)
