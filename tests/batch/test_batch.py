"""Batch executor on a real Ray: same bytes as the reference, every line in the manifest, nothing rendered twice."""

import json
import signal
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import ASTRONAUT, SYNTHETIC
from tests.fake_stages import FAKES, use_fakes, with_actor
from tests.ray_workers import use_small_images
from vidgen_ray.batch import render_script as render_module
from vidgen_ray.batch.render_script import _encoding_note, render_shots
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.cli import main
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import RelativeCost
from vidgen_ray.media.decode import open_video
from vidgen_ray.outputs import lease as leases
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import shot_path
from vidgen_ray.outputs.storage import LocalStorage
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.planner.choose_layout import plan_run
from vidgen_ray.planner.cluster import Cluster, Node, parse_gpus, this_machine
from vidgen_ray.planner.demand import ENCODING, MIN_SHOTS, demand_of
from vidgen_ray.planner.speed_trials import Trial, TrialResult, keep, settled
from vidgen_ray.profile import ProvenanceSettings
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import iter_script, read_script
from vidgen_ray.shot import Shot
from vidgen_ray.system.cache_dir import sha256_of
from vidgen_ray.system.files import this_process

SCRIPT = Path(__file__).with_name("tiny.jsonl")
"""Script with one line of every kind, for the profile `tiny`."""
DONE = "shots/[!.]*/*/shot.json"
"""Records of finished shots. Unfinished shots have their files in hidden folders."""


class Events:
    """Listener that records events and calls `at_first` when the first shot is done."""

    def __init__(self, at_first=lambda: None):
        self.rows = []
        self.messages = []
        self.quarantined = set()
        self._at_first = at_first

    def on_lines(self, total, skipped, rejected, complete):
        self.lines = (total, skipped, rejected, complete)

    def on_message(self, message):
        self.messages.append(message)

    def on_rejected(self, row):
        self.rows.append(row)

    def on_status(self, snapshot):
        self.quarantined.update(snapshot.quarantined)

    def on_finished(self, row):
        if row.status == "done" and not any(r.status == "done" for r in self.rows):
            self._at_first()
        self.rows.append(row)


def digests(out: Path) -> dict[str, str]:
    """Return file -> sha256 of all output files of a run."""
    return {
        str(file.relative_to(out)): sha256_of(file)
        for file in sorted((out / "shots").rglob("*"))
        if file.is_file() and file.name != "shot.json"
    }


@pytest.fixture(scope="module")
def script(tiny):
    return ScriptSettings(SCRIPT, run_seed=3, profile_defaults=tiny.defaults)


def render_lines(script, profile, out, listener=None, **options):
    return render_shots(script, profile, OutputFolder(out), RenderOptions(**options), listener=listener or Events())


@pytest.fixture(scope="module")
def reference(tiny, script, tmp_path_factory):
    """Output of the in-process pipeline for the script: file -> sha256."""
    use_small_images()
    out = tmp_path_factory.mktemp("reference")
    pipeline = VideoGenerationPipeline(tiny, out, keep_stages=True)
    for line in iter_script(script):
        pipeline.render(line.shot)
    pipeline.close()
    return digests(out)


