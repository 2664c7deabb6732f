"""Commands: output, error messages and exit codes."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from importlib.metadata import EntryPoint, EntryPoints
from unittest.mock import Mock

import numpy as np
import pytest
import ray
from PIL import Image

from tests.conftest import ASTRONAUT, EXAMPLES
from tests.nets.test_faces import BOX, GROUP, POINTS
from vidgen_ray.batch.render_script import RunReport
from vidgen_ray.cli import main, one_stage
from vidgen_ray.cli.app import COMMANDS
from vidgen_ray.cli.options import changes_until
from vidgen_ray.cli.run_script import RenderedRun, print_ended
from vidgen_ray.errors import VidgenError
from vidgen_ray.media.decode import open_video
from vidgen_ray.outputs.records import LikenessRecord, ShotRecord, shot_path
from vidgen_ray.profile import load_profile
from vidgen_ray.provenance.record import read_provenance
from vidgen_ray.shot import Shot


def test_validate_counts_valid_lines_and_reports_invalid_ones(tmp_path, capsys):
    assert main(["validate", str(EXAMPLES / "demo.jsonl")]) == 0
    assert capsys.readouterr().out == "demo.jsonl: 14 valid shots, 0 invalid lines\n"
    path = tmp_path / "s.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "fps": 0}\n')
    assert main(["validate", str(path)]) == 3
    assert "s.jsonl line 2, fps: got 0, must be greater than or equal to 1" in capsys.readouterr().err
    assert main(["validate", str(path), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert (report["shots"], report["rejected"], report["errors"][0]["line"]) == (1, 1, 2)


def test_command_of_a_missing_package_does_not_break_the_others(monkeypatch, capsys):
    found = EntryPoints([EntryPoint("blur", "no_such_package:blur", COMMANDS)])
    monkeypatch.setattr("vidgen_ray.cli.app.entry_points", found.select)
    assert main(["--help"]) == 0
    assert "Not available: No module named 'no_such_package'." in capsys.readouterr().out
    assert main(["blur", "x.mp4", "--radius", "3"]) == 4
    assert "vidgen blur cannot be imported: No module named 'no_such_package'" in capsys.readouterr().err


def test_closed_pipe_is_no_failed_shot(capfd):
    with capfd.disabled():
        read, write = os.pipe()
        os.close(read)
        for command in (["schema", "manifest"], ["plan", str(EXAMPLES / "demo.jsonl"), "-p", "demo"]):
            pipe = os.fdopen(os.dup(write), "w", buffering=1)
            with redirect_stdout(pipe):
                assert main(command) == 141
            with suppress(BrokenPipeError):
                pipe.close()
        os.close(write)


def test_help_lists_groups_of_commands_and_the_common_options(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    names = ("Start", "demo", "Render scripts", "render", "Look at results", "status", "Export", "film", "Serve", "Machine")
    places = [re.search(rf"[─│] {name} ", out).start() for name in names]
    assert places == sorted(places)
    assert main(["upscal"]) == 2
    assert "Did you mean 'upscale'?" in capsys.readouterr().err
    shown = []
    for option in ("--help", "--help-all"):
        assert main(["render", option]) == 0
        text = capsys.readouterr().out
        assert "bool" not in text
        shown.append({*re.findall(r"--[a-z-]+", text)})
    common, every = shown
    assert {"--out", "--set", "--gpus", "--help-all"} < common
    assert len(common) < 15
    assert common | {"--wait-storage", "--cache-gb"} < every


def test_deleted_current_folder_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["validate", "none.jsonl"]) == 4
    assert "the current folder: No such file or directory" in capsys.readouterr().err


def test_missing_weights_and_unreachable_clusters_exit_with_code_4(tmp_path, capsys, monkeypatch):
    profile, script = tmp_path / "p.yaml", tmp_path / "s.txt"
    profile.write_text("{name: x, about: y, actors: {flux: {weights: nowhere}}}")
    script.write_text("a red ball\n")
    assert main(["shot", "a", "-p", str(profile), "--until", "image", "-o", str(tmp_path)]) == 4
    assert f"nothing at {tmp_path / 'nowhere'}" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    for address, used in (("127.0.0.1:1", "127.0.0.1:1"), ("auto", "127.0.0.1:2")):
        assert main(["render", str(script), "-o", str(tmp_path), "-p", "tiny", "--address", address]) == 4
        assert f"no Ray cluster at '{used}'" in capsys.readouterr().err


@pytest.mark.parametrize(("is_host", "printed"), [(False, "handled\n"), (True, "handled\nbefore\nfreed\n")])
def test_process_of_a_command_calls_exit_handlers_and_frees_no_objects(is_host, printed):
    """A process with exit handlers of its own, or one that calls `main`, ends as usual."""
    code = f"""
