"""A square canvas that is drawn on with curves in scene units: filled, stroked, soft or shaded, with anti-aliased edges.

Coordinates: x to the right, y down. The centre of the image is (0, 0), its edges are at -1 and 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

Colour = tuple[float, float, float]
"""Red, green, blue, 0 to 1."""
Shape = NDArray[np.float32]
"""Corners of a polygon or points of a line (N, 2), x and y in scene units."""

OVER = 2
"""Pixels drawn per side of a pixel of the image. Edges are anti-aliased before the image is reduced, too."""
SUBPIXEL_BITS = 4
STEPS = 8
"""Points of a curve per control point."""


def mixed(one: Colour, other: Colour, share: float) -> Colour:
    """Return the colour between two colours: `one` with a share of 0, `other` with 1."""
    r, g, b = (a + (c - a) * share for a, c in zip(one, other, strict=True))
    return r, g, b


def scaled(colour: Colour, by: float) -> Colour:
    r, g, b = (min(1.0, value * by) for value in colour)
    return r, g, b


def lit(colour: Colour, light: Colour) -> Colour:
    r, g, b = (min(1.0, value * of) for value, of in zip(colour, light, strict=True))
    return r, g, b


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Shape:
    around = np.linspace(0, 2 * np.pi, 49, dtype=np.float32)[:-1]
    points = np.stack([rx * np.cos(around), ry * np.sin(around)], axis=1)
    return turned(points, angle) + np.array((x, y), np.float32)


def box(x: float, y: float, rx: float, ry: float) -> Shape:
    return np.array([(x - rx, y - ry), (x + rx, y - ry), (x + rx, y + ry), (x - rx, y + ry)], np.float32)


def rounded(x: float, y: float, rx: float, ry: float, corner: float) -> Shape:
    """Return a box with round corners."""
    around = np.linspace(0, np.pi / 2, 7, dtype=np.float32)
    arc = np.stack([np.cos(around), np.sin(around)], axis=1) * corner
    parts = []
    for sx, sy, flip in ((1, 1, False), (-1, 1, True), (-1, -1, False), (1, -1, True)):
        part = arc * (sx, sy) + ((rx - corner) * sx, (ry - corner) * sy)
        parts.append(part[::-1] if flip else part)
    return np.concatenate(parts).astype(np.float32) + np.array((x, y), np.float32)


def turned(points: Shape, angle: float, about: tuple[float, float] = (0.0, 0.0)) -> Shape:
    """Turn points by an angle in radians, clockwise in the image."""
    cos, sin = np.cos(angle), np.sin(angle)
    centre = np.array(about, np.float32)
    return ((points - centre) @ np.array([(cos, sin), (-sin, cos)], np.float32) + centre).astype(np.float32)


def curve(points: Sequence[tuple[float, float]] | Shape, closed: bool = True) -> Shape:
    """Return a smooth line through the points. Source: Catmull and Rom 1974."""
    corners = np.asarray(points, np.float32)
    if closed:
        padded = np.concatenate([corners[-1:], corners, corners[:2]])
    else:
        padded = np.concatenate([2 * corners[:1] - corners[1:2], corners, 2 * corners[-1:] - corners[-2:-1]])
    weights = _spline_weights()
    windows = np.stack([padded[n : len(padded) - 3 + n] for n in range(4)], axis=1)
    line = np.einsum("sw,nwd->nsd", weights, windows).reshape(-1, 2)
    return line.astype(np.float32) if closed else np.concatenate([line, corners[-1:]]).astype(np.float32)


@lru_cache(1)
def _spline_weights() -> NDArray[np.float32]:
    t = np.linspace(0, 1, STEPS + 1)[:-1]
    rows = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3)
    return (0.5 * np.stack(rows, axis=1)).astype(np.float32)


@dataclass(slots=True)
class Canvas:
    """The drawn pixels (S, S, 3), uint8, where S is OVER times the size of the image."""

    pixels: NDArray[np.uint8]
    nearer: float = 1.0
    """Zoom factor of the camera."""
    centre_y: float = 0.0
    """The y of the scene at the centre of the image."""

    @classmethod
    def blank(cls, size_px: int, nearer: float = 1.0, centre_y: float = 0.0) -> Canvas:
        return cls(np.zeros((size_px * OVER, size_px * OVER, 3), np.uint8), nearer, centre_y)

    def image(self) -> NDArray[np.uint8]:
        size_px = len(self.pixels) // OVER
        return np.asarray(cv2.resize(self.pixels, (size_px, size_px), interpolation=cv2.INTER_AREA), np.uint8)

    def fill(self, shape: Shape, colour: Colour, opacity: float = 1.0) -> None:
        if opacity == 1.0:
            cv2.fillPoly(self.pixels, [self._fixed(shape)], _bytes(colour), cv2.LINE_AA, SUBPIXEL_BITS)
            return
        if (area := self._area(shape)) is not None:
            self._blend(area, self._cover(shape, area) * opacity, colour)

    def strokes(self, lines: Sequence[Shape], colour: Colour, width: float, closed: bool = False) -> None:
        """Draw lines of a width in scene units."""
        drawn_px = max(1, round(width * self._per_unit))
        fixed = [self._fixed(line) for line in lines]
        cv2.polylines(self.pixels, fixed, closed, _bytes(colour), drawn_px, cv2.LINE_AA, SUBPIXEL_BITS)

    def veil(self, lines: Sequence[Shape], colour: Colour, width: float, opacity: float) -> None:
        """Draw lines of which what is below can be seen. Where they cross, they are not darker."""
        if (area := self._area(np.concatenate(list(lines)), width)) is None:
            return
        cover = np.zeros((area[0].stop - area[0].start, area[1].stop - area[1].start), np.uint8)
        drawn_px = max(1, round(width * self._per_unit))
        cv2.polylines(cover, [self._fixed(line, area) for line in lines], False, 255, drawn_px, cv2.LINE_AA, SUBPIXEL_BITS)
        self._blend(area, cover.astype(np.float32) * (opacity / 255), colour)

    def soft(self, shape: Shape, colour: Colour, opacity: float, blur: float) -> None:
        """Fill a shape with a soft edge. `blur`: standard deviation in scene units."""
        if (area := self._area(shape, 2.5 * blur)) is None:
            return
        sigma_px = blur * self._per_unit
        coarse = max(1, int(sigma_px / 3))
        cover = self._cover(shape, area, coarse)
        cover = cv2.GaussianBlur(cover, (0, 0), max(0.3, sigma_px / coarse), borderType=cv2.BORDER_REPLICATE)
        rows, columns = area
        size = (columns.stop - columns.start, rows.stop - rows.start)
        cover = cv2.resize(cover, size, interpolation=cv2.INTER_LINEAR) if coarse > 1 else cover
        self._blend(area, cover * opacity, colour)

    def shade(self, shape: Shape, colour: Colour, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Cover a shape more and more between two points: not at all at `start`, wholly at `end`."""
        if (area := self._area(shape)) is None:
            return
        (x0, y0), (x1, y1) = self._px(np.array([start, end], np.float32))
        dx, dy = x1 - x0, y1 - y0
        rows, columns = area
        across = (np.arange(columns.start, columns.stop, dtype=np.float32) - x0) * (dx / (dx * dx + dy * dy))
        down = (np.arange(rows.start, rows.stop, dtype=np.float32) - y0) * (dy / (dx * dx + dy * dy))
        share = np.clip(down[:, None] + across[None], 0, 1)
        self._blend(area, self._cover(shape, area) * share, colour)

    @contextmanager
    def within(self, shape: Shape) -> Iterator[None]:
        """Keep what is drawn inside the block to a shape."""
        before = self.pixels.copy()
        yield
        if (area := self._area(shape)) is not None:
            below = before[area].astype(np.float32)
            cover = self._cover(shape, area)[..., None]
            before[area] = below + (self.pixels[area] - below) * cover + np.float32(0.5)
        self.pixels[:] = before

    def gradient(self, top: Colour, bottom: Colour, start_y: float, end_y: float) -> None:
        """Fill all rows between two heights from `top` to `bottom`, and the rows above `start_y` with `top`."""
        (_, first), (_, last) = self._px(np.array([(0, start_y), (0, end_y)], np.float32))
        rows = np.arange(len(self.pixels), dtype=np.float32)
        share = np.clip((rows - first) / (last - first), 0, 1)[:, None]
        colours = np.asarray(top, np.float32) + (np.asarray(bottom, np.float32) - np.asarray(top, np.float32)) * share
        stop = int(np.clip(np.ceil(last), 0, len(rows)))
        self.pixels[:stop] = np.rint(colours[:stop, None] * 255)

    def graded(self, colour: Colour, opacity: float) -> None:
        """Mix a colour into the whole image."""
        flat = np.full_like(self.pixels, _bytes(colour))
        cv2.addWeighted(self.pixels, 1 - opacity, flat, opacity, 0, dst=self.pixels)

    @property
    def _per_unit(self) -> float:
        return len(self.pixels) / 2 * self.nearer

    def _px(self, shape: Shape) -> NDArray[np.float32]:
        half = len(self.pixels) / 2
        points = np.asarray(shape, np.float32) - np.array((0, self.centre_y), np.float32)
        return np.asarray(points * (self.nearer * half) + (half - 0.5), np.float32)

    def _fixed(self, shape: Shape, area: tuple[slice, slice] | None = None, coarse: int = 1) -> NDArray[np.int32]:
        points = self._px(shape)
        if area is not None:
            points = (points - np.array((area[1].start, area[0].start), np.float32)) / coarse
        return np.rint(np.clip(points, -4000, 8000) * 2**SUBPIXEL_BITS).astype(np.int32)

    def _area(self, shape: Shape, margin: float = 0.0) -> tuple[slice, slice] | None:
        """Return the rows and columns of the canvas that a shape may cover, or `None` if it is outside."""
        points, size = self._px(shape), len(self.pixels)
        spread = margin * self._per_unit + 2
        left, top = np.clip(np.floor(points.min(0) - spread), 0, size).astype(int)
        right, bottom = np.clip(np.ceil(points.max(0) + spread), 0, size).astype(int)
        return None if right <= left or bottom <= top else (slice(top, bottom), slice(left, right))

    def _cover(self, shape: Shape, area: tuple[slice, slice], coarse: int = 1) -> NDArray[np.float32]:
        rows, columns = area
        size = (-(-(rows.stop - rows.start) // coarse), -(-(columns.stop - columns.start) // coarse))
        cover = np.zeros(size, np.uint8)
        cv2.fillPoly(cover, [self._fixed(shape, area, coarse)], 255, cv2.LINE_AA, SUBPIXEL_BITS)
        return cover.astype(np.float32) / np.float32(255)

    def _blend(self, area: tuple[slice, slice], share: NDArray[np.float32], colour: Colour) -> None:
        below = self.pixels[area].astype(np.float32)
        below += (np.asarray(_bytes(colour), np.float32) - below) * share[..., None]
        self.pixels[area] = below + np.float32(0.5)


def _bytes(colour: Colour) -> tuple[int, int, int]:
    r, g, b = (round(255 * min(1.0, max(0.0, value))) for value in colour)
    return r, g, b
