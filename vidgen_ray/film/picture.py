"""Frames of a piece of the film, made by FFmpeg filters: scale, pad, change of rate and length, overlay of captions and
title cards, cross-fade.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.filter import Graph
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from vidgen_ray.errors import MediaError, UsageError
from vidgen_ray.film.film_settings import FilmSettings, PixelSize
from vidgen_ray.film.timeline import FilmTimeline, Piece, TimelineItem
from vidgen_ray.media.decode import open_video_stream
from vidgen_ray.media.filters import BT709, UNSPECIFIED, add_chain, filtered
from vidgen_ray.media.images import read_image
from vidgen_ray.media.media_file import load_font, missing_letter, wrap_errors
from vidgen_ray.stages.base import Image

CAPTION_HEIGHT, TITLE_HEIGHT = 1 / 18, 1 / 10
"""Height of the letters as a share of the shorter side of the picture."""
_MIN_LETTER_PX = 9
MAX_TEXT_WIDTH, MAX_CAPTION_HEIGHT, MAX_TITLE_HEIGHT = 0.9, 0.5, 0.9
"""Largest text as a share of the picture."""
_MARGIN = 0.05
"""Space below a caption as a share of the height of the picture."""
_INK, OUTLINE, _BACKGROUND = (255, 255, 255), (0, 0, 0), (0, 0, 0)


class Overlay(NamedTuple):
    """Image with transparency and its position in the picture, in pixels."""

    rgba: NDArray[np.uint8]
    """(H, W, 4)."""
    left: int
    top: int


def draw_caption(text: str, size: PixelSize, font: Path | None) -> Overlay:
    """Draw a caption for the lower edge of a picture. Raises UsageError if the text does not fit or the font lacks a letter."""
    lines, loaded = _fitting(text, size, font, CAPTION_HEIGHT, MAX_CAPTION_HEIGHT)
    outline_px = max(1, round(loaded.size / 10))
    left, top, right, bottom = _box(lines, loaded, outline_px)
    width, height = _even(right - left), _even(bottom - top)
    image = PILImage.new("RGBA", (width, height), (0, 0, 0, 0))
    ImageDraw.Draw(image).multiline_text(
        (-left, -top), lines, _INK, loaded, align="center", stroke_width=outline_px, stroke_fill=OUTLINE
    )
    # Even positions, since the chroma of two pixels is shared.
    x = (size.width - width) // 4 * 2
    y = (size.height - height - round(size.height * _MARGIN)) // 2 * 2
    return Overlay(np.asarray(image), max(0, x), max(0, y))


def draw_title(text: str, size: PixelSize, font: Path | None) -> Image:
    """Draw a title card (H, W, 3), text in the middle. Raises UsageError if it does not fit or the font lacks a letter."""
    lines, loaded = _fitting(text, size, font, TITLE_HEIGHT, MAX_TITLE_HEIGHT)
    card = PILImage.new("RGB", size, _BACKGROUND)
    left, top, right, bottom = _box(lines, loaded, 0)
    position = (size.width - right + left) / 2 - left, (size.height - bottom + top) / 2 - top
    ImageDraw.Draw(card).multiline_text(position, lines, _INK, loaded, align="center")
    return np.asarray(card)


def _fitting(
    text: str, size: PixelSize, font: Path | None, height: float, max_height: float
) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return the text with line breaks, and the font with the largest letters that fit."""
    letter_px = max(_MIN_LETTER_PX, round(min(size) * height))
    while letter_px >= _MIN_LETTER_PX:
        loaded = _font(font, letter_px)
        if (letter := missing_letter(text, loaded)) is not None:
            raise UsageError(f"text {text[:60]!r}: the font has no letter {letter!r}; set a font that has it")
        lines = "\n".join(_balanced(text, loaded, size.width * MAX_TEXT_WIDTH))
        left, top, right, bottom = _box(lines, loaded, round(letter_px / 10))
        if right - left <= size.width and bottom - top <= size.height * max_height:
            return lines, loaded
        letter_px = min(letter_px - 1, round(letter_px * 0.9))
    shown = text if len(text) <= 60 else f"{text[:59]}…"
    raise UsageError(f"text {shown!r}: too long for a picture of {size}; shorten it or use a larger size")