import atexit, sys
from vidgen_ray.cli import main, run_process
class Freed:
    def __del__(self):
        print("freed", flush=True)
freed = Freed()
if {is_host}:
    atexit.register(print, "before")
    assert main() == 3
code = run_process()
atexit.register(print, "handled")
sys.exit(code)
"""
    ended = subprocess.run([sys.executable, "-c", code, "validate", "none.jsonl"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (3, printed), ended.stderr


def test_commands_run_with_closed_streams():
    for arguments, code, message in (
        ("schema >&-", 0, ""),
        ("validate - <&-", 3, "vidgen: stdin.txt: got no lines, must have at least one shot"),
    ):
        command = f"{shlex.quote(sys.executable)} -m vidgen_ray {arguments}"
        closed = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        assert (closed.returncode, closed.stderr.strip()) == (code, message)


def test_exit_codes_are_pinned():
    codes = {
        error.__name__: error.exit_code for error in VidgenError.__subclasses__() if error.exit_code != VidgenError.exit_code
    }
    assert codes == {"UsageError": 2, "ScriptError": 3, "ProfileError": 3, "SetupError": 4, "TooExpensive": 5}
    assert VidgenError.exit_code == 1


def test_retry_renders_as_the_last_run_did(tmp_path, monkeypatch):
    script, out, calls = tmp_path / "s.jsonl", tmp_path / "out", []
    script.write_text('{"prompt": "a", "height": 7}\n')
    options = ["--keep", "stages", "--cache", "all", "--cache-gb", "2", "--replace", "--attempts", "2", "--seed", "5"]
    options += ["--until", "image", "--no-provenance"]
    # A run without a valid line starts no Ray.
    assert main(["render", str(script), "-o", str(out), "-p", "tiny", *options]) == 3

    def record(script, profile, outputs, options, **_):
        calls.append((script, profile, options))
        raise KeyboardInterrupt

    monkeypatch.setattr("vidgen_ray.batch.render_script.render_shots", record)
    assert main(["retry", str(out)]) == 130
    ((script, profile, retried),) = calls
    assert (profile.name, profile.provenance.metadata) == ("tiny", "off")
    assert (retried.keep_stages, retried.cache, retried.cache_gb) == (True, "all", 2)
    assert (retried.replace, retried.attempts) == (True, 2)
    assert (script.run_seed, script.changes) == (5, changes_until("image"))
    assert main(["retry", str(out), "--profile", "demo"]) == 130
    assert calls[1][1].name == "demo"


def test_shot_prints_the_written_files(tmp_path, capsys):
    arguments = ["shot", "a red ball", "-o", str(tmp_path), "-p", "tiny", "--until", "video", "-s", "id=ball", "-s", "fps=9"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / shot_path("ball") / n) for n in ("image.png", "video.mp4")]
    with open_video(tmp_path / shot_path("ball") / "video.mp4") as video:
        assert float(video.fps) == 9
    assert main(["shot", "a red ball", "-o", str(tmp_path), "-p", "tiny", "--until", "image", "-s", "id=image", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shot"]["id"] == "image"


@pytest.mark.parametrize(("profile", "advice"), [("demo", "profile demo draw a cartoon world"), ("tiny", "seeds")])
def test_images_without_a_face_are_noted(tmp_path, capsys, monkeypatch, profile, advice):
    likeness = LikenessRecord(image=None, clip_mean=None, clip_worst=None, frames_without_face=1)
    record = ShotRecord.model_construct(likeness=likeness, cut_texts=(), stages=(), files={})
    monkeypatch.setattr(one_stage.VideoGenerationPipeline, "render", lambda *_: record)
    assert main(["shot", "a", "-p", profile, "--face", str(ASTRONAUT), "-o", str(tmp_path)]) == 0
    printed = capsys.readouterr().err
    assert "note: no face was found in the image" in printed
    assert advice in printed
    report = RunReport("r", 3, 0, 1, 0, 0, True, 1.0, 0.0, None, None, 0, {}, None, (), without_face=2)
    print_ended(str(tmp_path), [RenderedRun(report, None, load_profile(profile))], as_json=False)
    printed = capsys.readouterr().err
    assert "note: no face was found in 2 images" in printed
    assert advice in printed


def test_interrupted_stage_does_not_promise_to_resume(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(one_stage, "run_one_stage", Mock(side_effect=KeyboardInterrupt))
    assert main(["stage", "flux", "-o", str(tmp_path / "a.png"), "-p", "tiny", "-s", "prompt=a"]) == 130
    assert "interrupted. Run the same command again." in capsys.readouterr().err


def test_error_of_ray_is_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(one_stage, "run_one_stage", Mock(side_effect=ray.exceptions.RaySystemError("out of ports")))
    assert main(["stage", "flux", "-o", str(tmp_path / "a.png"), "-p", "tiny", "-s", "prompt=a"]) == 4
    assert "vidgen: Ray failed: RaySystemError: System error: out of ports. Run the same command" in capsys.readouterr().err


def test_stage_command_chains_stages_through_files(tmp_path, capsys):
    """A stage for each kind of input and result."""

    def stage(name, *arguments, out):
        assert main(["stage", name, *map(str, arguments), "-o", str(tmp_path / out), "-p", "tiny"]) == 0, capsys.readouterr()
        return tmp_path / out

    face = json.loads(stage("instantid", ASTRONAUT, out="face.json").read_text())
    assert {name: len(embedding) for name, embedding in face["embeddings"].items()} == {"antelopev2": 512, "ir_se50": 512}
    assert np.asarray(Image.open(stage("instantid", ASTRONAUT, out="pose.png"))).any()
    base = stage("instantid_sdxl", tmp_path / "face.json", "-s", "prompt=a man", out="base.png")
    refined = stage("lora", base, "-s", "prompt=a man", "-s", "lora=builtin:tiny/lora.safetensors", out="lora.png")
    assert Image.open(refined).size == (128, 64)
    for made in (base, refined):
        assert read_provenance(made).source_type == "trainedAlgorithmicMedia"
    assert read_provenance(tmp_path / "pose.png") == (None, None)
    clip = stage("svd", refined, "-s", "num_frames=4", out="clip.mp4")
    hd = stage("realesrgan", clip, "-s", "scale=3", out="hd.mp4")
    smooth = stage("rife", clip, "-s", "fps_out=12", out="smooth.mp4")
    with open_video(clip) as before, open_video(hd) as large, open_video(smooth) as after:
        assert (large.width, large.height, large.frame_count) == (3 * before.width, 3 * before.height, before.frame_count)
        assert (float(before.fps), float(after.fps)) == (5, 12)
        assert after.frame_count == math.ceil(before.frame_count * 12 / 5)
    assert main(["stage", "rife", str(smooth), "-s", "fps_out=8", "-o", str(tmp_path / "x.mp4"), "-p", "tiny"]) == 1
    assert "has 12 frames per second, more than 8" in capsys.readouterr().err
    assert main(["stage", "svd", str(refined), "-o", str(tmp_path / "clip.txt"), "-p", "tiny"]) == 2
    assert "must end in .mp4 for svd" in capsys.readouterr().err


def test_schema_prints_the_json_schema_of_a_shot(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == Shot.model_json_schema()
    assert all(field["description"] for field in schema["properties"].values())


def test_identity_show_draws_the_detected_face(tmp_path, capsys):
    """The expected box and keypoints are those of tests/nets/test_faces.py, confirmed by two networks."""
    drawn = tmp_path / "new" / "astronaut.png"
    assert main(["identity", "show", str(ASTRONAUT), "-o", str(drawn), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (photo,) = result["photos"]
    (face,) = photo["faces"]
    assert np.abs(np.subtract(face["box"], BOX)).max() < 2
    assert np.abs(np.subtract(photo["keypoints"], POINTS)).max() < 2
    assert (photo["size"], face["chosen"], face["score"] > 0.85) == ([512, 512], True, True)
    assert (result["embeddings"]["antelopev2"]["numbers"], len(result["digest"]), result["drawn"]) == (512, 64, str(drawn))
    sheet = np.asarray(Image.open(drawn)).astype(int)
    # The photo starts at (12, 32) and is scaled from 512 to 480 pixels. The box of the face is green.
    left, top, _, bottom = (round(side * 480 / 512) for side in BOX)
    middle = sheet[32 + (top + bottom) // 2, 12 + left - 3 : 12 + left + 6]
    assert (np.abs(middle - (74, 222, 128)).sum(-1) < 30).any()
    assert len(np.unique(sheet[32:242, 740:1160].reshape(-1, 3), axis=0)) > 5, "keypoint image is missing"


def test_identity_show_selects_the_face_index_and_fails_without_a_face(tmp_path, capsys):
    drawn, wall = tmp_path / "group.jpg", tmp_path / "wall.png"
    assert main(["identity", "show", str(GROUP), str(ASTRONAUT), "-o", str(drawn), "--face-index", "4", "--json"]) == 0
    group, astronaut = json.loads(capsys.readouterr().out)["photos"]
    assert [face["chosen"] for face in group["faces"]] == [False, False, False, False, True, False]
    assert [face["chosen"] for face in astronaut["faces"]] == [True]
    drawn.unlink()
    Image.fromarray(np.repeat(np.arange(200, dtype=np.uint8)[:, None, None], 200, 1).repeat(3, 2)).save(wall)
    assert main(["identity", "show", str(ASTRONAUT), str(wall), "-o", str(drawn)]) == 1
    assert f"vidgen: face_image 2 of 2 ({wall}): no face found; use a photo" in capsys.readouterr().err
    assert not drawn.exists()
