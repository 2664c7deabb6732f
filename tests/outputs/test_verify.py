"""`vidgen verify`: damage to every kind of file is found, and repaired where that is possible."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.fake_stages import use_fakes
from tests.outputs.test_outputs import write
from vidgen_ray.cli import folder_commands, main
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.records import shot_path
from vidgen_ray.outputs.verify import verify
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import read_script


@pytest.fixture(params=["disk", "s3"])
def outputs(request, tmp_path, url):
    return OutputFolder(tmp_path / "out" if request.param == "disk" else url)


@pytest.fixture
def shot(outputs, plan_of):
    """A finished shot `a` with a manifest row and a cache entry."""
    plan = plan_of("a", generate_video=False)
    with outputs.draft(plan) as draft:
        draft.path("image.png").write_bytes(b"image")
        record = draft.commit([])
    outputs.stage_cache.put(plan.steps[0].key, {"image": np.zeros((16, 16, 3), np.uint8)})
    write(outputs, "r1", ManifestRow.of_shot("r1", "s.jsonl", plan.shot, 1, record, "rendered"))
    return plan


def damage(storage, path):
    """Change the first byte of a file, and cut off the last one of a table."""
    content = storage.read(path)
    storage.write(path, content[:-1] if path.endswith(".parquet") else bytes([content[0] ^ 1]) + content[1:])


def test_intact_folder_has_no_damage(outputs, shot):
    report = verify(outputs)
    assert (report.shots, report.bytes, report.cache_entries, report.damaged) == (1, 5, 1, [])


def test_damage_is_named_and_a_damaged_shot_can_be_rendered_again(outputs, shot):
    storage, folder = outputs.storage, shot_path("a")
    record, key = storage.read(f"{folder}/shot.json"), shot.steps[0].key
    (manifest,) = storage.files("manifest")
    damages = {
        f"{folder}/image.png": "has another content than shot.json states (sha256)",
        f"cache/{key[:2]}/{key}/image.png": "cannot be decoded",
        f"manifest/{manifest}": "is not a complete Parquet file; rendering its script again restores its rows",
        "inputs/0123456789abcdef.png": "has another content than its name states (sha256)",
    }
    storage.write("inputs/0123456789abcdef.png", b"photo")
    for path in damages:
        damage(storage, path)
    entry = f"cache/{key[:2]}/{key}"
    expected = {path.replace(f"{entry}/image.png", entry): problem for path, problem in damages.items()}
    report = verify(outputs)
    assert dict(report.damaged) == expected
    ((line,), scripts) = report.lines, report.scripts
    assert (line.id, line.fields["prompt"], scripts) == ("a", shot.shot.prompt, set())
    assert outputs.find_by_id("a"), "nothing is changed without --repair"

    storage.write(f"{folder}/image.png", b"imag")
    assert verify(outputs).damaged[1].problem == "has 4 bytes instead of 5"
    storage.delete(f"{folder}/image.png")
    verify(outputs, repair=True)
    assert outputs.find_by_id("a") is None
    assert not outputs.stage_cache.has(key)
    # The lines of a damaged record are known to the script only.
    storage.write(f"{folder}/shot.json", record[:-9])
    assert [damage.problem for damage in verify(outputs).damaged if "shot.json" in damage.path] == [
        "is not the record of a shot"
    ]


def test_missing_shots_and_key_files_are_found(outputs, shot):
    key_file = f"keys/{shot.key[:2]}/{shot.key}"
    outputs.storage.delete(key_file)
    (missing,) = verify(outputs, repair=True).damaged
    assert missing == (key_file, "is missing; a server finds the shot a by it")
    assert outputs.find_by_key(shot.key)
    outputs.delete_shot("a")
    report = verify(outputs)
    assert report.damaged == [(shot_path("a"), "is missing, but the manifest has it as finished")]
    assert report.scripts == {"s.jsonl"}


def test_folder_in_use_is_refused(outputs, shot):
    with outputs.lease("r1"), pytest.raises(SetupError, match=r"run r1 .* is working in it"):
        verify(outputs)


def test_command_renders_damaged_shots_again(tmp_path, tiny, make_shot, capsys, monkeypatch):
    """The pipeline stands for a run, which `vidgen retry` starts in the same way."""
    out = tmp_path / "out"

    def render_again(out, script, profile, *options, as_json):
        for line in read_script(ScriptSettings(script, profile_defaults=profile.defaults)).lines:
            pipeline.render(line.shot)

    monkeypatch.setattr(folder_commands, "render_again", render_again)
    with closing(use_fakes(VideoGenerationPipeline(tiny, out))) as pipeline:
        for shot_id in "ab":
            pipeline.render(make_shot(id=shot_id, generate_video=False))
        assert main(["verify", str(out)]) == 0
        image = Path(out / shot_path("b") / "image.png")
        original = image.read_bytes()
        image.write_bytes(original[:-20] + bytes(20))
        capsys.readouterr()
        assert main(["verify", str(out), "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["damaged"] == [
            {"path": f"{shot_path('b')}/image.png", "problem": "has another content than shot.json states (sha256)"}
        ]
        assert main(["verify", str(out), "--repair", "-p", "tiny"]) == 0
    assert image.read_bytes() == original
    assert main(["verify", str(out)]) == 0
