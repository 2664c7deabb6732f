"""A script through two servers, with faults of theirs and a killed driver."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from tests.remote.fake_server import HEIGHT, WIDTH, FakeServer, colour_of, profile_of
from vidgen_ray.media.decode import open_video
from vidgen_ray.media.images import write_png
from vidgen_ray.outputs.manifest import read_manifest

pytestmark = pytest.mark.very_slow

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


def wait_until_up(server):
    """Wait until the server responds: it may be starting again. Without a client, it does not exit."""
    while True:
        with suppress(OSError):
            urlopen(f"{server.url}/v1/models", timeout=5).close()
            return
        time.sleep(0.05)  # polls: a server that starts sends no event


@contextmanager
def process(*arguments, log):
    """Run a command of vidgen in a session of its own. At the end, kill it, and wait until its cluster has ended."""
    with log.open("ab") as file:
        command = [sys.executable, "-m", "vidgen_ray", *map(str, arguments)]
        running = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield running
    finally:
        cluster: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            cluster = psutil.Process(running.pid).children(recursive=True)
        with suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        # Its workers get clips from the servers until they notice.
        assert not psutil.wait_procs(cluster, timeout=60)[1]


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
        for server in servers:
            wait_until_up(server)
        with process(*arguments, log=log) as driver:
            while driver.poll() is None and log.read_text().count(" done s") < LINES // 4:
                time.sleep(0.05)
        done = [line["prompt"] for line in lines if any(out.glob(f"shots/*/{line['id']}/shot.json"))]
        for server in servers:
            wait_until_up(server)
            server.client_was_killed(done)
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
    paid = [prompt for server in servers for prompt in server.paid()]
    assert sorted(paid) == sorted(line["prompt"] for line in lines)
    assert all(server.paid() for server in servers)