def test_batch_output_equals_the_pipeline_and_a_second_run_skips_everything(
    local_ray, tiny, script, reference, tmp_path, monkeypatch
):
    measured = {}
    monkeypatch.setattr(render_module, "save_calibration", lambda profile, card, seconds: measured.update(seconds))
    # A second process takes seconds to import torch. tests/chaos has several.
    first, one_worker = Events(), Cluster((Node((), 2.5, 64.0),))
    report = render_lines(script, tiny, tmp_path, first, keep_stages=True, cluster=one_worker)
    assert (report.done, report.failed, report.skipped) == (13, 0, 0)
    assert {Path(name).name for name in reference} == {
        "image.png", "video.mp4", "hd.mp4", "base.png", "refine.png", "lora.png", "style.png", "face.json"
    }  # fmt: skip
    assert digests(tmp_path) == reference
    # CPU seconds and megapixels of each shot with a clip.
    encoding = [(seconds, cost.fixed) for seconds, cost in measured[ENCODING] if cost.fixed]
    assert len(encoding) == sum(line.shot.generate_video for line in iter_script(script))
    assert all(0.01 * mpx < seconds < 100 * mpx for seconds, mpx in encoding)
    # Two passes of 4 frames, which share one, at 5 per second last 1.4 seconds.
    with open_video(tmp_path / shot_path("draft") / "hd.mp4") as video:
        assert (video.frame_count, video.fps) == (17, 12)

    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "shots").rglob("*")}
    second = Events()
    report = render_lines(script, tiny, tmp_path, second, keep_stages=True)
    assert (report.done, report.failed, report.skipped) == (0, 0, 13)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "shots").rglob("*")} == written
    manifest = pq.read_table(tmp_path / "manifest").to_pylist()
    assert sorted(row["id"] for row in manifest) == sorted(line.shot.id for line in iter_script(script))
    for row in manifest:
        for kind in ("image", "video", "hd_video"):
            assert row[kind] is None or row[f"{kind}_sha256"] == reference[row[kind]]


def test_speed_options_are_settled_before_the_keys_and_a_folder_keeps_them(in_process, tiny, tmp_path, own_cache, monkeypatch):
    """Trials in a long run use what helps. Later runs in the folder have the same keys, also with other results of trials."""
    options = {"channels_last": True, "decode_chunk_frames": 1}
    profile = with_actor(tiny, "svd", trial_options=options)
    known = {"channels_last": TrialResult(speedup=2.0), "decode_chunk_frames": TrialResult(error="RuntimeError: no kernel")}

    def trials(profile, shots, address, cluster, on_message):
        for option, value in options.items():
            keep(Trial(profile, "svd", option, value), "cpu", known[option])
        return settled(profile, cluster.kinds)

    monkeypatch.setattr(render_module, "run_trials", trials)
    (tmp_path / "s.jsonl").write_text(json.dumps({"prompt": "a boat", "num_frames": 2, "steps": {"svd": 1}, "scale": 2}))
    script = ScriptSettings(tmp_path / "s.jsonl", run_seed=1, profile_defaults=tiny.defaults)
    counts = []
    for out, trial_from_s in (("fast", 0.0), ("short", 1e9), ("fast", 0.0), ("short", 0.0)):
        for measured in own_cache.glob("*.json"):
            measured.unlink()
        monkeypatch.setattr(render_module, "TRIAL_FROM_S", trial_from_s)
        report = render_lines(script, profile, tmp_path / out, stages=FAKES)
        counts.append((report.done, report.skipped))
        options = json.loads((tmp_path / out / "run.json").read_text())["profile"]["actors"]["svd"]["options"]
        assert options == ({"channels_last": True} if out == "fast" else {})
    assert counts == [(1, 0), (1, 0), (0, 1), (0, 1)]


def test_trials_depend_on_the_seconds_planned_for_the_sizes_of_a_script(tiny, tmp_path, own_cache, monkeypatch):
    """FLUX takes 211 s: kernels of a small image start no faster than those of a large one. By the pixels it would be 82 s."""
    path = write_lines(tmp_path / "s.jsonl", [{"id": f"{n}", "prompt": "a boat"} for n in range(50)])
    defaults = {"width": 512, "height": 320, "generate_video": False}
    script = ScriptSettings(path, run_seed=1, profile_defaults=defaults)
    profile = with_actor(tiny, "flux", device="cuda", dtype="bfloat16", seconds={}, options={}, trial_options={"compile": True})
    monkeypatch.setattr(render_module, "run_trials", Mock(side_effect=InterruptedError))
    monkeypatch.setattr(render_module, "TRIAL_FROM_S", 150.0)
    with pytest.raises(InterruptedError):
        render_lines(script, profile, tmp_path / "out", cluster=parse_gpus("1xH100"))


