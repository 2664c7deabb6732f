"""Blocks of planned lines: finished shots, and ids that several lines have."""

import pickle
import random
from collections import Counter
from unittest.mock import Mock

import pytest

from vidgen_ray.batch.line_planner import LinePlanner, unique_shots
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import DoneShot
from vidgen_ray.script.check import LineChecker
from vidgen_ray.script.lines import Line, ScriptIndex

BLOCK = 20


def finished(plan):
    """Return a finished shot if the prompt contains `finished`."""
    times = {"committed_at": None, "seconds": 1.0, "gpu_seconds": 1.0, "lora_loads": 0}
    done = DoneShot(plan.key, f"shots/{plan.shot.id}", seed=1, likeness=None, sha256={}, bytes={}, **times)
    return done if "finished" in plan.shot.prompt else None


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
        shots += unique_shots(block, index)
    return shots


def test_blocks_have_the_same_result_as_lines_one_by_one(planner):
    draw = random.Random(3)
    fields = []
    for number in range(400):
        line = {"prompt": f"{draw.choice(['finished', 'new'])} {number}"}
        if draw.random() < 0.9:
            # Few blocks of the first half have a repeated id, nearly all blocks of the second half do.
            line["id"] = f"x{draw.randrange(100_000 if number < 200 else 300)}"
        if draw.random() < 0.1:
            line["variants"] = 2
        if draw.random() < 0.1:
            line["fps"] = 0
        if draw.random() < 0.05:
            line["failure"] = {"id": f"before-{number}", "script": "s.jsonl"}
        if draw.random() < 0.05:
            # The id that a rejected line without an id gets.
            line["id"] = f"s-line-{number + draw.randrange(1, 9)}"
        fields.append(line)
    expected = list(unique_shots(planner.plan(numbered(fields)), ScriptIndex()))
    shots = in_blocks(planner, numbered(fields))
    names = [shot.line.id if shot.line.errors else shot.line.shot.id for shot in shots]
    assert len(set(names)) == len(names)
    assert Counter("has the same id" in str(shot.line.errors) for shot in expected)[True] > 20
    assert Counter(isinstance(result, DoneShot) for shot in expected for result in shot.results)[True] > 100
    assert shots == expected


def test_first_line_with_an_id_owns_it(planner):
    """Even if the second one is finished, or a rejected line would get it as a generated name."""
    for size in (1, BLOCK):
        lines = numbered([{"id": "a", "prompt": "new"}, {"id": "a", "prompt": "finished"}])
        shots = in_blocks(planner, lines, size=size)
        assert [shot.line.shot.id for shot in shots[:1]] == ["a"]
        assert str(shots[1].line.errors[0]).startswith("s.jsonl line 2, id: got 'a', line 1 has the same id")
    lines = numbered([{"prompt": "x", "fps": 0, "id": "?"}, {"id": "s-line-1", "prompt": "finished"}])
    assert [shot.line.id for shot in in_blocks(planner, lines)] == ["s-line-1", "s-line-2"]
