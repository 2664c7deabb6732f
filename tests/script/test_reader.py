"""Scripts: formats, tables, folders, precedence of defaults, settings without effect, errors with file, line and field."""

import base64
import csv
import json
import os
import shutil
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from tests.conftest import SYNTHETIC
from vidgen_ray.errors import ScriptError
from vidgen_ray.media.images import write_png
from vidgen_ray.script import check as checks
from vidgen_ray.script import read
from vidgen_ray.script.formats import EXTENSION_NAME, check_no_extension_types, open_script, table_lines
from vidgen_ray.script.lines import Columns, ScriptSettings
from vidgen_ray.shot import Shot
from vidgen_ray.stages.svd import SVDStage

LINES = [
    {"id": "one", "prompt": "a red ball", "width": 128, "steps.flux": 3, "lora": ["a.safetensors"]},
    {"prompt": "a man, walking", "use_hunyuan_style": True, "metadata": {"scene": 4}},
]


@pytest.fixture(autouse=True)
def referenced_files(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x")
    (tmp_path / "face.jpg").write_bytes(b"x")


def read_script(path, profile_defaults=None, **options):
    fallback = {"consent": SYNTHETIC, **(profile_defaults or {})}
    return read.read_script(ScriptSettings(path, profile_defaults=fallback, **options))


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else "".join(json.dumps(line) + "\n" for line in content))
    return path


