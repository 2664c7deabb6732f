"""`vidgen score`: what is computed again, what fails, near-duplicates, scorers of users, and scores during a run."""

import shutil
from contextlib import suppress
from types import SimpleNamespace

import cv2
import numpy as np
import psutil
import pytest
import ray
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from tests.conftest import EXAMPLES
from tests.dataset.conftest import make_folder, moving, texture
from vidgen_ray.batch.render_script import RunReport
from vidgen_ray.bench.tiny_networks import clip_tokenizer
from vidgen_ray.cli import main
from vidgen_ray.dataset import score_folder as module
from vidgen_ray.dataset.measurements import HashScorer, PixelScorer
from vidgen_ray.dataset.score_folder import (
    ClipScorer,
    ScoreWriter,
    ScoringListener,
    finished_clips,
    nearest_neighbours,
    score_folder,
)
from vidgen_ray.dataset.scorers import choose_scorers
from vidgen_ray.dataset.tables import open_tables
from vidgen_ray.outputs.manifest import read_manifest

SIZE = (64, 128)
REPORT = RunReport("r", 2, 0, 1, 0, 0, True, 1.0, 0.0, None, None, 0, {}, None, ())
LOGGING_SCORER = """
import os
from pathlib import Path
import pyarrow
from vidgen_ray.dataset.scorers import Column, Scorer

class Logging(Scorer):
    name, version, cpu_s_per_frame = "logging", 1, 1.0
    num_gpus = 0.25
    columns = {"shape": Column(pyarrow.list_(pyarrow.int64()), "Shape of the frames.")}
    def __init__(self, weights):
        self.log = weights / "log"
    def score(self, clip):
        if "raise" in clip.row["prompt"]:
            raise ValueError("a bad clip")
        if "crash" in clip.row["prompt"]:
            os._exit(1)
        with self.log.open("a") as file:
            file.write(clip.row["id"] + "\\n")
        return {"shape": clip.frames.shape}
"""


@pytest.fixture
def logging_scorer(tmp_path, monkeypatch):
    """Return the arguments of a scorer that logs what it scores, in a module of the current folder, and its log."""
    # A name of its own: Python imports a module once.
    name = f"logging_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(LOGGING_SCORER)
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    return [f"{name}:Logging"], [f"logging={tmp_path / 'weights'}"], tmp_path / "weights" / "log"


def clips(count):
    return [({"id": f"clip-{number}"}, moving(4, seed=number, size=SIZE)) for number in range(count)]


def query(outputs, sql):
    with open_tables(outputs.storage) as database:
        return database.sql(sql).fetchall()


