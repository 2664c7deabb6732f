"""`vidgen upscale` as a command: inputs, outputs, exit codes, kills, Ray."""

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import av
import pytest

from tests import forked
from tests.upscale.conftest import SETTINGS, compact
from tests.upscale.videos import decoded, packets, write_video
from vidgen_ray.cli import main
from vidgen_ray.system.cache_dir import sha256_of
from vidgen_ray.upscale import frames as upscale_frames
from vidgen_ray.upscale import ray_runner, segments
from vidgen_ray.upscale import run as upscale_run
from vidgen_ray.upscale import upscale_command as command
from vidgen_ray.upscale.network import EngineSettings
from vidgen_ray.upscale.source import read_source

NETWORK = "--preset", "ultrafast", "--model"


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Weights of a tiny network in the current folder, which is empty otherwise."""
    monkeypatch.chdir(tmp_path)
    return compact(tmp_path / "tiny.safetensors")


@pytest.fixture
def run(weights, monkeypatch, capsys):
    """Return a function that runs the command with a tiny network: exit code, standard output, standard error."""
    monkeypatch.setattr(command, "choose_settings", lambda model, device, workers: SETTINGS)

    def call(words):
        code = main(["upscale", *words.split(), *NETWORK, str(weights)])
        return code, *capsys.readouterr()

    return call


def files(pattern):
    return sorted(path.name for path in Path().glob(pattern) if path.is_file())


def test_inputs_can_be_a_folder_a_pattern_and_a_list_and_a_bad_video_fails_alone(run):
    Path("in").mkdir()
    write_video(Path("in/a.mp4"), 2)
    write_video(Path("in/c.avi"), 2, codec="mpeg4")
    Path("in/notes.md").write_text("no video")
    Path("bad.mp4").write_text("nonsense")
    Path("list.txt").write_text("# three\nbad.mp4\n\nin/a.mp4\nmissing.mp4\n")
    write_video(Path("in/d.gif"), 2, codec="gif", pixel_format="rgb8")
    Path("in/e.wmv").write_bytes(b"0&\xb2u")
    code, _, errors = run("in -o one")
    assert (code, files("one/*")) == (0, ["a.mp4", "c.mkv", "d.mkv"])
    assert "in: left out 2 files without the ending of a video that can be read: e.wmv, notes.md" in errors
    assert run("in/*.m*4 -o two")[0] == 0
    assert files("two/*") == ["a.mp4"]
    code, output, errors = run("list.txt -o three --json --to 256x256")
    assert (code, "2 of 3 videos failed" in errors, "Traceback" in errors) == (1, True, False)
    assert "bad.mp4: not a supported video format" in errors
    assert "missing.mp4: no such file" in errors
    (good,) = [video for video in json.loads(output)["videos"] if "error" not in video]
    assert (good["frames"], good["size"]) == (2, "256x192")
    assert files("three/*.mp4") == ["a.mp4"]
    # The same command again: what is finished stays, what failed is tried again.
    code, output, errors = run("list.txt -o three --json --to 256x256")
    assert (code, [video.get("was_finished") for video in json.loads(output)["videos"]].count(True)) == (1, 1)


def test_wrong_arguments_exit_with_2(run):
    for folder in ("empty", "other"):
        Path(folder).mkdir()
    for path in ("in.mp4", "other/in.mp4"):
        write_video(Path(path), 1)
    for arguments, message in (
        ("", "VIDEO: got nothing"),
        ("empty", "which has no video"),
        ("none-*.mp4", "no file matches"),
        ("https://x/y.mp4", "must be a file on this machine; URLs are not read"),
        ("in.mp4 other/in.mp4 -o out", "would both become"),
        ("in.mp4 other/in.mp4 -o out.mp4", "must be a folder"),
        ("in.mp4 -o in.mp4", "would replace a source"),
        ("in.mp4 -o s3://bucket/out", "must be a folder or file on a disk"),
        ("in.mp4 -o o.gif", "--out: got 'o.gif', must be a folder or end in .mp4"),
        ("in.mp4 --fps fast", "--fps: got 'fast', must be from 1 to 240"),
        ("in.mp4 --to big", "--to: got 'big', must be WIDTHxHEIGHT"),
        ("in.mp4 --to 640x480 --scale 2", "cannot be combined"),
        ("in.mp4 --crf 60", "must be from 0 to 51 for h264"),
        ("in.mp4 --preview soon", "--preview: got 'soon', must be seconds"),
    ):
        code, _, errors = run(arguments)
        assert (code, message in errors) == (2, True), errors


def test_preview_shows_both_versions_beside_each_other(run):
    write_video(Path("in.mp4"), 36)
    code, _, errors = run("in.mp4 -o out --preview 1s")
    assert code == 0
    assert "out/in.preview.mp4: 12 frames of 256x96" in errors
    frames, _ = decoded(Path("out/in.preview.mp4"))
    assert (len(frames), frames[0].shape) == (12, (96, 256, 3))
    code, _, errors = run("in.mp4 -o out --preview 1s --deinterlace --force")
    assert (code, "frames are interlaced; --deinterlace changes nothing" in errors) == (0, True), errors


def command_in_a_fork(segment_frames, words):
    """Run the command with the tiny network in segments of this many frames, and write the peak memory of its process."""
    command.choose_settings = lambda model, device, workers: SETTINGS
    if segment_frames is not None:
        segments.MAX_SEGMENT_FRAMES = segments.MIN_SEGMENT_FRAMES = segment_frames
    code = main(["upscale", *words.split(), *NETWORK, "tiny.safetensors"])
    Path("peak_mb").write_text(str(forked.peak_mb()))
    return code


def start(words, segment_frames=5):
    """Start the command in a process of its own, which has many moments to be killed at."""
    return forked.start(Path("errors"), command_in_a_fork, segment_frames, words)


@pytest.mark.parametrize(("has_encoder", "codec"), [(True, "hevc"), (False, "h264")])
def test_ten_bits_become_hevc_which_hardware_decodes(run, monkeypatch, has_encoder, codec):
    write_video(Path("deep.mkv"), 1, codec="libx265", pixel_format="yuv420p10le", options={"x265-params": "log-level=none"})
    write_video(Path("plain.mp4"), 1)
    if not has_encoder:
        monkeypatch.setattr(upscale_frames, "codecs_available", {"libx264"})
    code, _, errors = run("deep.mkv plain.mp4 -o out")
    assert code == 0, errors
    assert ("deep.mkv: becomes H.264 of 10 bits" in errors) != has_encoder
    assert "1 frame of " in errors
    found = []
    for name in ("deep.mkv", "plain.mp4"):
        with av.open(f"out/{name}") as opened:
            found.append(opened.streams.video[0].codec_context.name)
    assert found == [codec, "h264"]


def wait_for_segments(process, folder, count):
    """Wait until `count` more segments exist."""
    wanted = len(files(f"{folder}/0*.mp4")) + count
    while len(files(f"{folder}/0*.mp4")) < wanted:
        assert process.is_alive(), f"the command ended before it had made {count} segments"
        time.sleep(0.002)  # a file system sends no event


def test_killed_and_interrupted_commands_are_resumed_to_the_bytes_of_an_undisturbed_run(run, short_segments):
    write_video(Path("in.mp4"), 100, sound_s=2.0)
    assert run("in.mp4 -o whole.mp4 --workers 2")[0] == 0
    words, segments = "in.mp4 -o out/in.mp4 --workers 2", Path("out/.vidgen-upscale/in.mp4")
    for sent, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = start(words)
        wait_for_segments(process, segments, random.randrange(1, 5))
        os.kill(process.pid, sent)
        process.join()
        assert (process.exitcode, files("out/*.mp4")) == (code, [])
    assert "Run the same command to resume" in Path("errors").read_text()
    assert files(f"{segments}/.tmp-*") == []
    assert run(words)[0] == 0
    assert sha256_of(Path("out/in.mp4")) == sha256_of(Path("whole.mp4"))
    assert not segments.exists()


def read_source_dropping_an_interrupt(video, **options):
    """Read a video. Ctrl-C is pressed meanwhile, and its exception is dropped, as some imports of libraries do."""
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    return read_source(video, **options)


def test_interrupt_whose_exception_is_dropped_ends_the_command(run, monkeypatch):
    for name in ("a.mp4", "b.mp4"):
        write_video(Path(name), 12)
    with monkeypatch.context() as patched:
        patched.setattr(upscale_run, "read_source", read_source_dropping_an_interrupt)
        for words in ("a.mp4 b.mp4 -o out", "a.mp4 b.mp4 -o out --preview 1s"):
            code, _, errors = run(words)
            assert code == 130
            assert errors.endswith("vidgen: interrupted. Run the same command to resume.\n")
            assert files("out/*.mp4") == []
    assert run("a.mp4 b.mp4 -o out")[0] == 0


@pytest.mark.slow
def test_long_film_takes_the_memory_of_a_short_one(weights):
    """Frames of 128x72. The times of all frames are in memory. They would take 50 MB, upscaled four times as much."""
    peaks = []
    for frames in (300, 2_100):
        write_video(Path("in.mkv"), frames, size=(128, 72), options={"preset": "ultrafast"})
        process = start(f"in.mkv -o {frames}.mkv", segment_frames=None)
        process.join()
        assert process.exitcode == 0, Path("errors").read_text()
        assert len(packets(Path(f"{frames}.mkv"), "video")) == frames
        peaks.append(float(Path("peak_mb").read_text()))
    assert peaks[1] - peaks[0] < 40


def test_worker_reserves_its_threads_or_a_whole_node(monkeypatch):
    for cpus, slots in (((1, 1), 2), ((3,), 1), ((4, 1), 2), ((0,), 0)):
        nodes = [{"Alive": True, "Resources": {"CPU": float(count)}} for count in cpus]
        monkeypatch.setattr(ray_runner.ray, "nodes", lambda nodes=nodes: nodes)
        assert ray_runner.cluster_slots(EngineSettings(threads=2)) == slots


@pytest.mark.usefixtures("local_ray", "short_segments")
def test_on_ray_the_file_has_the_same_bytes(run, tmp_path, monkeypatch):
    """Segments are made by tasks. The process of the first attempt of one of them crashes.

    A run before is interrupted, and the exception is dropped.
    """
    write_video(Path("in.mp4"), 30, sound_s=1.0)
    assert run("in.mp4 -o whole.mp4")[0] == 0
    monkeypatch.setattr(ray_runner, "settings_on_cluster", lambda model: SETTINGS)
    marker = tmp_path / "failed once"
    make = ray_runner.make_segment

    def crashing_once(run_id, target, segment):
        if segment.number == 3 and not marker.exists():
            marker.write_text("")
            os._exit(1)
        return make(run_id, target, segment)

    monkeypatch.setattr(ray_runner, "make_segment", crashing_once)
    words = f"{tmp_path}/in.mp4 -o {tmp_path}/ray.mp4 --address auto --workers 2"
    with monkeypatch.context() as patched:
        patched.setattr(upscale_run, "read_source", read_source_dropping_an_interrupt)
        assert run(words)[0] == 130
    assert not marker.exists()
    assert run(words)[0] == 0
    assert marker.exists()
    assert sha256_of(Path("ray.mp4")) == sha256_of(Path("whole.mp4"))
