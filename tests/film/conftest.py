"""Fixtures of the film's tests: an output folder with clips that are made on the spot."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.dataset.conftest import make_folder
from vidgen_ray.media.encode import Mp4Settings, Mp4Writer
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import shot_path

FAST = Mp4Settings(crf=18, preset="ultrafast", threads=1)
RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


def write_clip(path: Path, colour=RED, frames=6, fps=6, size=(64, 48), encode=FAST, sound=None) -> None:
    """Write a clip of one colour, or of a list of colours, one per frame.

    `sound` is (2, samples) at 48 kHz, or a tuple of samples and their rate.
    """
    video = path if sound is None else path.with_suffix(".silent.mp4")
    with Mp4Writer(video, *size, fps, encode) as clip:
        for pixel in colour if isinstance(colour, list) else [colour] * frames:
            clip.write(np.full((1, size[1], size[0], 3), pixel, np.uint8))
    if sound is None:
        return
    samples, rate = sound if isinstance(sound, tuple) else (sound, 48_000)
    with av.open(str(video)) as source, av.open(str(path), "w", format="mp4") as target:
        picture = source.streams.video[0]
        out = target.add_stream_from_template(picture)
        audio = target.add_stream("aac", rate=rate, layout="stereo")
        audio.bit_rate = 192_000
        for packet in source.demux(picture):
            if packet.size:
                packet.stream = out
                target.mux(packet)
        for begin in range(0, samples.shape[1], 1024):
            block = np.ascontiguousarray(samples[:, begin : begin + 1024], np.float32)
            frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
            target.mux(audio.encode(frame))
        target.mux(audio.encode(None))
    video.unlink()


class Shots:
    """An output folder to which finished and failed shots can be added, in the order of their script."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.outputs = OutputFolder(root)
        self._ids: dict[str, None] = {}

    def add(self, shot_id: str, *, line=None, metadata=None, image_only=False, **clip) -> Path:
        """Add a finished shot and return its file."""
        width, height = clip.get("size", (64, 48))
        image = np.full((height, width, 3), GREEN, np.uint8)
        fields = {"id": shot_id, "metadata": metadata or {}, "width": 128, "height": 64}
        self._add(fields, image if image_only else lambda path: write_clip(path, **clip), line)
        return self.root / shot_path(shot_id) / ("image.png" if image_only else "video.mp4")

    def add_failed(self, shot_id: str) -> None:
        self._add({"id": shot_id}, None)

    def _add(self, fields, result, line=None) -> None:
        self._ids.pop(fields["id"], None)
        self._ids[fields["id"]] = None
        make_folder(self.root, [(fields, result)], first_line=line or len(self._ids))


@pytest.fixture
def shots(tmp_path) -> Shots:
    return Shots(tmp_path / "out")


def read_frames(path: Path) -> list[np.ndarray]:
    """Return all frames, each (H, W, 3)."""
    with av.open(str(path)) as film:
        return [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]


def read_sound(path: Path) -> np.ndarray:
    """Return the sound as players hear it, (2, samples) at 48 kHz: encoder delay removed."""
    with av.open(str(path)) as film:
        assert film.streams.audio[0].rate == 48_000
        return np.concatenate([frame.to_ndarray() for frame in film.decode(audio=0)], axis=1)


def tone(seconds: float, hertz: float = 440, gain: float = 0.2, rate: int = 48_000) -> np.ndarray:
    """Return a tone (2, samples)."""
    wave = gain * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave, wave]).astype(np.float32)


def write_sound(path: Path, samples: np.ndarray) -> Path:
    """Write (2, samples) at 48 kHz as a WAV file."""
    with av.open(str(path), "w", format="wav") as target:
        stream = target.add_stream("pcm_s16le", rate=48_000, layout="stereo")
        block = np.ascontiguousarray((np.clip(samples, -1, 1) * 32767).astype(np.int16).T.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(block, format="s16", layout="stereo")
        frame.sample_rate = 48_000
        target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return path