@pytest.mark.usefixtures("local_ray")
def test_interrupted_call_is_resumed_and_a_new_scorer_computes_only_its_column(tmp_path, monkeypatch, logging_scorer):
    fails = [({"id": name, "prompt": "raise"}, moving(4, seed=9 + len(name), size=SIZE)) for name in ("raises", "gone", "cut")]
    outputs = make_folder(tmp_path / "out", [*clips(3), *fails, ({"id": "image"}, texture(*SIZE)), ({"id": "failed"}, None)])
    (outputs.shot_folder("gone") / "video.mp4").unlink()
    damaged = outputs.shot_folder("cut") / "video.mp4"
    intact = damaged.read_bytes()
    damaged.write_bytes(intact[: len(intact) // 3] + bytes(len(intact) - len(intact) // 3))
    scorer, weights, log = logging_scorer
    chosen = choose_scorers((HashScorer,), scorer, weights, None)
    done, add = [], ScoreWriter.add

    def interrupt(writer, scores):
        add(writer, scores)
        done.append(1)
        if len(done) == 5:  # at least two of them have not failed
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ScoreWriter, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            score_folder(outputs, chosen, None, None)
    first = len(query(outputs, "SELECT * FROM scores WHERE shape IS NOT NULL"))
    logged = len(log.read_text().split())
    report = score_folder(outputs, chosen, None, None)
    assert (report.clips, report.done + report.already_done, report.already_done) == (7, 4, first)
    assert report.failed["raises"] == "logging: ValueError: a bad clip"
    assert "gone/video.mp4 is missing" in report.failed["gone"]
    assert report.failed.keys() == {"raises", "gone", "cut"}
    # Clips that were in progress may be scored twice, those that were written are not.
    assert len(log.read_text().split()) <= logged + 4 - first
    found = query(outputs, "SELECT id, shape, len(phash) FROM clips WHERE id NOT LIKE 'clip-%' ORDER BY id")
    image = ("image", [1, *SIZE, 3], 3)
    assert found == [("cut", None, None), ("failed", None, None), ("gone", None, None), image, ("raises", None, 3)]

    log.unlink()
    damaged.write_bytes(intact)
    report = score_folder(outputs, choose_scorers((HashScorer, PixelScorer), scorer, weights, None), None, None)
    assert (report.done, report.failed.keys(), log.exists()) == (4, {"raises", "gone", "cut"}, False)
    assert query(outputs, "SELECT count(black_frames), count(phash), count(shape) FROM scores") == [(6, 6, 4)]
    # With other weights, no clip has a score.
    (tmp_path / "weights" / "more").write_text("x")
    (other,) = choose_scorers((), scorer, weights, None)
    assert (len(module._scored(outputs.storage, chosen[1])), module._scored(outputs.storage, other)) == (4, set())


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_clip_that_crashes_its_process_fails_alone(tmp_path, logging_scorer):
    outputs = make_folder(tmp_path / "out", [*clips(3), ({"id": "crash", "prompt": "crash"}, moving(4, seed=9, size=SIZE))])
    report = score_folder(outputs, choose_scorers((HashScorer,), *logging_scorer[:2], None), None, None)
    assert (report.done, report.failed) == (3, {"crash": "the process that scored it crashed"})


def low_priority():
    """Return the ids of this process's children with the lowest priority."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.nice() == 19:
                found.add(child.pid)
    return found


@pytest.mark.usefixtures("local_ray")
def test_clips_are_scored_during_and_after_a_run(tmp_path, monkeypatch, capsys):
    """The run is replaced: its listener gets the rows of a folder."""
    outputs = make_folder(tmp_path / "out", clips(3))
    rows = read_manifest(outputs.root)
    monkeypatch.setattr(module, "SCORERS", (HashScorer,))
    listeners, before = [], low_priority()

    def render(script, profile, outputs, options, *, listener, stop, lease):
        assert isinstance(listener, ScoringListener)
        for row in rows[:2]:
            listener.on_finished(row)
        assert not listener._running
        listener.on_status(SimpleNamespace(stages={}, gpus_busy=None, in_progress=0))
        ray.wait(listener._running, num_returns=2)
        listener.on_status(SimpleNamespace(stages={}, gpus_busy=None, in_progress=0))
        listeners.append(listener)
        return REPORT

    monkeypatch.setattr("vidgen_ray.batch.render_script.render_shots", render)
    script = tmp_path / "script.jsonl"
    script.write_text('{"id": "clip-0", "prompt": "x"}\n')
    assert main(["render", str(script), "--out", str(outputs.root), "--profile", "tiny", "--score"]) == 0
    assert not listeners[0]._running
    assert low_priority() > before
    assert "3 clips: 1 scored, 2 already scored, 0 failed" in capsys.readouterr().err
    assert query(outputs, "SELECT count(phash) FROM scores") == [(3,)]


def test_nearest_neighbour_is_exact_over_several_blocks(monkeypatch):
    monkeypatch.setattr(module, "PAIR_ROWS", 7)
    hashes = np.random.default_rng(0).integers(0, 2**63, (60, 3), dtype=np.uint64)
    hashes[41] = hashes[3] ^ np.array([5, 0, 1], np.uint64)
    nearest, distances = nearest_neighbours(hashes)
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None]).sum(-1)
    np.fill_diagonal(bits, 255)
    assert nearest.tolist() == bits.argmin(1).tolist()
    assert distances.tolist() == bits.min(1).tolist()
    assert (nearest[41], nearest[3], distances[3]) == (3, 41, 3)


def score_here(outputs, chosen):
    """Score a folder without Ray."""
    writer, scorer = ScoreWriter(outputs.storage, chosen), ClipScorer(chosen, outputs, None)
    found = finished_clips(outputs.storage)
    for clip in found:
        writer.add(scorer.score(clip | {"scorers": [each.kind.name for each in chosen]}))
    writer.flush()
    return found


def test_near_duplicates_are_neighbours(tmp_path):
    frames = moving(4, seed=1, size=SIZE)
    noisy = (frames + np.random.default_rng(0).normal(0, 6, frames.shape)).clip(0, 255).astype(np.uint8)
    large = np.stack([cv2.resize(frame, (256, 128), interpolation=cv2.INTER_CUBIC) for frame in moving(4, size=SIZE)])
    folder = [*clips(4), ({"id": "noisy"}, noisy), ({"id": "same"}, moving(4, seed=2, size=SIZE)), ({"id": "large"}, large)]
    outputs = make_folder(tmp_path / "out", folder)
    found = score_here(outputs, choose_scorers((HashScorer,), (), (), None))
    module.write_neighbours(outputs.storage, found)
    neighbours = {row[0]: row[1:] for row in query(outputs, "SELECT id, neighbour_id, neighbour_distance FROM clips")}
    assert (neighbours["clip-1"][0], neighbours["noisy"][0]) == ("noisy", "clip-1")
    assert neighbours["noisy"][1] <= 6
    assert neighbours["clip-2"] == ("same", 0)
    assert (neighbours["clip-0"][0], neighbours["clip-0"][1] <= 6) == ("large", True)
    assert neighbours["clip-3"][1] > 60
    file = outputs.root / module.NEIGHBOURS_FILE
    written = file.stat().st_mtime_ns
    module.write_neighbours(outputs.storage, found)
    assert file.stat().st_mtime_ns == written
    module.write_neighbours(outputs.storage, found[:1])
    assert not file.exists()


WRONG_SCORERS = """
from vidgen_ray.dataset.measurements import FLOAT
from vidgen_ray.dataset.scorers import Column, Scorer

class Base(Scorer):
    name, version, cpu_s_per_frame, columns = 'mine', 1, 0.1, {'flicker': Column(FLOAT, 'x')}

class Taken(Base):
    def score(self, clip): return {}

class Needy(Taken):
    needs = ('sound',)
"""


def test_wrong_scorers_are_named_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong_scorers.py").write_text(WRONG_SCORERS)
    out = str(make_folder(tmp_path / "out", clips(1)).root)
    for name, message in (
        ("wrong_scorers", "must be module:Class"),
        ("no_such:X", "no_such cannot be imported"),
        ("wrong_scorers:Gone", "has no Gone"),
        ("wrong_scorers:FLOAT", "must be a subclass of vidgen_ray.dataset.scorers.Scorer"),
        ("wrong_scorers:Base", "must define score"),
        ("wrong_scorers:Taken", "flicker is already that of PixelScorer"),
        ("wrong_scorers:Needy", "needs sound, allowed are frames, flow, faces"),
    ):
        assert main(["score", out, "--scorer", name]) == 2, name
        assert message in capsys.readouterr().err
    assert main(["score", out, "--weights", "motion=x"]) == 2
    assert "must be NAME=PATH with a scorer that takes weights: none" in capsys.readouterr().err
    assert main(["score", str(tmp_path)]) == 4
    assert capsys.readouterr().err.count("has no results") == 1
    assert not (tmp_path / "out" / "scores").exists()


def test_clip_scorer_of_the_examples_compares_prompt_and_frames(tmp_path, monkeypatch):
    weights = tmp_path / "clip"
    tokenizer = clip_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(weights)
    side = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side), tokenizer).save_pretrained(weights)
    outputs = make_folder(tmp_path / "out", clips(2))
    shutil.copy(EXAMPLES / "clip_scorer.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    name = ["clip_scorer:ClipTextScorer"]
    without = ClipScorer(choose_scorers((), name, (), None), outputs, None).score(finished_clips(outputs.storage)[0])
    assert without.is_fatal
    assert without.errors == ["a scorer cannot be loaded: pass --weights clip_text=PATH, the folder of a CLIP model"]
    score_here(outputs, choose_scorers((), name, [f"clip_text={weights}"], None))
    rows = query(outputs, "SELECT clip_text_worst, clip_text_mean FROM scores")
    assert len(rows) == 2
    assert all(-1 <= worst < mean <= 1 for worst, mean in rows)
    assert rows[0] != rows[1]
