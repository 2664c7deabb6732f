"""FFmpeg filter graphs: build chains and pull frames through them as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import av
from av.filter import Graph


def add_chain(graph: Graph, source: Any, filters: Sequence[str]) -> Any:
    """Append filters, written as `name=options`, to a node of the graph. Return the last one."""
    node = source
    for text in filters:
        name, _, options = text.partition("=")
        following = graph.add(name, options or None)
        node.link_to(following)
        node = following
    return node


def filtered(frames: Iterable[Any], source: Any, sink: Any) -> Iterator[Any]:
    """Push frames into a configured graph with one open input, and yield what comes out.

    Stops when a filter has ended the stream, even if there are more frames. Endless with a filter such as tpad.
    """
    for frame in chain(frames, [None]):
        source.push(frame)
        while True:
            try:
                out = sink.pull()
            except av.BlockingIOError:
                break
            except av.EOFError:
                return
            yield out


def available(sink: Any) -> Iterator[Any]:
    """Yield the frames that the graph has ready."""
    while True:
        try:
            frame = sink.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        yield frame