def test_formats_produce_the_same_shots(tmp_path):
    scripts = [write(tmp_path, "s.jsonl", LINES)]
    scripts.append(write(tmp_path, "s.yaml", json.dumps({"title": "t", "shots": LINES})))
    columns = list(dict.fromkeys(k for line in LINES for k in line))
    with (tmp_path / "s.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for line in LINES:
            writer.writerow({k: v if isinstance(v, str | int) else json.dumps(v) for k, v in line.items()})
    scripts.append(tmp_path / "s.csv")
    tables = [pa.Table.from_pylist([line]) for line in LINES]
    pq.write_table(pa.concat_tables(tables, promote_options="default"), tmp_path / "s.parquet")
    scripts.append(tmp_path / "s.parquet")
    read = [read_script(path, run_seed=5) for path in scripts]
    assert [script.errors for script in read] == [[], [], [], []]
    jsonl, *others = [[shot.model_dump(exclude={"id", "seed"}) for shot in script.shots] for script in read]
    assert others == [jsonl] * 3
    first = read[0].shots[0]
    assert (first.steps.flux, first.lora[0].path) == (3, str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("change", ["appended", "overwritten", "same time", "renamed", "deleted", "table"])
def test_script_that_changes_while_it_is_read_is_an_error(tmp_path, change):
    if change == "table":
        path = tmp_path / "tables"
        path.mkdir()
        changed = path / "a.parquet"
        pq.write_table(pa.table({"prompt": ["a", "b", "c"]}), changed)
    else:
        path = changed = write(tmp_path, "s.txt", "a\nb\nc\n")
    _, lines = open_script(ScriptSettings(path))
    next(lines)
    if change == "appended":
        with changed.open("a") as file:
            file.write("d\n")
    elif change == "overwritten":
        changed.write_text("b\nc\n")
    elif change == "same time":
        before = changed.stat()
        changed.write_text("a\nb\nd\n")
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "deleted":
        changed.unlink()
    else:
        copy = tmp_path / "copy"
        copy.write_bytes(changed.read_bytes())
        copy.rename(changed)
    with pytest.raises(ScriptError, match="changed while it was read"):
        list(lines)


def test_txt_script_has_one_prompt_per_line(tmp_path):
    script = read_script(write(tmp_path, "s.txt", "\ufeff# a comment\r\na red ball\n\n  a blue ball \n"))
    assert [s.prompt for s in script.shots] == ["a red ball", "a blue ball"]
    assert [line.number for line in script.lines] == [2, 4]


def test_defaults_precedence_is_header_then_command_line_then_profile(tmp_path):
    shots = ["a", {"prompt": "b", "fps": 7, "steps": {"svd": 9}}]
    path = write(tmp_path, "s.yaml", json.dumps({"defaults": {"fps": 6}, "shots": shots}))
    profile = {"num_frames": 10, "scale": 2, "steps": {"flux": 1, "svd": 1}}
    shots = read_script(path, defaults={"fps": 8, "num_frames": 9}, profile_defaults=profile).shots
    assert [(s.fps, s.num_frames, s.scale) for s in shots] == [(6, 9, 2), (7, 9, 2)]
    assert (shots[1].steps.flux, shots[1].steps.svd) == (1, 9)


def test_line_overrides_character_and_character_overrides_defaults(tmp_path):
    (tmp_path / "side.jpg").write_bytes(b"x")
    ada = {"face_image": ["face.jpg", "side.jpg"], "face_index": 1, "identity": "instantid-sdxl", "identity_strength": 0.6}
    bob = {"lora": "a.safetensors", "trigger": "bob person"}
    shots = [
        {"prompt": "a"},
        {"prompt": "b", "identity_strength": 0.7, "face_image": None},
        {"prompt": "at sea", "character": "bob"},
        {"prompt": "c", "character": "eve"},
        {"character": "bob"},
        {"character": "bob", "prompt": " "},
    ]
    header = {"defaults": {"character": "ada", "identity_strength": 0.9, "fps": 6}, "characters": {"ada": ada, "bob": bob}}
    script = read_script(write(tmp_path, "s.yaml", json.dumps({**header, "shots": shots})), {"identity": "none"})
    a, b, c = script.shots
    assert a.face_image == (str(tmp_path / "face.jpg"), str(tmp_path / "side.jpg"))
    assert (a.face_index, a.identity, a.identity_strength, a.fps) == (1, "instantid-sdxl", 0.6, 6)
    assert (b.face_image, b.face_index, b.identity_strength) == ((), 1, 0.7)
    assert (c.prompt, c.lora[0].path) == ("bob person, at sea", str(tmp_path / "a.safetensors"))
    assert "must be one of the script's characters: ada, bob" in str(script.errors[0])
    # A trigger does not replace a missing prompt.
    assert [error.field for error in script.errors[1:]] == ["prompt"] * 2


PHOTOS = [
    ("s.jsonl", '{"prompt": "a", "face_image": "face.jpg"}', ["face.jpg"]),
    ("s.jsonl", '{"prompt": "a", "face_image": ["face.jpg", "7"]}', ["face.jpg", "7"]),
    ("s.jsonl", '{"prompt": "a", "face_image": null}', []),
    ("s.csv", "prompt,face_image\na,7\n", ["7"]),
    ("s.csv", 'prompt,face_image\na,"[""face.jpg"", ""7""]"\n', ["face.jpg", "7"]),
    ("s.csv", "prompt,face_image,fps\na,,6\n", []),
]


def test_face_image_accepts_one_photo_or_several(tmp_path):
    (tmp_path / "7").write_bytes(b"x")
    for name, text, expected in PHOTOS:
        (shot,) = read_script(write(tmp_path, name, text)).shots
        assert shot.face_image == tuple(str(tmp_path / photo) for photo in expected), text
        assert Shot.model_validate_json(shot.model_dump_json()) == shot


def test_seeds_and_ids_do_not_depend_on_the_line_order(tmp_path):
    lines = [{"prompt": f"ball {n}"} for n in range(5)]
    forward = read_script(write(tmp_path, "a.jsonl", lines), run_seed=3)
    backward = read_script(write(tmp_path, "b.jsonl", lines[::-1]), run_seed=3)
    assert {s.id: s.seed for s in forward.shots} == {s.id: s.seed for s in backward.shots}
    assert len({s.seed for s in forward.shots}) == 5
    assert {s.seed for s in read_script(tmp_path / "a.jsonl", run_seed=4).shots}.isdisjoint({s.seed for s in forward.shots})


def test_priority_changes_neither_id_nor_seed_nor_record(tmp_path):
    lines = [{"prompt": "a ball"}, {"prompt": "a ball", "priority": "high"}]
    (plain,), (first,) = (read_script(write(tmp_path, f"{n}.jsonl", [line])).shots for n, line in enumerate(lines))
    assert first.priority == "high"
    assert first.model_dump() == plain.model_dump()


def test_single_shot_must_be_one_shot():
    for fields, field in (({"prompt": "a {red|blue} ball"}, "prompt"), ({"prompt": "a", "variants": 2}, "variants")):
        with pytest.raises(ScriptError, match=rf"shot, {field}: got 2 shots, must be one; choices {{a\|b}}, a matrix and"):
            checks.check_shot(fields, "shot", {})


def test_variants_are_separate_shots_with_separate_seeds(tmp_path):
    lines = [{"id": "x", "prompt": "a", "variants": 3}, {"id": "y", "prompt": "a", "variants": 2, "seed": 5}]
    shots = read_script(write(tmp_path, "s.jsonl", lines)).shots
    assert [s.id for s in shots] == ["x-v0", "x-v1", "x-v2", "y-v0", "y-v1"]
    assert len({s.seed for s in shots}) == 5
    assert [s.seed for s in shots[3:]] == [5, 6]


INVALID_LINES = [
    # More are in tests/hostile/scripts.py.
    ({"width": 1000}, "width", "got 1000, must be a multiple of 16 from 64 to 2048 (nearest: 992, 1008)"),
    ({"width": 4096}, "width", "(nearest: 2048)"),
    ({"width": 80}, None, "width 80 is not a multiple of 64"),
    ({"lora": "missing.safetensors"}, "lora", "must be an existing .safetensors file"),
    ({"face_image": ["face.jpg", "missing.jpg"]}, "face_image", "got 'missing.jpg', must be an existing file"),
    ({"fps": None}, "fps", "got null, must be a valid integer"),
    ({"face_image": [7]}, "face_image", "got 7, must be a valid string"),
    ({"identity": "pulid"}, "identity", "got 'pulid', must be one of infusenet, instantid-sdxl, reference, none"),
    ({"identity_start": 0.5, "identity_end": 0.5}, "identity_end", "got 0.5, must be greater than identity_start"),
    (
        {"face_image": "face.jpg", "identity": "instantid-sdxl", "refine.steps": 2},
        None,
        "refine_strength 0.35 of 2 steps is less than one step; set steps.refine to at least 3",
    ),
    ({"steps.fulx": 2}, "steps.fulx", "an unknown field"),
    ({"character": "ada"}, "character", "header of a .yaml script"),
    ({"lora": "a.safetensors", "lora_strength": 0.2, "steps.lora": 4}, None, "set steps.lora to at least 5"),
    ({"lora": [[[["a.safetensors"]]]]}, "lora", "got"),
    ({"lora": {"wieght": 1, "path": "a.safetensors"}}, "lora.wieght", "lora has no such field"),
    ({"image": "~nosuchuser/x.png"}, "image", "must be an existing file"),
    ({"steps": 5, "flux.steps": 3}, "steps", "got 5"),
    ({"id": "x" * 128, "variants": 2}, "variants", "must be 1 with an id of 128 characters"),
    # Valid in a shot, but too deep in a shot inside a plan.
    ({"metadata": reduce(lambda inner, _: {"x": inner}, range(197), 1)}, "metadata", "not nested deeply"),
]


def test_invalid_lines_are_rejected_and_other_lines_are_kept(tmp_path):
    lines = []
    for number, (fields, _, _) in enumerate(INVALID_LINES):
        lines += [{"prompt": f"good {number}"}, {"prompt": "a", **fields}]
    script = read_script(write(tmp_path, "s.jsonl", lines))
    assert [s.prompt for s in script.shots] == [line["prompt"] for line in lines[::2]]
    for number, (rejected, (_, field, message)) in enumerate(zip(script.rejected, INVALID_LINES, strict=True), start=1):
        error = rejected.errors[0]
        assert (error.source, error.line, error.field) == ("s.jsonl", 2 * number, field)
        assert message in str(error)
    # The record of a rejected line has absolute paths.
    (photo,) = [line.fields["face_image"] for line in script.rejected if line.fields.get("identity") == "instantid-sdxl"]
    assert photo == str(tmp_path / "face.jpg")


def test_invalid_csv_row_does_not_affect_other_rows(tmp_path):
    script = read_script(write(tmp_path, "s.csv", 'prompt,fps\none,5\n"two"x,5\nthree,5\nfour,0\nfive,5,6\n'))
    assert [s.prompt for s in script.shots] == ["one", "three"]
    assert [(e.line, e.field) for e in script.errors] == [(3, None), (5, "fps"), (6, None)]


@pytest.mark.parametrize(
    ("cell", "later", "end"),
    [('"a ball', "c", 9), ('"a ball', 'a "red" ball', 6), ('"a ball', '6" nails', 6), ('"a ball\nof wool"', "c", None)],
    ids=["to the end", "to the next quote", "closed by another quote", "closed"],
)
def test_quote_that_is_never_closed_is_named_with_its_line(tmp_path, cell, later, end):
    rows = [f"s{n},{cell if n == 2 else later if n == 5 else 'a ball'},{n}\n" for n in range(1, 9)]
    script = read_script(write(tmp_path, "s.csv", "id,prompt,seed\n" + "".join(rows)))
    if end is None:
        assert (len(script.shots), script.errors) == (8, [])
        return
    (error,) = script.errors
    assert str(error).startswith(
        f"s.csv line 3: got a quote that opens here and takes in lines 3 to {end}, must be closed in its"
    )
    assert [shot.seed for shot in script.shots] == [1, *range(end, 9)]


def test_lines_of_a_prompt_are_no_rows(tmp_path):
    text = 'id,prompt\n\ns0,"a dog\ns2,a cow\nb"\ns1,"a cat\n1girl, sleepy\nin the sun"\ns4,"a dog\ns5,a cow"\n'
    script = read_script(write(tmp_path, "s.csv", text))
    assert [shot.id for shot in script.shots] == ["s1"]
    assert [error.line for error in script.errors] == [3, 9]
    assert "for a prompt with such lines, write a .jsonl or .yaml script" in str(script.errors[0])


def test_rejected_lines_have_unique_ids(tmp_path):
    lines = [
        {"id": "x", "prompt": "good"},
        {"id": "x", "prompt": "bad", "fps": 0},
        {"id": "y", "prompt": "bad", "fps": 0},
        {"id": "y", "prompt": "bad", "width": 1},
        {"id": "s-line-4", "prompt": "good"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "{broken\n{broken\n"
    text += json.dumps({"id": "z-v1", "prompt": "a"}) + "\n" + json.dumps({"id": "z", "prompt": "a", "variants": 3}) + "\n"
    script = read_script(write(tmp_path, "s.jsonl", text))
    # The first line with an id owns it, also if that line is rejected. No id equals the name of a rejected line without one.
    assert [s.id for s in script.shots] == ["x", "s-line-4", "z-v1"]
    # An id of one variant rejects the whole line.
    assert [line.id for line in script.rejected] == ["s.jsonl:2", "y", "s.jsonl:4", "s.jsonl:6", "s.jsonl:7", "z"]


def test_yaml_errors_have_line_numbers(tmp_path):
    text = "title: t\nshots:\n- a red ball\n\n- prompt: a blue ball\n  fps: 6\n- 7\n# a comment\n- prompt: b\n  fps: 0\n"
    script = read_script(write(tmp_path, "s.yaml", text))
    assert [line.number for line in script.lines if line.shots] == [3, 5]
    assert [error.line for error in script.errors] == [7, 9]
    assert script.rejected[0].id == "s.yaml:7"


def test_csv_rows_do_not_end_at_unicode_line_separators(tmp_path):
    prompt = "a\u2028b\u0085c"
    (tmp_path / "s.csv").write_text(f"prompt,fps\n{prompt},5\nnext,6\n", encoding="utf-8", newline="")
    assert [s.prompt for s in read_script(tmp_path / "s.csv").shots] == [prompt, "next"]


INVALID_FILES = [
    # More are in tests/hostile/scripts.py.
    ("s.doc", "x", r"got file type '\.doc', must be one of \.csv, \.jsonl, \.ndjson, \.parquet, \.tsv, \.txt, \.yaml, \.yml"),
    ("s.xlsx", "x", r"must be one of .*; save the sheet as \.csv"),
    ("s.json", "[]", r"must be one of .*; write one object per line to \.jsonl"),
    ("s.yaml", "shots: [a]\ndefalts: {}", "an unknown header field 'defalts'"),
    ("s.yaml", "", "got an empty file, must be a mapping"),
    ("s.yaml", "shots: [a]\ndefaults: [b]", r"defaults: \['b'\], must be a mapping of names to values"),
    ("s.yaml", "shots: [a]\ncharacters: [ada]", r"characters: got \['ada'\], must be a mapping"),
    ("s.yaml", "shots: [a]\ncharacters: {ada: {photo: x}}", "photo: got an unknown field, must be one of face_image, .*descri"),
]


def test_invalid_script_file_raises_script_error(tmp_path):
    for name, content, message in INVALID_FILES:
        with pytest.raises(ScriptError, match=message):
            read_script(write(tmp_path, name, content))


def test_extension_type_is_found_at_any_position_in_base64(tmp_path):
    for position in range(3):
        schema = base64.b64encode(b"x" * position + EXTENSION_NAME + b"yz")
        (tmp_path / "s.parquet").write_bytes(b"PAR1" + schema + len(schema).to_bytes(4, "little") + b"PAR1")
        with pytest.raises(ScriptError, match="got an extension type"):
            check_no_extension_types(tmp_path / "s.parquet")


def test_separators_and_spelling_of_the_columns_are_recognised(tmp_path):
    for text in (
        "prompt,seed,metadata.shot\na ball,7,4\n",
        "Prompt;Seed;metadata.shot\r\na ball;7;4\r\n",
        "prompt|seed|metadata.shot\na ball|7|4\n",
        "\ufeffprompt\tSEED\tmetadata.shot\na ball\t7\t4\n",
        " Prompt , Seed , metadata.shot , \n a ball , 7 , 4 , \n,,,\n",
    ):
        (tmp_path / "s.csv").write_text(text)
        script = read_script(tmp_path / "s.csv")
        assert not script.errors
        assert [(shot.prompt, shot.seed, shot.metadata) for shot in script.shots] == [("a ball", 7, {"shot": 4})]


def test_unknown_columns_are_one_error_that_says_what_to_add(tmp_path):
    (tmp_path / "s.csv").write_text("prompt,promt,notes\n" + "a,b,c\n" * 1000)
    with pytest.raises(ScriptError) as raised:
        read_script(tmp_path / "s.csv")
    assert str(raised.value) == (
        "s.csv: got unknown columns 'promt', 'notes', did you mean prompt?; add --map promt=FIELD --keep-columns, "
        "which copies the other unknown ones to metadata"
    )
    # The longest text of the first row is probably the prompt. Without known columns, what gives most columns separates them.
    (tmp_path / "s.csv").write_text("Bild-Nr.;Kurze Beschreibung\n1;a red ball\n")
    with pytest.raises(ScriptError, match="add --map 'Kurze Beschreibung=prompt' --keep-columns") as raised:
        read_script(tmp_path / "s.csv")
    columns = Columns({"Kurze Beschreibung": "prompt"}, keep_unknown=True)
    assert read_script(tmp_path / "s.csv", columns=columns).shots[0].metadata == {"Bild-Nr.": 1}


def test_table_without_a_prompt_says_what_the_first_row_must_have(tmp_path):
    for text in ("a red ball\na blue ball\n", "text,seed\na,1\n"):
        (tmp_path / "s.csv").write_text(text)
        with pytest.raises(ScriptError, match=r"must be named after fields, in the first row of a \.csv, one of them prompt"):
            read_script(tmp_path / "s.csv")


def test_tables_of_spreadsheets_say_what_to_save(tmp_path):
    (tmp_path / "s.csv").write_text("sep=;\nprompt;lora_strength\na;0.8\nb;0,8\n")
    script = read_script(tmp_path / "s.csv")
    assert (script.shots[0].lora_strength, [str(error) for error in script.errors]) == (
        0.8, ["s.csv line 4, lora_strength: got '0,8', must have a decimal point: 0.8"]
    )  # fmt: skip
    # Empty columns without a name are skipped.
    (tmp_path / "s.csv").write_text(";prompt;;seed;\n;a ball;;7;\n;b;x;8;\n")
    for columns in (Columns(), Columns(keep_unknown=True)):
        script = read_script(tmp_path / "s.csv", columns=columns)
        assert [(shot.prompt, shot.seed, shot.metadata) for shot in script.shots] == [("a ball", 7, {})]
        (error,) = script.errors
        assert str(error) == "s.csv line 3: got a cell in column 3, must have a name in the first row, or no cells"
    (tmp_path / "s.csv").write_text(",prompt\n0,a\n")
    with pytest.raises(ScriptError, match=r"got a column without a name, .* with pandas: to_csv\(\.\.\., index=False\)"):
        read_script(tmp_path / "s.csv")
    (tmp_path / "s.csv").write_bytes("prompt\nein Bär\n".encode("cp1252"))
    with pytest.raises(ScriptError, match=r"line 2: got bytes that are not UTF-8, save .* in Excel as CSV UTF-8"):
        read_script(tmp_path / "s.csv")


def test_folder_of_captioned_images_has_a_shot_for_each(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(ScriptError, match="a folder without scripts"):
        read_script(folder)
    for name in ("b.png", "a 1.png", "c.png"):
        write_png(folder / name, np.zeros((64, 64, 3), np.uint8))
    (folder / "a 1.txt").write_text("a red\nball\n")
    (folder / "b.txt").write_text("a blue ball")
    script = read_script(folder)
    assert [(shot.id, shot.prompt, shot.image) for shot in script.shots] == [
        ("a-1", "a red ball", str(folder / "a 1.png")),
        ("b", "a blue ball", str(folder / "b.png")),
    ]
    (error,) = script.errors
    assert (error.line, error.got) == (3, "no caption for c.png")


def test_image_folder_with_metadata_and_a_data_set_of_parquet_files(tmp_path):
    images, tables = tmp_path / "images", tmp_path / "tables"
    images.mkdir()
    (tables / "data").mkdir(parents=True)
    write_png(images / "x.png", np.zeros((64, 64, 3), np.uint8))
    (images / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "a ball", "Seed": 3}\n{"file_name": "y.png"}\n')
    script = read_script(images)
    assert [(shot.id, shot.prompt, shot.seed) for shot in script.shots] == [("x", "a ball", 3)]
    assert {error.field for error in script.errors} == {"prompt"}
    for number, caption in enumerate(("one", "two")):
        pq.write_table(pa.table({"caption": [caption]}), tables / "data" / f"train-0000{number}.parquet")
    assert [(line.shot.prompt, line.number) for line in read_script(tables).lines] == [("one", 1), ("two", 2)]


LORA = {"transformer.x.lora_A.weight": np.ones((1, 2), np.float32), "transformer.x.lora_B.weight": np.ones((2, 1), np.float32)}


@pytest.fixture
def check(tmp_path):
    write_png(tmp_path / "face.png", np.zeros((64, 64, 3), np.uint8))
    save_file(LORA, tmp_path / "a.safetensors")

    def check(line, *, decode_files=False):
        (tmp_path / "s.jsonl").write_text(json.dumps(line) + "\n")
        settings = ScriptSettings(tmp_path / "s.jsonl", profile_defaults={"consent": SYNTHETIC})
        return read.read_script(settings, decode_files=decode_files)

    return check


def test_metadata_that_only_a_stage_of_a_package_reads_are_not_noted(check, monkeypatch):
    monkeypatch.setitem(checks.STAGES_OF_FIELD, "metadata", [SVDStage])
    monkeypatch.setattr(checks, "CHECKED", checks.CHECKED | {"metadata"})
    assert check({"prompt": "a", "metadata": {"source": "web"}}).notes == []


def test_settings_without_effect_are_noted(check):
    for line, note in (
        ({"metadata": {"caption": "The end? 🌧"}}, "s.jsonl line 1, caption: the font of films has no letter '🌧'"),
        ({"width": 128, "height": 192, "crop_width": 72}, "crop_width, crop_height: keep 14.1% of the finished 512x768 pixels"),
        ({"width": 128, "height": 192, "aspect": "9:16"}, None),
        ({"style_prompt": "ink"}, "s.jsonl line 1, style_prompt: has no effect; set use_hunyuan_style to true"),
        ({"style_prompt": "ink", "use_hunyuan_style": True}, None),
        ({"style_prompt": "ink", "use_hunyuan_style": True, "mode": "fast"}, "use_hunyuan_style to true, in mode quality"),
        ({"face_index": 1}, "face_index: has no effect; only these stages read it"),
        ({"face_index": 1, "face_image": "face.png"}, None),
        ({"identity_strength": 0.5}, "identity_strength: has no effect; set face_image"),
        ({"max_tries": 2}, "max_tries: has no effect; set min_identity"),
        ({"lora_strength": 0.2}, "lora_strength: has no effect; set lora"),
        ({"steps": {"hunyuan": 3}}, "steps.hunyuan: has no effect"),
        ({"motion_bucket_id": 127, "generate_video": False}, None),
    ):
        script = check({"prompt": "a", **line})
        assert (script.errors, len(script.shots), len(script.notes)) == ([], 1, note is not None), line
        assert note is None or note in script.notes[0]


def test_contradicting_settings_are_refused(check):
    for line, field, message in (
        ({"steps.flux": 3, "steps": {"flux": 4}}, "steps.flux", "must be set once"),
        ({"lora": ["a.safetensors", "./a.safetensors"]}, "lora", "is listed twice"),
        ({"lora": "https://example.com/a.safetensors"}, "lora", "URLs are not read"),
    ):
        (error,) = check({"prompt": "a", **line}).errors
        assert (error.field, message in error.allowed) == (field, True)
    (error,) = check({"prompt": "a", "fps": 5, "fps_out": 12, "interpolation": 2}).errors
    assert "got fields that do not fit together, fps_out 12 contradicts interpolation 2" in str(error)


def test_same_prompt_twice_names_what_can_be_done(tmp_path):
    (tmp_path / "s.txt").write_text("a\na\n")
    (error,) = read_script(tmp_path / "s.txt").errors
    assert "line 1 has the same content" in error.allowed
    assert "`variants`" in error.allowed


def test_files_that_cannot_be_used_are_found_before_rendering(check, tmp_path):
    """More such files are in tests/hostile."""
    (tmp_path / "x.png").write_bytes(b"text")
    save_file({"transformer.x.lora_A.weight": np.ones((1, 1), np.int8)}, tmp_path / "z.safetensors")
    save_file({"lora_unet_single_blocks_0.hada_w1_a": np.ones((1, 1), np.float32)}, tmp_path / "h.safetensors")
    for field, name, message in (
        ("image", "x.png", "not a supported image format"),
        ("lora", "z.safetensors", "has type I8"),
        ("lora", "h.safetensors", "is a LoHa, must be a LoRA for FLUX.1"),
    ):
        line = {"prompt": "a", field: name}
        assert not check(line).errors
        (error,) = check(line, decode_files=True).errors
        assert (error.field, error.got) == (field, "an unusable file")
        assert message in error.allowed
    # A notebook may repair a file and read the script again.
    (tmp_path / "x.png").write_bytes((tmp_path / "face.png").read_bytes())
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "z.safetensors")
    assert not check({"prompt": "a", "image": "x.png", "lora": "z.safetensors"}, decode_files=True).errors
    line = {"prompt": "a", "image": "face.png", "face_image": "face.png", "lora": "a.safetensors"}
    assert not check(line, decode_files=True).errors


def test_function_of_a_data_set_gets_rows_with_their_nulls():
    table = pa.table({"id": ["a", "b"], "photo": pa.array([None, "p.png"])})
    lines = table_lines("data", table, lambda row: {"id": row["id"], "prompt": "x", "image": row["photo"]})
    assert [line.fields for line in lines] == [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x", "image": "p.png"}]