def rows_of(out):
    return {row["id"]: row for row in pq.read_table(out / "manifest").to_pylist()}


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_failed_lines_do_not_affect_others_and_can_be_rerun(command, tiny, tmp_path):
    Image.fromarray(np.full((200, 200, 3), 128, np.uint8)).save(tmp_path / "wall.png")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "cut.jpg").write_bytes(ASTRONAUT.read_bytes()[:2000])
    lines = [
        {"id": "good", "prompt": "a red ball"},
        {"id": "tall", "prompt": "a", "height": 7},
        {"id": "no-face", "prompt": "a", "face_image": "wall.png", "consent": SYNTHETIC},
        {"id": "junk", "prompt": "a", "lora": "junk.safetensors"},
        {"id": "cut", "prompt": "a", "image": "cut.jpg"},
        {"id": "unknown", "prompt": "a", "upscaler": "best"},
        "{not json",
        {"id": "good-too", "prompt": "a blue ball", "generate_video": False},
    ]
    path, out = write_lines(tmp_path / "s.jsonl", lines), tmp_path / "out"
    code, report = command("render", path, "-o", out, "-p", "tiny", "--json")
    assert (code, report["done"], report["failed"], report["skipped"]) == (1, 2, 6, 0)
    rows = rows_of(out)
    assert {i: (r["status"], r["line"], r["failure_stage"], r["failure_error"]) for i, r in rows.items()} == {
        "good": ("done", 1, None, None),
        "tall": ("failed", 2, "script", "ScriptError"),
        "no-face": ("failed", 3, "instantid", "StageError"),
        "junk": ("failed", 4, "plan", "ScriptError"),
        "cut": ("failed", 5, "svd", "MediaError"),
        "unknown": ("failed", 6, "plan", "StageError"),
        "s.jsonl:7": ("failed", 7, "script", "ScriptError"),
        "good-too": ("done", 8, None, None),
    }
    assert rows["tall"]["failure_message"].startswith("s.jsonl line 2, height: got 7, must be a multiple of 16")
    no_face = f"face_image ({tmp_path / 'wall.png'}): no face found"
    assert no_face in rows["no-face"]["failure_message"]
    assert no_face in (out / "failures.jsonl").read_text()

    # failures.jsonl contains all fields, independent of later defaults.
    valid = read_script(ScriptSettings(path, profile_defaults=tiny.defaults)).shots
    reread = read_script(ScriptSettings(out / "failures.jsonl", profile_defaults={"num_frames": 99, "scale": 4}))
    assert {s.id: s for s in reread.shots} == {s.id: s for s in valid if rows[s.id]["status"] == "failed"}
    assert {(line.id, line.errors[0].field) for line in reread.rejected} == {("tall", "height"), ("s.jsonl:7", "prompt")}

    Image.open(ASTRONAUT).save(tmp_path / "wall.png")
    assert command("retry", out)[0] == 1
    after = rows_of(out)
    assert [after[id_]["status"] for id_ in ("no-face", "junk", "good", "tall")] == ["done", "failed", "done", "failed"]
    assert {id_: row["line"] for id_, row in after.items()} == {id_: row["line"] for id_, row in rows.items()}

    # The script is fixed: the old failures are removed. Finished shots that it no longer has are marked and can be removed.
    write_lines(path, [lines[0], {**lines[1], "height": 64}])
    assert command("render", path, "-o", out, "-p", "tiny", "--until", "image")[0] == 0
    statuses = {id_: row["status"] for id_, row in rows_of(out).items()}
    assert statuses == {"good": "done", "tall": "done", "no-face": "replaced", "good-too": "replaced"}
    assert not (out / "failures.jsonl").exists()
    assert command("prune", out)[0] == 0
    assert set(rows_of(out)) == {"good", "tall"}
    assert [(out / shot_path(id_) / "shot.json").exists() for id_ in statuses] == [s == "done" for s in statuses.values()]