def _font(path: Path | None, letter_px: int) -> ImageFont.FreeTypeFont:
    try:
        return load_font(path, letter_px)
    except OSError:
        raise UsageError(f"font {path}: not a font; must be a .ttf, .otf or .ttc file") from None


def _balanced(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> Sequence[str]:
    """Break lines so that they are about equally long, without more lines than needed."""
    lines = _wrapped(text, font, width_px)
    while width_px > font.size and len(narrower := _wrapped(text, font, width_px - font.size / 2)) == len(lines):
        lines, width_px = narrower, width_px - font.size / 2
    return lines


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> Sequence[str]:
    """Break lines at blanks, and inside words that are wider than the picture."""
    lines = []
    for paragraph in text.strip().splitlines():
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if line and font.getlength(joined) > width_px:
                lines.append(line)
                joined = word
            while font.getlength(joined) > width_px and len(joined) > 1:
                count = max(1, sum(font.getlength(joined[:end]) <= width_px for end in range(1, len(joined))))
                lines.append(joined[:count])
                joined = joined[count:]
            line = joined
        lines.append(line)
    return lines


def _box(lines: str, font: ImageFont.FreeTypeFont, outline_px: int) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the text drawn at (0, 0), in whole pixels."""
    canvas = ImageDraw.Draw(PILImage.new("L", (1, 1)))
    box = canvas.multiline_textbbox((0, 0), lines, font, align="center", stroke_width=outline_px)
    left, top, right, bottom = box
    return int(left) - 1, int(top) - 1, int(right) + 2, int(bottom) + 2


def _even(value: int) -> int:
    return value + value % 2


OpenFile = Callable[[str], AbstractContextManager[Path]]
"""Yields a local file with the content of a path of the output folder."""
LIMITED = 1
"""FFmpeg's number of the limited range."""
SCALING = (
    "force_original_aspect_ratio=decrease:force_divisible_by=2:out_color_matrix=bt709:out_range=tv"
    ":flags=lanczos+accurate_rnd+full_chroma_int+bitexact"
)


def check_texts(timeline: FilmTimeline, settings: FilmSettings) -> None:
    """Draw all titles and burnt-in captions. Raises UsageError that names the shot if one cannot be drawn."""
    for item in timeline.items:
        source = item.source
        try:
            if source.title is not None:
                draw_title(source.title, timeline.size, settings.font)
            if settings.captions == "burn" and source.settings.caption is not None:
                draw_caption(source.settings.caption, timeline.size, settings.font)
        except UsageError as error:
            raise UsageError(f"{source.name}: {error}") from None


def piece_frames(piece: Piece, timeline: FilmTimeline, settings: FilmSettings, open_file: OpenFile) -> Iterator[av.VideoFrame]:
    """Yield the frames of a piece: yuv420p, BT.709, limited range, in the size of the film. Raises MediaError."""
    caption = burnt_caption(piece, settings)
    frames = _item_frames(piece.item, piece.first, piece.frames, timeline, settings, caption, open_file)
    if piece.fade_to is None:
        return frames
    following = _item_frames(piece.fade_to, 0, piece.frames, timeline, settings, None, open_file)
    return _cross_fade(frames, following, piece, timeline)


def burnt_caption(piece: Piece, settings: FilmSettings) -> str | None:
    """Return the caption that is drawn into a piece. `None` during a cross-fade, where two captions would overlap."""
    if settings.captions != "burn" or piece.fade_to is not None:
        return None
    return piece.item.source.settings.caption


def _item_frames(
    item: TimelineItem,
    first: int,
    count: int,
    timeline: FilmTimeline,
    settings: FilmSettings,
    caption: str | None,
    open_file: OpenFile,
) -> Iterator[av.VideoFrame]:
    """Yield `count` frames of an item from frame `first`. The last frame of a clip is repeated as long as needed."""
    with (
        wrap_errors(f"{item.source.name}: the picture cannot be rendered"),
        _decoded(item, timeline, settings, open_file) as frames,
    ):
        start = next(frames, None)
        if start is None:
            raise MediaError(f"{item.source.path}: has no frames")
        graph = Graph()
        source = graph.add("buffer", _buffer_options(start))
        width, height = timeline.size
        node = add_chain(
            graph,
            source,
            [
                f"scale={width}:{height}:{SCALING}",
                "format=yuv420p",
                f"pad={width}:{height}:(ow-iw)/4*2:(oh-ih)/4*2",
                "setsar=1",
                f"setpts=(PTS-STARTPTS)*{item.stretch}",
                f"fps={timeline.fps}",
                "tpad=stop=-1:stop_mode=clone",
            ],
        )
        overlay = None if caption is None else draw_caption(caption, timeline.size, settings.font)
        image = None
        if overlay is not None:
            node, image = _with_overlay(graph, node, overlay)
        sink = add_chain(graph, node, ["format=yuv420p", "buffersink"])
        graph.configure()
        if image is not None and overlay is not None:
            image.push(_still(overlay.rgba, "rgba"))
            image.push(None)
        yield from islice(filtered(zip(chain([start], frames), strict=True), [source], sink), first, first + count)


@contextmanager
def _decoded(
    item: TimelineItem, timeline: FilmTimeline, settings: FilmSettings, open_file: OpenFile
) -> Iterator[Iterator[av.VideoFrame]]:
    """Open the source of an item and yield its frames: those of the clip, or one."""
    source = item.source
    if source.path is None:
        assert source.title is not None
        yield iter([_still(draw_title(source.title, timeline.size, settings.font))])
        return
    with open_file(source.path) as path:
        if source.clip is None:
            yield iter([_still(read_image(path))])
            return
        with open_video_stream(path) as (opened, stream):
            yield opened.decode(stream)


def _still(image: Any, pixel_format: str = "rgb24") -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=pixel_format)
    frame.pts, frame.time_base, frame.duration = 0, Fraction(1, 1000), 1000
    return frame


