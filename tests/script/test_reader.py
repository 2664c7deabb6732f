"""Scripts: formats, precedence of defaults, and errors with file, line and field."""

import base64
import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import SYNTHETIC
from vidgen_ray.errors import ScriptError
from vidgen_ray.script import read
from vidgen_ray.script.formats import EXTENSION_NAME, check_no_extension_types, open_script
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.shot import Shot

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
    pq.write_table(pa.Table.from_pylist(LINES, schema=None), tmp_path / "s.parquet")
    pq.write_table(
        pa.concat_tables([pa.Table.from_pylist([line]) for line in LINES], promote_options="default"),
        tmp_path / "s.parquet",
    )
    scripts.append(tmp_path / "s.parquet")
    read = [read_script(path, run_seed=5) for path in scripts]
    assert [script.errors for script in read] == [[], [], [], []]
    for script in read[1:]:
        assert [s.model_dump(exclude={"id", "seed"}) for s in script.shots] == [
            s.model_dump(exclude={"id", "seed"}) for s in read[0].shots
        ]
    first = read[0].shots[0]
    assert (first.steps.flux, first.lora[0].path) == (3, str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("change", ["appended", "overwritten", "renamed", "deleted", "table"])
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
    path = write(
        tmp_path,
        "s.yaml",
        json.dumps({"defaults": {"fps": 6}, "shots": ["a", {"prompt": "b", "fps": 7, "steps": {"svd": 9}}]}),
    )
    shots = read_script(
        path,
        defaults={"fps": 8, "num_frames": 9},
        profile_defaults={"num_frames": 10, "scale": 2, "steps": {"flux": 1, "svd": 1}},
    ).shots
    assert [(s.fps, s.num_frames, s.scale) for s in shots] == [(6, 9, 2), (7, 9, 2)]
    assert (shots[1].steps.flux, shots[1].steps.svd) == (1, 9)


def test_character_adds_photo_lora_and_trigger(tmp_path):
    ada = {"face_image": "face.jpg", "lora": "a.safetensors", "trigger": "ada person"}
    path = write(
        tmp_path,
        "s.yaml",
        json.dumps(
            {
                "characters": {"ada": ada},
                "shots": [{"prompt": "at sea", "character": "ada"}, {"prompt": "b", "character": "bob"}],
            }
        ),
    )
    script = read_script(path)
    (shot,) = script.shots
    assert shot.prompt == "ada person, at sea"
    assert shot.face_image == (str(tmp_path / "face.jpg"),)
    assert shot.lora[0].path == str(tmp_path / "a.safetensors")
    assert "must be one of the script's characters: ada" in str(script.errors[0])


def test_line_overrides_character_and_character_overrides_defaults(tmp_path):
    (tmp_path / "side.jpg").write_bytes(b"x")
    ada = {"face_image": ["face.jpg", "side.jpg"], "face_index": 1, "identity": "instantid-sdxl", "identity_strength": 0.6}
    shots = [{"prompt": "a"}, {"prompt": "b", "identity_strength": 0.7, "face_image": None}]
    header = {"defaults": {"character": "ada", "identity_strength": 0.9, "fps": 6}, "characters": {"ada": ada}}
    path = write(tmp_path, "s.yaml", json.dumps({**header, "shots": shots}))
    a, b = read_script(path, profile_defaults={"identity": "none"}).shots
    assert a.face_image == (str(tmp_path / "face.jpg"), str(tmp_path / "side.jpg"))
    assert (a.face_index, a.identity, a.identity_strength, a.fps) == (1, "instantid-sdxl", 0.6, 6)
    assert (b.face_image, b.face_index, b.identity_strength) == ((), 1, 0.7)


PHOTOS = [
    ("s.jsonl", '{"prompt": "a", "face_image": "face.jpg"}', ["face.jpg"]),
    ("s.jsonl", '{"prompt": "a", "face_image": ["face.jpg", "7"]}', ["face.jpg", "7"]),
    ("s.jsonl", '{"prompt": "a", "face_image": null}', []),
    ("s.jsonl", '{"prompt": "a", "face_image": []}', []),
    ("s.csv", "prompt,face_image\na,face.jpg\n", ["face.jpg"]),
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


def test_rejected_line_has_absolute_photo_paths(tmp_path):
    (line,) = read_script(write(tmp_path, "s.jsonl", [{"prompt": "a", "fps": 0, "face_image": ["face.jpg"]}])).rejected
    assert line.fields["face_image"] == [str(tmp_path / "face.jpg")]


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


def test_variants_are_separate_shots_with_separate_seeds(tmp_path):
    path = write(
        tmp_path,
        "s.jsonl",
        [{"id": "x", "prompt": "a", "variants": 3}, {"id": "y", "prompt": "a", "variants": 2, "seed": 5}],
    )
    shots = read_script(path).shots
    assert [s.id for s in shots] == ["x-v0", "x-v1", "x-v2", "y-v0", "y-v1"]
    assert len({s.seed for s in shots}) == 5
    assert [s.seed for s in shots[3:]] == [5, 6]


INVALID_LINES = [
    # More are in tests/hostile/scripts.py.
    ({"prompt": "a", "width": 1000}, "width", "got 1000, must be a multiple of 16 from 64 to 2048 (nearest: 992, 1008)"),
    ({"prompt": "a", "width": 4096}, "width", "(nearest: 2048)"),
    ({"prompt": "a", "width": 80}, None, "width 80 is not a multiple of 64"),
    ({"prompt": "a", "lora": "missing.safetensors"}, "lora", "must be an existing .safetensors file"),
    ({"prompt": "a", "face_image": ["face.jpg", "missing.jpg"]}, "face_image", "got 'missing.jpg', must be an existing file"),
    ({"prompt": "a", "face_image": [7]}, "face_image", "got 7, must be a valid string"),
    (
        {"prompt": "a", "identity": "pulid"},
        "identity",
        "got 'pulid', must be one of infusenet, instantid-sdxl, reference, none",
    ),
    (
        {"prompt": "a", "identity_start": 0.5, "identity_end": 0.5},
        "identity_end",
        "got 0.5, must be greater than identity_start",
    ),
    ({"prompt": "a", "identity_start": 1.0}, "identity_end", "got 1.0, must be greater than identity_start (1.0)"),
    (
        {"prompt": "a", "face_image": "face.jpg", "identity": "instantid-sdxl", "refine.steps": 2},
        None,
        "refine_strength 0.35 of 2 steps is less than one step; set steps.refine to at least 3",
    ),
    ({"prompt": "a", "steps.fulx": 2}, "steps.fulx", "an unknown field"),
    ({"prompt": "a", "character": "ada"}, "character", "header of a .yaml script"),
    ({"prompt": "a", "lora": "a.safetensors", "lora_strength": 0.2, "steps.lora": 4}, None, "set steps.lora to at least 5"),
    ({"prompt": "a", "lora": [[[["a.safetensors"]]]]}, "lora", "got"),
    ({"prompt": "a", "lora": {"wieght": 1, "path": "a.safetensors"}}, "lora.wieght", "lora has no such field"),
    ({"prompt": "a", "character": ["ada"]}, "character", "got ['ada']"),
    ({"prompt": "a", "image": "~nosuchuser/x.png"}, "image", "must be an existing file"),
    ({"prompt": "a", "lora": "builtin:nope.safetensors"}, "lora", "unknown name, must be one of"),
    ({"prompt": "a", "steps": 5, "flux.steps": 3}, "steps", "got 5"),
    ({"prompt": "a", "id": "x" * 128, "variants": 2}, "variants", "must be 1 with an id of 128 characters"),
    # Valid in a shot, but too deep in a shot inside a plan.
    ('{"prompt": "a", "metadata": ' + '{"x": ' * 197 + "1" + "}" * 198, "metadata", "not nested deeply"),
]


def test_invalid_lines_are_rejected_and_other_lines_are_kept(tmp_path):
    texts = [line if isinstance(line, str) else json.dumps(line) for line, _, _ in INVALID_LINES]
    good = [json.dumps({"prompt": f"good {number}"}) for number in range(len(texts))]
    lines = [line for pair in zip(good, texts, strict=True) for line in pair]
    script = read_script(write(tmp_path, "s.jsonl", "\n".join(lines)))
    assert [s.prompt for s in script.shots] == [f"good {number}" for number in range(len(texts))]
    for number, (rejected, (_, field, message)) in enumerate(zip(script.rejected, INVALID_LINES, strict=True), start=1):
        error = rejected.errors[0]
        assert (error.source, error.line, error.field) == ("s.jsonl", 2 * number, field)
        assert message in str(error)


def test_invalid_csv_row_does_not_affect_other_rows(tmp_path):
    script = read_script(write(tmp_path, "s.csv", 'prompt,fps\none,5\n"two"x,5\nthree,5\nfour,0\nfive,5,6\n'))
    assert [s.prompt for s in script.shots] == ["one", "three"]
    assert [(e.line, e.field) for e in script.errors] == [(3, None), (5, "fps"), (6, None)]


def test_rejected_lines_have_unique_ids(tmp_path):
    lines = [
        {"id": "x", "prompt": "good"},
        {"id": "x", "prompt": "bad", "fps": 0},
        {"id": "y", "prompt": "bad", "fps": 0},
        {"id": "y", "prompt": "bad", "width": 1},
        {"id": "s-line-6", "prompt": "good"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "{broken\n{broken\n"
    script = read_script(write(tmp_path, "s.jsonl", text))
    # The first line with an id owns it, also if that line is rejected or the id was made for it.
    assert [s.id for s in script.shots] == ["x", "s-line-6"]
    assert [line.id for line in script.rejected] == ["s-line-2", "y", "s-line-4", "s-line-6-2", "s-line-7"]


def test_duplicate_id_of_one_variant_rejects_the_whole_line(tmp_path):
    lines = [{"id": "x-v1", "prompt": "a"}, {"id": "x", "prompt": "a", "variants": 3}, {"id": "x-v2", "prompt": "a"}]
    script = read_script(write(tmp_path, "s.jsonl", lines))
    assert [shot.id for shot in script.shots] == ["x-v1", "x-v2"]
    assert [(line.id, line.number, line.fields["id"]) for line in script.rejected] == [("x", 2, "x")]


def test_yaml_errors_have_line_numbers(tmp_path):
    text = "title: t\nshots:\n- a red ball\n\n- prompt: a blue ball\n  fps: 6\n- 7\n# a comment\n- prompt: b\n  fps: 0\n"
    script = read_script(write(tmp_path, "s.yaml", text))
    assert [line.number for line in script.lines if line.shots] == [3, 5]
    assert [error.line for error in script.errors] == [7, 9]
    assert script.rejected[0].id == "s-line-7"


def test_csv_rows_do_not_end_at_unicode_line_separators(tmp_path):
    prompt = "a\u2028b\u0085c\x0bd\x0ce"
    (tmp_path / "s.csv").write_text(f"prompt,fps\n{prompt},5\nnext,6\n", encoding="utf-8", newline="")
    assert [s.prompt for s in read_script(tmp_path / "s.csv").shots] == [prompt, "next"]


def test_character_trigger_does_not_replace_a_missing_prompt(tmp_path):
    header = {"characters": {"ada": {"trigger": "sks"}}}
    shots = [{"character": "ada"}, {"character": "ada", "prompt": " "}, {"character": "ada", "prompt": 5}]
    script = read_script(write(tmp_path, "s.yaml", json.dumps({**header, "shots": shots})))
    assert not script.shots
    assert [e.field for e in script.errors] == ["prompt"] * 3


INVALID_FILES = [
    ("s.doc", "x", r"got file type '\.doc', must be one of \.csv, \.jsonl, \.ndjson, \.parquet, \.tsv, \.txt, \.yaml, \.yml"),
    ("s.xlsx", "x", r"must be one of .*; save the sheet as \.csv"),
    ("s.json", "[]", r"must be one of .*; write one object per line to \.jsonl"),
    # More are in tests/hostile/scripts.py.
    ("s.yaml", "shots: [a]\ndefalts: {}", "an unknown header field 'defalts'"),
    ("s.yaml", "shots: [a]\ndefaults: [b]", r"defaults: \['b'\], must be a mapping of names to values"),
    ("s.yaml", "shots: [a]\ncharacters: [ada]", r"characters: got \['ada'\], must be a mapping"),
    (
        "s.yaml",
        "shots: [a]\ncharacters: {ada: {photo: x}}",
        "characters.ada.photo: got an unknown field, must be one of face_image, .*description",
    ),
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


def test_shot_schema_describes_all_fields():
    properties = Shot.model_json_schema()["properties"]
    assert set(properties) == set(Shot.model_fields)
    assert all(schema["description"] for schema in properties.values())