@pytest.mark.parametrize(
    "typo",
    [("s2,", 's2,"'), ("s4,a ball,64", "s4,a ball,64,1"), ("s5,a ball,64", "s5,a ball,65"), ("s5,", "s4,")],
    ids=["quote", "unreadable", "invalid", "id of another line"],
)
def test_line_that_cannot_be_read_replaces_and_prunes_no_shot(command, tmp_path, typo):
    path, out = tmp_path / "s.csv", tmp_path / "out"
    rows = [f"s{n},a ball,64\n" for n in range(6)]
    whole, typed = ("id,prompt,height\n" + text for text in ("".join(rows), "".join(rows).replace(*typo)))

    def run(text, *options):
        path.write_text(text)
        code, report = command("render", path, "-o", out, "-p", "tiny", "--set", "generate_video=false", "--json", *options)
        return code, (report["done"], report["skipped"])

    assert run(whole) == (0, (6, 0))
    assert run(typed, "--prune")[0] == 1
    assert command("prune", out)[1] == "removed 0 shots: 0 bytes\n"
    assert "replaced" not in {row["status"] for row in rows_of(out).values()}
    assert run(whole) == (0, (0, 6))
    # Removed by a run, and there again with the typo.
    assert run(whole.replace(rows[5], "")) == (0, (0, 5))
    assert rows_of(out)["s5"]["status"] == "replaced"
    assert run(typed, "--prune")[0] == 1
    assert "s.csv: nothing pruned, since 1 line of it is rejected" in command.messages
    assert run(whole) == (0, (0, 6))
    assert run(whole.replace(rows[5], ""), "--prune") == (0, (0, 5))
    assert rows_of(out).keys() == {f"s{n}" for n in range(5)}


def test_prune_removes_the_files_of_failed_lines_and_keeps_those_that_the_library_has_made(command, tiny, make_shot, tmp_path):
    path, out = tmp_path / "s.jsonl", tmp_path / "out"
    lines = [{"id": id_, "prompt": "a ball", "generate_video": False} for id_ in "abcdef"]
    # Then the image of a clip has the bytes of the image alone.
    render = ("render", path, "-o", out, "-p", "tiny", "--no-provenance")

    def has_files():
        return {id_ for id_ in "abcdef" if (out / shot_path(id_) / "shot.json").exists()}

    write_lines(path, lines)
    assert command(*render)[0] == 0
    # Changed so that they fail, then removed.
    write_lines(path, [{**lines[0], "prompt": "raise"}, {**lines[1], "fps": 0}, {**lines[2], "prompt": "raise"}, *lines[3:]])
    assert command(*render)[0] == 1
    write_lines(path, lines[4:5])
    assert command(*render)[0] == 0
    assert {id_: row["status"] for id_, row in rows_of(out).items()} == dict.fromkeys("abcdf", "replaced") | {"e": "done"}
    # Made with another key, which counts as the same result.
    record = out / shot_path("f") / "shot.json"
    record.write_text(record.read_text().replace(json.loads(record.read_text())["key"], "0" * 64))
    of_script = json.loads((out / shot_path("d") / "shot.json").read_text())["shot"]
    with closing(use_fakes(VideoGenerationPipeline(tiny.with_provenance(ProvenanceSettings(metadata="off")), out))) as pipeline:
        pipeline.render(make_shot(id="c", prompt="of the library", generate_video=False))
        pipeline.render(Shot.model_validate({**of_script, "generate_video": True}))
    assert command("prune", out, "--dry-run")[1].splitlines()[1:] == ["a", "b", "f"]
    assert command("prune", out)[0] == 0
    assert (has_files(), rows_of(out).keys()) == (set("cde"), {"e"})


