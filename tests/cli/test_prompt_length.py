"""Prompts that are longer than a text encoder reads: noted, counted, and rejected on request."""

import json

import pytest

from tests.outputs.test_outputs import commit
from vidgen_ray.batch.line_planner import LinePlanner
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.cli import main
from vidgen_ray.content_keys import ShotPlanner, params_of
from vidgen_ray.graph import stages_of
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.profile import load_profile
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import open_lines
from vidgen_ray.stages.text_length import CutText, cut_texts

LONG = "a red ball on a blue table " * 20
NOTE = "s.jsonl line 2, prompt: Base image (flux) reads the first 64 of "


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps({"id": f"s{n}", "prompt": text}) + "\n" for n, text in enumerate(("a ball", LONG))))
    return path


def test_validate_notes_a_cut_prompt_and_rejects_it_on_request(script, capsys):
    assert main(["validate", str(script), "-p", "tiny"]) == 0
    assert NOTE in " ".join(capsys.readouterr().err.split())
    assert main(["validate", str(script), "-p", "tiny", "--strict-prompts", "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert (result["shots"], [(error["line"], error["field"]) for error in result["errors"]]) == (1, [(2, "prompt")])


@pytest.mark.parametrize("strict", [False, True])
def test_run_notes_a_cut_prompt_or_rejects_the_line(script, tmp_path, tiny, strict):
    checker, lines = open_lines(ScriptSettings(script, profile_defaults=tiny.defaults))
    planned = LinePlanner(checker, tiny, OutputFolder(tmp_path / "out"), RenderOptions(strict_prompts=strict)).plan_first(
        list(lines)
    )
    assert [bool(each.line.errors) for each in planned] == [False, strict]
    assert planned[0].line.notes == ()
    if strict:
        assert "Base image (flux) reads the first 64 of " in str(planned[1].line.errors[0])
    else:
        assert planned[1].line.notes[0].startswith(NOTE)


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


def test_tokens_of_each_text_encoder_are_counted():
    profile = load_profile("tiny")

    def cut(text, **fields):
        from vidgen_ray.script.check import check_shot

        shot = check_shot({"prompt": text, **fields}, "test", profile.defaults)
        stages = stages_of(shot)
        return {each.stage: (each.read, each.tokens) for each in cut_texts(stages, params_of(profile, stages), shot)}

    assert cut("a ball") == {}
    found = cut("a ball", video_model="ltx", num_frames=9, motion_prompt="x " * 60)
    assert set(found) == {"ltx"}
    assert found["ltx"][0] == 64
    assert cut("a ball", use_hunyuan_style=True, style_prompt="x " * 300).keys() == {"hunyuan"}
    assert cut("a" * 70, image_model="klein")["klein"][0] == 64
    # What a tokenizer counts is what the pipeline would: letters of the small tokenizer, and its end.
    assert str(CutText(stage="ltx", label="LTX", read=128, tokens=231)) == "LTX reads the first 128 of 231 tokens"
