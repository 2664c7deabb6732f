"""Graphs of FFmpeg filters: add filters, and push frames through them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain
from typing import Any

import av
from av.filter import Graph

BT709, UNSPECIFIED = 1, 2
"""FFmpeg's numbers of colour matrices: that of BT.709, and a tag that is not set."""


def add_chain(graph: Graph, source: Any, filters: Sequence[str]) -> Any:
    """Append filters, written as `name=options`, to a node of the graph. Return the last one."""
    node = source
    for text in filters:
        name, _, options = text.partition("=")
        following = graph.add(name, options or None)
        node.link_to(following)
        node = following
    return node


def filtered(rounds: Iterable[Sequence[Any]], inputs: Sequence[Any], sink: Any) -> Iterator[Any]:
    """Push frames into a configured graph, in each round one into each of its open inputs, and yield what comes out.

    Stops when a filter has ended the stream, even if there are more frames. Endless with a filter such as tpad.
    """
    for frames in chain(rounds, [(None,) * len(inputs)]):
        for source, frame in zip(inputs, frames, strict=True):
            source.push(frame)
        if (yield from _available(sink)):
            return


def _available(sink: Any) -> Generator[Any, None, bool]:
    """Yield the frames that the graph has ready. Return true at the end of the stream."""
    while True:
        try:
            frame = sink.pull()
        except av.BlockingIOError:
            return False
        except av.EOFError:
            return True
        yield frame


def through_filter(frames: Iterator[Any], text: str) -> Iterator[Any]:
    """Yield video frames after a filter, written as `name=options`. All must have the size and format of the first."""
    if (first := next(frames, None)) is None:
        return
    graph = Graph()
    source = graph.add_buffer(
        width=first.width, height=first.height, format=first.format, time_base=first.time_base or Fraction(1)
    )
    sink = add_chain(graph, source, [text, "buffersink"])
    graph.configure()
    yield from filtered(zip(chain([first], frames), strict=True), [source], sink)