def test_retry_renders_each_line_as_the_run_in_which_it_failed(command, tmp_path, monkeypatch):
    """Another script was rendered with other options in between."""
    out = tmp_path / "out"
    first = write_lines(tmp_path / "a.jsonl", [{"id": "fails", "prompt": "raise"}, {"id": "wrong", "prompt": "a", "fps": 0}])
    second = write_lines(tmp_path / "b.jsonl", [{"id": "image", "prompt": "a"}, {"id": "tall", "prompt": "a", "height": 7}])
    assert command("render", first, "-o", out, "-p", "tiny", "--seed", "7", "--no-provenance")[0] == 1
    assert command("render", second, "-o", out, "-p", "demo", "--until", "image", "--keep", "stages")[0] == 1
    text = (out / "failures.jsonl").read_text()
    for wrong, right in (
        ('"prompt": "raise"', '"prompt": "a ball"'),
        ('"fps": 0', '"fps": 5'),
        ('"height": 7', '"height": 64'),
    ):
        assert wrong in text
        text = text.replace(wrong, right)
    # Added by hand: with the options of the last run, which are not those of the last lines.
    (out / "failures.jsonl").write_text('{"id": "hand", "prompt": "a"}\n' + text)
    code, report = command("retry", out, "--json")
    assert (code, report["done"], report["failed"]) == (0, 4, 0)
    rows = rows_of(out)
    assert {row["status"] for row in rows.values()} == {"done"}
    assert {id_: row["video"] is not None for id_, row in rows.items()} == {
        "fails": True, "wrong": True, "image": False, "tall": False, "hand": False
    }  # fmt: skip
    records = {id_: json.loads((out / shot_path(id_) / "shot.json").read_text()) for id_ in rows}
    details = {id_: record["provenance"]["metadata"] for id_, record in records.items()}
    assert details == {"fails": "off", "wrong": "off", "image": "full", "tall": "full", "hand": "full"}
    assert {id_: "base.png" in record["files"] for id_, record in records.items()} == {
        "fails": False, "wrong": False, "image": True, "tall": True, "hand": True
    }  # fmt: skip
    write_lines(first, [{"id": "wrong", "prompt": "a", "fps": 5}])
    assert records["wrong"]["shot"]["seed"] == read_script(ScriptSettings(first, 7)).shots[0].seed


def test_retry_reads_the_failed_lines_while_it_holds_the_lease(command, tmp_path, monkeypatch):
    """Another run, for which it has waited, has rendered one of them."""
    path, out = tmp_path / "s.jsonl", tmp_path / "out"
    lines = [{"id": id_, "prompt": "raise", "generate_video": False} for id_ in ("a", "b")]
    render = ("render", write_lines(path, lines), "-o", out, "-p", "tiny")
    assert command(*render)[0] == 1
    take = leases._take

    def wait_for_another_run(storage, run):
        monkeypatch.setattr(leases, "_take", take)
        write_lines(path, [{**lines[0], "prompt": "a ball"}, lines[1]])
        assert command(*render)[0] == 1
        return take(storage, run)

    monkeypatch.setattr(leases, "_take", wait_for_another_run)
    assert command("retry", out)[0] == 1
    assert {id_: row["status"] for id_, row in rows_of(out).items()} == {"a": "done", "b": "failed"}


def test_refused_run_writes_nothing_and_tries_no_options(command, tiny, tmp_path, own_cache, monkeypatch):
    out, written = tmp_path / "out", []
    path = write_lines(tmp_path / "s.jsonl", [{"id": "a", "prompt": "a ball"}, {"id": "b", "prompt": "raise"}])
    render = ("render", path, "-o", out, "-p", "tiny", "--until", "image")
    assert command(*render)[0] == 1

    def write(storage, name, content):
        written.append(name)
        return write_file(storage, name, content)

    write_file = LocalStorage.write
    profile = with_actor(tiny, "svd", trial_options={"channels_last": True})
    monkeypatch.setattr(render_module, "TRIAL_FROM_S", 0.0)
    monkeypatch.setattr(render_module, "run_trials", lambda *_: pytest.fail("the GPUs were used"))
    with OutputFolder(out).lease("first"), OutputFolder(tmp_path / "new").lease("first"):
        monkeypatch.setattr(LocalStorage, "write", write)
        (out / "index.html").write_text(page := 'name="generator" content="vidgen"')
        for refused in (render, ("retry", out), ("prune", out)):
            assert command(*refused)[0] == 4
            assert "is working in it" in command.messages
        with pytest.raises(SetupError, match="is working in it"):
            render_lines(ScriptSettings(path, profile_defaults=tiny.defaults), profile, tmp_path / "new", stages=FAKES)
    assert {name.partition("-")[0] for name in written} == {".running"}
    assert (out / "index.html").read_text() == page


