"""Videos made on the spot for the tests of `vidgen upscale`."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vidgen_ray.upscale.frames import end_real_time_priority

SIZE = 64, 48
"""Width and height in pixels."""


def picture(number: int, width: int = SIZE[0], height: int = SIZE[1], levels: int = 255) -> np.ndarray:
    """Return frame `number` of a moving pattern: no two of the first 500 are equal, (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    red, green, blue = (x * 3 + number * 5) % 256, (y * 4 + number) % 256, 40 + 80 * ((x // 8 + y // 8 + number // 3) % 2)
    pixels = np.stack([red, green, np.broadcast_to(blue, red.shape)], -1)
    return (pixels * (levels // 255)).astype(np.uint8 if levels == 255 else np.uint16)


def disc(number: int, width: int, height: int) -> np.ndarray:
    """Return image `number` of a disc that moves by 3 pixels per image, (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    ground = 100 + 30 * (np.sin(x / 7) + np.cos(y / 9))
    return np.repeat(np.where(np.hypot(x - 20 - 3 * number, y - 48) < 18, 230, ground)[..., None], 3, -1).astype(np.uint8)


def woven(order: str) -> Callable[..., np.ndarray]:
    """Return a function that draws frame n of an interlaced video: lines of discs 2n and 2n + 1. `order`: tff or bff."""

    def draw(number: int, width: int, height: int, **_: int) -> np.ndarray:
        pixels = disc(2 * number, width, height)
        second = slice(int(order == "tff"), None, 2)
        pixels[second] = disc(2 * number + 1, width, height)[second]
        return pixels

    return draw


def repeatable(codec: str, options: dict[str, str]) -> dict[str, str]:
    """Return options of an encoder that writes the same file each time and on every machine.

    Without `cpu-independent`, x264 also reads unfilled memory below 128 pixels of width.
    """
    if codec != "libx264":
        return options
    parameters = ":".join(filter(None, ("cpu-independent=1", options.get("x264-params"))))
    return {"threads": "2", **options, "x264-params": parameters}


def write_video(
    path: Path,
    frames: int = 12,
    *,
    size: tuple[int, int] = SIZE,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    times: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 12),
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    sound_s: float = 0.0,
    sound_codec: str = "aac",
    subtitles: Sequence[tuple[float, str]] = (),
    chapters: Sequence[tuple[float, float, str]] = (),
    aspect: Fraction | None = None,
    colour: tuple[int, int, int, int] | None = None,
    rotation: int | None = None,
    metadata: dict[str, str] | None = None,
    draw: Callable[..., np.ndarray] = picture,
) -> Path:
    """Write a video of `frames` frames. `times` are in units of `time_base`. `colour`: matrix, primaries, transfer, range."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        container.metadata.update(metadata or {})
        rate = round(1 / time_base) if times is None else 12
        video = container.add_stream(codec, rate=rate, options=repeatable(codec, options or {}))
        video.width, video.height = size
        video.pix_fmt = pixel_format
        if times is not None:
            video.codec_context.time_base = time_base
            video.time_base = time_base
        if aspect is not None:
            video.codec_context.sample_aspect_ratio = aspect
        if colour is not None:
            context = video.codec_context
            context.colorspace, context.color_primaries, context.color_trc, context.color_range = colour
        if rotation is not None:
            video.set_display_rotation(rotation)
        audio: Any = container.add_stream(sound_codec, rate=48_000, layout="mono") if sound_s else None
        text: Any = None
        if subtitles:
            text = container.add_stream("mov_text" if path.suffix == ".mp4" else "srt")
            text.metadata["language"] = "eng"
            text.codec_context.subtitle_header = b"[Script Info]\nScriptType: v4.00+\n"
        if chapters:
            entries = []
            for number, (begin, end, title) in enumerate(chapters):
                place = {"start": round(begin * 1000), "end": round(end * 1000), "time_base": Fraction(1, 1000)}
                entries.append({"id": number, "metadata": {"title": title}, **place})
            container.set_chapters(entries)
        deep = "10" in pixel_format
        for number in range(frames):
            pixels = draw(number, *size, levels=65535 if deep else 255)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le" if deep else "rgb24").reformat(format=pixel_format)
            frame.pts, frame.time_base = number if times is None else times[number], time_base
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        end_real_time_priority()
        if audio is not None:
            samples = np.sin(np.arange(round(sound_s * 48_000)) / 20).astype(np.float32)[None]
            for begin in range(0, samples.shape[1], 1024):
                block = av.AudioFrame.from_ndarray(samples[:, begin : begin + 1024], format="fltp", layout="mono")
                block.sample_rate, block.pts, block.time_base = 48_000, begin, Fraction(1, 48_000)
                container.mux(audio.encode(block))
            container.mux(audio.encode(None))
        for begin, words in subtitles:
            data = words.encode()
            packet = av.Packet(len(data).to_bytes(2) + data if path.suffix == ".mp4" else data)
            packet.stream, packet.time_base = text, Fraction(1, 1000)
            packet.pts = packet.dts = round(begin * 1000)
            packet.duration = 500
            container.mux(packet)
    return path


def decoded(path: Path) -> tuple[list[np.ndarray], list[Fraction]]:
    """Return the frames as RGB, and their times in seconds."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return [frame.to_ndarray(format="rgb24") for frame in frames], [frame.pts * frame.time_base for frame in frames]


def packets(path: Path, kind: str) -> list[tuple[Fraction, bytes]]:
    """Return time in seconds and content of each packet of the first stream of this type."""
    with av.open(str(path)) as container:
        stream = next(stream for stream in container.streams if stream.type == kind)
        return [(packet.pts * packet.time_base, bytes(packet)) for packet in container.demux(stream) if packet.size]


def audio_only(path: Path) -> None:
    """Write an MP4 file without a video stream."""
    with av.open(str(path), "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
