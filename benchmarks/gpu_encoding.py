"""The H.264 encoder of a GPU (NVENC) against x264: seconds, whether its bytes repeat, and PSNR at the same size of the file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from vidgen_ray.media.decode import open_video
from vidgen_ray.media.encode import COLOUR_TAGS, Mp4Settings, Mp4Writer
from vidgen_ray.stages.base import Frames

FPS = 24
NVENC, NVENC_OPTIONS = "h264_nvenc", {"preset": "p5", "tune": "hq", "rc": "constqp"}
QUANTISERS = (14, 18, 22, 26, 30)
"""Constant quantisers, around the size that x264 needs at crf 18."""
LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
"""Weights of red, green and blue in BT.709. Files have a quarter of the colours, whatever the encoder."""


def encoding_rates(on_gpu: bool, codec: str = NVENC, options: Mapping[str, str] = NVENC_OPTIONS) -> dict[str, Any]:
    """Return rows for x264 with the settings of profiles, for each quantiser of the other encoder, and for x264's size.

    Of a clip that moves and has grain, as an upscaled one. Seconds include the conversion of colours, on the CPU.
    """
    frames = _clip(4096, 2304, 10) if on_gpu else _clip(256, 144, 5)
    with TemporaryDirectory(prefix="vidgen-") as folder:
        file = Path(folder, "clip.mp4")
        x264, others = _encoded(file, frames, "x264, crf 18"), []
        try:
            for qp in QUANTISERS:
                others.append(_encoded(file, frames, f"{codec}, qp {qp}", codec, {**options, "qp": str(qp)}))
        # Without a GPU that has the encoder, or its driver.
        except Exception as error:
            return {"rates": [x264, *others], "problem": f"{codec}: {str(error).rpartition(': ')[2]}"}
    sizes, qualities = ([row[name] for row in reversed(others)] for name in ("bytes", "psnr_db"))
    psnr_db = np.interp(np.log(x264["bytes"]), np.log(sizes), qualities, left=np.nan, right=np.nan)
    at_same_size = {"encoder": f"{codec} at the size of x264", "bytes": x264["bytes"], "psnr_db": float(psnr_db)}
    return {"rates": [x264, *others, at_same_size]}


def _clip(width: int, height: int, frames: int) -> Frames:
    """Return smooth frames that move by 4 pixels each, with noise of a standard deviation of 3 levels."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (9, 16, 3), np.uint8))
    image = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    moved = (np.roll(image, 4 * n, 1) + random.normal(0, 3, image.shape) for n in range(frames))
    return np.stack([frame.round().clip(0, 255).astype(np.uint8) for frame in moved])


def _encoded(
    file: Path, frames: Frames, name: str, codec: str | None = None, options: Mapping[str, str] = {}
) -> dict[str, Any]:
    """Write the frames twice with an encoder, with that of profiles by default, and compare the file with them."""
    count, height, width, _ = frames.shape
    seconds, cpu_seconds, contents = [], [], set()
    for _ in range(2):
        writer = Mp4Writer(file, width, height, FPS, Mp4Settings())
        if codec is not None:
            writer._codec, writer._codec_options = codec, {**options, **COLOUR_TAGS}
        begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
        with writer:
            writer.write(frames)
        seconds.append(time.perf_counter() - begun_s)
        cpu_seconds.append(time.process_time() - begun_cpu_s)
        contents.add(file.read_bytes())
    with open_video(file) as video:
        errors = [np.square((video.frames(n, n + 1)[0].astype(np.float32) - frames[n]) @ LUMA).mean() for n in range(count)]
    return {
        "encoder": name,
        "s_per_frame": min(seconds) / count,
        "cpu_s_per_mpx": min(cpu_seconds) / (count * height * width / 1e6),
        "bytes": file.stat().st_size,
        "psnr_db": float(10 * np.log10(255**2 / np.mean(errors))),
        "same_bytes": len(contents) == 1,
    }
