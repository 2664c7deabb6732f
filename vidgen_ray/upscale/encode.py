"""Encode the frames of a segment to a file of its own, which starts with a keyframe and refers to no other segment."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
from pydantic import BaseModel, ConfigDict, Field

from vidgen_ray.errors import MediaError
from vidgen_ray.media.files import wrap_write_errors
from vidgen_ray.media.thread_priority import end_real_time_priority
from vidgen_ray.upscale.frames import Pixels, YuvConverter
from vidgen_ray.upscale.source import Source

Codec = Literal["h264", "hevc", "av1"]

ENCODERS: dict[Codec, str] = {"h264": "libx264", "hevc": "libx265", "av1": "libsvtav1"}
DEFAULT_CRF: dict[Codec, int] = {"h264": 18, "hevc": 20, "av1": 25}
SVT_PRESETS = {
    "ultrafast": 12,
    "superfast": 11,
    "veryfast": 10,
    "faster": 9,
    "fast": 8,
    "medium": 7,
    "slow": 5,
    "slower": 4,
    "veryslow": 2,
}
"""x264's name of a preset -> preset of SVT-AV1."""
SEGMENT_SUFFIX = ".mp4"

Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]


class EncodeSettings(BaseModel):
    """Compression of upscaled videos. Every field changes the bytes of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    codec: Codec = "h264"
    crf: int = Field(18, ge=0, le=63)
    """Quality, lower is better and larger. The scale depends on the codec."""
    preset: Preset = "medium"
    threads: int = Field(4, ge=1, le=64)
    """Threads of the encoder. Fixed, because the output depends on the number."""


def write_segment(
    path: Path,
    frames: Iterable[Pixels],
    count: int,
    size: tuple[int, int],
    fps: Fraction,
    source: Source,
    settings: EncodeSettings,
) -> None:
    """Encode exactly `count` frames of `size` (width, height in pixels).

    Frame i has the time i / fps; the real times are set when segments are joined.
    Raises MediaError if there are fewer or more frames, WriteError if the file cannot be written. It is deleted on an error.
    """
    # By default, SVT-AV1 prints its settings. 1: errors only.
    os.environ.setdefault("SVT_LOG", "1")
    converter = YuvConverter(source.colour, source.bits)
    written = 0
    with ExitStack() as stack:
        with wrap_write_errors(path):
            container = stack.enter_context(av.open(str(path.absolute()), "w", "mp4", options={"fflags": "+bitexact"}))
            stream = container.add_stream(ENCODERS[settings.codec], rate=fps, options=_options(source, settings))
            stream.width, stream.height = size
            stream.pix_fmt = converter.pixel_format
            _tag(stream.codec_context, source)
        # Errors of the frames themselves keep their class.
        for pixels in frames:
            with wrap_write_errors(path):
                frame = converter.convert(pixels)
                frame.pts, frame.time_base = written, 1 / fps
                packets = stream.encode(frame)
                if written == 0 and settings.codec == "av1":
                    # The first frame opens the encoder.
                    end_real_time_priority()
                container.mux(packets)
            written += 1
        if written != count:
            raise MediaError(f"{source.path}: got {written} upscaled frames of a segment, must be {count}")
        with wrap_write_errors(path):
            container.mux(stream.encode(None))
            container.close()


def _tag(codec: Any, source: Source) -> None:
    """Set aspect ratio and colour tags."""
    codec.sample_aspect_ratio = source.pixel_aspect
    codec.colorspace = source.colour.matrix
    codec.color_primaries = source.colour.primaries
    codec.color_trc = source.colour.transfer
    codec.color_range = 2 if source.colour.full_range else 1


def _options(source: Source, settings: EncodeSettings) -> dict[str, str]:
    hdr = _hdr_options(source, settings.codec)
    if settings.codec == "h264":
        # Without cpu-independent, the result depends on whether the CPU has AVX.
        parameters = ["cpu-independent=1", "open-gop=0", *hdr]
        return {
            "crf": str(settings.crf),
            "preset": settings.preset,
            "threads": str(settings.threads),
            "x264-params": ":".join(parameters),
        }
    if settings.codec == "hevc":
        parameters = ["open-gop=0", "log-level=none", f"pools={settings.threads}", "frame-threads=1", *hdr]
        if source.colour.is_hdr:
            parameters += ["hdr10-opt=1", "repeat-headers=0"]
        return {"crf": str(settings.crf), "preset": settings.preset, "x265-params": ":".join(parameters)}
    parameters = [f"lp={settings.threads}", *hdr]
    return {"crf": str(settings.crf), "preset": str(SVT_PRESETS[settings.preset]), "svtav1-params": ":".join(parameters)}


def _hdr_options(source: Source, codec: Codec) -> list[str]:
    """Return the encoder's parameters for static HDR metadata."""
    options = []
    if source.hdr.mastering is not None:
        red, green, blue, white = (source.hdr.mastering[i : i + 2] for i in range(0, 8, 2))
        low, high = source.hdr.mastering[8:]
        points = {"G": green, "B": blue, "R": red, "WP": white}
        if codec == "av1":
            text = "".join(f"{name}({float(x):.5f},{float(y):.5f})" for name, (x, y) in points.items())
            options.append(f"mastering-display={text}L({float(high):.4f},{float(low):.4f})")
        else:
            text = "".join(f"{name}({_scaled(x, 50_000)},{_scaled(y, 50_000)})" for name, (x, y) in points.items())
            name = "master-display" if codec == "hevc" else "mastering-display"
            options.append(f"{name}={text}L({_scaled(high, 10_000)},{_scaled(low, 10_000)})")
    if source.hdr.light is not None:
        name = {"h264": "cll", "hevc": "max-cll", "av1": "content-light"}[codec]
        options.append(f"{name}={source.hdr.light[0]},{source.hdr.light[1]}")
    return options


def _scaled(value: Fraction, unit: int) -> int:
    return round(value * unit)