def test_status_says_that_the_process_of_a_killed_run_is_gone(command, tmp_path):
    out = tmp_path / "out"
    assert command("render", write_lines(tmp_path / "s.txt", ["a"]), "-o", out, "-p", "tiny", "--until", "image")[0] == 0
    status = json.loads((out / "status.json").read_text())
    (out / "status.json").write_text(json.dumps({**status, "ended": False}))
    with OutputFolder(out).lease("first"):
        assert "its process has ended" not in command("status", out)[1]
        # As a killed process leaves it.
        (lease,) = out.glob(".running-*")
        ended = str(this_process()._replace(started=1))
        lease.write_text(json.dumps({**json.loads(lease.read_text()), "process": ended}))
        assert "killed, started" in (printed := command("status", out)[1])
        assert "its process has ended. Run the same command to resume." in printed


def test_sigterm_ends_the_command_after_the_shots_in_progress_and_it_can_be_resumed(in_process, tmp_path, capsys, monkeypatch):
    class Stopped(FAKES["flux"]):
        """Receives SIGTERM in its second call."""

        calls = 0

        def one(self, shot, artefacts):
            Stopped.calls += 1
            if Stopped.calls == 2:
                signal.raise_signal(signal.SIGTERM)
            return super().one(shot, artefacts)

    monkeypatch.setattr("vidgen_ray.batch.run_options.STAGE_BY_NAME", {**FAKES, "flux": Stopped})
    (tmp_path / "s.txt").write_text("".join(f"ball {number}\n" for number in range(6)))
    command = ["render", str(tmp_path / "s.txt"), "-o", str(tmp_path / "out"), "-p", "tiny", "--json"]
    assert main(command) == 130
    output = capsys.readouterr()
    assert "Run the same command to resume." in output.err
    done = json.loads(output.out)["done"]
    assert 1 <= done == len(list((tmp_path / "out").glob(DONE))) < 6
    before = digests(tmp_path / "out")
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == done
    assert before.items() < digests(tmp_path / "out").items()
    assert not list(tmp_path.rglob(".tmp-*"))


def test_clock_that_is_set_changes_neither_the_current_rows_nor_what_is_skipped(in_process, tiny, tmp_path, monkeypatch):
    for number, days in enumerate((0, -400, 400, -800)):

        class Clock(datetime):
            step = timedelta(days=days)

            @classmethod
            def now(cls, tz=None):
                return datetime.now(tz) + cls.step

        for module in ("manifest", "lease"):
            monkeypatch.setattr(f"vidgen_ray.outputs.{module}.datetime", Clock)
        ids = {"same": "x", "new": f"{number}", f"only-{number}": "y"}
        lines = [{"id": id_, "prompt": prompt, "generate_video": False} for id_, prompt in ids.items()]
        settings = ScriptSettings(write_lines(tmp_path / "s.jsonl", lines), 1, profile_defaults=tiny.defaults)
        report = render_lines(settings, tiny, tmp_path / "out", stages=FAKES)
        assert (report.done, report.skipped) == ((3, 0) if number == 0 else (2, 1))
        rows = rows_of(tmp_path / "out")
        assert {id_ for id_, row in rows.items() if row["status"] != "replaced"} == set(ids)
        assert {rows[id_]["run"] for id_ in ids} == {report.run}
        assert (rows["new"]["prompt"], report.run[:7]) == (str(number), f"00000{number + 1}-")


