"""`vidgen upscale` as a command: inputs, outputs, exit codes, kills, Ray."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.upscale.conftest import SETTINGS, compact
from tests.upscale.videos import decoded, packets, write_video
from vidgen_ray.cli import main
from vidgen_ray.system.cache_dir import sha256_of
from vidgen_ray.upscale import run as upscale_run
from vidgen_ray.upscale import upscale_command as command
from vidgen_ray.upscale.network import EngineSettings
from vidgen_ray.upscale.source import read_source

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def weights(tmp_path):
    return compact(tmp_path / "tiny.safetensors")


@pytest.fixture
def run(weights, monkeypatch, capsys):
    """Return a function that runs the command with a tiny network: exit code, standard output, standard error."""
    monkeypatch.setattr(command, "choose_settings", lambda model, device, workers: SETTINGS)

    def call(*arguments):
        code = main(["upscale", *map(str, arguments), "--model", str(weights), "--preset", "ultrafast"])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def test_a_folder_a_pattern_and_a_list(tmp_path, run):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.mp4", "b.mkv", "c.avi"):
        write_video(folder / name, 2, codec="mpeg4" if name == "c.avi" else "libx264")
    (folder / "notes.md").write_text("no video")
    (tmp_path / "list.txt").write_text("# two of them\nin/a.mp4\n\nin/b.mkv\n")
    assert run(folder, "-o", tmp_path / "one")[0] == 0
    assert sorted(path.name for path in (tmp_path / "one").iterdir() if path.is_file()) == ["a.mp4", "b.mkv", "c.mkv"]
    assert run(folder / "*.m*4", "-o", tmp_path / "two")[0] == 0
    assert [path.name for path in (tmp_path / "two").iterdir() if path.is_file()] == ["a.mp4"]
    code, output, _ = run(tmp_path / "list.txt", "-o", tmp_path / "three", "--json", "--to", "256x256")
    report = json.loads(output)
    assert (code, report["failed"]) == (0, 0)
    assert [(video["frames"], video["size"]) for video in report["videos"]] == [(2, "256x192")] * 2


def test_a_bad_video_fails_and_the_others_go_on(tmp_path, run):
    write_video(tmp_path / "good.mp4", 2)
    (tmp_path / "bad.mp4").write_text("nonsense")
    code, output, errors = run(
        tmp_path / "bad.mp4", tmp_path / "missing.mp4", tmp_path / "good.mp4", "-o", tmp_path / "out", "--json"
    )
    assert code == 1
    results = json.loads(output)["videos"]
    assert ["error" in result for result in results] == [True, True, False]
    assert "bad.mp4: not a supported video format" in errors
    assert "missing.mp4: no such file" in errors
    assert "2 of 3 videos failed" in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in (tmp_path / "out").glob("*.mp4")) == ["good.mp4"]
    # The same command again: what is finished stays, what failed is tried again.
    code, output, errors = run(tmp_path / "bad.mp4", tmp_path / "good.mp4", "-o", tmp_path / "out", "--json")
    assert (code, json.loads(output)["videos"][1]["was_finished"]) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "VIDEO: got nothing"),
        (["empty"], "which has no video"),
        (["none-*.mp4"], "no file matches"),
        (["in.mp4", "other/in.mp4", "-o", "out"], "would both become"),
        (["in.mp4", "other/in.mp4", "-o", "out.mp4"], "must be a folder"),
        (["in.mp4", "-o", "in.mp4"], "would replace a source"),
        (["in.mp4", "-o", "s3://bucket/out"], "must be a folder or file on a disk"),
        (["in.mp4", "--fps", "fast"], "--fps: got 'fast', must be from 1 to 240"),
        (["in.mp4", "--scale", "0.5"], "Invalid value for '--scale'"),
        (["in.mp4", "--to", "big"], "--to: got 'big', must be WIDTHxHEIGHT"),
        (["in.mp4", "--to", "640x480", "--scale", "2"], "cannot be combined"),
        (["in.mp4", "--codec", "vp8"], "Invalid value for '--codec'"),
        (["in.mp4", "--crf", "60"], "must be from 0 to 51 for h264"),
        (["in.mp4", "--preview", "soon"], "--preview: got 'soon', must be seconds"),
    ],
)
def test_wrong_arguments_exit_with_2(tmp_path, run, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "in.mp4", tmp_path / "other" / "in.mp4"):
        write_video(path, 1)
    code, _, errors = run(*arguments)
    assert code == 2
    assert message in errors


def test_preview_shows_both_versions_beside_each_other(tmp_path, run):
    write_video(tmp_path / "in.mp4", 36)
    code, _, errors = run(tmp_path / "in.mp4", "-o", tmp_path / "out", "--preview", "1s")
    assert code == 0
    assert f"{tmp_path / 'out' / 'in.preview.mp4'}: 12 frames of 256x96" in errors
    frames, _ = decoded(tmp_path / "out" / "in.preview.mp4")
    assert (len(frames), frames[0].shape) == (12, (96, 256, 3))


def test_list_models(run):
    code, output, _ = run("--list-models")
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()] == ["animevideov3", "x4plus-anime", "x4plus", "PATH"]


KILLED = """
import os, sys
from pathlib import Path
from benchmarks.peak_memory import write_at_exit
from tests.upscale.conftest import SETTINGS
from vidgen_ray.cli import main
from vidgen_ray.upscale import upscale_command as command
from vidgen_ray.upscale import job
command.choose_settings = lambda model, device, workers: SETTINGS
if "PEAK_FILE" in os.environ:
    write_at_exit(Path(os.environ["PEAK_FILE"]))
