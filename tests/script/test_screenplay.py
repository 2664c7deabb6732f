"""Characters, styles, scenes, choices and matrices: what the shots of a line are, and their ids."""

import json

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.conftest import EXAMPLES, SYNTHETIC
from vidgen_ray.errors import ScriptError
from vidgen_ray.film.film_settings import FilmSettings
from vidgen_ray.limits import MAX_SHOTS_PER_LINE
from vidgen_ray.script.expansion import read_characters
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import read_script
from vidgen_ray.script.screenplay import script_schema

HEADER = """
title: A day
defaults: {fps: 6}
characters:
  anna: {face_image: anna.jpg, trigger: sks woman, description: a woman with red hair}
  ben: {face_image: ben.jpg, lora: ben.safetensors}
styles:
  noir: {style_prompt: film noir, prompt: high contrast, lora: grain.safetensors}
"""


@pytest.fixture
def script(tmp_path):
    for name in ("anna.jpg", "ben.jpg", "ben.safetensors", "grain.safetensors"):
        (tmp_path / name).write_bytes(b"x")

    def read(text, name="s.yaml", **settings):
        (tmp_path / name).write_text(text)
        return read_script(ScriptSettings(tmp_path / name, profile_defaults={"consent": SYNTHETIC}, **settings))

    return read


def test_mentioned_character_gives_its_photo_and_description(script):
    shots = "shots: ['{anna} in the rain', {prompt: a man, character: ben}, {prompt: '{anna} and {ben}', character: ben}, x]"
    read = script(HEADER + shots)
    assert not read.errors
    rain = "sks woman, a woman with red hair in the rain"
    assert [shot.prompt for shot in read.shots] == [rain, "a man", "a woman with red hair and ben", "x"]
    photos = [[photo.rpartition("/")[2] for photo in shot.face_image] for shot in read.shots]
    assert photos == [["anna.jpg"], ["ben.jpg"], ["ben.jpg"], []]
    assert [shot.metadata.get("character") for shot in read.shots] == ["anna", "ben", "ben", None]
    for prompt, message in (("{anna} and {ben}", "must be set: the prompt names anna and ben"), ("{ana}", "is no character")):
        (error,) = script(HEADER + f"shots: ['{prompt}']").errors
        assert message in error.allowed


def test_style_adds_its_fields_below_those_of_the_line(script):
    plain, own = script(HEADER + "shots: [{prompt: a, style: noir, character: ben}, {prompt: b, style: noir, lora: []}]").shots
    assert (plain.use_hunyuan_style, plain.style_prompt, plain.prompt) == (True, "film noir", "a, high contrast")
    assert [lora.path.rpartition("/")[2] for lora in plain.lora] == ["ben.safetensors", "grain.safetensors"]
    assert own.lora == ()


def test_scenes_have_a_title_and_defaults(script):
    text = HEADER + (
        "scenes:\n- title: Morning\n  defaults: {fps: 7}\n  shots: [a, {prompt: b, fps: 8}]\n- shots:\n  - c\n  - {prompt: 3}\n"
    )
    read = script(text)
    found = [(shot.prompt, shot.fps, shot.metadata.get("scene")) for shot in read.shots]
    assert found == [("a", 7, "Morning"), ("b", 8, "Morning"), ("c", 6, None)]
    (error,) = read.errors
    assert (error.line, error.field) == (text.count("\n"), "prompt")


def test_choices_and_matrix_give_one_shot_each_with_ids_that_do_not_depend_on_the_others(script):
    matrix = {"motion_bucket_id": [10, 200], "character": ["ben"]}
    line = {"id": "beach", "prompt": "a {sunny|rainy} beach, {anna}", "matrix": matrix}
    read = script(HEADER + f"shots: [{json.dumps(line)}]")
    assert [(shot.id, shot.prompt, shot.motion_bucket_id) for shot in read.shots] == [
        ("beach-10-ben-sunny", "a sunny beach, a woman with red hair", 10),
        ("beach-10-ben-rainy", "a rainy beach, a woman with red hair", 10),
        ("beach-200-ben-sunny", "a sunny beach, a woman with red hair", 200),
        ("beach-200-ben-rainy", "a rainy beach, a woman with red hair", 200),
    ]
    assert [shot.metadata["choices"] for shot in read.shots] == [{"sunny|rainy": "sunny"}, {"sunny|rainy": "rainy"}] * 2
    line["prompt"] = "a {foggy|sunny|rainy} beach, {anna}"
    more = script(HEADER + f"shots: [{json.dumps(line)}]")
    seeds = {shot.id: shot.seed for shot in more.shots}
    assert {shot.id: shot.seed for shot in read.shots}.items() < seeds.items()
    assert len(seeds) == 6


