"""Commands with wrong arguments, folders and files: refused before anything is written, with a sentence and an exit code.

Wrong fields of script lines are tested in tests/script, wrong files that only a stage can find in tests/stages.
"""

import json
import os
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ASTRONAUT
from tests.upscale.videos import write_video
from vidgen_ray.cli import main
from vidgen_ray.engine import ray_cluster
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.manifest_writer import ManifestWriter


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command in a folder that has the script `s.txt`. Return its exit code and one line of messages."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    # A process of Ray would be started for a run that is not refused.
    monkeypatch.setattr(ray_cluster, "init_local_ray", lambda **_: pytest.fail("Ray was started"))
    Path("s.txt").write_text("a red ball\n")

    def run(words):
        code = main(shlex.split(words))
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return code, " ".join(err.replace("│", " ").split())

    return run


@pytest.fixture
def refuse(run):
    """Return a function that checks the exit code and the message of a command, and that it writes nothing."""

    def refuse(words, code, message):
        before = content_of(Path())
        found, err = run(words)
        assert (found, message in err) == (code, True), (words, err)
        assert content_of(Path()) == before, words
        return err

    return refuse


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished_folder(root):
    writer = ManifestWriter(OutputFolder(root), "r1", "s.txt")
    writer.add(ManifestRow(run="r1", script="s.txt", id="a", line=1, status="done"))
    writer.close()


USER_ERRORS = [
    ("rendr", 2, "No such command"),
    ("validate gone.jsonl", 3, "gone.jsonl: got gone.jsonl, must be an existing file"),
    ("shot a --set fps", 2, "must be FIELD=VALUE"),
    ("shot a --set fpss=3", 2, "--set fpss: got an unknown field, did you mean fps?"),
    ("shot a --set colour=red", 2, "see `vidgen schema shot` for all fields"),
    ("shot a --until dawn", 2, "'dawn' is not one of 'image', 'video'"),
    ("shot a -s prompt=b", 2, "which is the argument PROMPT of this command"),
    ("shot a --label 'a\nb'", 2, "--label: got 'a\\nb', must be one line"),
    ("shot a --profile nope", 3, "must be one of auto, demo"),
    ("stage blur x.png", 2, "must be one of instantid, instantid_sdxl, flux"),
    ("stage svd -o x.mp4", 2, "svd requires an input file (image)"),
    ("stage flux x.png -s prompt=a", 2, "flux has no input file"),
    ("stage instantid_sdxl face.jpg -s prompt=a", 2, "must be a .json file written by stage instantid"),
    ("schema cast", 2, "must be one of script, shot, profile, manifest, film"),
    ("identity show gone.jpg", 1, "gone.jpg: no such file"),
    ("identity show face.jpg -o x.gif", 2, "must end in .png, .jpg, .jpeg"),
    ("identity show face.jpg -o /proc/x.png", 4, "/proc/x.png: cannot be written"),
    ("identity show face.jpg --face-index 1", 1, "face_index: got 1, must be from 0 to 0"),
    ("render s.txt -p tiny --set fps=", 2, "--set fps: got"),
    ("render s.txt -p tiny --set fps=0", 2, "--set fps: got 0, must be greater than or equal to 1"),
    ("render s.txt -p tiny --set id=a", 2, "--set id: must be set by each line of the script"),
    ("render s.txt -p tiny --set face_image=gone.jpg", 2, "--set face_image: got"),
    *(
        (f"{command} {value}", 2, "must be a finite number")
        for command in (
            "plan s.txt --price",
            "render s.txt -p tiny --max-cost",
            "render s.txt -p tiny --grace",
        )
        for value in ("inf", "1e999")
    ),
    ("film nowhere --fade-s inf", 3, "finite number"),
    ("render s.txt -p tiny --mode slow", 2, "'--mode': Value error, 'slow' is not one of 'quality', 'fast'"),
    ("render s.txt -p tiny --cache most", 2, "'most' is not one of 'none', 'images', 'all'"),
    ("render s.txt -p tiny -o page", 2, "exists and is not from vidgen; move it, or choose another output folder"),
    *(
        (f"{command} -p tiny -o {place}", 4, message)
        for command in ("render s.txt", "shot a")
        for place, message in (
            ("s.txt", "is a file, must be a folder"),
            ("link", "cannot be written"),
            ("x" * 300, "File name too long"),
            ("/proc/out", "cannot be written"),
        )
    ),
    # The current folder would be read as captioned images.
    *((f"{command} ''", 2, "got an empty text, must be a file") for command in ("render", "plan", "validate")),
    *((f"{command} s3://b/s.csv", 2, "must be a file or folder on this machine") for command in ("render", "plan", "validate")),
    *(
        (f"{command} ''", 2, "got an empty text, must be a f")
        for command in (
            *("render s.txt -o", "render s.txt --characters", "plan s.txt -o", "shot a -o", "stage flux -o", "demo -o", "film"),
            *("gc", "prune", "status", "retry", "watch", "models pull tiny --to"),
        )
    ),
    *(
        (f"{command} nowhere", 4, "has no results; pass the output folder of `vidgen render`")
        for command in ("status", "retry", "prune", "gc", "verify", "watch", "film")
    ),
    ("logs nowhere a", 4, "has no results; pass the output folder of `vidgen render`"),
    ("plan s.txt -p tiny --gpus h100", 2, "did you mean 1xh100?"),
    ("plan s.txt -p tiny --price 2,50", 2, "got '2,50', must have a decimal point: 2.50"),
    ("show zero.mp4", 1, "zero.mp4: is empty"),
    # Clips that would be upscaled.
    ("stage realesrgan clip.mp4 -o x.png -p tiny", 2, "must end in .mp4, .m4v, .mov, .mkv for a clip"),
    ("stage realesrgan clip.bin -o x.mp4 -p tiny", 1, "name it .mp4, .mkv, .mov, .webm or .avi; convert others"),
    ("stage realesrgan text.ts -o x.mp4 -p tiny", 1, "not a supported video format (MP4 or MOV, Matroska or WebM, AVI"),
    ("stage realesrgan text.mp4 -o x.mp4 -p tiny", 1, "not a supported video format (MP4 or MOV, Matroska or WebM, AVI"),
    ("stage realesrgan gone.mp4 -o x.mp4 -p tiny", 1, "no such file"),
]


