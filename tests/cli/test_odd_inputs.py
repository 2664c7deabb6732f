"""Inputs that are odd but usual: tables as tools write them, files under other names, values that look like others.

Each is used as meant, noted, or refused with a sentence that says what it is.
"""

import gzip
import io
import json
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.outputs.test_outputs import commit
from vidgen_ray.batch.line_planner import LinePlanner
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.cli import main
from vidgen_ray.cli.file_options import check_out
from vidgen_ray.cli.options import LineOptions, parse_fields
from vidgen_ray.content_keys import ShotPlanner, cut_texts, params_of
from vidgen_ray.errors import ScriptError, UsageError
from vidgen_ray.graph import stages_of
from vidgen_ray.media.images import encode_png
from vidgen_ray.outputs import object_storage
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.profile import load_profile
from vidgen_ray.script.check import check_shot
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import open_lines, read_script
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.svd import SVDStage

PNG = encode_png(np.zeros((64, 64, 3), np.uint8), None)


def text(name, content):
    return name, lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def table(name="s.parquet", **columns):
    return name, lambda path: pq.write_table(pa.table(columns), path)


def lines(*fields, name="s.jsonl"):
    return text(name, "".join(json.dumps(each) + "\n" for each in fields))


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


LINE = b'{"prompt": "a ball", "seed": 7}\n'
MOMENT = datetime(2024, 5, 1, 12, tzinfo=UTC)
MAP = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))
# Name, file, expected fields of the first shot.
USED = [
    ("integer ids", table(prompt=["a", "b"], id=[1, 2]), {"id": "1"}),
    ("ids of pandas with gaps", table(prompt=["a", "b"], id=[1.0, None]), {"id": "1"}),
    ("timestamp", table(prompt=["a"], **{"metadata.t": [MOMENT]}), {"metadata": {"t": "2024-05-01T12:00:00+00:00"}}),
    ("decimal", table(prompt=["a"], **{"metadata.d": [Decimal("1.50")]}), {"metadata": {"d": "1.50"}}),
    ("metadata as map", table(prompt=["a"], metadata=MAP), {"metadata": {"a": 1}}),
    ("index of pandas", table(prompt=["a", "b"], seed=[1.0, float("nan")], __index_level_0__=[0, 1]), {"seed": 1}),
    ("Zstandard", text("s.csv.zst", zstd(b"prompt,seed\na,7\n")), {"seed": 7}),
    ("whole floats", text("s.jsonl", '{"prompt": "a", "fps": 24.0, "seed": 1e3}\n'), {"fps": 24, "seed": 1000}),
    ("bytes in metadata", table(prompt=["a"], metadata=[{"b": b"ab"}]), {"metadata": {"b": "YWI="}}),
    ("NaN in a struct", table(prompt=["a"], metadata=[{"a": float("nan"), "b": 1}]), {"metadata": {"b": 1}}),
    ("metadata as JSON text", table(prompt=["a"], metadata=['{"a": 1}']), {"metadata": {"a": 1}}),
    ("matrix as JSON text", table(prompt=["a"], id=["x"], matrix=['{"seed": [3, 4]}']), {"id": "x-3", "seed": 3}),
    ("boolean as 0", table(prompt=["a"], generate_video=[0]), {"generate_video": False}),
    ("image as bytes", table(prompt=["a"], image=[{"bytes": PNG, "path": "x.png"}]), {"image": "{cache}/inputs/*.image"}),
    ("caption beside text", table(caption=["a"], text=["b"]), {"prompt": "a", "metadata": {"text": "b"}}),
    ("gzip", text("s.jsonl.gz", gzip.compress(LINE)), {"seed": 7}),
    ("ndjson", text("s.ndjson", LINE), {"seed": 7}),
    ("missing numbers in .csv", text("s.csv", "prompt,seed,fps\nnone,nan,None\nb,null,6\n"), {"prompt": "none", "fps": 5}),
    ("id with leading zeros in YAML", text("s.yaml", "shots: [{id: 007, prompt: a}]"), {"id": "007"}),
    ("columns of another name", lines({"caption_long": "a", "sample_id": "x", "n": 1}), {"id": "x", "metadata": {"n": 1}}),
]

REFUSED = [
    (text("s.yaml", "shots: [{prompt: a, seed: 017}]"), "seed: got '017', must be a valid integer"),
    (text("s.yaml", "shots: [{prompt: on}]"), "prompt: got True, must be text; put it into quotes"),
    (lines({"prompt": "\u200b\u200b"}), "must not be blank"),
    (text("s.jsonl", '{"prompt": "a"}'.encode("utf-16")), "not UTF-8: the file is UTF-16 text"),
    (text("s.jsonl", gzip.compress(LINE)), "not UTF-8: the file is gzip data, name the file .jsonl.gz"),
    (text("s.jsonl.gz", gzip.compress(LINE)[:-9] + b"x" * 9), "a read error"),
    (text("s.yaml.gz", gzip.compress(b"shots: [a]")), "file type '.gz', must be one of"),
    (lines({"prompt": "a", "lora": "owner/name"}), "LoRAs are not read from a hub, download it first"),
    (lines({"prompt": "a", "image": "data:image/png;base64,AAAA"}), "URLs are not read"),
    (lines({"prompt": "a", "lora": "builtin:tiny/lorra.safetensors"}), "unknown name, must be one of tiny/lora.safetensors"),
    (lines({"id": "a", "prompt": "a", "continue_from": "a"}), "must name another shot than the line itself"),
]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Write a file, and return the settings with which a command reads these scripts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path / "cache"))
    Path("x.png").write_bytes(PNG)

    def make(*scripts, **options):
        return LineOptions(**options).settings([Path(each) for each in scripts], load_profile("tiny"))

    return make


