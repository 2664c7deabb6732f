"""Removing a person from output folders: what is deleted, what stays, and what is listed."""

import json

import pyarrow
import pyarrow.parquet as pq
import pytest

from tests.conftest import ASTRONAUT, EXAMPLES
from tests.outputs.test_outputs import commit
from vidgen_ray.cli import main
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.reviews import Opinion, ReviewSession, read_reviews
from vidgen_ray.system.cache_dir import sha256_of

ADA = EXAMPLES / "faces" / "ada.png"


@pytest.fixture
def folder(tmp_path, plan_of):
    """Output folder with cached steps, features and stored photos of two people, without rendering anything."""
    outputs = OutputFolder(tmp_path / "out")
    outputs.prepare()

    def committed(shot_id, *photos, **fields):
        plan = plan_of(shot_id, face_image=photos, generate_video=False, seed=len(shot_id), **fields)
        for step in plan.steps:
            outputs.storage.write(f"cache/{step.key[:2]}/{step.key}/face.json", "{}")
        return plan, commit(outputs, plan, ("image.png", "face.json"))

    shots = {
        "one": committed("one", str(ASTRONAUT)),
        "named": committed("named", str(ASTRONAUT), metadata={"character": "eileen"}),
        "other": committed("other", str(ADA), metadata={"character": "ada"}),
        "ball": committed("ball"),
    }
    for photo in (ASTRONAUT, ADA):
        outputs.storage.write(f"inputs/{sha256_of(photo)}", photo.read_bytes())
        outputs.keep_input(photo.read_bytes(), ".png")
    outputs.storage.write("cache/00/" + "0" * 64 + "/face.json", "{}")
    return outputs, shots


def cached(outputs, plan):
    return [outputs.stage_cache.has(step.key) for step in plan.steps]


def test_features_cache_and_photos_are_removed_and_shots_are_listed(folder, capsys):
    outputs, shots = folder
    before = {path: path.stat().st_mtime_ns for path in outputs.root.rglob("*") if path.is_file()}
    assert main(["identity", "remove", str(ASTRONAUT), str(outputs.root), "--dry-run", "--json"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)
    (outputs.root / ".lease-000001").unlink()
    now = {path: path.stat().st_mtime_ns for path in outputs.root.rglob("*") if path.is_file()}
    assert now == before
    assert main(["identity", "remove", str(ASTRONAUT), str(outputs.root), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report == {**planned, "dry_run": False}
    assert (report["shots"], report["shots_removed"]) == (["named", "one"], False)
    assert (report["features"], len(report["photos"])) == (2, 2)
    assert not any(cached(outputs, shots["one"][0]) + cached(outputs, shots["named"][0]))
    assert all(cached(outputs, shots["other"][0]) + cached(outputs, shots["ball"][0])), "of another person, and of nobody"
    assert not outputs.stage_cache.has("0" * 64), "of a failed shot, whose person is not known"
    names = {file.name for file in (outputs.root / "inputs").iterdir()}
    assert names == {sha256_of(ADA), f"{sha256_of(ADA)[:16]}.png"}
    for shot_id, has_features in (("one", False), ("other", True)):
        assert (outputs.shot_folder(shot_id) / "face.json").exists() == has_features
        assert (outputs.shot_folder(shot_id) / "image.png").exists()
        assert outputs.find_finished(shots[shot_id][0]) is not None, "the shot stays finished"


def test_outputs_are_removed_with_their_rows(folder, capsys):
    outputs, shots = folder
    assert main(["identity", "remove", "bob", str(outputs.root)]) == 2
    assert "got 'bob', must be an existing photo, or the character of a shot" in capsys.readouterr().err
    run = "20260101T000000-aaaaaa"
    writer = ManifestWriter(outputs, run, "s.jsonl")
    for plan, record in shots.values():
        writer.add(ManifestRow.of_shot(run, "s.jsonl", plan.shot, 1, record, "rendered"))
    writer.close()
    clip = shots["one"][1].files["image.png"].sha256
    ReviewSession(outputs.storage, None).add(Opinion(clip_sha256=clip, note="Eileen looks older"), "one")
    with outputs.storage.new_file("scores/faces@1/1.parquet") as path:
        pq.write_table(pyarrow.table({"clip_sha256": [clip, "0" * 64], "likeness_mean": [0.7, 0.1]}), path)
    (outputs.root / "scores/faces@1/.tmp-of-a-killed-call").write_bytes(b"PAR")
    assert main(["identity", "remove", "eileen", str(outputs.root), "--outputs"]) == 0
    assert read_reviews(outputs.storage) == {}
    assert pq.read_table(outputs.root / "scores/faces@1/1.parquet")["clip_sha256"].to_pylist() == ["0" * 64]
    out = capsys.readouterr().out
    assert "2 shots made with this person, removed:" in out
    assert [outputs.find_by_id(shot_id) is not None for shot_id in shots] == [False, False, True, True]
    assert {row["id"] for row in pq.read_table(outputs.root / "manifest").to_pylist()} == {"other", "ball"}
