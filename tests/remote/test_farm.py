"""A script through two servers: with faults of theirs and a killed driver, and through two servers of this project."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.remote.fake_server import HEIGHT, SIZE, WIDTH, FakeServer, colour_of, profile_of
from vidgen_ray.media import open_video, write_png
from vidgen_ray.outputs.manifest import read_manifest
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.profile import load_profile
from vidgen_ray.remote.video_server import RemoteJob

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FAULTS = (
    *("none", "busy", "500-after-success", "dies", "truncated", "damaged", "foreign", "failed", "slow"),
    "busy-without-time",
)
LINES = 20


def start_images(folder, count):
    rng = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 255, (8, 16, 3), dtype=np.uint8))
        write_png(folder / f"{number}.png", np.asarray(small.resize((WIDTH, HEIGHT))))
        yield str(folder / f"{number}.png")


@contextmanager
def kept_running(*servers):
    """Start servers, and again whenever they exit."""
    stop = threading.Event()

    def keep(server):
        server.start()
        while not stop.wait(0.05):
            if server.process.poll() is not None:
                server.start()

    keepers = [threading.Thread(target=keep, args=(server,)) for server in servers]
    try:
        for keeper in keepers:
            keeper.start()
        yield
    finally:
        stop.set()
        for keeper, server in zip(keepers, servers, strict=True):
            keeper.join()
            server.stop()


@contextmanager
def process(*arguments, log):
    """Run a command of vidgen in a session of its own, and kill it at the end of the block."""
    with log.open("ab") as file:
        command = [sys.executable, "-m", "vidgen_ray", *map(str, arguments)]
        running = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield running
    finally:
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def test_faulty_servers_and_a_killed_driver_lose_double_and_repay_nothing(tmp_path):
    lines = [
        {"id": f"s{number:02}", "prompt": f"shot {number} fault:{FAULTS[number % len(FAULTS)]}", "image": image, "seed": number}
        for number, image in enumerate(start_images(tmp_path, LINES))
    ]
    script, profile, out, log = (tmp_path / name for name in ("script.jsonl", "farm.yaml", "out", "log.txt"))
    script.write_text("".join(json.dumps(line) + "\n" for line in lines))
    servers = [FakeServer(tmp_path / "first"), FakeServer(tmp_path / "second")]
    farm = profile_of(*(server.url for server in servers)).model_dump(mode="json", exclude={"encode", "provenance"})
    profile.write_text(yaml.safe_dump(farm))
    arguments = ("render", script, "-o", out, "--profile", profile)
    with kept_running(*servers):
        with process(*arguments, log=log) as driver:
            while driver.poll() is None and log.read_text().count(" done s") < LINES // 4:
                time.sleep(0.05)
        with process(*arguments, log=log) as driver:
            assert driver.wait(300) == 0, log.read_text()
    assert sorted((row.id, row.status) for row in read_manifest(out)) == [(line["id"], "done") for line in lines]
    for line in lines:
        folder = next(out.glob(f"shots/*/{line['id']}"))
        with open_video(folder / "video.mp4") as video:
            frames = video.frames(0, video.frame_count).astype(int)
        image = np.asarray(Image.open(line["image"])).astype(int)
        assert abs(frames[0] - image).mean() < 8
        assert abs(frames[-1, HEIGHT * 3 // 4 :] - np.array(colour_of(line["prompt"], line["seed"]))).mean() < 8
    paid = [prompt for server in servers for prompt in server.paid().values()]
    assert sorted(paid) == sorted(line["prompt"] for line in lines)
    assert all(server.paid() for server in servers)


@contextmanager
def own_servers(folder, *ports):
    """Start servers of the demo models at once. Yields their URLs."""
    with ExitStack() as stack:
        servers = []
        for port in ports:
            arguments = ("serve", "--profile", "demo", "--port", port, "--data", folder / str(port))
            servers.append(stack.enter_context(process(*arguments, log=folder / f"{port}.txt")))
        for port, server in zip(ports, servers, strict=True):
            while True:
                assert server.poll() is None, (folder / f"{port}.txt").read_text()
                with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5):
                    break
                time.sleep(0.2)
        yield [f"http://127.0.0.1:{port}" for port in ports]
        # They stop the Ray that they have started.
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait()


@pytest.mark.very_slow
@pytest.mark.timeout(600)
def test_two_of_our_servers_give_the_bytes_of_a_local_run(tmp_path):
    fields = {"video_model": "svd", "upscale_video": False}
    images = list(start_images(tmp_path, 2))
    shots = [{"prompt": f"a red boat {number}", "image": image, "seed": number} for number, image in enumerate(images)]
    ports = [FakeServer(tmp_path / f"port{number}").port for number in range(2)]
    served = {}
    with own_servers(tmp_path, *ports) as (first, second):
        farm = profile_of(first, second, fields=fields, timeout_s=300)
        actor = farm.actors["remote"].model_copy(update={"weights": "remote:demo"})
        for shot, server in zip(shots, (first, second), strict=True):
            # One shot a server in turn, as the workers of a run have them.
            options = {**actor.options, "servers": [server, first, second]}
            profile = farm.model_copy(update={"actors": {"remote": actor.model_copy(update={"options": options})}})
            with VideoGenerationPipeline(profile, tmp_path / "out") as pipeline:
                clip = pipeline.generate_video(**shot)
            received = pipeline.outputs.stage_cache.get(clip.record.stages[0].key, ["frames"])["frames"]
            job = RemoteJob.model_validate_json(pipeline.outputs.remote_jobs.get(clip.record.stages[0].key))
            assert job.server == server
            with urlopen(f"{server}/v1/videos/{job.id}/content") as response:
                served[shot["prompt"]] = response.read(), received
    with VideoGenerationPipeline(load_profile("demo"), tmp_path / "local") as pipeline:
        for shot in shots:
            local = pipeline.generate_video(**shot, **fields, **SIZE).video
            content, received = served[shot["prompt"]]
            assert local.read_bytes() == content
            with open_video(local) as video:
                assert (video.frames(0, video.frame_count) == received).all()
