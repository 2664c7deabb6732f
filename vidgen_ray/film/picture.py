"""Frames of a piece of the film, made by FFmpeg filters: scale, pad, change of rate and length, overlay, cross-fade."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.filter import Graph

from vidgen_ray.errors import MediaError, UsageError
from vidgen_ray.film.filter_graphs import add_chain, available, filtered
from vidgen_ray.film.settings import FilmSettings
from vidgen_ray.film.text_images import Overlay, draw_caption, draw_title
from vidgen_ray.film.timeline import Item, Piece, Timeline
from vidgen_ray.limits import MAX_PIXELS
from vidgen_ray.media import read_image
from vidgen_ray.media.files import open_media, wrap_errors

OpenFile = Callable[[str], AbstractContextManager[Path]]
"""Yields a local file with the content of a path of the output folder."""
BT709, LIMITED, UNSPECIFIED = 1, 1, 2
"""FFmpeg's numbers of colour matrices and ranges."""
DECODE_THREADS = 2
SCALING = (
    "force_original_aspect_ratio=decrease:force_divisible_by=2:out_color_matrix=bt709:out_range=tv"
    ":flags=lanczos+accurate_rnd+full_chroma_int+bitexact"
)


def check_texts(timeline: Timeline, settings: FilmSettings) -> None:
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


def piece_frames(piece: Piece, timeline: Timeline, settings: FilmSettings, open_file: OpenFile) -> Iterator[av.VideoFrame]:
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
    item: Item,
    first: int,
    count: int,
    timeline: Timeline,
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
        yield from islice(filtered(chain([start], frames), source, sink), first, first + count)


@contextmanager
def _decoded(item: Item, timeline: Timeline, settings: FilmSettings, open_file: OpenFile) -> Iterator[Iterator[av.VideoFrame]]:
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
        with open_media(path) as opened:
            stream = opened.streams.best("video")
            stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
            stream.thread_type, stream.thread_count = "AUTO", DECODE_THREADS
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
    before: Iterator[av.VideoFrame], after: Iterator[av.VideoFrame], piece: Piece, timeline: Timeline
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
    for number, pair in enumerate(zip(before, after, strict=True)):
        for source, frame in zip(inputs, pair, strict=True):
            frame.pts, frame.time_base = number, 1 / timeline.fps
            source.push(frame)
        yield from available(sink)
    for source in inputs:
        source.push(None)
    yield from available(sink)
