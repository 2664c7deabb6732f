"""Blocks of planned lines: finished shots, and ids that several lines have."""

import json
import pickle
from contextlib import nullcontext
from unittest.mock import Mock

import pyarrow
import pytest
from PIL import Image

from vidgen_ray.batch import line_planner
from vidgen_ray.batch.line_planner import LinePlanner
from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.script.check import LineChecker
from vidgen_ray.script.lines import Line, ScriptIndex, ScriptSettings
from vidgen_ray.script.read import unique_lines

BLOCK = 20


def finished(plan):
    """Return a finished shot if the prompt contains `finished`."""
    row = ManifestRow(run="1", script="s.jsonl", id=plan.shot.id, line=1, status="done")
    return row if "finished" in plan.shot.prompt else None


@pytest.fixture
def planner(tiny, tmp_path):
    checker = LineChecker("s.jsonl", tmp_path, {**tiny.defaults, "upscale_video": False})
    planner = LinePlanner(checker, tiny, OutputFolder(tmp_path / "out"))
    planner.finished = Mock(other_owner=lambda *_: None, find=lambda plans, _: map(finished, plans))
    return planner


def numbered(fields):
    return [Line(number, line) for number, line in enumerate(fields, start=1)]


def in_blocks(planner, lines, *, size=BLOCK):
    """Return the shots, in order. Blocks are pickled as they are between processes."""
    index, shots = ScriptIndex(), []
    for first in range(0, len(lines), size):
        block = pickle.loads(pickle.dumps(planner.plan(lines[first : first + size])))
        shots += unique_lines(block, index)
    return shots


@pytest.mark.parametrize("size", [1, 2, BLOCK])
def test_results_belong_to_their_lines_also_between_rejected_lines_and_variants(planner, size):
    fields = [
        {"id": "a", "prompt": "finished"},
        {"id": "wrong", "prompt": "finished", "fps": 0},
        {"id": "two", "prompt": "new", "variants": 2},
        {"id": "b", "prompt": "finished"},
        {"id": "c", "prompt": "new", "failure": {"id": "before", "script": "s.jsonl"}},
        {"id": "two-v1", "prompt": "finished"},
        {"id": "d", "prompt": "finished"},
    ]
    shots = in_blocks(planner, numbered(fields), size=size)
    names = [line.id if line.errors else line.shot.id for line in shots]
    is_done = {name: [isinstance(each, ManifestRow) for each in line.results] for name, line in zip(names, shots, strict=True)}
    new = {"two-v0": [False], "two-v1": [False], "c": [False]}
    assert is_done == {"a": [True], "b": [True], "d": [True], "wrong": [], "s.jsonl:6": [], **new}


def test_first_line_with_an_id_owns_it(planner):
    """Even if the second one is finished."""
    for size in (1, BLOCK):
        lines = numbered([{"id": "a", "prompt": "new"}, {"id": "a", "prompt": "finished"}])
        shots = in_blocks(planner, lines, size=size)
        assert [line.shot.id for line in shots[:1]] == ["a"]
        assert str(shots[1].errors[0]).startswith("s.jsonl line 2, id: got 'a', line 1 has the same id")


class InProcess:
    """Data set whose tasks run at once in this process, as those of two executions may in one process of Ray."""

    def __init__(self, lines):
        self.block = pyarrow.table({"lines": [pickle.dumps(lines)]})

    def map_batches(self, task, *, fn_kwargs, **_):
        self.block = task(self.block, **fn_kwargs)
        return self

    def iter_batches(self, **_):
        yield self.block


def test_next_execution_in_a_process_sees_changed_files_and_other_finished_shots(planner, tmp_path, monkeypatch):
    found = planner.finished
    # Otherwise they would start a Ray.
    monkeypatch.setattr("ray.put", lambda value: value)
    monkeypatch.setattr("ray.get", lambda _: found)
    monkeypatch.setattr(line_planner, "on_this_node", lambda: {"label_selector": {}})
    image = tmp_path / "photo.png"

    def result(prompt, colour):
        Image.new("RGB", (64, 64), colour).save(image)
        ((line,),) = line_planner.planned_rows(
            InProcess(numbered([{"id": "a", "prompt": prompt, "image": str(image)}])), planner
        )
        return line.result

    assert result("new", "red").key == result("new", "red").key != result("new", "blue").key
    assert isinstance(result("finished", "blue"), ManifestRow)
    found = Mock(other_owner=lambda *_: None, find=lambda plans, _: [None for _ in plans])
    assert isinstance(result("finished", "blue"), ShotPlan)


def test_lines_of_a_resumed_run_are_planned_in_its_process_until_one_is_new(planner, tmp_path, monkeypatch):
    monkeypatch.setattr(line_planner, "FIRST_LOOK_LINES", 2)
    monkeypatch.setattr(line_planner, "BLOCK_LINES", 2)
    monkeypatch.setattr(line_planner, "on_this_node", dict)
    monkeypatch.setattr(line_planner, "own_context", nullcontext)
    monkeypatch.setattr(line_planner, "one_task_source", lambda blocks: blocks())
    monkeypatch.setattr("ray.data.read_datasource", lambda blocks, **_: blocks)
    monkeypatch.setattr(line_planner, "planned_rows", lambda blocks, _: (pickle.loads(*b["lines"].to_pylist()) for b in blocks))
    script, found = tmp_path / "s.jsonl", planner.finished

    def planned(prompts):
        """Return the numbers of the lines of each block, and whether it was planned in this process."""
        script.write_text("".join(json.dumps({"id": f"s{n}", "prompt": text}) + "\n" for n, text in enumerate(prompts)))
        settings, planner.found_all, planner.finished = ScriptSettings(script), True, found
        _, first, version = line_planner.first_lines(settings)
        planner.plan(first)
        later = line_planner.LaterLines(settings, version, planner)
        before = [*later.finished()]
        blocks = before[:-1] if before and before[-1] is None else [*before, *later.rest()]
        return [([line.number for line in block], bool(block[0].results)) for block in blocks]

    done = ["finished"] * 7
    assert planned(done) == [([3, 4], True), ([5, 6], True), ([7], True)]
    assert planned([*done[:4], "new", *done]) == [
        ([3, 4], True),
        ([5, 6], True),
        ([7, 8], False),
        ([9, 10], False),
        ([11, 12], False),
    ]
    assert planned(["new", *done]) == [([3, 4], False), ([5, 6], False), ([7, 8], False)]
    monkeypatch.setattr(line_planner, "RESUME_S", 0.0)
    assert planned(done)[0] == ([3, 4], False)
