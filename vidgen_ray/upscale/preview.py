"""A short clip with both versions of a video side by side: left enlarged bicubically, right by the network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import tee
from pathlib import Path

import numpy as np

from vidgen_ray.errors import MediaError
from vidgen_ray.media.files import append_xmp
from vidgen_ray.system.files import new_file
from vidgen_ray.upscale.calibration import Calibration
from vidgen_ray.upscale.encode import write_segment
from vidgen_ray.upscale.frames import FrameReader, Pixels
from vidgen_ray.upscale.job import upscale_frames
from vidgen_ray.upscale.network import UpscaleNetwork
from vidgen_ray.upscale.run import Progress, UpscaleOptions, UpscaleReport, engine_settings, planned_size
from vidgen_ray.upscale.source import read_source


def write_preview(
    video: Path,
    out: Path,
    options: UpscaleOptions,
    calibration: Calibration,
    seconds: float,
    *,
    on_progress: Progress = lambda done, total, made: None,
) -> UpscaleReport:
    """Write `seconds` from the middle of the video to NAME.preview.mp4 beside `out`, at a constant rate and without sound.

    Raises MediaError, StageError and SetupError.
    """
    import cv2

    begin = time.monotonic()
    path = out.with_name(f"{out.stem}.preview.mp4")
    if path.exists() and not options.force:
        raise MediaError(f"{path}: exists; replace it with --force")
    source, size = planned_size(read_source(video), options)
    count = min(source.frame_count, max(1, round(seconds * source.fps)))
    start = (source.frame_count - count) // 2
    on_progress(0, count, 0)
    network = UpscaleNetwork(options.model, engine_settings(source, options.model, calibration), size)
    reader = FrameReader(source)

    def pairs() -> Iterator[Pixels]:
        originals, frames = tee(reader.read(start, start + count))
        for number, (pixels, upscaled) in enumerate(zip(originals, upscale_frames(frames, network), strict=True), 1):
            yield np.concatenate([cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC), upscaled], axis=1)
            on_progress(number, count, number)

    record = options.record(video)
    try:
        with new_file(path) as tmp:
            write_segment(tmp, pairs(), count, (2 * size[0], size[1]), source.fps, source, options.encode)
            if record is not None:
                append_xmp(tmp, record.metadata().xmp)
    finally:
        reader.close()
    return UpscaleReport(
        video=str(video),
        out=str(path),
        frames=count,
        size=f"{2 * size[0]}x{size[1]}",
        seconds=round(time.monotonic() - begin, 3),
        resumed_frames=0,
        was_finished=False,
        notes=(),
        metadata=options.provenance.metadata,
    )
