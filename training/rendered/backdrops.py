"""Draw skies and grounds, with light, haze and depth."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np

from training.rendered.canvas import Canvas, Colour, Shape, box, curve, ellipse, lit, mixed, scaled
from training.rendered.world import Scene

HORIZON = 0.30
SKY: dict[str, tuple[Colour, Colour]] = {
    "sunny": ((0.24, 0.55, 0.93), (0.78, 0.92, 1.00)),
    "cloudy": ((0.55, 0.60, 0.66), (0.83, 0.86, 0.88)),
    "sunset": ((0.36, 0.20, 0.52), (1.00, 0.66, 0.38)),
    "night": ((0.02, 0.04, 0.14), (0.15, 0.20, 0.42)),
}
"""Colours at the top and at the horizon."""
LIGHT: dict[str, Colour] = {
    "sunny": (1, 1, 1),
    "cloudy": (0.84, 0.87, 0.90),
    "sunset": (1.0, 0.78, 0.66),
    "night": (0.36, 0.42, 0.62),
}
"""Light on the ground."""
ON_SUBJECT: dict[str, Colour] = {
    "sunny": (1, 1, 1),
    "cloudy": (0.96, 0.97, 0.97),
    "sunset": (1.0, 0.95, 0.90),
    "night": (0.86, 0.87, 0.94),
}
"""Light on the subject. Weaker than on the ground, so that its colours are recognisable at night."""
FARTHEST, FAR = 0.35, 0.65
"""Sideways motion of mountains and of hills and houses in the image, relative to the ground in front."""
PERIOD = 3.4
"""Width after which the background repeats."""


def draw_sky(canvas: Canvas, scene: Scene) -> None:
    top, bottom = SKY[scene.weather]
    canvas.gradient(top, bottom, -1.0, HORIZON)
    if scene.weather == "sunny":
        canvas.soft(ellipse(0.68, -0.70, 0.34, 0.34), (1.0, 0.97, 0.80), 0.75, 0.14)
        canvas.fill(ellipse(0.68, -0.70, 0.15, 0.15), (1.0, 0.95, 0.66))
    elif scene.weather == "sunset":
        canvas.soft(ellipse(-0.66, 0.14, 0.70, 0.42), (1.0, 0.80, 0.42), 0.8, 0.2)
        canvas.fill(ellipse(-0.66, 0.14, 0.23, 0.23), (1.0, 0.90, 0.60))
    elif scene.weather == "night":
        _stars(canvas, scene)
        canvas.soft(ellipse(0.66, -0.68, 0.24, 0.24), (0.55, 0.62, 0.85), 0.5, 0.10)
        canvas.fill(ellipse(0.66, -0.68, 0.14, 0.14), (0.97, 0.95, 0.84))
        for x, y, r in ((0.62, -0.72, 0.035), (0.70, -0.64, 0.025), (0.69, -0.73, 0.018)):
            canvas.fill(ellipse(x, y, r, r * 0.9), (0.86, 0.84, 0.74))
    _clouds(canvas, scene)


def _stars(canvas: Canvas, scene: Scene) -> None:
    random = Random(scene.land)
    for n in range(34):
        x, y, bright = random.uniform(-1, 1), random.uniform(-1, HORIZON - 0.25), random.random()
        twinkle = 0.75 + 0.25 * np.sin(3 * scene.seconds + n)
        r = 0.006 + 0.010 * bright**3
        canvas.fill(ellipse(x, y, r, r), mixed(SKY["night"][0], (1.0, 0.98, 0.90), (0.5 + 0.5 * bright) * twinkle))


def _clouds(canvas: Canvas, scene: Scene) -> None:
    look: dict[str, tuple[int, Colour, Colour, float]] = {
        "sunny": (2, (1.0, 1.0, 1.0), (0.78, 0.87, 0.96), 0.95),
        "cloudy": (5, (0.95, 0.96, 0.97), (0.58, 0.62, 0.67), 0.9),
        "sunset": (3, (1.0, 0.70, 0.52), (0.62, 0.33, 0.50), 0.85),
        "night": (1, (0.22, 0.26, 0.42), (0.12, 0.15, 0.29), 0.8),
    }
    count, bright, dark, opacity = look[scene.weather]
    for n, (offset, y, scale) in enumerate(
        ((0.0, -0.70, 1.0), (0.55, -0.46, 0.75), (0.3, -0.16, 0.6), (0.8, -0.82, 0.9), (0.12, -0.34, 0.8))
    ):
        if n >= count:
            break
        x = ((scene.clouds + offset) % 1.0) * 3.0 - 1.5
        flat = 0.55 if scene.weather == "sunset" else 1.0
        puffs = [ellipse(x + dx * scale, y + dy * scale * flat, rx * scale, ry * scale * flat) for dx, dy, rx, ry in _PUFFS]
        for puff in puffs:
            canvas.soft(puff, dark, opacity, 0.018)
        for dx, dy, rx, ry in _PUFFS[:5]:
            lifted = ellipse(
                x + (dx - 0.012) * scale, y + (dy - 0.028) * scale * flat, 0.86 * rx * scale, 0.82 * ry * scale * flat
            )
            canvas.soft(lifted, bright, opacity, 0.022)


_PUFFS = (
    (-0.22, 0.04, 0.15, 0.07),
    (-0.07, -0.03, 0.16, 0.12),
    (0.10, -0.01, 0.15, 0.10),
    (0.24, 0.05, 0.13, 0.06),
    (0.02, 0.05, 0.22, 0.06),
)


def draw_ground(canvas: Canvas, scene: Scene) -> None:
    _GROUNDS[scene.place](canvas, scene, LIGHT[scene.weather])


def _repeated(x: float, camera: float) -> float:
    """Return where something at `x` is seen after the camera has moved."""
    return (x - camera + PERIOD / 2) % PERIOD - PERIOD / 2


def _haze(scene: Scene, colour: Colour, share: float) -> Colour:
    """Return a colour as seen from afar: mixed with that of the sky at the horizon."""
    return mixed(colour, SKY[scene.weather][1], share)


def _ridge(canvas: Canvas, points: Shape, colour: Colour, foot: Colour) -> None:
    """Fill everything below a line down to the horizon, and fade it to `foot` at the bottom."""
    left, right = points[0, 0], points[-1, 0]
    shape = np.concatenate([points, np.array([(right, HORIZON + 0.02), (left, HORIZON + 0.02)], np.float32)])
    canvas.fill(shape, colour)
    canvas.shade(shape, foot, (0, float(points[:, 1].min())), (0, HORIZON + 0.35))


def _hills(seed: int, camera: float, top: float, height: float) -> Shape:
    """Return a smooth line of hills over the whole width. It repeats after PERIOD."""
    random = np.random.default_rng(seed)
    phases, waves = random.uniform(0, 2 * np.pi, 3), np.array([1, 2, 3])
    x = np.linspace(-1.3, 1.3, 66, dtype=np.float32)
    angles = 2 * np.pi / PERIOD * (x[:, None] + camera) * waves + phases
    y = top - height * (np.sin(angles) * (0.5, 0.35, 0.15)).sum(1)
    return np.stack([x, np.minimum(y, HORIZON + 0.01)], axis=1).astype(np.float32)


def _floor(canvas: Canvas, near: Colour, far: Colour) -> None:
    floor = box(0, HORIZON + 0.8, 1.6, 0.8)
    canvas.fill(floor, far)
    canvas.shade(floor, near, (0, HORIZON), (0, 1.0))


def _meadow(canvas: Canvas, scene: Scene, light: Colour) -> None:
    green: Colour = (0.36, 0.62, 0.24)
    for depth, (haze, top, height, speed) in enumerate(((0.6, 0.16, 0.14, FARTHEST), (0.35, 0.22, 0.10, FAR))):
        colour = _haze(scene, lit(mixed((0.24, 0.46, 0.30), green, depth * 0.5), light), haze)
        line = _hills(10 * scene.land + depth, speed * scene.camera, top, height)
        _ridge(canvas, line, colour, _haze(scene, colour, 0.25))
    random = Random(scene.land)
    for _ in range(6):
        x, r = _repeated(random.uniform(-PERIOD / 2, PERIOD / 2), FAR * scene.camera), random.uniform(0.05, 0.085)
        leaves = _haze(scene, lit((0.16, 0.42, 0.20), light), 0.18)
        canvas.fill(box(x, HORIZON - 0.5 * r, 0.12 * r, 0.6 * r), _haze(scene, lit((0.36, 0.25, 0.16), light), 0.18))
        canvas.fill(ellipse(x, HORIZON - 1.5 * r, 0.85 * r, r), leaves)
        canvas.soft(ellipse(x - 0.2 * r, HORIZON - 1.8 * r, 0.4 * r, 0.45 * r), scaled(leaves, 1.35), 0.8, 0.2 * r)
    _floor(canvas, lit((0.24, 0.50, 0.14), light), lit((0.52, 0.75, 0.32), light))
    tufts, flowers = [], []
    for n in range(80):
        depth = random.random() ** 0.7
        y = HORIZON + 0.05 + 0.68 * depth
        x = _repeated(random.uniform(-PERIOD / 2, PERIOD / 2), (0.7 + 0.3 * depth) * scene.camera)
        sway = 0.012 * np.sin(2.5 * scene.seconds + n)
        tall = 0.02 + 0.05 * depth
        if n % 4:
            tufts += [
                np.array([(x + dx * tall, y), (x + 2.0 * dx * tall + sway, y - tall)], np.float32) for dx in (-0.25, 0.0, 0.25)
            ]
        else:
            flowers.append((x, y - 0.5 * tall, 0.007 + 0.012 * depth, n // 4))
    canvas.strokes(tufts, lit((0.20, 0.44, 0.12), light), 0.010)
    for x, y, r, n in flowers:
        colour: Colour = ((0.98, 0.97, 0.92), (0.98, 0.86, 0.30), (0.93, 0.45, 0.55))[n % 3]
        canvas.fill(ellipse(x, y, r, r * 0.8), lit(colour, light))


def _sea(canvas: Canvas, scene: Scene, light: Colour) -> None:
    island = _haze(scene, lit((0.25, 0.38, 0.42), light), 0.5)
    for n, (x, w, h) in enumerate(((-0.75, 0.45, 0.07), (0.9, 0.6, 0.11))):
        at = _repeated(x + 0.2 * (scene.land % 4), FARTHEST * scene.camera)
        canvas.fill(
            curve(
                [
                    (at - w, HORIZON + 0.02),
                    (at - 0.4 * w, HORIZON - h),
                    (at + 0.1 * w, HORIZON - 0.7 * h),
                    (at + w, HORIZON + 0.02),
                ],
                closed=False,
            ),
            mixed(island, SKY[scene.weather][1], 0.2 * n),
        )
    water = lit((0.10, 0.40, 0.66), light)
    _floor(canvas, scaled(water, 0.75), mixed(_haze(scene, water, 0.45), (1, 1, 1), 0.05))
    if scene.weather in ("sunset", "night", "sunny"):
        x, glow = {
            "sunset": (-0.66, (1.0, 0.78, 0.45)),
            "night": (0.66, (0.75, 0.80, 0.95)),
            "sunny": (0.68, (0.95, 0.98, 1.0)),
        }[scene.weather]
        canvas.soft(
            np.array([(x - 0.10, HORIZON), (x + 0.10, HORIZON), (x + 0.34, 1.0), (x - 0.34, 1.0)], np.float32), glow, 0.38, 0.05
        )
    random = Random(scene.land)
    for row in range(13):
        depth = (row + 0.5) / 13
        y = HORIZON + 0.02 + 0.68 * depth**1.6
        lines = []
        for _ in range(5):
            x = _repeated(random.uniform(-PERIOD / 2, PERIOD / 2), (0.6 + 0.4 * depth) * scene.camera)
            x += 0.03 * depth * np.sin(2.2 * scene.seconds + 5 * row)
            bob = 0.010 * depth * np.sin(3.0 * scene.seconds + 2 * row + x * 4)
            w, h = 0.07 + 0.22 * depth, 0.006 + 0.018 * depth
            lines.append(
                curve(
                    [(x - w, y + bob), (x - 0.5 * w, y - h + bob), (x, y + bob), (x + 0.5 * w, y - h + bob), (x + w, y + bob)],
                    closed=False,
                )
            )
        colour = mixed(water, (0.92, 0.97, 1.0), 0.45) if row % 2 else scaled(water, 0.72)
        canvas.veil(lines, lit(colour, mixed(light, (1, 1, 1), 0.3)), 0.006 + 0.012 * depth, 0.55)


def _desert(canvas: Canvas, scene: Scene, light: Colour) -> None:
    sand: Colour = (0.93, 0.75, 0.44)
    random = Random(scene.land)
    for x in (-1.1, 0.25, 1.3):
        at, w, h = (
            _repeated(x + random.uniform(-0.2, 0.2), FARTHEST * scene.camera),
            random.uniform(0.22, 0.34),
            random.uniform(0.16, 0.26),
        )
        mesa = _haze(scene, lit((0.70, 0.40, 0.26), light), 0.4)
        block = np.array(
            [
                (at - w, HORIZON),
                (at - 0.72 * w, HORIZON - 0.85 * h),
                (at - 0.62 * w, HORIZON - h),
                (at + 0.6 * w, HORIZON - h),
                (at + 0.7 * w, HORIZON - 0.8 * h),
                (at + w, HORIZON),
            ],
            np.float32,
        )
        canvas.fill(block, mesa)
        canvas.shade(block, scaled(mesa, 0.7), (at - w, 0), (at + 1.2 * w, 0))
    line = _hills(10 * scene.land, FAR * scene.camera, 0.22, 0.13)
    _ridge(canvas, line, _haze(scene, lit((0.86, 0.64, 0.36), light), 0.1), lit(scaled(sand, 0.86), light))
    _floor(canvas, lit((0.84, 0.60, 0.30), light), lit((0.96, 0.82, 0.54), light))
    for n in range(5):
        depth = (n + 0.7) / 5
        y = HORIZON + 0.66 * depth**1.3
        shift = _repeated(random.uniform(-1, 1), (0.6 + 0.4 * depth) * scene.camera)
        x = np.linspace(-1.3, 1.3, 40, dtype=np.float32)
        crest = np.stack([x, y - 0.05 * depth * np.sin(2.6 * (x - shift)) - 0.012 * np.sin(7 * (x - shift))], axis=1).astype(
            np.float32
        )
        below = np.concatenate([crest, crest[::-1] + np.array((0, 0.10 + 0.08 * depth), np.float32)])
        canvas.shade(below, lit((0.70, 0.48, 0.24), light), (0, float(y + 0.25)), (0, float(y - 0.12)))
        canvas.veil([crest], lit((1.0, 0.92, 0.70), light), 0.012, 0.6)
    for x, tall in ((-0.62, 0.22), (1.0, 0.28)):
        _cactus(
            canvas,
            _repeated(x + 0.25 * random.random(), 0.8 * scene.camera),
            HORIZON + 0.16,
            tall,
            lit((0.22, 0.46, 0.24), light),
        )


def _cactus(canvas: Canvas, x: float, foot: float, tall: float, green: Colour) -> None:
    canvas.soft(ellipse(x + 0.05, foot, 0.10, 0.02), (0.35, 0.22, 0.10), 0.5, 0.015)
    w = 0.14 * tall
    for side, low, high in ((-1, 0.35, 0.75), (1, 0.5, 0.9)):
        arm = curve(
            [(x, foot - low * tall), (x + side * 0.30 * tall, foot - low * tall), (x + side * 0.32 * tall, foot - high * tall)],
            closed=False,
        )
        canvas.strokes([arm], scaled(green, 0.9), 1.3 * w)
    canvas.fill(rounded_top(x, foot, w, tall), green)
    canvas.shade(rounded_top(x, foot, w, tall), scaled(green, 0.62), (x - 0.5 * w, 0), (x + 1.4 * w, 0))


def rounded_top(x: float, foot: float, half_width: float, tall: float) -> Shape:
    arc = np.linspace(np.pi, 2 * np.pi, 13)
    top = np.stack([x + half_width * np.cos(arc), foot - tall + half_width * (1 + np.sin(arc))], axis=1)
    return np.concatenate([top, [(x + half_width, foot), (x - half_width, foot)]]).astype(np.float32)


def _snow(canvas: Canvas, scene: Scene, light: Colour) -> None:
    random = Random(scene.land)
    for n, x in enumerate((-1.2, -0.45, 0.3, 1.1)):
        at, w, h = (
            _repeated(x + random.uniform(-0.1, 0.1), FARTHEST * scene.camera),
            random.uniform(0.55, 0.75),
            random.uniform(0.42, 0.66),
        )
        rock = _haze(scene, lit((0.42, 0.49, 0.62), light), 0.42 - 0.1 * (n % 2))
        white = _haze(scene, lit((0.97, 0.98, 1.0), light), 0.15)
        peak = (at, HORIZON - h)
        mountain = np.array([(at - w, HORIZON + 0.02), peak, (at + w, HORIZON + 0.02)], np.float32)
        canvas.fill(mountain, rock)
        canvas.fill(
            np.array(
                [peak, (at + w, HORIZON + 0.02), (at + 0.12 * w, HORIZON + 0.02), (at + 0.02 * w, HORIZON - 0.55 * h)],
                np.float32,
            ),
            scaled(rock, 0.76),
        )
        cap = [
            peak,
            (at + 0.42 * w, HORIZON - 0.58 * h),
            (at + 0.22 * w, HORIZON - 0.66 * h),
            (at + 0.06 * w, HORIZON - 0.50 * h),
            (at - 0.12 * w, HORIZON - 0.66 * h),
            (at - 0.36 * w, HORIZON - 0.64 * h),
        ]
        canvas.fill(np.array(cap, np.float32), white)
        canvas.fill(np.array([cap[0], cap[1], cap[2], (at + 0.04 * w, HORIZON - 0.72 * h)], np.float32), scaled(white, 0.82))
    _ridge(
        canvas,
        _hills(10 * scene.land, FAR * scene.camera, 0.24, 0.08),
        lit((0.86, 0.91, 0.98), light),
        lit((0.80, 0.86, 0.96), light),
    )
    for _ in range(9):
        x, tall = _repeated(random.uniform(-PERIOD / 2, PERIOD / 2), FAR * scene.camera), random.uniform(0.13, 0.24)
        _pine(
            canvas,
            x,
            HORIZON + random.uniform(0.0, 0.05),
            tall,
            _haze(scene, lit((0.14, 0.34, 0.28), light), 0.15),
            lit((0.95, 0.97, 1.0), light),
        )
    _floor(canvas, lit((0.80, 0.87, 0.97), light), lit((0.97, 0.98, 1.0), light))
    for _ in range(7):
        depth = random.random()
        x, y = (
            _repeated(random.uniform(-PERIOD / 2, PERIOD / 2), (0.7 + 0.3 * depth) * scene.camera),
            HORIZON + 0.08 + 0.62 * depth,
        )
        canvas.soft(ellipse(x, y, 0.20 + 0.2 * depth, 0.02 + 0.03 * depth), lit((0.66, 0.76, 0.92), light), 0.7, 0.02)
    for n in range(24):
        x = _repeated(random.uniform(-PERIOD / 2, PERIOD / 2) + 0.03 * np.sin(scene.seconds + n), scene.camera)
        y = (random.uniform(-1, 1) + 0.15 * scene.seconds + 1) % 2 - 1
        canvas.fill(ellipse(x, y, 0.010, 0.010), (1.0, 1.0, 1.0), 0.75)


def _pine(canvas: Canvas, x: float, foot: float, tall: float, green: Colour, white: Colour) -> None:
    for n, (low, high, wide) in enumerate(((0.05, 0.55, 0.34), (0.35, 0.8, 0.27), (0.6, 1.0, 0.18))):
        canvas.fill(
            np.array(
                [(x - wide * tall, foot - low * tall), (x, foot - high * tall), (x + wide * tall, foot - low * tall)],
                np.float32,
            ),
            scaled(green, 0.85 + 0.12 * n),
        )
        canvas.fill(
            np.array(
                [
                    (x - 0.36 * wide * tall, foot - (0.6 * high + 0.4 * low) * tall),
                    (x, foot - high * tall),
                    (x + 0.1 * wide * tall, foot - (0.75 * high + 0.25 * low) * tall),
                ],
                np.float32,
            ),
            white,
        )


def _city(canvas: Canvas, scene: Scene, light: Colour) -> None:
    random = Random(scene.land)
    dark = scene.weather in ("night", "sunset")
    for n in range(13):
        x, h = _repeated(-PERIOD / 2 + n * PERIOD / 13, FARTHEST * scene.camera), random.uniform(0.30, 0.75)
        canvas.fill(box(x, HORIZON - h / 2, 0.15, h / 2), _haze(scene, lit((0.42, 0.47, 0.58), light), 0.55))
    walls: tuple[Colour, ...] = (
        (0.62, 0.42, 0.36),
        (0.50, 0.53, 0.60),
        (0.74, 0.66, 0.54),
        (0.44, 0.50, 0.56),
        (0.66, 0.56, 0.52),
    )
    for n in range(7):
        x, w, h = (
            _repeated(-PERIOD / 2 + (n + 0.5) * PERIOD / 7, FAR * scene.camera),
            random.uniform(0.17, 0.21),
            random.uniform(0.45, 0.95),
        )
        wall = _haze(scene, lit(walls[(n + scene.land) % 5], light), 0.12)
        house = box(x, HORIZON - h / 2 + 0.02, w, h / 2 + 0.02)
        canvas.fill(house, wall)
        canvas.shade(house, scaled(wall, 0.62), (x - 0.3 * w, 0), (x + 1.6 * w, 0))
        canvas.fill(box(x, HORIZON - h, w + 0.012, 0.014), scaled(wall, 0.75))
        for row in range(int(h / 0.13)):
            for side in (-0.6, 0.0, 0.6):
                on = random.random() < 0.6
                glass: Colour = ((1.0, 0.84, 0.45) if on else (0.22, 0.24, 0.34)) if dark else (0.66, 0.80, 0.92)
                at = box(x + side * w, HORIZON - h + 0.09 + row * 0.13, 0.034, 0.040)
                canvas.fill(at, glass if dark else lit(glass, light))
    _floor(canvas, lit((0.34, 0.35, 0.38), light), lit((0.46, 0.47, 0.50), light))
    canvas.fill(box(0, HORIZON + 0.06, 1.6, 0.06), lit((0.68, 0.67, 0.65), light))
    canvas.fill(box(0, HORIZON + 0.125, 1.6, 0.012), lit((0.50, 0.50, 0.50), light))
    for n in range(5):
        x = _repeated(-PERIOD / 2 + n * PERIOD / 5, scene.camera)
        stripe = np.array([(x - 0.14, 0.72), (x + 0.12, 0.72), (x + 0.15, 0.77), (x - 0.13, 0.77)], np.float32)
        canvas.fill(stripe, lit((0.93, 0.91, 0.84), light))
    for n in range(3):
        _lamp(canvas, _repeated(-PERIOD / 2 + (n + 0.3) * PERIOD / 3, 0.8 * scene.camera), dark, light)


def _lamp(canvas: Canvas, x: float, dark: bool, light: Colour) -> None:
    iron = lit((0.20, 0.22, 0.25), light)
    canvas.fill(box(x, HORIZON - 0.18, 0.010, 0.28), iron)
    canvas.fill(box(x + 0.03, HORIZON - 0.46, 0.045, 0.010), iron)
    if dark:
        canvas.soft(ellipse(x + 0.065, HORIZON - 0.43, 0.09, 0.09), (1.0, 0.88, 0.55), 0.7, 0.04)
    canvas.fill(
        ellipse(x + 0.065, HORIZON - 0.435, 0.024, 0.020), (1.0, 0.93, 0.70) if dark else lit((0.92, 0.92, 0.88), light)
    )


_GROUNDS: dict[str, Callable[[Canvas, Scene, Colour], None]] = {
    "meadow": _meadow,
    "sea": _sea,
    "desert": _desert,
    "snow": _snow,
    "city": _city,
}
