"""Fixtures of the film's tests: an output folder with clips that are made on the spot."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from vidgen_ray.media import Mp4Settings, Mp4Writer, write_png
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import SCHEMA, ManifestRow
from vidgen_ray.outputs.records import FileRecord, ShotRecord, shot_path
from vidgen_ray.shot import Shot
from vidgen_ray.system.cache_dir import sha256_of

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
        self._rows: list[ManifestRow] = []

    def add(self, shot_id: str, *, script="script.jsonl", line=None, metadata=None, image_only=False, **clip) -> Path:
        """Add a finished shot and return its file."""
        folder = self.root / shot_path(shot_id)
        folder.mkdir(parents=True, exist_ok=True)
        width, height = clip.get("size", (64, 48))
        write_png(folder / "image.png", np.full((height, width, 3), GREEN, np.uint8))
        files = {"image.png"}
        if not image_only:
            write_clip(folder / "video.mp4", **clip)
            files.add("video.mp4")
        shot = Shot(id=shot_id, prompt=shot_id, seed=1, metadata=metadata or {})
        record = ShotRecord(
            key="0" * 64,
            shot=shot,
            tries=1,
            likeness=None,
            seeds={},
            stages=(),
            files={name: FileRecord(sha256=sha256_of(folder / name), bytes=(folder / name).stat().st_size) for name in files},
            software={},
        )
        (folder / "shot.json").write_text(record.model_dump_json(exclude={"committed_at"}))
        self._row(shot_id, script, line, status="done", metadata=json.dumps(metadata or {}))
        return folder / ("image.png" if image_only else "video.mp4")

    def add_failed(self, shot_id: str, *, script="script.jsonl", line=None) -> None:
        self._row(shot_id, script, line, status="failed", failure_stage="svd", failure_message="out of memory")

    def _row(self, shot_id: str, script: str, line: int | None, **columns) -> None:
        self._rows = [row for row in self._rows if row.id != shot_id]
        number = line or len(self._rows) + 1
        self._rows.append(ManifestRow(run="r", script=script, id=shot_id, line=number, **columns))
        (self.root / "manifest").mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist([row.model_dump() for row in self._rows], schema=SCHEMA)
        pyarrow.parquet.write_table(table, self.root / "manifest" / "r-0.parquet")


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
