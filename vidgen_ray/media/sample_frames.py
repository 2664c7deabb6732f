"""Frames of an untrusted video, decoded in a child process: if FFmpeg crashes, hangs or lacks memory, that process ends only.

Run as a program, this module is the child, which writes the frames to its standard output.
"""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from vidgen_ray.errors import MediaError
from vidgen_ray.limits import VIDEO_DECODE_BYTES, VIDEO_DECODE_S
from vidgen_ray.media.checks import check_pixels
from vidgen_ray.stages.base import Image

HEADER = struct.Struct("<II")
"""Before each frame: its width and height in pixels. Before an error message: 0 and the number of its bytes."""
MAX_MESSAGE_BYTES = 10_000


def sample_frames(path: Path, count: int, start_frames: int, timeout_s: float = VIDEO_DECODE_S) -> Generator[Image, None, None]:
    """Yield up to `count` frames (H, W, 3), spread evenly over the first `start_frames` frames of the video.

    Raises MediaError if the video cannot be decoded, or not within `timeout_s` seconds. Closing the generator ends the child.
    """
    arguments = [sys.executable, "-m", __name__, str(path), str(count), str(start_frames)]
    # Each thread of BLAS would take address space, which is limited.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    expired = threading.Event()
    with subprocess.Popen(arguments, env=environment, **pipes) as child:

        def kill() -> None:
            expired.set()
            child.kill()

        timer = threading.Timer(timeout_s, kill)
        timer.start()
        try:
            assert child.stdout is not None
            while len(header := child.stdout.read(HEADER.size)) == HEADER.size:
                width, height = HEADER.unpack(header)
                if not width:
                    raise MediaError(child.stdout.read(min(height, MAX_MESSAGE_BYTES)).decode("utf-8", "replace"))
                check_pixels(path, width, height)
                pixels = child.stdout.read(width * height * 3)
                if len(pixels) < width * height * 3:
                    break
                yield np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
            # Its output has ended, so it has ended or is about to.
            returncode = child.wait()
            if expired.is_set():
                raise MediaError(f"{path}: could not be decoded within {timeout_s:g} s")
            if returncode != 0:
                raise MediaError(f"{path}: the decoder crashed; the file is damaged, or needs too much memory")
        finally:
            timer.cancel()
            child.kill()


def write_frames(path: Path, count: int, start_frames: int) -> None:
    """Write the frames, or the reason why the video cannot be decoded, to the standard output."""
    resource.setrlimit(resource.RLIMIT_AS, (VIDEO_DECODE_BYTES, VIDEO_DECODE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from vidgen_ray.media.decode import open_video

    output = sys.stdout.buffer
    try:
        with open_video(path, backend="pyav") as video:
            frame_count = min(video.frame_count, start_frames)
            for index in sorted({number * frame_count // count for number in range(count)}):
                (frame,) = video.frames(index, index + 1)
                output.write(HEADER.pack(video.width, video.height))
                output.write(frame.tobytes())
    except MediaError as error:
        message = str(error).encode("utf-8", "replace")[:MAX_MESSAGE_BYTES]
        output.write(HEADER.pack(0, len(message)))
        output.write(message)
    output.flush()


if __name__ == "__main__":
    write_frames(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
