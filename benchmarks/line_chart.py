"""Line charts and dot charts as one SVG file, without a package for plots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
WIDTH_PX, HEIGHT_PX = 380, 320
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 48, 18, 34, 44
LEGEND_LINE_PX = 15
MAX_DOTS = 8
"""Points of a line from which they are not drawn as dots."""
STYLE = (
    "text{font:12px sans-serif;fill:#222}.title{font-weight:bold;font-size:13px}.middle{text-anchor:middle}"
    ".end{text-anchor:end}.small{font-size:11px}"
)

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart of several lines, each with a name."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Points]
    y_ticks: Sequence[float]
    x_ticks: Sequence[float]
    is_log: bool = False
    """The y axis is logarithmic."""
    legend_at: tuple[float, float] = (0.04, 0.06)
    """Upper left corner of the legend, as fractions of the chart."""

    def y_of(self, value: float) -> float:
        low, high = (self._scaled(self.y_ticks[n]) for n in (0, -1))
        share = (self._scaled(value) - low) / (high - low)
        return HEIGHT_PX - BOTTOM_PX - share * (HEIGHT_PX - TOP_PX - BOTTOM_PX)

    def x_of(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return LEFT_PX + (value - low) / (high - low) * (WIDTH_PX - LEFT_PX - RIGHT_PX)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, self.y_ticks[0])) if self.is_log else value

    def elements(self) -> Iterator[str]:
        """Yield the elements of the chart, at the origin."""
        yield _text(LEFT_PX, 18, self.title, "title")
        yield _text((LEFT_PX + WIDTH_PX - RIGHT_PX) / 2, HEIGHT_PX - 8, self.x_label, "middle")
        yield _text(LEFT_PX, TOP_PX - 3, self.y_label, "small")
        for y in self.y_ticks:
            yield _line(LEFT_PX, self.y_of(y), WIDTH_PX - RIGHT_PX, self.y_of(y), "#ddd")
            yield _text(LEFT_PX - 5, self.y_of(y) + 4, f"{y:g}", "end")
        for x in self.x_ticks:
            yield _text(self.x_of(x), HEIGHT_PX - BOTTOM_PX + 15, f"{x:g}", "middle")
        for number, (name, points) in enumerate(self.lines.items()):
            yield from self._line(COLOURS[number], name, points, number)

    def _line(self, colour: str, name: str, points: Points, number: int) -> Iterator[str]:
        places = [(self.x_of(x), self.y_of(y)) for x, y in points if not self.is_log or y > 0]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        if len(points) < MAX_DOTS:
            yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places)
        x = LEFT_PX + self.legend_at[0] * (WIDTH_PX - LEFT_PX - RIGHT_PX)
        y = TOP_PX + self.legend_at[1] * (HEIGHT_PX - TOP_PX - BOTTOM_PX) + LEGEND_LINE_PX * number
        yield _line(x, y, x + 16, y, colour, 3)
        yield _text(x + 21, y + 4, name, "small")


def charts_svg(charts: Sequence[Chart]) -> str:
    """Return the charts side by side as an SVG file."""
    width = WIDTH_PX * len(charts)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT_PX}" width="{width}" height="{HEIGHT_PX}">',
        f"<style>{STYLE}</style>",
        f'<rect width="{width}" height="{HEIGHT_PX}" fill="white"/>',
    ]
    for number, chart in enumerate(charts):
        parts += [f'<g transform="translate({number * WIDTH_PX},0)">', *chart.elements(), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, colour: str, width: int = 1) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}" stroke-width="{width}"/>'
