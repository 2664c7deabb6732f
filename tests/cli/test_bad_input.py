"""Commands with wrong arguments, folders and files: refused before anything is written, with a sentence and an exit code.

Wrong fields of script lines are tested in tests/script, wrong files that only a stage can find in tests/stages.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ASTRONAUT
from vidgen_ray.cli import main
from vidgen_ray.engine import ray_cluster
from vidgen_ray.media import Mp4Settings, Mp4Writer
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.manifest_writer import ManifestWriter


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder that has the script `s.txt`. Return its exit code and one line of messages."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    # A process of Ray would be started for a run that is not refused.
    monkeypatch.setattr(ray_cluster, "init_local_ray", lambda **_: pytest.fail("Ray was started"))
    Path("s.txt").write_text("a red ball\n")

    def run(*arguments):
        code = main(list(map(str, arguments)))
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return code, " ".join(err.replace("│", " ").split())

    return run


# Options and the output folder


def finished_folder(root):
    writer = ManifestWriter(OutputFolder(root), "r1", "s.txt")
    writer.add(ManifestRow(run="r1", script="s.txt", id="a", line=1, status="done"))
    writer.close()


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_wrong_option_is_one_usage_error_and_changes_nothing(run):
    finished_folder(Path("out"))
    before = content_of(Path("out"))
    for arguments, message in (
        (["--set", "foo=1"], "--set foo: got an unknown field"),
        (["--set", "fps="], "--set fps: got"),
        (["--set", "fps=0"], "--set fps: got 0, must be greater than or equal to 1"),
        (["--set", "id=a"], "--set id: must be set by each line of the script"),
        (["--mode", "slow"], "'--mode': Value error, 'slow' is not one of 'quality', 'fast'"),
        (["--cache", "most"], "'most' is not one of 'none', 'images', 'all'"),
        (["--set", "face_image=gone.jpg"], "--set face_image: got"),
    ):
        code, err = run("render", "s.txt", "-p", "tiny", *arguments)
        assert (code, message in err, "line 1" in err) == (2, True, False), err
        assert content_of(Path("out")) == before


def test_empty_path_is_refused(run):
    Path("mine").write_text("")
    for words in (
        *("render s.txt -o", "render s.txt --characters", "plan s.txt -o", "shot a -o", "stage flux -o", "demo -o", "film"),
        *("gc", "prune", "status", "retry", "watch", "models pull tiny --to"),
    ):
        code, err = run(*words.split(), "")
        assert (code, "got an empty text, must be a f" in err) == (2, True), err
    assert {path.name for path in Path().iterdir()} == {"s.txt", "mine"}


def test_folder_without_results_is_one_sentence(run):
    for command in ("status", "retry", "prune", "gc", "film"):
        code, err = run(command, "nowhere")
        assert (code, any(text in err for text in ("has no results", "has no manifest", "does not exist"))) == (4, True), err


def test_script_must_be_a_file_on_this_machine(run):
    # The current folder would be read as captioned images.
    Path("a.png").symlink_to(ASTRONAUT)
    Path("a.txt").write_text("a man")
    scripts = {"": "got an empty text, must be a file", "s3://b/s.csv": "must be a file or folder on this machine"}
    for command in ("render", "plan", "validate"):
        for script, message in scripts.items():
            code, err = run(command, script)
            assert (code, message in err) == (2, True), err


def test_relative_output_folder_of_a_submitted_job_is_refused(run, monkeypatch):
    package = Path("session/runtime_resources/working_dir_files/_ray_pkg_1")
    package.mkdir(parents=True)
    (package / "s.txt").write_text("a\n")
    monkeypatch.chdir(package)
    for arguments in ([], ["-o", "results"], ["-o", "."]):
        code, err = run("render", "s.txt", "-p", "tiny", *arguments)
        assert (code, "use an absolute path of a shared disk, or a URL" in err) == (2, True), err
        assert [path.name for path in Path().iterdir()] == ["s.txt"]


def test_page_of_another_program_is_kept(run):
    Path("out").mkdir()
    Path("out/index.html").write_text("<h1>My holiday</h1>")
    code, err = run("render", "s.txt", "-p", "tiny")
    assert (code, "exists and is not from vidgen; move it, or choose another output folder" in err) == (2, True)
    assert content_of(Path("out")) == {Path("index.html"): b"<h1>My holiday</h1>"}


def test_output_folder_that_cannot_be_written(run):
    Path("file").write_text("mine")
    Path("link").symlink_to("nowhere/at/all")
    places = {"file": "is a file, must be a folder", "link": "cannot be written", "x" * 300: "File name too long"}
    for command in (["render", "s.txt"], ["shot", "a"]):
        for place, message in {**places, "/proc/out": "cannot be written"}.items():
            code, err = run(*command, "-p", "tiny", "-o", place)
            assert (code, message in err, "same command" in err) == (4, True, False), err
    assert Path("file").read_text() == "mine"


# Scripts and photos


def test_messages_about_many_wrong_lines_are_limited(run):
    Path("s.jsonl").write_text(
        "".join(json.dumps({"prompt": "x" * 20_000, "fps": 0, "id": "!" * 500}) + "\n" for _ in range(500))
    )
    assert main(["validate", "s.jsonl"]) == 3
    code, err = run("render", "s.jsonl", "--strict")
    assert code == 3
    assert "more errors" in err
    assert len(err) < 50 * 310


def test_path_of_an_option_is_relative_to_the_current_folder(run):
    Path("scripts").mkdir()
    Path("scripts/s.txt").write_text("a man\n")
    Path("me.jpg").symlink_to(ASTRONAUT)
    assert run("validate", "scripts/s.txt", "--set", "face_image=me.jpg") == (0, "")
    Path("me.jpg").rename("scripts/me.jpg")
    code, err = run("validate", "scripts/s.txt", "--set", "face_image=me.jpg")
    assert (code, str(Path("me.jpg").absolute()) in err) == (2, True), err


def test_wrong_header_is_one_error_and_changes_nothing(run):
    finished_folder(Path("out"))
    rows = content_of(Path("out"))
    Path("s.yaml").write_text("defaults: {fps: fast}\nshots: [a, b, c]\n")
    for folder in ("out", "new"):
        code, err = run("render", "s.yaml", "-p", "tiny", "-o", folder)
        assert (code, err.count("s.yaml, defaults.fps: got 'fast'")) == (3, 1), err
    assert rows.items() <= content_of(Path("out")).items()
    assert content_of(Path("new")) == {}


def test_clip_that_is_too_large_for_the_gpus_is_refused(run):
    Path("s.jsonl").write_text(json.dumps({"prompt": "a", "width": 2048, "height": 2048, "num_frames": 256, "scale": 4}))
    code, err = run("plan", "s.jsonl", "-p", "gpu-80gb", "--gpus", "1x80GB")
    assert (code, "stage svd: 2048x2048 with 256 frames needs" in err, "fits" in err) == (4, True, True), err


# Profiles and weights


def test_unusable_profile(run):
    for content, message in (
        (b"", "got an empty file, must be a mapping with name, about and actors"),
        (b"- a\n- b\n", "got ['a', 'b'], must be a mapping"),
        ("name: x".encode("utf-16"), "is not UTF-8 text; save it as UTF-8"),
        (b"{name: x, about: y, actors: {fluxx: {weights: a}}}", "actors.fluxx: must be one of"),
        (b"{name: x, about: y, defaults: {fps: fast}, actors: {}}", "defaults: got"),
    ):
        Path("p.yaml").write_bytes(content)
        code, err = run("render", "s.txt", "-p", "p.yaml")
        assert (code, message in err) == (3, True), err
    assert not Path("out/manifest").exists()


IMAGE = {"image": str(ASTRONAUT)}
KINDS = {
    "instantid": ({"face_image": str(ASTRONAUT)}, "no .onnx files in this folder; unpack antelopev2 into it"),
    "flux": ({}, "FluxPipeline"),
    "klein": ({"image_model": "klein"}, "Flux2KleinPipeline"),
    "hunyuan": ({**IMAGE, "use_hunyuan_style": True}, "HunyuanDiTPipeline"),
    "svd": (IMAGE, "StableVideoDiffusionPipeline"),
    "wan": ({**IMAGE, "video_model": "wan", "num_frames": 9}, "WanImageToVideoPipeline or WanPipeline"),
    "realesrgan": ({**IMAGE, "upscale_video": True}, "must be a folder of .safetensors or .pth files"),
    "rife": ({**IMAGE, "interpolation": 2}, "must be RIFE's flownet.pkl or flownet.safetensors"),
}
"""Actor -> fields of a shot that needs it, and the message for other weights."""


def test_weights_of_another_kind_are_found_before_ray_starts(run, tiny, tmp_path):
    empty, other, file = (tmp_path / name for name in ("empty", "other", "file"))
    empty.mkdir()
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    file.write_bytes(b"x")
    actors = {name: each.model_dump(mode="json", exclude_defaults=True) for name, each in tiny.actors.items()}
    for actor, (fields, message) in KINDS.items():
        # The worker alone reads the file of RIFE.
        for place in (empty, other) if actor == "rife" else (empty, other, file):
            profile = {"name": "x", "about": "y", "actors": {**actors, actor: {**actors[actor], "weights": str(place)}}}
            Path("p.yaml").write_text(json.dumps(profile))
            Path("s.jsonl").write_text(json.dumps({"prompt": "a", **tiny.defaults, "upscale_video": False, **fields}))
            code, err = run("render", "s.jsonl", "-p", "p.yaml")
            assert (code, message in err, "Ray" in err) == (4, True, False), (actor, place, err)


def test_ray_that_does_not_start_is_one_sentence(run, monkeypatch):
    def fail(**_):
        raise ray_cluster.RayStartTimeout("3 attempts of 30 s each timed out; the machine may be overloaded")

    monkeypatch.setattr(ray_cluster, "init_local_ray", fail)
    code, err = run("render", "s.txt", "-p", "tiny")
    assert code == 4
    assert "Ray did not start on this machine: 3 attempts of 30 s each timed out" in err
    assert not list(Path("out").glob("manifest/*.parquet"))


# Clips


def write_clip(path):
    with Mp4Writer(path, 64, 64, 5, Mp4Settings()) as clip:
        clip.write(np.zeros((2, 64, 64, 3), np.uint8))


def test_unusable_clip_is_refused_before_it_is_upscaled(run, monkeypatch):
    monkeypatch.setattr(
        "vidgen_ray.stages.realesrgan.RealESRGANStage.run_chunk", lambda *_: pytest.fail("frames were upscaled")
    )
    write_clip(Path("clip.mp4"))
    for name in ("clip.bin", "clip"):
        os.link("clip.mp4", name)
    for name in ("text.mp4", "text.ts"):
        Path(name).write_text("text")
    for source, out, code, message in (
        ("clip.mp4", "x.png", 2, "must end in .mp4, .m4v, .mov, .mkv for a clip"),
        ("clip.bin", "x.mp4", 1, "name it .mp4, .mkv, .mov, .webm or .avi; convert others"),
        ("text.ts", "x.mp4", 1, "not a supported video format (MP4 or MOV, Matroska or WebM, AVI)"),
        ("clip", "x.mp4", 1, "name it .mp4"),
        ("text.mp4", "x.mp4", 1, "not a supported video format (MP4 or MOV, Matroska or WebM, AVI)"),
        ("gone.mp4", "x.mp4", 1, "no such file"),
    ):
        found, err = run("stage", "realesrgan", source, "-o", out, "-p", "tiny")
        assert (found, message in err) == (code, True), err
        assert not Path(out).exists()


def test_stage_names_the_frames_of_an_animation(run):
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    red.save("a.gif", save_all=True, append_images=[blue])
    code, err = run("stage", "realesrgan", "a.gif", "-o", "x.png", "-p", "tiny")
    assert (code, "a.gif: has 2 frames, the first is used" in err) == (0, True), err
