"""`vidgen retry --rejected` and `--where`: new seeds, which the script of the shots keeps."""

import json
import pickle

import pytest

from tests.batch.test_batch import rows_of, write_lines
from tests.batch.test_continued_shots import SMALL
from tests.conftest import ASTRONAUT
from tests.fake_stages import FAKES
from vidgen_ray.batch import run_options
from vidgen_ray.batch.line_planner import LinePlanner, first_lines
from vidgen_ray.cli import main
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.reviews import Opinion, ReviewSession, clip_digest
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.shot import Shot

IMAGE = {"width": 64, "height": 64, "generate_video": False}
UNLIKE = next(seed for seed in range(50) if Shot(prompt="x", seed=seed).with_seed_of_try(2).seed % 100 >= 50)
"""Seed whose second try is like the photo: the likeness of a fake image is the last two digits of its seed."""
LINES = [
    {**SMALL, "id": "a", "prompt": "a red ball"},
    {**SMALL, "id": "b", "prompt": "it rolls", "continue_from": "a"},
    {**IMAGE, "id": "m", "prompt": "a boat", "matrix": {"seed": [1, 2]}},
    {**IMAGE, "id": "v", "prompt": "a kite", "variants": 2},
    {**IMAGE, "id": "face", "prompt": "ada", "face_image": str(ASTRONAUT), "seed": UNLIKE, "min_identity": 0.5, "max_tries": 4},
    {**IMAGE, "id": "bad", "prompt": "raise"},
]


@pytest.fixture
def run(in_process, tmp_path, monkeypatch, capsys):
    """Return a function that calls a command about the folder, and returns its exit code and what it prints."""
    monkeypatch.setattr(run_options, "STAGE_BY_NAME", FAKES)
    script, out = tmp_path / "s.jsonl", tmp_path / "out"

    def call(*arguments, lines=LINES):
        write_lines(script, lines)
        of_script = [str(script), "-o", str(out), "-p", "tiny"] if arguments[0] == "render" else [str(out)]
        code = main([arguments[0], *of_script, *arguments[1:]])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    call.out = out
    return call


def reject(out, *ids):
    session, rows = ReviewSession(OutputFolder(out).storage, "ada"), rows_of(out)
    for id_ in ids:
        session.add(Opinion(clip_sha256=clip_digest(rows[id_]), verdict="reject"), id_)


def changed(before, after):
    """Return id -> (old, new seed) of the shots that have other files."""
    return {id_: (before[id_]["seed"], row["seed"]) for id_, row in after.items() if row["key"] != before[id_]["key"]}


def test_rejected_shots_get_new_seeds_that_the_script_keeps(run, tiny):
    assert run("render")[0] == 1
    first = rows_of(run.out)
    assert first["face"]["seed"] != UNLIKE
    reject(run.out, "a", "m-2", "v-v1", "face")
    code, printed = run("retry", "--rejected")
    assert (code, "continue one of them and change, too: b\n" in printed) == (0, True)
    second = rows_of(run.out)
    seeds = changed(first, second)
    assert set(seeds) == {"a", "b", "m-2", "v-v1", "face"}
    assert [id_ for id_, (old, new) in seeds.items() if old == new] == ["b"]
    assert json.loads(second["m-2"]["metadata"])["matrix"] == {"seed": second["m-2"]["seed"]}
    assert second["face"]["image_likeness"] >= 0.5
    assert {id_: second[id_]["line"] for id_ in seeds} == {"a": 1, "b": 2, "m-2": 3, "v-v1": 4, "face": 5}
    # Neither the script nor the same command renders one of them again.
    assert "0 done, 7 already done, 1 failed" in run("render")[1]
    assert run("retry", "--rejected") == (0, "No finished shot is rejected.\n")

    # The clips with the new seeds are rejected as well, and the one that continues them has a seed of its own in the script.
    reject(run.out, "a", "face")
    assert run("retry", "--rejected")[0] == 0
    third = rows_of(run.out)
    assert set(changed(second, third)) == {"a", "b", "face"}
    assert json.loads((run.out / "seeds.json").read_text())["a"] == [5, third["a"]["seed"]]
    assert "0 done, 7 already done, 1 failed" in run("render")[1]
    # A task of Ray, which plans later lines of a long script, gets the seeds with the pickled planner.
    settings = ScriptSettings(run.out.parent / "s.jsonl", profile_defaults=tiny.defaults)
    planner = LinePlanner(first_lines(settings)[0], tiny, OutputFolder(run.out))
    planner.checker.script = "s.jsonl"
    planner.load_finished()
    in_task = pickle.loads(pickle.dumps(planner))
    in_task.finished = planner.finished
    planned = {each.fields["id"]: each.results for each in in_task.plan(first_lines(settings)[1])}
    assert all(isinstance(result, ManifestRow) for id_ in ("a", "m", "v", "face") for result in planned[id_])
    edited = [{**line, "seed": 6} if line["id"] == "a" else line for line in LINES]
    assert run("render", lines=edited)[0] == 1
    assert rows_of(run.out)["a"]["seed"] == 6


def test_retry_scores_if_the_run_did(run, monkeypatch):
    scored = []

    class Listener:
        def __init__(self, view, outputs, profile, address):
            self._view = view

        def __getattr__(self, name):
            return getattr(self._view, name)

        def finish(self):
            scored.append(set(rows_of(run.out)))

    monkeypatch.setattr("vidgen_ray.cli.run_script.load_of_extra", lambda *_: Listener)
    run("render", "--score", lines=LINES[:1])
    for _ in range(2):
        reject(run.out, "a")
        assert run("retry", "--rejected", lines=LINES[:1])[0] == 0
    assert scored == [{"a"}] * 3
    run("render", "--fresh", lines=LINES[:1])
    reject(run.out, "a")
    run("retry", "--rejected", lines=LINES[:1])
    assert len(scored) == 3


def test_retry_and_prune_of_the_shots_that_match(run):
    pytest.importorskip("duckdb")
    more = [*LINES, {**IMAGE, "id": "worse", "prompt": "raise later"}]
    assert run("render", lines=more)[0] == 1
    first = rows_of(run.out)
    code, printed = run("retry", "--where", "id in ('bad', 'v-v0') or stars > 3", lines=more)
    assert (code, "1 done, 0 already done, 1 failed" in printed) == (1, True)
    second = rows_of(run.out)
    assert set(changed(first, second)) == {"v-v0"}
    assert [json.loads(line)["failure"]["id"] for line in (run.out / "failures.jsonl").read_text().splitlines()] == [
        "worse",
        "bad",
    ]
    code, printed = run("prune", "--where", "prompt = 'a kite'", "--dry-run")
    assert (code, printed.splitlines()[1:]) == (0, ["v-v0", "v-v1"])
    assert set(rows_of(run.out)) == set(first)
    assert run("prune", "--where", "prompt = 'a kite'")[0] == 0
    assert first.keys() - rows_of(run.out).keys() == {"v-v0", "v-v1"}
    code, printed = run("retry", "--where", "colour = 'red'")
    assert (code, "colour" in printed, "prompt" in printed) == (2, True, True)
