"""Shots that continue another one: order, failures and resume."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.batch.test_batch import Events, digests, render_lines, rows_of, write_lines
from tests.conftest import ASTRONAUT, SYNTHETIC
from tests.fake_stages import FAKES, use_fakes
from vidgen_ray.batch import render_script
from vidgen_ray.batch.line_planner import LinePlanner, first_lines
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.batch.shot_queue import ContinuedShots
from vidgen_ray.errors import ScriptError
from vidgen_ray.graph import stages_of
from vidgen_ray.media.images import read_image
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import shot_path
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.script.lines import Line, ScriptIndex, ScriptSettings
from vidgen_ray.script.read import iter_script, read_script, unique_lines
from vidgen_ray.shot import Shot

SMALL = {"width": 64, "height": 64, "num_frames": 4, "upscale_video": False, "seed": 5}
CHAIN = [
    {**SMALL, "id": "a", "prompt": "a red ball"},
    {**SMALL, "id": "b", "prompt": "it rolls", "continue_from": "a"},
    {**SMALL, "id": "c", "prompt": "it stops", "continue_from": "b"},
]


def script(folder, lines, profile):
    return ScriptSettings(write_lines(folder / "s.jsonl", lines), profile_defaults=profile.defaults)


def test_chain_equals_that_of_the_library(in_process, tiny, tmp_path):
    settings = script(tmp_path, CHAIN, tiny)
    with use_fakes(VideoGenerationPipeline(tiny, tmp_path / "library")) as pipeline:
        for line in iter_script(settings):
            pipeline.render(line.shot)
        with pytest.raises(ScriptError, match="continue_from: got 'gone', must be the id of a finished shot"):
            pipeline.generate_video("a", continue_from="gone")
    assert render_lines(settings, tiny, tmp_path / "batch", stages=FAKES).done == 3
    for first, second in ("ab", "bc"):
        out = tmp_path / "batch"
        last, start = (out / shot_path(first) / "last_frame.png"), (out / shot_path(second) / "image.png")
        np.testing.assert_array_equal(read_image(last), read_image(start))
    assert digests(tmp_path / "batch") == digests(tmp_path / "library")


def test_line_added_later_continues_a_finished_shot_and_only_another_last_frame_renders_it_again(in_process, tiny, tmp_path):
    out = tmp_path / "out"

    def counts(*lines):
        report = render_lines(script(tmp_path, lines, tiny), tiny, out, stages=FAKES)
        return report.done, report.skipped, report.failed

    a, b, _ = CHAIN
    assert counts(a) == (1, 0, 0)
    assert not list(out.rglob("last_frame.png"))
    assert counts(a, b) == (1, 1, 0)
    last, start = (out / shot_path(id_) / name for id_, name in (("a", "last_frame.png"), ("b", "image.png")))
    np.testing.assert_array_equal(read_image(last), read_image(start))
    assert not (out / shot_path("b") / "last_frame.png").exists()
    # The second one passes no FLUX, but it starts from an image that FLUX has made.
    record = OutputFolder(out).find_by_id("b")
    assert [each.weights for each in record.licences] == ["builtin:tiny/flux", "builtin:tiny/svd"]
    assert {id_: row["status"] for id_, row in rows_of(out).items()} == {"a": "done", "b": "done"}
    assert counts({**a, "upscale_video": True}, b) == (1, 1, 0)
    assert counts({**a, "upscale_video": True, "num_frames": 3}, b) == (2, 0, 0)


def test_failed_shot_fails_those_that_continue_it(command, tiny, tmp_path):
    wall, out = tmp_path / "wall.png", tmp_path / "out"
    Image.fromarray(np.full((200, 200, 3), 128, np.uint8)).save(wall)
    lines = [
        {**CHAIN[0], "face_image": str(wall), "consent": SYNTHETIC},
        *CHAIN[1:],
        {**SMALL, "id": "other", "prompt": "a boat"},
    ]
    report = render_lines(script(tmp_path, lines, tiny), tiny, out)
    assert (report.done, report.failed) == (1, 3)
    rows = rows_of(out)
    assert [rows[id_]["failure_stage"] for id_ in "abc"] == ["instantid", "continue_from", "continue_from"]
    for id_ in "bc":
        assert rows[id_]["failure_message"].startswith("shot a failed: ")
        assert "no face found" in rows[id_]["failure_message"]
    Image.open(ASTRONAUT).save(wall)
    assert command("retry", out)[0] == 0
    assert {row["status"] for row in rows_of(out).values()} == {"done"}


@pytest.mark.parametrize(
    ("lines", "number", "message"),
    [
        ([CHAIN[1], CHAIN[0]], 1, "continue_from: got 'a', must be the id of an earlier line"),
        ([{**CHAIN[0], "continue_from": "c"}, *CHAIN[1:]], 1, "must be the id of an earlier line"),
        ([{**CHAIN[0], "continue_from": "a"}], 1, "must name another shot"),
        ([CHAIN[0], {**CHAIN[1], "image": str(ASTRONAUT)}], 2, "must not be set together with image"),
    ],
)
def test_unknown_and_later_shots_are_refused(tiny, tmp_path, lines, number, message):
    (error,) = read_script(script(tmp_path, lines, tiny)).errors[:1]
    assert error.line == number
    assert message in str(error)


def test_chain_longer_than_the_queue(in_process, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("vidgen_ray.batch.director.MAX_SHOTS", 2)
    fields = {"prompt": "a red ball", "seed": 5, "width": 64, "height": 64, "generate_video": False}
    lines = [{**fields, "id": f"s{n}", **({"continue_from": f"s{n - 1}"} if n else {})} for n in range(6)]
    settings, outputs = script(tmp_path, lines, tiny), OutputFolder(tmp_path / "out")
    checker, numbered, _ = first_lines(settings)

    def remaining():
        planner = LinePlanner(checker, tiny, outputs)
        planner.load_finished()
        yield from (planner.plan([line]) for line in numbered[1:])

    planner = LinePlanner(checker, tiny, outputs)
    report = render_script.render_lines(
        planner, numbered[:1], remaining, "s.jsonl", tiny, RenderOptions(stages=FAKES), listener=Events()
    )
    assert (report.done, report.failed) == (6, 0)


def test_rows_of_a_data_set_are_refused(tiny, tmp_path):
    checker, _, _ = first_lines(script(tmp_path, CHAIN, tiny))
    rows = [checker.check(Line(0, dict(fields))) for fields in CHAIN[:2]]
    first, second = unique_lines(rows, ScriptIndex())
    assert not first.errors
    assert "continue_from: got 'a', must not be set in a data set" in str(second.errors[0])


def line_of(number, **fields):
    shot = Shot(id=f"s{number}", prompt="a", seed=1, continue_from=f"s{number - 1}", **fields)
    return Line(number, {}, script="s.jsonl", script_line=number, shots=(shot,))


def test_long_chain_fails_with_its_first_shot_and_an_object_store_is_refused(tmp_path):
    shots = ContinuedShots(OutputFolder(tmp_path), pytest.fail, pytest.fail)
    shots.opened("s0")
    assert not [decided for number in range(1, 3000) for decided in shots.accept(line_of(number))]
    failed = shots.failed("s0", "no face")
    assert [line.number for line in failed] == [*range(1, 3000)]
    (late,) = shots.accept(line_of(3000))
    assert {decided.result.message for decided in (*failed, late)} == {"shot s0 failed: no face"}
    assert len(shots) == 0
    store = SimpleNamespace(storage=SimpleNamespace(local=None), url="s3://clips")
    (decided,) = ContinuedShots(store, pytest.fail, pytest.fail).accept(line_of(1))
    assert "output folder s3://clips: must be a local folder" in decided.result.message


def test_no_stage_changes_the_start_frame():
    for fields in (
        {"mode": "fast", "lora": "builtin:tiny/lora.safetensors"},
        {"image_model": "klein"},
        {"use_hunyuan_style": True, "style_model": "qwen-edit"},
        {"identity": "instantid-sdxl", "face_image": str(ASTRONAUT)},
    ):
        stages = stages_of(line_of(1, **fields).shot)
        assert not [stage.name for stage in stages if "image" in stage.writes]
        assert "svd" in [stage.name for stage in stages]