else:
    # Many moments to be killed at.
    job.MAX_SEGMENT_FRAMES = job.MIN_SEGMENT_FRAMES = 5
sys.exit(main(["upscale", *sys.argv[1:]]))
"""


def start(*arguments, **environment):
    command_line = [sys.executable, "-c", KILLED, *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.Popen(command_line, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_after_segments(process, folder, count):
    """Kill the process when `count` segments exist. Return false if it ended before."""
    while process.poll() is None:
        if len(list(folder.glob("0*.mp4"))) >= count:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.002)  # a file system sends no event
    process.communicate()
    return False


@pytest.fixture
def digest_after(run, short_segments):
    """Return a function that upscales a video in this process and returns the digest of the result."""

    def upscaled(video, out, *options):
        code, _, errors = run(video, "-o", out, *options)
        assert code == 0, errors
        return sha256_of(out)

    return upscaled


def test_a_killed_command_resumes_with_the_same_bytes(tmp_path, weights, digest_after):
    video = write_video(tmp_path / "in.mp4", 120, sound_s=1.0)
    options = "--model", weights, "--preset", "ultrafast"
    expected = digest_after(video, tmp_path / "whole" / "in.mp4")
    out = tmp_path / "out" / "in.mp4"
    folder = out.parent / ".vidgen-upscale" / "in.mp4"
    assert kill_after_segments(start(video, "-o", out, *options), folder, 4)
    assert not out.exists()
    assert len(list(folder.glob("0*.mp4"))) >= 4
    assert digest_after(video, out) == expected
    assert not folder.exists()


@pytest.mark.slow
def test_kills_at_random_moments_leave_the_bytes_of_an_undisturbed_run(tmp_path, weights, digest_after):
    video = write_video(tmp_path / "in.mp4", 400, sound_s=3.0)
    options = "--model", weights, "--preset", "ultrafast", "--workers", "2"
    expected = digest_after(video, tmp_path / "whole" / "in.mp4", "--workers", "2")
    out = tmp_path / "out" / "in.mp4"
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    kills = 0
    for _ in range(8):
        process = start(video, "-o", out, *options)
        folder = out.parent / ".vidgen-upscale" / "in.mp4"
        kills += kill_after_segments(process, folder, len(list(folder.glob("0*.mp4"))) + rng.randrange(1, 12))
    assert digest_after(video, out, "--workers", "2") == expected, f"seed {seed}"
    assert kills >= 3, f"seed {seed}"


def test_interrupt_exits_with_130_and_resumes(tmp_path, weights):
    video = write_video(tmp_path / "in.mp4", 800)
    options = "--model", weights, "--preset", "ultrafast"
    out = tmp_path / "out" / "in.mp4"
    folder = out.parent / ".vidgen-upscale" / "in.mp4"
    process = start(video, "-o", out, *options)
    while not folder.exists() or len(list(folder.glob("0*.mp4"))) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Run the same command to resume" in errors
    assert not list(folder.glob(".tmp-*"))


def read_source_dropping_an_interrupt(video):
    """Read a video. Ctrl-C is pressed meanwhile, and its exception is dropped, as some imports of libraries do."""
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    return read_source(video)


def test_interrupt_whose_exception_is_dropped_ends_the_command(tmp_path, run, monkeypatch):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, 12)
    arguments = tmp_path / "a.mp4", tmp_path / "b.mp4", "-o", tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(upscale_run, "read_source", read_source_dropping_an_interrupt)
        for options in ((), ("--preview", "1s")):
            code, _, errors = run(*arguments, *options)
            assert code == 130
            assert errors.endswith("vidgen: interrupted. Run the same command to resume.\n")
            assert not list((tmp_path / "out").glob("*.mp4"))
    assert run(*arguments)[0] == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_long_film_takes_the_memory_of_a_short_one(tmp_path, weights):
    """Frames of 64x36. The times of all frames are in memory. The frames would take 0.1 GB, and upscaled four times as much."""
    peaks = []
    for name, frames in (("short", 2_400), ("long", 16_800)):
        video = write_video(tmp_path / f"{name}.mkv", frames, size=(64, 36), options={"preset": "ultrafast"})
        peak = tmp_path / f"{name}.peak_mb"
        options = "--model", weights, "--preset", "ultrafast"
        process = start(video, "-o", tmp_path / "out" / video.name, *options, PEAK_FILE=str(peak))
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert len(packets(tmp_path / "out" / video.name, "video")) == frames
        peaks.append(float(peak.read_text()))
    assert peaks[1] - peaks[0] < 60


@pytest.mark.parametrize(("cpus", "slots"), [((1, 1), 2), ((3,), 1), ((4, 1), 2), ((0,), 0)])
def test_worker_reserves_its_threads_or_a_whole_node(monkeypatch, cpus, slots):
    from vidgen_ray.upscale import ray_runner

    nodes = [{"Alive": True, "Resources": {"CPU": float(count)}} for count in cpus]
    monkeypatch.setattr(ray_runner.ray, "nodes", lambda: nodes)
    assert ray_runner.cluster_slots(EngineSettings(threads=2)) == slots


@pytest.mark.timeout(600)
def test_on_ray_the_file_has_the_same_bytes(tmp_path, weights, monkeypatch, digest_after):
    """Segments are made by tasks. The process of the first attempt of one of them crashes.

    A run before is interrupted, and the exception is dropped.
    """
    import ray

    from vidgen_ray.upscale import ray_runner

    video = write_video(tmp_path / "in.mp4", 120, sound_s=1.0)
    options = "--model", str(weights), "--preset", "ultrafast"
    expected = digest_after(video, tmp_path / "whole" / "in.mp4")
    monkeypatch.setattr(ray_runner, "settings_on_cluster", lambda model: SETTINGS)
    marker = tmp_path / "failed once"
    make = ray_runner.make_segment

    def crashing_once(run_id, job, segment):
        if segment.number == 3 and not marker.exists():
            marker.write_text("")
            os._exit(1)
        return make(run_id, job, segment)

    monkeypatch.setattr(ray_runner, "make_segment", crashing_once)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    command_line = ["upscale", str(video), "-o", str(tmp_path / "ray" / "in.mp4"), *options, "--address", "auto"]
    try:
        with monkeypatch.context() as patched:
            patched.setattr(upscale_run, "read_source", read_source_dropping_an_interrupt)
            assert main(command_line) == 130
        assert not marker.exists()
        code = main(command_line)
    finally:
        ray.shutdown()
    assert code == 0
    assert marker.exists()
    assert sha256_of(tmp_path / "ray" / "in.mp4") == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bytes_are_the_same_after_the_loss_of_a_node(tmp_path, weights, monkeypatch, digest_after):
    """Two nodes with one CPU each. One is lost with its first segment, and nothing can replace it."""
    import ray
    from ray.cluster_utils import Cluster

    from vidgen_ray.upscale import ray_runner

    video = write_video(tmp_path / "in.mp4", 120, sound_s=1.0)
    options = "--model", str(weights), "--preset", "ultrafast"
    expected = digest_after(video, tmp_path / "whole" / "in.mp4")
    monkeypatch.setattr(ray_runner, "settings_on_cluster", lambda model: SETTINGS)
    lost = tmp_path / "lost"
    make = ray_runner.make_segment

    def make_or_lose_the_node(run_id, job, segment):
        if ray.get_runtime_context().get_node_id() != head:
            lost.write_text(str(segment.number))
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(1)
        return make(run_id, job, segment)

    monkeypatch.setattr(ray_runner, "make_segment", make_or_lose_the_node)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    head = cluster.head_node.node_id
    try:
        cluster.add_node(**node)
        code = main(["upscale", str(video), "-o", str(tmp_path / "ray" / "in.mp4"), *options, "--address", cluster.address])
    finally:
        cluster.shutdown()
    assert code == 0
    assert lost.exists()
    assert sha256_of(tmp_path / "ray" / "in.mp4") == expected