def read(settings, file, **options):
    name, build = file
    build(Path(name))
    return read_script(settings(name, **options))


@pytest.mark.parametrize(("file", "expected"), [row[1:] for row in USED], ids=[row[0] for row in USED])
def test_odd_script_is_read_as_meant(settings, tmp_path, file, expected):
    options = {"columns": ["caption_long=prompt", "sample_id=id"], "keep_columns": True} if file[0] == "s.jsonl" else {}
    script = read(settings, file, **options)
    assert not script.errors
    found = script.shots[0].model_dump(include=set(expected))
    if "image" in expected:
        assert Path(found["image"]).match(str(tmp_path / "cache/inputs/*.image"))
        assert Path(found["image"]).read_bytes() == PNG
    else:
        assert found == expected


def test_odd_scripts_are_refused_with_what_they_are(settings):
    for file, message in REFUSED:
        try:
            errors = read(settings, file).errors
        except ScriptError as error:
            errors = error.errors
        assert message in " ".join(map(str, errors))


def test_id_of_a_line_with_an_image_does_not_depend_on_the_folder(settings, monkeypatch, tmp_path):
    file = table(prompt=["a"], image=[{"bytes": PNG, "path": None}])
    first = read(settings, file).shots[0]
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path / "other"))
    second = read(settings, file).shots[0]
    assert (first.id, first.seed) == (second.id, second.seed)
    assert first.image != second.image


def test_several_files_and_patterns_are_one_script(settings, tmp_path):
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, "x.png").write_bytes(PNG)
        Path(name, "s.jsonl").write_text(json.dumps({"prompt": name, "image": "x.png"}) + "\n")
    Path("c.csv").write_text("prompt\nc\n")
    for scripts, name in ((["*/s.jsonl", "c.csv"], "s.jsonl+2"), (["a/s.jsonl", "b/s.jsonl", "c.csv"], "s.jsonl+2")):
        given = settings(*scripts)
        script = read_script(given)
        assert (given.path.name, script.errors) == (name, [])
        assert [(line.number, line.shot.prompt) for line in script.lines] == [(1, "a"), (2, "b"), (3, "c")]
        assert [shot.image for shot in script.shots][:2] == [str(tmp_path / each / "x.png") for each in "ab"]
    assert settings("a/*.jsonl").path == Path("a/s.jsonl")
    assert [settings(each).path for each in (".", "a/..")] == [tmp_path, tmp_path], "their names are those of the folders"
    Path("y.yaml").write_text("defaults: {fps: 6}\nshots: [a]\n")
    with pytest.raises(ScriptError, match="one of several scripts with a header, must be rendered alone"):
        read_script(settings("c.csv", "y.yaml"))
    with pytest.raises(UsageError, match=r"no file matches 'gone\*.csv'"):
        settings("gone*.csv")


def test_standard_input_is_a_script(settings, monkeypatch, tmp_path):
    for content, name in ((LINE, "stdin.jsonl"), (b"id,prompt\nx,a ball\n", "stdin.csv"), (b"a ball\n", "stdin.txt")):
        for script in ("-", "/dev/stdin"):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
            given = settings(script)
            assert (given.path.name, given.folder) == (name, tmp_path)
            assert [shot.prompt for shot in read_script(given).shots] == ["a ball"]


def test_options_that_contradict_themselves_are_refused(settings):
    with pytest.raises(UsageError, match="--set seed: is given twice"):
        parse_fields(["seed=1", "seed=2"])
    for columns, message in (
        (["sample_id"], "must be COLUMN=FIELD"),
        (["sample_id=idd"], "--map sample_id: got 'idd', did you mean id?"),
        (["a=id", "a=prompt"], "--map a: is given twice"),
    ):
        with pytest.raises(UsageError, match=message.replace("?", r"\?")):
            settings("s.txt", columns=columns)
    with pytest.raises(ScriptError, match="the column 'id' twice"):
        read(settings, text("s.csv", "sample_id,id,prompt\na,b,c\n"), columns=["sample_id=id"])
    with pytest.raises(ScriptError, match="add --map sample_id=FIELD --keep-columns"):
        read(settings, text("s.csv", "sample_id,prompt\na,c\n"))


