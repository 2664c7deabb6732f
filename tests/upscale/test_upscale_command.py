"""`vidgen upscale` as a command: inputs, outputs, exit codes, kills, Ray."""

import json
import os
import random
import signal
import time
from contextlib import suppress

import pytest

from tests import forked
from tests.upscale.conftest import SETTINGS, compact
from tests.upscale.videos import decoded, packets, write_video
from vidgen_ray.cli import main
from vidgen_ray.system.cache_dir import sha256_of
from vidgen_ray.upscale import job, ray_runner
from vidgen_ray.upscale import run as upscale_run
from vidgen_ray.upscale import upscale_command as command
from vidgen_ray.upscale.network import EngineSettings
from vidgen_ray.upscale.source import read_source


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


def test_inputs_can_be_a_folder_a_pattern_and_a_list(tmp_path, run):
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


def test_bad_video_fails_and_the_others_continue(tmp_path, run):
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


def command_in_a_fork(segment_frames, peak_file, arguments):
    """Run the command with the tiny network in segments of this many frames, and write the peak memory of its process."""
    command.choose_settings = lambda model, device, workers: SETTINGS
    if segment_frames is not None:
        job.MAX_SEGMENT_FRAMES = job.MIN_SEGMENT_FRAMES = segment_frames
    code = main(["upscale", *arguments])
    peak_file.write_text(str(forked.peak_mb()))
    return code


@pytest.fixture
def start(tmp_path, weights):
    """Return a function that starts the command in a process of its own, which has many moments to be killed at."""

    def start(*arguments, segment_frames=5):
        words = [*map(str, arguments), "--model", str(weights), "--preset", "ultrafast"]
        return forked.start(tmp_path / "errors", command_in_a_fork, segment_frames, tmp_path / "peak_mb", words)

    return start


def segments_in(folder):
    with suppress(FileNotFoundError):  # the command creates the folder, and deletes it at its end
        return len(list(folder.glob("0*.mp4")))
    return 0


def wait_for_segments(process, folder, count):
    """Wait until `count` segments exist. Return false if the process ends before."""
    while process.is_alive():
        if segments_in(folder) >= count:
            return True
        time.sleep(0.002)  # a file system sends no event
    return False


@pytest.fixture
def digest_after(run, short_segments):
    """Return a function that upscales a video in this process and returns the digest of the result."""

    def upscaled(video, out, *options):
        code, _, errors = run(video, "-o", out, *options)
        assert code == 0, errors
        return sha256_of(out)

    return upscaled


def test_kills_at_random_moments_leave_the_bytes_of_an_undisturbed_run(tmp_path, start, digest_after):
    video = write_video(tmp_path / "in.mp4", 60, sound_s=2.0)
    expected = digest_after(video, tmp_path / "whole" / "in.mp4", "--workers", "2")
    out = tmp_path / "out" / "in.mp4"
    folder = out.parent / ".vidgen-upscale" / "in.mp4"
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    kills = 0
    for _ in range(2):
        process = start(video, "-o", out, "--workers", "2")
        if wait_for_segments(process, folder, segments_in(folder) + rng.randrange(1, 5)):
            kills += 1
        process.kill()
        process.join()
    assert kills, f"seed {seed}"
    assert not out.exists(), f"seed {seed}"
    assert digest_after(video, out, "--workers", "2") == expected, f"seed {seed}"
    assert not folder.exists()


def test_interrupt_exits_with_130_and_resumes(tmp_path, start):
    video = write_video(tmp_path / "in.mp4", 400)
    out = tmp_path / "out" / "in.mp4"
    folder = out.parent / ".vidgen-upscale" / "in.mp4"
    process = start(video, "-o", out)
    assert wait_for_segments(process, folder, 2), (tmp_path / "errors").read_text()
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert "Run the same command to resume" in (tmp_path / "errors").read_text()
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
def test_long_film_takes_the_memory_of_a_short_one(tmp_path, start):
    """Frames of 128x72. The times of all frames are in memory. They would take 50 MB, upscaled four times as much."""
    peaks = []
    for name, frames in (("short", 300), ("long", 2_100)):
        video = write_video(tmp_path / f"{name}.mkv", frames, size=(128, 72), options={"preset": "ultrafast"})
        process = start(video, "-o", tmp_path / "out" / video.name, segment_frames=None)
        process.join()
        assert process.exitcode == 0, (tmp_path / "errors").read_text()
        assert len(packets(tmp_path / "out" / video.name, "video")) == frames
        peaks.append(float((tmp_path / "peak_mb").read_text()))
    assert peaks[1] - peaks[0] < 40


@pytest.mark.parametrize(("cpus", "slots"), [((1, 1), 2), ((3,), 1), ((4, 1), 2), ((0,), 0)])
def test_worker_reserves_its_threads_or_a_whole_node(monkeypatch, cpus, slots):
    nodes = [{"Alive": True, "Resources": {"CPU": float(count)}} for count in cpus]
    monkeypatch.setattr(ray_runner.ray, "nodes", lambda: nodes)
    assert ray_runner.cluster_slots(EngineSettings(threads=2)) == slots


@pytest.mark.usefixtures("local_ray")
def test_on_ray_the_file_has_the_same_bytes(tmp_path, weights, monkeypatch, digest_after):
    """Segments are made by tasks. The process of the first attempt of one of them crashes.

    A run before is interrupted, and the exception is dropped.
    """
    video = write_video(tmp_path / "in.mp4", 30, sound_s=1.0)
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
    command_line = [
        "upscale",
        str(video),
        "-o",
        str(tmp_path / "ray" / "in.mp4"),
        *options,
        "--address",
        "auto",
        "--workers",
        "2",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(upscale_run, "read_source", read_source_dropping_an_interrupt)
        assert main(command_line) == 130
    assert not marker.exists()
    assert main(command_line) == 0
    assert marker.exists()
    assert sha256_of(tmp_path / "ray" / "in.mp4") == expected
