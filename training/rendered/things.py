"""Draw the things of the rendered world, with materials, light from the upper left and a shadow on the ground."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from training.rendered.backdrops import HORIZON, ON_SUBJECT, rounded_top
from training.rendered.canvas import Canvas, Colour, Shape, box, curve, ellipse, lit, mixed, rounded, scaled
from training.rendered.world import COLOURS, Scene, Thing

INK: Colour = (0.12, 0.10, 0.13)
FOOT = HORIZON + 0.24
"""The y of the foot of things that stand on the ground."""


class Brush:
    """Draws in the units of a thing: its foot or centre is at (0, 0), 1 is its size. `flip` -1 mirrors it."""

    def __init__(self, canvas: Canvas, x: float, y: float, size: float, flip: int, light: Colour) -> None:
        self.canvas, self.size, self.light = canvas, size, light
        self._origin, self._scale = np.array((x, y), np.float32), np.array((size * flip, size), np.float32)

    def at(self, shape: Shape) -> Shape:
        return np.asarray(shape * self._scale + self._origin, np.float32)

    def fill(self, shape: Shape, colour: Colour, opacity: float = 1.0) -> None:
        self.canvas.fill(self.at(shape), lit(colour, self.light), opacity)

    def outlined(self, shape: Shape, colour: Colour, width: float = 0.028) -> None:
        self.fill(shape, colour)
        self.line([shape], scaled(lit(colour, self.light), 0.45), width, closed=True)

    def line(self, lines: list[Shape], colour: Colour, width: float, closed: bool = False) -> None:
        self.canvas.strokes([self.at(line) for line in lines], lit(colour, self.light), width * self.size, closed)

    def veil(self, lines: list[Shape], colour: Colour, width: float, opacity: float) -> None:
        self.canvas.veil([self.at(line) for line in lines], lit(colour, self.light), width * self.size, opacity)

    def soft(self, shape: Shape, colour: Colour, opacity: float, blur: float) -> None:
        self.canvas.soft(self.at(shape), lit(colour, self.light), opacity, blur * self.size)

    def shade(self, shape: Shape, colour: Colour, start: tuple[float, float], end: tuple[float, float]) -> None:
        (x0, y0), (x1, y1) = self.at(np.array([start, end], np.float32)).tolist()
        self.canvas.shade(self.at(shape), lit(colour, self.light), (x0, y0), (x1, y1))


def draw_thing(canvas: Canvas, scene: Scene, thing: Thing) -> None:
    light = ON_SUBJECT[scene.weather]
    foot = -0.32 if thing.kind == "balloon" else FOOT
    if thing.kind not in ("balloon", "boat"):
        canvas.soft(ellipse(thing.x + 0.06, FOOT + 0.01, 1.0 * thing.size, 0.10 * thing.size), (0.05, 0.05, 0.10), 0.5, 0.03)
    # The light comes from the left, also on things that face to the left.
    brush = Brush(canvas, thing.x, foot - thing.lift, thing.size, thing.faces, light)
    _THINGS[thing.kind](brush, COLOURS[thing.colour], scene, -thing.faces)


def _ball(brush: Brush, colour: Colour, scene: Scene, lit_side: int) -> None:
    ball = ellipse(0, -0.76, 0.78, 0.78)
    brush.outlined(ball, colour)
    with brush.canvas.within(brush.at(ball)):
        for x in (-0.42, 0.42):
            brush.fill(ellipse(x, -0.76, 0.13, 0.80, 0.35 * x), (0.98, 0.97, 0.93))
        brush.soft(ellipse(-0.35 * lit_side, -0.40, 0.80, 0.70), scaled(colour, 0.35), 0.42, 0.30)
        brush.soft(ellipse(0.34 * lit_side, -1.12, 0.24, 0.18), (1, 1, 1), 0.85, 0.09)
    brush.line([ball], scaled(colour, 0.42), 0.03, closed=True)


def _balloon(brush: Brush, colour: Colour, scene: Scene, lit_side: int) -> None:
    hull = curve(
        [
            (0, -0.95),
            (0.60, -0.72),
            (0.82, -0.10),
            (0.55, 0.52),
            (0.22, 0.98),
            (-0.22, 0.98),
            (-0.55, 0.52),
            (-0.82, -0.10),
            (-0.60, -0.72),
        ]
    )
    brush.line(
        [np.array([(sx * 0.21, 0.95), (sx * 0.15, 1.28)], np.float32) for sx in (-1, -0.3, 0.3, 1)], (0.30, 0.22, 0.15), 0.022
    )
    brush.outlined(rounded(0, 1.40, 0.22, 0.16, 0.05), (0.58, 0.38, 0.20))
    brush.veil([np.array([(-0.2, y), (0.2, y)], np.float32) for y in (1.33, 1.40, 1.47)], (0.36, 0.22, 0.10), 0.02, 0.8)
    brush.fill(hull, colour)
    with brush.canvas.within(brush.at(hull)):
        for x, w in ((-0.52, 0.14), (0.0, 0.20), (0.52, 0.14)):
            brush.fill(
                curve(
                    [
                        (0.4 * x, -0.98),
                        (x - w, -0.2),
                        (x - 0.8 * w, 0.4),
                        (0.32 * x - 0.06, 1.0),
                        (0.32 * x + 0.06, 1.0),
                        (x + 0.8 * w, 0.4),
                        (x + w, -0.2),
                    ]
                ),
                mixed(colour, (1.0, 0.97, 0.88), 0.55),
            )
        brush.soft(ellipse(-0.55 * lit_side, 0.25, 0.6, 0.95), scaled(colour, 0.3), 0.5, 0.25)
        brush.soft(ellipse(0.36 * lit_side, -0.50, 0.18, 0.26), (1, 1, 1), 0.8, 0.10)
    brush.line([hull], scaled(colour, 0.42), 0.028, closed=True)


def _boat(brush: Brush, colour: Colour, scene: Scene, lit_side: int) -> None:
    wave = 0.03 * float(np.sin(2.5 * scene.seconds))
    brush.soft(ellipse(0, 0.16, 0.95, 0.12), (0.05, 0.12, 0.22), 0.55, 0.06)
    brush.soft(curve([(-0.5, 0.1), (0.5, 0.1), (0.3, 0.7), (-0.3, 0.7)]), mixed(colour, (1, 1, 1), 0.2), 0.32, 0.08)
    brush.line([np.array([(0, -0.1), (0, -2.0)], np.float32)], (0.34, 0.22, 0.13), 0.055)
    front = curve([(0.06, -1.85), (0.42, -1.15), (0.80, -0.42), (0.40, -0.36), (0.06, -0.38)])
    front = np.array(
        [
            (0.06, -1.88),
            *_bulge((0.06, -1.88), (0.86, -0.36), 0.10),
            (0.86, -0.36),
            *_bulge((0.86, -0.36), (0.06, -0.36), 0.05),
        ],
        np.float32,
    )
    back = np.array(
        [(-0.06, -1.66), *_bulge((-0.06, -1.66), (-0.62, -0.36), -0.10), (-0.62, -0.36), (-0.06, -0.36)], np.float32
    )
    for sail, tone in ((front, 1.0), (back, 0.84)):
        brush.outlined(sail, scaled(colour, tone))
        brush.shade(sail, scaled(colour, 0.55), (0.1, -1.6), (1.6 if tone == 1.0 else -1.6, 0.6))
        with brush.canvas.within(brush.at(sail)):
            brush.veil(
                [np.array([(-1, y), (1, y + 0.04)], np.float32) for y in (-1.35, -0.98, -0.62)], scaled(colour, 0.5), 0.02, 0.5
            )
    flag = np.array([(0, -2.04), (0.28, -1.97 + wave), (0, -1.88)], np.float32)
    brush.fill(flag, (0.90, 0.25, 0.20))
    hull = np.array(
        [
            (-1.0, -0.24),
            *_bulge((-1.0, -0.24), (1.12, -0.30), -0.05),
            (1.12, -0.30),
            *_bulge((1.12, -0.30), (0.70, 0.16), 0.06),
            (0.70, 0.16),
            (-0.78, 0.16),
        ],
        np.float32,
    )
    brush.outlined(hull, (0.52, 0.31, 0.17))
    with brush.canvas.within(brush.at(hull)):
        brush.fill(box(0, -0.24, 1.4, 0.065), (0.93, 0.88, 0.78))
        brush.veil([np.array([(-1.1, y), (1.1, y)], np.float32) for y in (-0.10, 0.0, 0.08)], (0.28, 0.15, 0.07), 0.02, 0.7)
        brush.shade(hull, (0.20, 0.11, 0.06), (0, -0.1), (0, 0.4))
    brush.veil(
        [curve([(-1.0, 0.17 + wave), (-0.4, 0.13), (0.2, 0.19 - wave), (0.9, 0.15)], closed=False)],
        (0.95, 0.98, 1.0),
        0.05,
        0.8,
    )


def _bulge(start: tuple[float, float], end: tuple[float, float], by: float) -> list[tuple[float, float]]:
    """Return points of an arc between two points that is `by` away from the straight line, to its left."""
    (x0, y0), (x1, y1) = start, end
    arc = [(t, 4 * by * t * (1 - t)) for t in np.linspace(0, 1, 10)[1:-1].tolist()]
    return [(x0 + t * (x1 - x0) - off * (y1 - y0), y0 + t * (y1 - y0) + off * (x1 - x0)) for t, off in arc]


def _house(brush: Brush, colour: Colour, scene: Scene, lit_side: int) -> None:
    dark = scene.weather in ("night", "sunset")
    roof = mixed(scaled(colour, 0.42), (0.30, 0.18, 0.16), 0.4)
    brush.outlined(box(0.48, -1.72, 0.11, 0.26), (0.55, 0.34, 0.28))
    wall = box(0, -0.60, 0.82, 0.60)
    brush.outlined(wall, colour)
    brush.shade(wall, scaled(colour, 0.55), (0.3 * lit_side, -0.9), (-1.6 * lit_side, -0.2))
    brush.soft(box(0, -1.14, 0.82, 0.06), scaled(colour, 0.3), 0.5, 0.05)
    gable = np.array([(-1.04, -1.16), (-0.02, -1.98), (1.04, -1.16)], np.float32)
    brush.outlined(gable, roof)
    with brush.canvas.within(brush.at(gable)):
        for row in range(5):
            y = -1.30 - 0.14 * row
            brush.veil(
                [
                    curve([(-1.1 + 0.12 * k, y), (-1.05 + 0.12 * k, y + 0.04), (-0.98 + 0.12 * k, y)], closed=False)
                    for k in range(19)
                ],
                scaled(roof, 0.55),
                0.022,
                0.8,
            )
        brush.soft(
            np.array([(-0.02, -2.0), (1.2 * lit_side, -1.1), (0.4 * lit_side, -1.1)], np.float32),
            mixed(roof, (1, 1, 1), 0.5),
            0.35,
            0.12,
        )
    door = rounded_top(0, 0, 0.18, 0.62)
    brush.outlined(door, (0.40, 0.24, 0.14))
    brush.fill(ellipse(0.10, -0.28, 0.025, 0.025), (0.95, 0.80, 0.40))
    for side in (-0.50, 0.50):
        frame, glass = rounded(side, -0.72, 0.20, 0.20, 0.02), box(side, -0.72, 0.155, 0.155)
        brush.fill(frame, (0.97, 0.95, 0.90))
        brush.fill(glass, (1.0, 0.86, 0.50) if dark else (0.60, 0.78, 0.90))
        brush.shade(glass, (1.0, 0.95, 0.75) if dark else (0.92, 0.97, 1.0), (side + 0.15, -0.55), (side - 0.2, -0.95))
        brush.line(
            [
                np.array([(side, -0.88), (side, -0.56)], np.float32),
                np.array([(side - 0.16, -0.72), (side + 0.16, -0.72)], np.float32),
            ],
            (0.97, 0.95, 0.90),
            0.035,
        )
        brush.fill(box(side, -0.49, 0.22, 0.03), (0.90, 0.87, 0.80))


def _tree(brush: Brush, colour: Colour, scene: Scene, lit_side: int) -> None:
    trunk = curve([(-0.15, 0.02), (-0.09, -0.5), (-0.16, -1.0), (0.16, -1.0), (0.10, -0.5), (0.20, 0.02)])
    brush.outlined(trunk, (0.46, 0.30, 0.18))
    brush.shade(trunk, (0.20, 0.12, 0.07), (0.08 * lit_side, 0), (-0.3 * lit_side, 0))
    random = np.random.default_rng(5)
    sway = 0.02 * float(np.sin(2.0 * scene.seconds))
    crown = [
        (0.0, -1.60, 0.50),
        (-0.45, -1.18, 0.42),
        (0.45, -1.18, 0.42),
        (-0.28, -1.62, 0.38),
        (0.28, -1.62, 0.38),
        (0.0, -1.14, 0.46),
        (0.0, -1.85, 0.32),
    ]
    for x, y, r in crown:
        brush.fill(ellipse(x + sway, y, 1.06 * r, 1.06 * r), scaled(colour, 0.40))
    for x, y, r in crown:
        brush.fill(ellipse(x + sway, y, r, r), scaled(colour, 0.78))
    for x, y, r in crown:
        brush.soft(ellipse(x + sway + 0.16 * r * lit_side, y - 0.18 * r, 0.68 * r, 0.62 * r), colour, 1.0, 0.10)
    for tone, count in ((0.55, 34), (1.0, 30)):
        leaves = []
        for _ in range(count):
            x, y, r = crown[random.integers(len(crown))]
            angle, out = random.uniform(0, 2 * np.pi), r * random.uniform(0.2, 0.95)
            flutter = 0.02 * float(np.sin(4 * scene.seconds + 9 * angle))
            at = (x + sway + out * np.cos(angle) + flutter, y + out * np.sin(angle))
            leaves.append(
                curve([(at[0] - 0.06, at[1] + 0.01), (at[0], at[1] - 0.035), (at[0] + 0.06, at[1] + 0.01)], closed=False)
            )
        brush.veil(leaves, mixed(colour, (1, 1, 1), 0.35) if tone == 1.0 else scaled(colour, tone), 0.03, 0.8)


def _car(brush: Brush, colour: Colour, scene: Scene, lit_side: int) -> None:
    cabin = curve([(-0.78, -0.62), (-0.62, -1.02), (-0.15, -1.12), (0.25, -1.02), (0.55, -0.64), (0.0, -0.58)])
    brush.outlined(cabin, scaled(colour, 0.92))
    glass = curve([(-0.62, -0.66), (-0.52, -0.95), (-0.15, -1.02), (0.18, -0.94), (0.40, -0.67), (0.0, -0.64)])
    brush.fill(glass, (0.36, 0.52, 0.62))
    brush.shade(glass, (0.90, 0.97, 1.0), (0.1, -0.62), (-0.4, -1.1))
    brush.fill(box(-0.12, -0.82, 0.035, 0.24), scaled(colour, 0.9))
    body = curve(
        [
            (-1.08, -0.30),
            (-1.04, -0.58),
            (-0.70, -0.66),
            (0.50, -0.66),
            (0.98, -0.52),
            (1.10, -0.28),
            (1.02, -0.12),
            (0.0, -0.10),
            (-1.02, -0.12),
        ]
    )
    brush.outlined(body, colour)
    with brush.canvas.within(brush.at(body)):
        brush.soft(box(0, -0.08, 1.2, 0.13), scaled(colour, 0.30), 0.7, 0.08)
        brush.soft(box(-0.05, -0.56, 0.95, 0.03), (1, 1, 1), 0.75, 0.03)
        brush.veil(
            [np.array([(-0.12, -0.66), (-0.12, -0.18)], np.float32), np.array([(0.42, -0.66), (0.36, -0.18)], np.float32)],
            scaled(colour, 0.4),
            0.02,
            0.8,
        )
        brush.fill(box(-0.02, -0.48, 0.06, 0.018), (0.90, 0.90, 0.90))
    brush.fill(ellipse(1.0, -0.38, 0.085, 0.095), (1.0, 0.95, 0.62))
    brush.fill(ellipse(-1.03, -0.40, 0.05, 0.08), (0.75, 0.10, 0.10))
    if scene.weather == "night":
        brush.soft(np.array([(1.05, -0.42), (1.9, -0.62), (1.9, 0.0)], np.float32), (1.0, 0.94, 0.62), 0.5, 0.08)
    turn = -6.0 * scene.camera
    for x in (-0.60, 0.62):
        brush.fill(ellipse(x, -0.14, 0.30, 0.30), scaled(colour, 0.25))
        brush.fill(ellipse(x, -0.12, 0.25, 0.25), (0.10, 0.10, 0.12))
        brush.fill(ellipse(x, -0.12, 0.145, 0.145), (0.80, 0.81, 0.84))
        spokes = [
            np.array([(x, -0.12), (x + 0.13 * np.cos(turn + k), -0.12 + 0.13 * np.sin(turn + k))], np.float32)
            for k in (0.0, 1.257, 2.513, 3.770, 5.027)
        ]
        brush.line(spokes, (0.42, 0.43, 0.46), 0.03)
        brush.fill(ellipse(x, -0.12, 0.04, 0.04), (0.30, 0.30, 0.33))


_THINGS: dict[str, Callable[[Brush, Colour, Scene, int], None]] = {
    "boat": _boat,
    "house": _house,
    "tree": _tree,
    "balloon": _balloon,
    "car": _car,
    "ball": _ball,
}