def test_lora_for_a_model_of_another_size_is_refused_by_name(settings, capsys):
    lora = "builtin:tiny/lora.safetensors"
    Path("s.jsonl").write_text(json.dumps({"prompt": "a", "lora": lora}) + "\n")
    assert main(["validate", "s.jsonl", "-p", "tiny"]) == 0
    capsys.readouterr()
    assert main(["validate", "s.jsonl", "-p", "demo"]) == 3
    message = f"lora {lora}: is for a model of width 32, that of the profile has 192"
    assert message in " ".join(capsys.readouterr().err.split())


def test_google_cloud_without_credentials_is_refused_at_once(settings, monkeypatch, capsys):
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(object_storage, "GOOGLE_FILE", Path("nowhere"))
    monkeypatch.setattr(object_storage, "GOOGLE_MACHINE", ("127.0.0.1", 1))
    assert main(["status", "gs://bucket/out"]) == 4
    assert "no credentials of Google Cloud: set GOOGLE_APPLICATION_CREDENTIALS" in " ".join(capsys.readouterr().err.split())


def test_arguments_that_look_like_others(settings, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_out("~/out") == str(tmp_path / "out")
    script = read(settings, text("s.txt", "id,prompt\na,b\n"))
    assert script.notes == ["s.txt line 1: is the first row of a table; name the file .csv"]
    monkeypatch.setattr("vidgen_ray.cli.one_stage.VideoGenerationPipeline", lambda *_, **__: pytest.fail("a shot was rendered"))
    with pytest.raises(pytest.fail.Exception):
        main(["shot", "@p.txt", "-p", "tiny"])
    assert "note: '@p.txt' is the prompt; no file is read" in capsys.readouterr().err


def test_faces_of_the_same_size_and_upside_down_and_black_start_images_are_noted(tiny, photo):
    with InstantIDStage(tiny.params(InstantIDStage).model_copy(update={"detector": "centerface"})) as stage:
        stage.features([np.hstack([photo, photo])])
        assert "face_image: 2 faces are about equally large; number" in stage.take_notes()[0]
        stage.features([np.hstack([photo, photo])], face_index=0)
        assert stage.take_notes() == ()
        stage.features([photo[::-1]])
        assert stage.take_notes() == ("face_image: the face is upside down; turn the photo",)
    stage = SVDStage(tiny.params(SVDStage))
    black = np.zeros((64, 64, 3), np.uint8)
    for artefacts, notes in (({}, 1), ({"image": photo}, 0), ({"made_by": {"image": "key"}}, 0)):
        stage._note_dark_start(Item(Shot(prompt="a"), {"image": black, **artefacts}))
        assert len(stage.take_notes()) == notes


LONG = "a red ball on a blue table " * 20
NOTE = "s.jsonl line 2, prompt: Base image (flux) reads the first 64 of "


def test_cut_prompt_is_noted_or_rejected_on_request(tmp_path, tiny, capsys):
    script = tmp_path / "s.jsonl"
    script.write_text("".join(json.dumps({"id": f"s{n}", "prompt": text}) + "\n" for n, text in enumerate(("a ball", LONG))))
    assert main(["validate", str(script), "-p", "tiny"]) == 0
    assert NOTE in " ".join(capsys.readouterr().err.split())
    assert main(["validate", str(script), "-p", "tiny", "--strict-prompts", "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert (result["shots"], [(error["line"], error["field"]) for error in result["errors"]]) == (1, [(2, "prompt")])
    for strict in (False, True):
        checker, lines = open_lines(ScriptSettings(script, profile_defaults=tiny.defaults))
        planner = LinePlanner(checker, tiny, OutputFolder(tmp_path / "out"), RenderOptions(strict_prompts=strict))
        planner.load_finished()
        first, second = planner.plan(list(lines))
        assert not first.errors
        assert not first.notes
        (told,) = second.errors if strict else second.notes
        assert "Base image (flux) reads the first 64 of " in str(told)


def test_cut_tokens_are_in_the_record_and_the_manifest(tmp_path, tiny, make_shot):
    shot = make_shot(id="x", prompt=LONG, upscale_video=False)
    plan = ShotPlanner(params_of(tiny, stages_of(shot)), tiny.encode)(shot)
    (cut,) = plan.cut_texts
    assert (cut.stage, cut.read) == ("flux", 64)
    outputs = OutputFolder(tmp_path)
    record = commit(outputs, plan)
    assert json.loads((outputs.shot_folder("x") / "shot.json").read_text())["cut_texts"] == [cut.model_dump()]
    row = ManifestRow.of_shot("r", "s", plan.shot, 1, record, "rendered")
    assert row.cut_tokens == cut.tokens - 64 > 0


def test_tokens_of_each_text_encoder_are_counted(tiny):
    def cut(text, **fields):
        shot = check_shot({"prompt": text, **fields}, "test", tiny.defaults)
        stages = stages_of(shot)
        return {each.stage: each.read for each in cut_texts(stages, params_of(tiny, stages), shot)}

    assert cut("a ball") == {}
    assert cut("a ball", video_model="ltx", num_frames=9, motion_prompt="x " * 60) == {"ltx": 64}
    assert cut("a ball", use_hunyuan_style=True, style_prompt="x " * 300).keys() == {"hunyuan"}
    assert cut("a" * 70, image_model="klein")["klein"] == 64
