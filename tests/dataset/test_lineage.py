"""Differences of two output folders and their reasons."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from vidgen_ray.cli import main
from vidgen_ray.dataset.lineage import differences
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import RECORD, FileRecord, ShotRecord, StepRecord, shot_path
from vidgen_ray.shot import Shot


def _digest(*parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _write(out, shot, changed=None, *, version=1, bytes_of="", weights=None, torch="2.9", photo=None):
    """Write a record whose keys and bytes are those of the first version, from the stage `changed` on those of `version`."""
    number, steps = 1, []
    for stage in ("flux", "lora", "svd"):
        number = version if stage == changed else number
        loaded = ((weights or {}).get(stage, f"weights of {stage}"),)
        key = _digest(shot["id"], stage, number)
        steps.append(StepRecord(stage=stage, key=key, weights=loaded, seconds=1, gpu_seconds=1, cached=False))
    made = {"image.png": _digest(steps[1].key), "video.mp4": _digest(steps[2].key) + bytes_of}
    folder = out / shot_path(shot["id"])
    folder.mkdir(parents=True)
    record = ShotRecord(
        key=_digest(steps[-1].key, version if changed == "crop" else 1),
        shot=Shot(**{"prompt": "a boat", "seed": 1, **shot}),
        tries=1,
        likeness=None,
        seeds={},
        stages=tuple(steps),
        files={name: FileRecord(sha256=digest, bytes=1) for name, digest in made.items()},
        software={"torch": torch},
        face_photos=() if photo is None else (photo,),
    )
    (folder / RECORD).write_text(record.model_dump_json(exclude={"committed_at"}))


def _profile(out: Path, **options: Any) -> None:
    actor = {"options": options, "device": "cpu", "dtype": "float32"}
    profile = {"actors": {"svd": actor}, "encode": {"crf": 18}, "provenance": {"metadata": "full", "label": None}}
    (out / "run.json").write_text(json.dumps({"profile": profile}))


LORA = {"lora": [{"path": "/old/boat.safetensors", "weight": 0.6}]}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with a shot for each kind of difference."""
    old, new = tmp_path / "old", tmp_path / "new"
    both = {
        # Neither another path of the same files nor metadata matter.
        "same": ({**LORA, "metadata": {"a": 1}}, {"lora": [{"path": "/new/boat.safetensors", "weight": 0.6}]}, {}),
        "lora-1": (LORA, {"lora": [{"path": "/new/boat.safetensors", "weight": 0.8}]}, {"changed": "lora"}),
        "lora-2": (LORA, {"lora": [{"path": "/new/boat.safetensors", "weight": 0.8}]}, {"changed": "lora"}),
        "trained": (LORA, LORA, {"changed": "lora", "weights": {"lora": "trained"}}),
        # `lora_strength` is read by no stage that changed.
        "motion": ({"lora_strength": 0.5}, {"motion_bucket_id": 60}, {"changed": "svd"}),
        "option": ({}, {}, {"changed": "svd"}),
        "device": ({}, {}, {"bytes_of": "other"}),
        "torch": ({}, {}, {"bytes_of": "other", "torch": "2.10"}),
        "photo": ({}, {}, {"changed": "flux", "photo": "b" * 64}),
    }
    both |= {f"seed-{n}": ({"seed": n}, {"seed": n + 100}, {"changed": "flux"}) for n in range(6)}
    for name, (before, after, how) in both.items():
        _write(old, {"id": name, **before}, photo="a" * 64 if name == "photo" else None)
        _write(new, {"id": name, **after}, version=2, **how)
    _write(old, {"id": "gone"})
    _write(new, {"id": "added"})
    (new / shot_path("half")).mkdir(parents=True)
    _profile(old, decode_chunk_frames=5)
    _profile(new, decode_chunk_frames=5, cpu_offload=True)
    return old, new


def _found(old: Path, new: Path) -> dict[str, tuple[str | None, str | None, list[str]]]:
    found = list(differences(OutputFolder(old), OutputFolder(new)))
    return {each.id: (each.file, each.step, [str(reason) for reason in each.reasons]) for each in found if each}


def test_first_step_that_differs_and_its_reasons_are_named(folders: tuple[Path, Path]) -> None:
    found = _found(*folders)
    names = {"lora-1", "lora-2", "trained", "motion", "option", "device", "torch", "photo", "gone", "added"}
    assert found.keys() == {*names, *(f"seed-{n}" for n in range(6))}
    assert found["lora-1"] == ("image", "lora", ["lora.weight 0.6 -> 0.8"])
    assert found["trained"] == ("image", "lora", ["lora weights weights of l -> trained"])
    assert found["motion"] == ("video", "svd", ["motion_bucket_id 127 -> 60"])
    (unknown,) = found["option"][2]
    assert unknown.startswith("version of the stage, or an option")
    assert found["device"] == ("video", None, ["another GPU, driver or encoder"])
    assert found["torch"] == ("video", None, ["torch 2.9 -> 2.10"])
    assert found["photo"] == ("image", "flux", ["face_image aaaaaaaaaaaa -> bbbbbbbbbbbb"])
    assert found["gone"] == found["added"] == (None, None, [])


def test_options_that_change_bytes_damaged_records_and_new_stages_are_reasons(folders: tuple[Path, Path]) -> None:
    old, new = folders
    (old / shot_path("torch") / RECORD).write_text("{")
    record = json.loads((new / shot_path("option") / RECORD).read_text())
    record["stages"].append({**record["stages"][0], "stage": "of-another-package"})
    (new / shot_path("option") / RECORD).write_text(json.dumps(record))
    found = _found(old, new)
    assert found["torch"] == (None, None, ["a damaged shot.json; see `vidgen verify`"])
    assert found["option"] == ("video", "svd", ["stage of-another-package only in OUT2"])
    _profile(new, decode_chunk_frames=3, cpu_offload=True)
    found = _found(old, new)
    assert found["photo"][2] == ["face_image aaaaaaaaaaaa -> bbbbbbbbbbbb", "svd.decode_chunk_frames 5 -> 3"]
    assert found["device"][2] == ["another GPU, driver or encoder"]


def test_diff_groups_equal_reasons_and_exits_with_1(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    old, new = map(str, folders)
    assert main(["diff", old, new]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 shot equal"
    assert lines[1].startswith("6 shots different from flux: seed, such as seed ")
    assert lines[2] == "2 shots different from lora: lora.weight 0.6 -> 0.8 (lora-2, lora-1)"
    assert "1 shot only in OUT1 (gone)" in lines
    assert "1 shot different, same key: another GPU, driver or encoder (device)" in lines
    assert main(["diff", old, new, "--json"]) == 1
    shots = {shot["id"]: shot for shot in json.loads(capsys.readouterr().out)}
    assert len(shots) == 16
    assert shots["motion"]["reasons"] == [{"kind": "field", "name": "motion_bucket_id", "old": 127, "new": 60}]
    assert main(["diff", old, old]) == 0
    assert capsys.readouterr().out == "16 shots equal\n"
    assert main(["diff", old, str(folders[0] / "none")]) == 4