def _buffer_options(frame: av.VideoFrame) -> str:
    """Return the options of the graph's input. Without the colour tags, FFmpeg would guess them."""
    is_rgb = frame.format.is_rgb
    return (
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={frame.time_base}:pixel_aspect=1/1"
        f":colorspace={UNSPECIFIED if is_rgb else int(frame.colorspace)}:range={int(frame.color_range)}"
    )


def _with_overlay(graph: Graph, node: Any, overlay: Overlay) -> tuple[Any, Any]:
    """Lay an image over the pictures. Return the output, and the input for the image."""
    height, width, _ = overlay.rgba.shape
    image = graph.add("buffer", f"video_size={width}x{height}:pix_fmt=rgba:time_base=1/1000:pixel_aspect=1/1")
    over = graph.add("overlay", f"{overlay.left}:{overlay.top}:eof_action=repeat:format=yuv420")
    node.link_to(over, 0, 0)
    image.link_to(over, 0, 1)
    return over, image


def _cross_fade(
    before: Iterator[av.VideoFrame], after: Iterator[av.VideoFrame], piece: Piece, timeline: FilmTimeline
) -> Iterator[av.VideoFrame]:
    """Yield the cross-fade of two items, both with the frames of the piece."""
    width, height = timeline.size
    options = (
        f"video_size={width}x{height}:pix_fmt=yuv420p:time_base={1 / timeline.fps}:frame_rate={timeline.fps}"
        f":pixel_aspect=1/1:colorspace={BT709}:range={LIMITED}"
    )
    graph = Graph()
    inputs = [graph.add("buffer", options), graph.add("buffer", options)]
    fade = graph.add("xfade", f"transition=fade:duration={float(piece.frames / timeline.fps)}:offset=0")
    for number, source in enumerate(inputs):
        source.link_to(fade, 0, number)
    sink = add_chain(graph, fade, ["format=yuv420p", "buffersink"])
    graph.configure()
    numbered = (_numbered(frames, timeline.fps) for frames in (before, after))
    yield from filtered(zip(*numbered, strict=True), inputs, sink)


def _numbered(frames: Iterator[av.VideoFrame], fps: Fraction) -> Iterator[av.VideoFrame]:
    for number, frame in enumerate(frames):
        frame.pts, frame.time_base = number, 1 / fps
        yield frame