def test_ids_of_a_matrix_name_what_differs_and_never_collide(script, tmp_path):
    folder = "loras/project-with-a-long-name"
    names = [f"{folder}/step-500.safetensors", f"{folder}/step-1000.safetensors", "b/step-500.safetensors"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    lora = [*names, {"path": names[1], "weight": 0.5}]
    read = script(json.dumps({"id": "x", "prompt": "a", "matrix": {"lora": lora, "scale": [2]}}) + "\n", "s.jsonl")
    assert not read.errors
    ids = [shot.id for shot in read.shots]
    assert ids[:2] == ["x-step-500-2", "x-step-1000-2"]
    assert ids[2].startswith("x-step-500-2-")
    assert ids[3] == "x-step-1000-0-5-2"
    assert [shot.metadata["matrix"] for shot in read.shots] == [{"lora": value, "scale": 2} for value in lora]
    texts = script('{"id": "y", "prompt": "a {ink!|ink?} ball", "matrix": {"style_prompt": ["a-b", "a b"]}}\n', "s.jsonl").shots
    assert len({shot.id for shot in texts}) == 4
    assert [shot.metadata["matrix_number"] for shot in texts] == [0, 1, 2, 3]


def test_choices_without_an_id_derive_ids_from_the_chosen_text(script):
    chosen = script('{"prompt": "a {red |}ball"}\n', "s.jsonl").shots
    assert [shot.metadata["choices"] for shot in chosen] == [{"red |": "red"}, {"red |": ""}]
    (both, *_) = script('{"prompt": "a {red|blue} ball", "style_prompt": "{red|blue}"}\n', "s.jsonl").shots
    assert both.metadata["choices"] == {"red|blue": "red", "red|blue (2)": "red"}
    plain = script('{"prompt": "a red ball"}\n{"prompt": "a ball"}\n', "s.jsonl").shots
    assert [(shot.id, shot.prompt) for shot in chosen] == [(shot.id, shot.prompt) for shot in plain]


def test_line_that_cannot_be_expanded_is_rejected_as_a_whole(script):
    for line, field, message in (
        ({"prompt": "a {b|{c|d}}"}, "prompt", "must not contain other choices"),
        ({"prompt": "a {b|c} {d|e, f"}, "prompt", "must end with }"),
        ({"prompt": "a {b|b}"}, "prompt", "must differ"),
        ({"matrix": [1]}, "matrix", "must map fields to lists"),
        ({"matrix": {"fps": 3}}, "matrix.fps", "must be a list"),
        ({"matrix": {"fpss": [3]}}, "matrix.fpss", "did you mean fps?"),
        ({"matrix": {"seed": list(range(MAX_SHOTS_PER_LINE + 1))}}, "matrix", f"at most {MAX_SHOTS_PER_LINE}"),
        ({"id": "x", "matrix": {"seed": [1, 1]}}, "matrix", "must be listed once"),
        ({"matrix": {"fps": [3, "x"]}}, "fps", "must be a valid integer"),
    ):
        read = script(json.dumps({"prompt": "a", **line}) + "\n", "s.jsonl")
        (error,) = read.errors
        assert (error.field, message in str(error), read.shots) == (field, True, []), error


def test_characters_of_a_file_serve_every_format(script, tmp_path):
    people = tmp_path / "people" / "people.yaml"
    people.parent.mkdir()
    (people.parent / "cleo.jpg").write_bytes(b"x")
    people.write_text("cleo: {face_image: cleo.jpg, description: a queen}\nJörg: {description: a king}")
    # Spreadsheets on a Mac write the accent as a character of its own.
    rows = "Prompt;Character\na throne;cleo\n{Jo\u0308rg} sits;Jo\u0308rg\n"
    read = script(rows, "s.csv", characters=read_characters(people))
    assert read.shots[0].face_image == (str(people.parent / "cleo.jpg"),)
    assert (read.shots[1].prompt, read.shots[1].metadata["character"]) == ("a king sits", "Jörg")
    with pytest.raises(ScriptError, match="must not be in the file of --characters, too"):
        script("characters: {cleo: {}}\nshots: [a]", characters=read_characters(people))


def test_schema_for_editors_accepts_scripts_and_finds_mistakes():
    validator = Draft202012Validator(script_schema({"film": FilmSettings.model_json_schema()}))
    right = "shots: [a, {prompt: b, flux.steps: 3, lora: [x.safetensors], face_image: y.jpg, matrix: {fps: [3]}}]"
    for text in ((EXAMPLES / "film.yaml").read_text(), right):
        assert validator.is_valid(yaml.safe_load(text)), text
    for text in (
        "shots: [{prompt: a, fpss: 3}]",
        "shots: [{prompt: a, fps: fast}]",
        "shots: [a]\nscenes: []",
        "characters: {a: {fps: 3}}\nshots: [a]",
        "scenes: [{titel: x, shots: [a]}]",
        "film: {transition: wipe}\nshots: [a]",
    ):
        assert not validator.is_valid(yaml.safe_load(text)), text


def test_wrong_header_is_one_error_that_names_its_place(script):
    for text, message in (
        ("defaults: {fps: fast}", "s.yaml, defaults.fps: got 'fast', must be a valid integer"),
        ("defaults: {id: x}", "s.yaml, defaults.id: got 'x', must be set by each line"),
        ("defaults: {style: x}", "s.yaml, defaults.style: got 'x', must be one of none"),
        ("characters: {a: {identity_strength: 2}}", "s.yaml, characters.a.identity_strength: got 2, must be"),
        ("characters: {a: {face_image: x.jpg}}", "s.yaml, characters.a.face_image: got 'x.jpg', must be an existing"),
        ("characters: {a: {trigger: 1}}", "s.yaml, characters.a.trigger: got 1, must be text"),
        ("styles: {a: {fps: 3}}", "s.yaml, styles.a.fps: got an unknown field"),
        ("scenes: []", "got both shots and scenes"),
        ("title: a\ntitle: b", "got invalid YAML, line 2: duplicate key 'title'"),
        ("characters: {a b: {}}", "got 'a b', a name must be 1 to 64 letters, digits, _ or -"),
    ):
        with pytest.raises(ScriptError, match=message) as raised:
            script(f"{text}\nshots: [a, b]")
        assert len(raised.value.errors) == 1
