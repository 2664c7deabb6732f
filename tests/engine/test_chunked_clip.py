"""Stages on a clip file: memory of long clips, and the frames of each chunk."""

import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import EXAMPLES
from tests.fake_stages import FakeStage
from tests.upscale.videos import write_video
from vidgen_ray.engine.chunked_clip import upscale_clip
from vidgen_ray.media import Mp4Settings, decode, open_video
from vidgen_ray.profile import load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.rife import RifeStage

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


def test_overlapping_chunks_are_decoded_once(tmp_path, monkeypatch):
    """RIFE draws each frame from the two around it, so most frames of the clip are needed for several chunks."""
    source = write_video(tmp_path / "in.mp4", 25)
    with open_video(source) as video:
        expected = video.frames(0, video.frame_count)
    decoders = []
    from_first_frame = decode._PyavReader._from_first_frame

    def count(self):
        decoders.append(self)
        return from_first_frame(self)

    monkeypatch.setattr(decode._PyavReader, "_from_first_frame", count)
    monkeypatch.setattr(decode, "_open_decord", lambda header: pytest.fail("decord keeps the frames of the whole clip"))
    chunks = []

    class Recorder(FakeStage, RifeStage):
        def process_chunk(self, shot, frames, chunk):
            part = self.source_frames(shot, chunk)
            np.testing.assert_array_equal(frames, expected[part.start : part.stop])
            chunks.append(chunk)
            return frames[:1]

    profile = load_profile("tiny")
    shot = Shot(**{**profile.defaults, "prompt": "a", "fps_out": 32})
    with Recorder(profile.params(RifeStage)) as stage:
        upscale_clip(stage, shot, source, tmp_path / "out.mp4", Mp4Settings(preset="ultrafast"))
    assert len(decoders) == 1
    assert [chunk.start for chunk in chunks] == list(range(67))  # 25 frames at 12 per second last as long as 66.7 at 32