def test_user_errors_are_one_sentence_and_change_nothing(refuse, monkeypatch):
    run_chunk = "vidgen_ray.stages.realesrgan.RealESRGANStage.run_chunk"
    monkeypatch.setattr(run_chunk, lambda *_: pytest.fail("frames were upscaled"))
    finished_folder(Path("out"))
    Path("page").mkdir()
    Path("page/index.html").write_text("<h1>My holiday</h1>")
    Path("link").symlink_to("nowhere/at/all")
    Path("face.jpg").symlink_to(ASTRONAUT)
    Path("face.txt").write_text("a man")
    Path("zero.mp4").touch()
    write_video(Path("clip.mp4"), 2)
    os.link("clip.mp4", "clip.bin")
    for name in ("text.mp4", "text.ts"):
        Path(name).write_text("text")
    for words, code, message in USER_ERRORS:
        assert "line 1" not in refuse(words, code, message), words


def test_relative_output_folder_of_a_submitted_job_is_refused(refuse, monkeypatch):
    package = Path("session/runtime_resources/working_dir_files/_ray_pkg_1")
    package.mkdir(parents=True)
    Path("s.txt").rename(package / "s.txt")
    monkeypatch.chdir(package)
    for options in ("", " -o ."):
        refuse(f"render s.txt -p tiny{options}", 2, "use an absolute path of a shared disk, or a URL")


def test_messages_about_many_wrong_lines_are_limited(run):
    line = json.dumps({"prompt": "x" * 20_000, "fps": 0, "id": "!" * 500})
    Path("s.jsonl").write_text(f"{line}\n" * 500)
    code, err = run("render s.jsonl --strict")
    assert (code, "more errors" in err) == (3, True)
    assert len(err) < 50 * 310


def test_path_of_an_option_is_relative_to_the_current_folder(run):
    Path("scripts").mkdir()
    Path("scripts/s.txt").write_text("a man\n")
    Path("me.jpg").symlink_to(ASTRONAUT)
    assert run("validate scripts/s.txt --set face_image=me.jpg") == (0, "")
    Path("me.jpg").rename("scripts/me.jpg")
    code, err = run("validate scripts/s.txt --set face_image=me.jpg")
    assert (code, str(Path("me.jpg").absolute()) in err) == (2, True), err


def test_wrong_headers_and_profiles_are_one_error_and_render_nothing(run):
    finished_folder(Path("out"))
    rows = content_of(Path("out"))
    Path("s.yaml").write_text("defaults: {fps: fast}\nshots: [a, b, c]\n")
    for folder in ("out", "new"):
        code, err = run(f"render s.yaml -p tiny -o {folder}")
        assert (code, err.count("s.yaml, defaults.fps: got 'fast'")) == (3, 1), err
    for content, message in (
        ("", "got an empty file, must be a mapping with name, about and actors"),
        ("{name: x, about: y, actors: {fluxx: {weights: a}}}", "actors.fluxx: must be one of"),
        ("{name: x, about: y, defaults: {fps: fast}, actors: {}}", "defaults: got"),
    ):
        Path("p.yaml").write_text(content)
        code, err = run("render s.txt -p p.yaml -o new")
        assert (code, message in err) == (3, True), err
    assert rows.items() <= content_of(Path("out")).items()
    assert content_of(Path("new")) == {}


IMAGE = {"image": str(ASTRONAUT)}
KINDS = {
    "instantid": ({"face_image": str(ASTRONAUT)}, "no .onnx files in this folder; unpack antelopev2 into it"),
    "flux": ({}, "FluxPipeline"),
    "svd": (IMAGE, "StableVideoDiffusionPipeline"),
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
            code, err = run("render s.jsonl -p p.yaml")
            assert (code, message in err, "Ray" in err) == (4, True, False), (actor, place, err)


def test_ray_that_does_not_start_is_one_sentence(run, monkeypatch):
    def fail(**_):
        raise ray_cluster.RayStartTimeout("3 attempts of 30 s each timed out; the machine may be overloaded")

    monkeypatch.setattr(ray_cluster, "init_local_ray", fail)
    code, err = run("render s.txt -p tiny")
    assert (code, "Ray did not start on this machine: 3 attempts of 30 s each timed out" in err) == (4, True)
    assert not list(Path("out").glob("manifest/*.parquet"))


def test_stage_names_the_frames_of_an_animation(run):
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    red.save("a.gif", save_all=True, append_images=[blue])
    code, err = run("stage realesrgan a.gif -o x.png -p tiny")
    assert (code, "a.gif: has 2 frames, the first is used" in err) == (0, True)