def test_scripts_of_one_name_are_told_apart_by_path_and_content(command, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def run(folder, *ids):
        if ids:
            lines = ({"id": id_, "prompt": f"{id_} of {folder[:2]}", "generate_video": False} for id_ in ids)
            write_lines(tmp_path / folder / "s.jsonl", lines)
        monkeypatch.chdir(tmp_path / folder)
        code, _ = command("render", "s.jsonl", "-o", out, "-p", "tiny", "--seed", "1")
        return code, {
            id_: (row["script"], "reused" if (row["status"], row["last_run"]) == ("done", "reused") else row["status"])
            for id_, row in rows_of(out).items()
        }

    a, b = ("s.jsonl", "done"), ("b1/s.jsonl", "done")
    run("a1", "x", "y", "z")
    assert run("b1", "v", "w") == (0, dict.fromkeys("xyz", a) | dict.fromkeys("vw", b)), "two scripts of one name"
    code, rows = run("b1", "v", "x")
    assert (code, rows["x"], rows["w"]) == (1, a, b), "the id belongs to the other script"
    assert rows["b1-s.jsonl:2"] == ("b1/s.jsonl", "failed")
    # Moved, and edited after its first run there.
    (tmp_path / "a1").rename(tmp_path / "a2")
    assert run("a2")[1]["x"] == ("s.jsonl", "reused")
    assert run("a2", "x", "y")[1]["z"] == ("s.jsonl", "replaced")
    # Uploaded twice as part of the working directory of a Ray job.
    jobs = [f"j1/_ray_pkg_{number}" for number in range(2)]
    run(jobs[0], "p", "q")
    assert run(jobs[1], "p")[1]["q"] == ("_ray_pkg_0/s.jsonl", "replaced")
    # Moved together with the output folder.
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("out", "a2"):
        (tmp_path / name).rename(moved / name)
    out = moved / "out"
    assert run("moved/a2", "x")[1]["y"] == ("s.jsonl", "replaced")
    (out / "scripts.json").write_text("{")
    assert command("render", "s.jsonl", "-o", out, "-p", "tiny")[0] == 4


def test_id_of_another_script_is_rejected_unless_it_is_replaced(command, tmp_path):
    out = tmp_path / "out"
    line = {"id": "shot-001", "prompt": "a pet", "generate_video": False}
    # The images of the fake stages depend on the seed only.
    first, second = (write_lines(tmp_path / f"episode{n}.jsonl", [{**line, "seed": n}]) for n in (1, 2))

    def run(script, *options):
        code, report = command("render", script, "-o", out, "-p", "tiny", "--json", *options)
        image = sha256_of(out / shot_path("shot-001") / "image.png")
        return code, (report["done"], report["skipped"], report["failed"]), image

    def statuses():
        return {id_: (row["script"], row["status"]) for id_, row in rows_of(out).items()}

    _, counts, cat = run(first)
    assert counts == (1, 0, 0)
    # Rendering failures.jsonl changes neither the owner nor the script of the line.
    for script in (second, out / "failures.jsonl"):
        assert run(script) == (3, (0, 0, 1), cat)
        assert statuses() == {"shot-001": ("episode1.jsonl", "done"), "episode2.jsonl:1": ("episode2.jsonl", "failed")}
        assert rows_of(out)["episode2.jsonl:1"]["failure_message"] == (
            f"{script.name} line 1, id: got 'shot-001', which is a finished shot of episode1.jsonl in this output folder; "
            "rename the id, use another output folder, or replace the shot of episode1.jsonl with --replace"
        )
    code, counts, dog = run(out / "failures.jsonl", "--replace")
    assert (code, counts, dog != cat) == (0, (1, 0, 0), True)
    assert statuses() == {"shot-001": ("episode2.jsonl", "done")}
    assert run(first)[0] == 3, "now the id belongs to the other script"
    # A script may replace its own shots.
    code, counts, fox = run(write_lines(second, [{**line, "seed": 3}]))
    assert (code, counts, fox != dog) == (0, (1, 0, 0), True)


@pytest.mark.parametrize(("encode_s", "needed"), [(1.9, None), (4.1, "5 encoders")])
def test_run_with_too_few_encoders_says_so(tiny, make_shot, encode_s, needed):
    planned = replace(plan_run(tiny, demand_of([make_shot()]), this_machine()), shots_per_hour=1800.0)
    planned = replace(planned, layout=replace(planned.layout, encoders=2))
    results = Mock(durations={ENCODING: [(encode_s, RelativeCost(1, 1))] * MIN_SHOTS})
    note = _encoding_note(planned, results)
    assert note is None if needed is None else f"2 encoders ran, the planned rate needs {needed[0]}" in note
