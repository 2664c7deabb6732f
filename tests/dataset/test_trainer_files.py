"""Data sets for LoRA trainers: files, what a kill leaves, and what the data code of the trainers reads."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.dataset.conftest import make_folder, moving
from tests.dataset.test_export import content_of, export_to, inline  # noqa: F401  # a fixture
from vidgen_ray.cli import main
from vidgen_ray.dataset.export import _Export
from vidgen_ray.outputs.manifest import read_manifest

PACKAGES = {
    "diffsynth": ("diffsynth==2.1.12",),
    "finetrainers": ("finetrainers==0.2.0", "datasets==3.3.2"),
    "simpletuner": ("simpletuner==4.10.1", "trainingsample==0.3.2", "atomicwrites==1.4.1"),
}
"""Trainers in the package index, with what their data code imports and this project does not."""
SHAPES = {"svd": (25, 5), "smooth": (120, 24), "ltx": (121, 25), "wan": (81, 16), "short": (3, 16)}
"""Name of a clip -> its frames and rate: defaults of this project, and one that no trainer takes."""
CAPTIONS = {
    "svd": "two\nlines, and\n\na third",
    "smooth": """He said "go", it's 🚤 \\ {x} # [[y]]""",
    "ltx": "שלום \u202eעולם",
    "wan": "long " * 999 + "end",
    "short": "x",
}
TARGETS = ("diffusion-pipe:wan22-14b", "musubi:hunyuan", "simpletuner:wan21-14b", "finetrainers:wan21-14b", "diffsynth:ltx2")
SETTINGS = {"format": "captions", "splits": {"train": 0.5, "val": 0.5}, "split_by": ("prompt",)}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Return an output folder with two clips of each shape; some are small squares."""
    out = tmp_path_factory.mktemp("shapes") / "out"
    clips = [
        (
            {"id": f"{name}.{number}", "prompt": f"{CAPTIONS[name][:4990]}{number}", "fps": fps},
            moving(frames, size=(64, 64) if name == "ltx" else (64, 128), seed=10 * frames + number),
        )
        for name, (frames, fps) in SHAPES.items()
        for number in range(2)
    ]
    make_folder(out, clips)
    return out


def used_clips(dest):
    used = json.loads((dest / "used.json").read_text())
    assert used["counts"] == Counter(clip["status"] for clip in used["clips"])
    return {clip["id"]: clip for clip in used["clips"]}


def configured(target, dest, split):
    """Return folder -> frames of the configuration of a split."""
    trainer, suffix = target.partition(":")[0], "toml" if target.startswith(("diff", "musubi")) else "json"
    if trainer == "diffsynth":
        return {}
    content = (dest / f"{split}.{suffix}").read_text()
    config = tomllib.loads(content) if suffix == "toml" else json.loads(content)
    if trainer == "diffusion-pipe":
        return {each["path"]: size[2] for each in config["directory"] for size in each["size_buckets"]}
    if trainer == "musubi":
        assert all(isinstance(each["source_fps"], float) for each in config["datasets"])
        return {each["video_directory"]: each["target_frames"][0] for each in config["datasets"]}
    if trainer == "simpletuner":
        return {each["instance_data_dir"]: each["video"]["num_frames"] for each in config[:-1]}
    return {each["data_root"]: each["video_resolution_buckets"][0][0] for each in config["datasets"]}


def configuration_of(dest):
    """Return name -> text of the files with paths."""
    files = {path.name: path for path in dest.iterdir() if path.suffix in (".toml", ".json", ".args")}
    return {name: path.read_text() for name, path in files.items() if name != "croissant.json"}


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("target", TARGETS)
def test_each_clip_is_in_a_configured_group_or_dropped_with_the_reason(target, shapes, tmp_path):
    dest = tmp_path / 'space, "quotes" and é'
    report = export_to(dest, shapes, trainer=target, **SETTINGS)
    clips = used_clips(dest)
    assert clips.keys() == {f"{name}.{number}" for name in SHAPES for number in range(2)}
    assert {id_ for id_, clip in clips.items() if clip["status"] == "dropped"} == {each["id"] for each in report.missing}
    assert {"short.0", "short.1"} <= {each["id"] for each in report.missing}
    files = {str(path.relative_to(dest)) for path in dest.rglob("*.mp4")}
    assert files == {clip["file"] for clip in clips.values() if "file" in clip}
    groups = {folder: frames for split in ("train", "val") for folder, frames in configured(target, dest, split).items()}
    prompts = {row.id: row.prompt for row in read_manifest(shapes)}
    for id_, clip in clips.items():
        if "file" in clip:
            path = dest / clip["file"]
            assert groups.get(str(path.parent), clip["frames"]) == clip["frames"]
            assert path.with_suffix(".txt").read_bytes().decode() == prompts[id_]
    assert sum(group["clips"] for group in report.groups) == 10
    before = content_of(dest)
    assert export_to(dest, shapes, trainer=target, **SETTINGS).up_to_date
    assert content_of(dest) == before
    # A machine for training has neither the output folder nor this package.
    dest = dest.rename(tmp_path / "moved, it's ö")
    subprocess.run([sys.executable, "-I", dest / "set_paths.py"], check=True)
    moved = configuration_of(dest)
    assert all(folder.startswith(f"{dest}/") for folder in configured(target, dest, "train"))
    export_to(dest, shapes, trainer=target, **SETTINGS)
    assert configuration_of(dest) == moved
    # What was dropped or cut is encoded again in the same data set.
    report = export_to(dest, shapes, trainer=target, fit=True, **SETTINGS)
    assert report.counts["dropped"] == 0
    fitted = used_clips(dest)
    assert {clip["status"] for clip in fitted.values()} == {"used"}
    assert {str(path.relative_to(dest)) for path in dest.rglob("*.mp4")} == {clip["file"] for clip in fitted.values()}
    again = r"all \d frames; encoded again as \d frames at \d\d fps, 128x64, frames repeated: \d, left out: 0"
    assert re.search(again, fitted["short.0"]["reason"])


@pytest.mark.usefixtures("inline")
def test_next_call_completes_a_killed_export_and_damaged_clips_are_dropped(shapes, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = {"trainer": "diffusion-pipe:wan22-14b", "fit": True, **SETTINGS}
    row = next(row for row in read_manifest(shapes) if row.id == "wan.1")
    clip = shapes / row.video
    content = clip.read_bytes()
    clip.unlink()
    clip.write_bytes(b"x" * len(content))
    try:
        report = export_to(whole, shapes, **settings)
        assert (report.counts["failed"], report.counts["dropped"]) == (1, 0)
        assert used_clips(whole)["wan.1"]["status"] == "dropped"
        for step in ("_record", "_save", "_finish"):
            with patch.object(_Export, step, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
                export_to(killed, shapes, **settings)
        export_to(killed, shapes, **settings)
    finally:
        clip.write_bytes(content)
    assert used_clips(killed) == used_clips(whole)
    assert (killed / "train.toml").read_text() == (whole / "train.toml").read_text().replace(str(whole), str(killed))
    assert {path.relative_to(killed) for path in killed.rglob("*.mp4")} == {
        path.relative_to(whole) for path in whole.rglob("*.mp4")
    }


@pytest.mark.usefixtures("inline")
def test_clips_and_captions_that_change_get_other_names(tmp_path):
    """Trainers find what they have cached of a clip by its name."""
    out, dest = tmp_path / "out", tmp_path / "dest"
    clips = {id_: ({"id": id_, "fps": 16}, moving(9, size=(64, 64), seed=seed)) for seed, id_ in enumerate("abcd")}
    make_folder(out, clips.values())
    settings = {"trainer": "simpletuner:wan21-14b", "format": "captions", "fit": True}
    assert export_to(dest, out, **settings).cache is None
    before = {id_: clip["file"] for id_, clip in used_clips(dest).items()}
    retried, said = (
        ({"id": "a", "seed": 5, "fps": 16}, moving(9, size=(64, 64), seed=9)),
        ({**clips["b"][0], "prompt": "b"}, clips["b"][1]),
    )
    make_folder(out, [retried, said, ({**clips["c"][0], "metadata": {"x": 1}}, clips["c"][1]), ({"id": "d"}, None)])
    report = export_to(dest, out, **settings)
    assert (report.counts["changed"], report.counts["removed"]) == (3, 1)
    assert report.cache.startswith("start it without preserve_data_backend_cache")
    after = {id_: clip["file"] for id_, clip in used_clips(dest).items()}
    assert {id_: after[id_] == before[id_] for id_ in after} == {"a": False, "b": False, "c": True}
    assert {str(path.relative_to(dest).with_suffix(".mp4")) for path in dest.glob("train/*/*")} == {*after.values()}
    assert export_to(dest, out, **settings).cache is None


@pytest.mark.usefixtures("inline")
def test_dropped_clips_are_lines_of_the_summary_and_wrong_options_are_refused(shapes, tmp_path, capsys):
    command = ["export", str(shapes), str(tmp_path / "dest")]
    assert main([*command, "--for", "musubi:hunyuan"]) == 1
    printed = capsys.readouterr()
    assert "svd.0: left out: would be trained at 4.8 times its speed: the trainer skips frames, but repeats none" in printed.err
    assert "2 clips of 120 frames at 24 fps, 128x64: cut: the first 117 of 120 frames\n" in printed.out
    assert "6 dropped)" in printed.out
    assert "add --fit to encode these clips again" in printed.err
    only_dropped = ["--for", "musubi:hunyuan", "--split", "train=0.8,val=0.2", "--where", "id LIKE 'svd%'"]
    assert main(["export", str(shapes), str(tmp_path / "none"), *only_dropped]) == 1
    printed = capsys.readouterr()
    assert "2 clips of 25 frames at 5 fps, 128x64: dropped: would be trained at 4.8 times its speed" in printed.out
    assert "add --fit" in printed.err
    assert main(["export", str(shapes), str(tmp_path / "none"), *only_dropped, "--fit"]) == 0
    assert "train 1, val 1 (2 added)" in capsys.readouterr().out
    assert main([*command, "--for", "musubi:hunyuan", "--fit", "--where", "id LIKE 's%'"]) == 0
    state = json.loads((tmp_path / "dest/.vidgen/export.json").read_text())
    capsys.readouterr()
    assert main([*shlex.split(state["command"])[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["up_to_date"]
    for options, message in (
        (["--for", "kohya:wan"], "--for: got 'kohya:wan', must be TRAINER:MODEL, one of diffusion-pipe:wan21-14b, "),
        (["--for", "musubi:hunyuan", "--format", "lance"], "--for and --format: only one can be given"),
        (["--fit"], "--fit: needs --for TRAINER:MODEL"),
        (["--for", "musubi:hunyuan", "--image"], "--for: the selected shots have images, must be clips"),
        (["--for", "musubi:wan21-14b"], "was exported with trainer musubi:hunyuan, got musubi:wan21-14b"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    pattern = str(tmp_path / "set [v1]")
    assert main(["export", str(shapes), pattern, "--for", "musubi:hunyuan", "--fit"]) == 2
    assert (
        f"DEST: got {pattern}, must have none of [ * ? in its path, which musubi takes as a pattern" in capsys.readouterr().err
    )
    assert not Path(pattern).exists()


@pytest.fixture(scope="module")
def packages(request):
    """Return a function of a trainer that returns the folder of its package, which is installed once."""

    def installed(trainer):
        folder = request.config.rootpath / "out/trainers" / "-".join(PACKAGES[trainer])
        if not folder.exists():
            uv, to = Path(sys.executable).with_name("uv"), folder.with_name(f"{folder.name}.{os.getpid()}")
            for name in PACKAGES[trainer]:
                # Its wheel names Python 3.12, which the data code does not need.
                python = ["--python-version", "3.12"] if name.startswith("simpletuner") else []
                command = [uv, "pip", "install", "--quiet", "--no-deps", *python, "--target", to, name]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    pytest.skip(f"{name} cannot be installed: {done.stderr[-300:]}")
            to.rename(folder)
        return folder

    return installed


def run_trainer(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("read_with_trainer.py")
    done = subprocess.run([sys.executable, script, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.rpartition("\n")[2]


@pytest.mark.very_slow
@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(
    "target", ["simpletuner:wan21-14b", "simpletuner:hunyuan", "finetrainers:wan21-14b", "diffsynth:ltx2", "diffsynth:wan22-5b"]
)
def test_data_code_of_the_trainer_reads_what_used_json_says(target, shapes, tmp_path, packages):
    package, prompts = packages(target.partition(":")[0]), {row.id: row.prompt for row in read_manifest(shapes)}
    for fit in (False, True):
        dest = tmp_path / f"fit-{fit}"
        export_to(dest, shapes, trainer=target, fit=fit, format="captions")
        read = json.loads(run_trainer(package, target, dest, "train"))
        used = {clip["file"]: clip for clip in used_clips(dest).values() if clip["status"] != "dropped"}
        assert read.keys() == used.keys()
        for file, (frames, height, width, caption) in read.items():
            clip = used[file]
            assert (f"{width}x{height}", frames) == (Path(file).parent.name.split("-")[0], clip["frames"])
            assert caption.strip() == prompts[clip["id"]].strip()


@pytest.mark.parametrize(
    "trainer",
    [pytest.param(name, marks=pytest.mark.slow if name == "finetrainers" else pytest.mark.very_slow) for name in PACKAGES],
)
def test_rules_are_those_of_the_trainers_code(trainer, packages):
    run_trainer(packages(trainer), trainer, "rules")
