"""Stages on a clip file: memory of long clips."""

import subprocess
import sys

from tests.conftest import EXAMPLES
from tests.upscale.videos import write_video

FAST = {"preset": "ultrafast"}
SIZE = 480, 272
MAX_GROWTH_MB = 60
"""The 432 frames more would take 170 MB, and 680 MB when upscaled."""
UPSCALE = """
import re, sys
from pathlib import Path
from tests.fake_stages import FakeRealESRGAN
from vidgen_ray.engine.chunked_clip import upscale_clip
from vidgen_ray.media import Mp4Settings
from vidgen_ray.profile import load_profile
from vidgen_ray.shot import Shot

profile = load_profile("tiny")
shot = Shot(**{**profile.defaults, "prompt": "a", "scale": 2})
with FakeRealESRGAN(profile.params(FakeRealESRGAN)) as stage:
    upscale_clip(stage, shot, Path(sys.argv[1]), Path(sys.argv[2]), Mp4Settings(preset="ultrafast", threads=1))
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def test_memory_of_a_clip_does_not_grow_with_its_length(tmp_path):
    """2 s and 20 s at 24 frames per second."""
    peaks_mb = []
    for frames in (48, 480):
        source = write_video(tmp_path / f"{frames}.mp4", frames, size=SIZE, options=FAST)
        command = [sys.executable, "-c", UPSCALE, source, tmp_path / f"{frames}-large.mp4"]
        run = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True, check=True)
        peaks_mb.append(int(run.stdout.split()[-1]) / 1024)
    assert peaks_mb[1] - peaks_mb[0] < MAX_GROWTH_MB, peaks_mb
