"""Draw people: head, hair, features and clothes, with the head turned up to 20 degrees.

Features are points on a head in three dimensions, in half head heights: x to the right, y down, z towards the camera.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.rendered.backdrops import ON_SUBJECT
from training.rendered.canvas import Canvas, Colour, Shape, curve, ellipse, mixed, rounded, scaled, turned
from training.rendered.things import INK, Brush
from training.rendered.world import COLOURS, EYES, HAIRS, SKINS, Identity, Person, Scene

EYE_X, EYE_Y, NOSE_Y, MOUTH_X, MOUTH_Y = 0.36, -0.11, 0.29, 0.27, 0.60
"""Positions of facial features. The proportions match the template for face alignment: insightface's, with 112 pixels."""
EYE_Z, NOSE_Z, MOUTH_Z, CHEEK_Z, HAIRLINE_Z = 0.66, 0.92, 0.74, 0.55, 0.45
MOST_TURN = math.radians(20)
NECK = (0.0, 0.75)
"""The point about which a head is tilted."""
JAWS: dict[str, tuple[tuple[float, float], ...]] = {
    "round": ((0.0, 1.0), (0.36, 0.93), (0.68, 0.62), (0.83, 0.18), (0.84, -0.30), (0.70, -0.76), (0.36, -1.0)),
    "long": ((0.0, 1.10), (0.27, 1.03), (0.52, 0.72), (0.68, 0.25), (0.71, -0.28), (0.62, -0.76), (0.34, -1.0)),
    "square": ((0.0, 1.02), (0.42, 0.99), (0.68, 0.78), (0.77, 0.28), (0.79, -0.28), (0.70, -0.78), (0.38, -1.0)),
}
"""Face shape -> right half of the outline, from the chin to the top of the head."""


@dataclass(frozen=True, slots=True)
class Pose:
    """Turns points of a head in three dimensions to the image."""

    yaw: float
    tilt: float

    def __call__(self, x: float, y: float, z: float) -> tuple[float, float]:
        seen = np.array([(x * math.cos(self.yaw) + z * math.sin(self.yaw), y)], np.float32)
        ((across, down),) = turned(seen, self.tilt, NECK).tolist()
        return across, down

    def flat(self, shape: Shape, z: float) -> Shape:
        """Turn a shape at the depth z."""
        seen = np.stack([shape[:, 0] * math.cos(self.yaw) + z * math.sin(self.yaw), shape[:, 1]], axis=1)
        return turned(seen.astype(np.float32), self.tilt, NECK)


def pose_of(person: Person) -> Pose:
    return Pose(MOST_TURN * person.looks, person.tilt)


def keypoints(person: Person) -> NDArray[np.float32]:
    """Return eyes, nose and mouth corners from left to right in the image, in scene units: (5, 2)."""
    at = pose_of(person)
    places = [
        at(-EYE_X, EYE_Y, EYE_Z),
        at(EYE_X, EYE_Y, EYE_Z),
        at(0, NOSE_Y, NOSE_Z),
        at(-MOUTH_X, MOUTH_Y, MOUTH_Z),
        at(MOUTH_X, MOUTH_Y, MOUTH_Z),
    ]
    return np.asarray(np.array(places) * person.radius + (person.x, person.y), np.float32)


def draw_person(canvas: Canvas, scene: Scene, person: Person) -> None:
    who, at = person.identity, pose_of(person)
    brush = Brush(canvas, person.x, person.y, person.radius, 1, ON_SUBJECT[scene.weather])
    skin, hair = SKINS[who.skin], HAIRS[who.hair]
    sway = 0.02 * math.sin(2.2 * scene.seconds)
    _hair_behind(brush, who, at, hair, sway)
    _body(brush, person, skin)
    for side in (-1, 1):
        ear = ellipse(*at(side * 0.80, 0.02, -0.05), 0.13, 0.20)
        if who.face_shape == "long":
            ear = ellipse(*at(side * 0.70, 0.02, -0.05), 0.12, 0.20)
        brush.outlined(ear, scaled(skin, 0.90), 0.02)
    face = _face(who, at)
    brush.outlined(face, skin, 0.022)
    with canvas.within(brush.at(face)):
        _shading(brush, who, at, skin)
        if who.beard:
            _beard(brush, at, hair)
        _nose(brush, who, at, skin)
        _mouth(brush, person, at, skin)
        for side in (-1, 1):
            _eye(brush, person, at, side, skin)
        if who.hair_style == "bald":
            brush.soft(at.flat(ellipse(-0.18, -0.72, 0.30, 0.16), 0.3), mixed(skin, (1, 1, 1), 0.6), 0.55, 0.08)
    _hair_in_front(brush, who, at, hair, sway)
    for side in (-1, 1):
        _brow(brush, person, at, side)
    if who.glasses:
        _glasses(brush, at)


def _face(who: Identity, at: Pose) -> Shape:
    half = JAWS[who.face_shape]
    outline = [*half, *((-x, y) for x, y in reversed(half[1:]))]
    # The jaw is nearer than the rest of the outline, so the chin moves with the turn.
    return curve([at(x, y, 0.22 * max(0.0, y)) for x, y in outline])


def _body(brush: Brush, person: Person, skin: Colour) -> None:
    colour = COLOURS[person.clothes]
    dark = scaled(colour, 0.55)
    legs = np.array([(-0.78, 4.0), (0.78, 4.0), (0.70, 9.5), (0.10, 9.5), (0, 5.2), (-0.10, 9.5), (-0.70, 9.5)], np.float32)
    brush.outlined(legs, (0.20, 0.23, 0.34))
    for side in (-1, 1):
        arm = curve(
            [
                (side * 0.86, 1.75),
                (side * 1.26, 1.95),
                (side * 1.40, 3.0),
                (side * 1.38, 4.1),
                (side * 1.06, 4.1),
                (side * 1.0, 3.0),
            ]
        )
        brush.fill(ellipse(side * 1.22, 4.25, 0.19, 0.24), scaled(skin, 0.95))
        brush.outlined(arm, scaled(colour, 0.88))
    torso = curve(
        [
            (0.0, 1.34),
            (0.34, 1.36),
            (0.86, 1.52),
            (1.16, 1.86),
            (1.04, 2.6),
            (0.92, 4.2),
            (0.0, 4.3),
            (-0.92, 4.2),
            (-1.04, 2.6),
            (-1.16, 1.86),
            (-0.86, 1.52),
            (-0.34, 1.36),
        ]
    )
    brush.outlined(torso, colour)
    with brush.canvas.within(brush.at(torso)):
        brush.shade(torso, dark, (0.1, 1.5), (1.7, 3.2))
        brush.soft(ellipse(-0.55, 1.75, 0.35, 0.22), mixed(colour, (1, 1, 1), 0.5), 0.35, 0.15)
        if person.garment == "sweater":
            ribs = [
                curve([(x - 0.05, 1.3), (x, 2.5), (x - 0.03, 4.2)], closed=False) for x in np.linspace(-1.1, 1.1, 15).tolist()
            ]
            brush.veil(ribs, scaled(colour, 0.5), 0.03, 0.32)
        else:
            brush.veil([curve([(0.0, 1.5), (0.01, 4.2)], closed=False)], scaled(colour, 0.45), 0.03, 0.8)
            for y in (1.95, 2.4, 2.85, 3.3):
                brush.fill(ellipse(0.0, y, 0.045, 0.045), mixed(colour, (1, 1, 1), 0.7))
    neck = curve([(-0.30, 0.60), (-0.30, 1.10), (-0.44, 1.44), (0.0, 1.62), (0.44, 1.44), (0.30, 1.10), (0.30, 0.60)])
    brush.outlined(neck, scaled(skin, 0.90), 0.02)
    with brush.canvas.within(brush.at(neck)):
        brush.soft(ellipse(0.05, 0.98, 0.48, 0.24), scaled(skin, 0.52), 0.75, 0.07)
    if person.garment == "sweater":
        collar = curve([(-0.50, 1.40), (0.0, 1.62), (0.50, 1.40), (0.46, 1.58), (0.0, 1.82), (-0.46, 1.58)])
        brush.outlined(collar, scaled(colour, 0.80), 0.024)
        return
    for side in (-1, 1):
        wing = np.array([(side * 0.36, 1.28), (side * 0.62, 1.50), (side * 0.34, 1.86), (side * 0.02, 1.62)], np.float32)
        brush.outlined(wing, mixed(colour, (1, 1, 1), 0.25), 0.024)


def _shading(brush: Brush, who: Identity, at: Pose, skin: Colour) -> None:
    dark = scaled(skin, 0.62)
    brush.soft(at.flat(curve([(0.95, -1.0), (0.62, -0.3), (0.60, 0.4), (0.22, 1.2), (1.2, 1.2)]), 0.1), dark, 0.55, 0.12)
    brush.soft(at.flat(ellipse(-0.40, -0.45, 0.26, 0.22), CHEEK_Z), mixed(skin, (1, 0.97, 0.92), 0.6), 0.35, 0.14)
    for side in (-1, 1):
        brush.soft(at.flat(ellipse(side * 0.46, 0.30, 0.17, 0.12), CHEEK_Z), mixed(skin, (0.90, 0.30, 0.26), 0.5), 0.45, 0.08)
        brush.soft(at.flat(ellipse(side * EYE_X, EYE_Y - 0.02, 0.24, 0.15), EYE_Z), dark, 0.28, 0.07)
    if who.freckles:
        random = np.random.default_rng(3)
        for _ in range(24):
            side, x, y = random.choice((-1, 1)), random.uniform(0.10, 0.62), random.uniform(0.10, 0.42)
            brush.fill(
                ellipse(*at(side * x, y, CHEEK_Z + 0.2), 0.024, 0.022), mixed(scaled(skin, 0.6), (0.55, 0.25, 0.10), 0.45)
            )


def _eye(brush: Brush, person: Person, at: Pose, side: int, skin: Colour) -> None:
    who = person.identity
    open_by = 1 - person.eyelids
    x = side * EYE_X

    def placed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [at(x + side * dx, EYE_Y + dy, EYE_Z) for dx, dy in points]

    top, low = 0.135 * open_by - 0.03 * person.eyelids, 0.095
    almond = curve(
        placed(
            [
                (-0.20, 0.03),
                (-0.10, -0.75 * top),
                (0.02, -top),
                (0.14, -0.65 * top),
                (0.215, -0.01),
                (0.12, 0.7 * low),
                (0.0, low),
                (-0.12, 0.7 * low),
            ]
        )
    )
    lid = curve(
        placed([(-0.21, 0.035), (-0.10, -0.8 * top - 0.01), (0.02, -top - 0.015), (0.14, -0.7 * top - 0.01), (0.245, -0.035)]),
        closed=False,
    )
    if open_by > 0.25:
        brush.fill(almond, (0.98, 0.98, 0.97))
        iris = EYES[who.eyes]
        px, py = at(x + 0.055 * person.gaze, EYE_Y - 0.012, EYE_Z)
        with brush.canvas.within(brush.at(almond)):
            brush.fill(ellipse(px, py, 0.128, 0.128), scaled(iris, 0.55))
            brush.fill(ellipse(px, py, 0.108, 0.108), iris)
            brush.soft(ellipse(px, py + 0.055, 0.075, 0.05), mixed(iris, (1, 1, 0.9), 0.4), 0.75, 0.02)
            brush.fill(ellipse(px, py, 0.054, 0.054), INK)
            brush.soft(
                curve(placed([(-0.25, -0.2), (0.25, -0.2), (0.22, -0.45 * top), (0.0, -0.72 * top), (-0.2, -0.4 * top)])),
                (0.25, 0.2, 0.2),
                0.5,
                0.03,
            )
            brush.fill(ellipse(px - 0.045, py - 0.05, 0.034, 0.034), (1, 1, 1))
    else:
        brush.fill(almond, scaled(skin, 0.92))
        lid = curve(placed([(-0.20, 0.02), (-0.1, 0.065), (0.02, 0.08), (0.14, 0.06), (0.235, 0.0)]), closed=False)
    brush.line([lid], mixed(INK, scaled(skin, 0.3), 0.2), 0.042)
    crease = curve(placed([(-0.17, -0.10), (0.0, -0.205), (0.20, -0.10)]), closed=False)
    brush.veil([crease], scaled(skin, 0.5), 0.024, 0.6)


def _brow(brush: Brush, person: Person, at: Pose, side: int) -> None:
    who = person.identity
    hair = HAIRS[who.hair if who.hair_style != "bald" or who.beard else "brown"]
    thick = 0.060 if who.thick_brows else 0.030
    raised = 0.03 * person.smile
    middle = [(-0.22, -0.285), (-0.05, -0.345 - raised), (0.12, -0.335 - raised), (0.25, -0.265)]
    widths = (thick, 1.1 * thick, 0.8 * thick, 0.2 * thick)
    upper = [at(side * (EYE_X + dx), EYE_Y + dy - w, EYE_Z) for (dx, dy), w in zip(middle, widths, strict=True)]
    lower = [at(side * (EYE_X + dx), EYE_Y + dy + w, EYE_Z) for (dx, dy), w in zip(middle, widths, strict=True)]
    brush.fill(curve([*upper, *reversed(lower)]), scaled(hair, 0.62 if who.hair != "black" else 1.0))


def _nose(brush: Brush, who: Identity, at: Pose, skin: Colour) -> None:
    wide = 0.165 if who.broad_nose else 0.105
    bridge = [at(0.05, EYE_Y + 0.02, 0.72), at(0.045, 0.12, 0.86), at(0.05, NOSE_Y - 0.02, NOSE_Z)]
    brush.soft(curve([*bridge, at(wide + 0.06, NOSE_Y + 0.07, 0.74), at(0.17, 0.1, 0.66)]), scaled(skin, 0.66), 0.55, 0.035)
    brush.soft(ellipse(*at(-0.02, NOSE_Y - 0.05, NOSE_Z), 0.05, 0.07), mixed(skin, (1, 1, 1), 0.55), 0.6, 0.03)
    wings = curve(
        [
            at(-wide, NOSE_Y + 0.02, 0.78),
            at(-0.8 * wide, NOSE_Y + 0.09, 0.80),
            at(-0.03, NOSE_Y + 0.07, 0.88),
            at(0.0, NOSE_Y + 0.11, 0.9),
            at(0.03, NOSE_Y + 0.07, 0.88),
            at(0.8 * wide, NOSE_Y + 0.09, 0.80),
            at(wide, NOSE_Y + 0.02, 0.78),
        ],
        closed=False,
    )
    brush.veil([wings], scaled(skin, 0.40), 0.032, 0.8)


def _mouth(brush: Brush, person: Person, at: Pose, skin: Colour) -> None:
    full = 1.55 if person.identity.full_lips else 0.85
    lips = mixed(scaled(skin, 0.72), (0.80, 0.20, 0.24), 0.62)
    smile = person.smile
    corner, wide = -0.075 * smile + 0.02, MOUTH_X * (0.82 + 0.24 * smile)
    opened = max(0.0, smile - 0.55) * 0.30
    y = MOUTH_Y

    def placed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [at(dx, y + dy, MOUTH_Z + 0.1 * (1 - abs(dx) / MOUTH_X)) for dx, dy in points]

    upper = [
        (-wide, corner),
        (-0.5 * wide, -0.035 * full),
        (-0.14 * wide, -0.062 * full),
        (0, -0.045 * full),
        (0.14 * wide, -0.062 * full),
        (0.5 * wide, -0.035 * full),
        (wide, corner),
    ]
    lower = [(0.6 * wide, 0.055 * full + opened), (0, 0.088 * full + opened), (-0.6 * wide, 0.055 * full + opened)]
    whole = curve(placed([*upper, *lower]))
    brush.fill(whole, lips)
    seam = [(-wide, corner), (-0.5 * wide, 0.012), (0, 0.02), (0.5 * wide, 0.012), (wide, corner)]
    if opened > 0.02:
        teeth = curve(
            placed(
                [
                    (-0.86 * wide, 0.5 * corner),
                    (-0.4 * wide, 0.012),
                    (0, 0.016),
                    (0.4 * wide, 0.012),
                    (0.86 * wide, 0.5 * corner),
                    (0.5 * wide, opened),
                    (0, 1.15 * opened),
                    (-0.5 * wide, opened),
                ]
            )
        )
        brush.fill(teeth, (0.97, 0.96, 0.94))
        brush.line([teeth], scaled(lips, 0.5), 0.018, closed=True)
    else:
        brush.line([curve(placed(seam), closed=False)], scaled(lips, 0.45), 0.028)
    brush.veil(
        [
            curve(
                placed([(-0.35 * wide, 0.06 * full + opened), (0, 0.072 * full + opened), (0.3 * wide, 0.06 * full + opened)]),
                closed=False,
            )
        ],
        mixed(lips, (1, 1, 1), 0.6),
        0.025,
        0.6,
    )
    brush.veil(
        [curve(placed([(-0.3 * wide, 0.16 + opened), (0, 0.175 + opened), (0.3 * wide, 0.16 + opened)]), closed=False)],
        scaled(skin, 0.55),
        0.03,
        0.45,
    )


def _beard(brush: Brush, at: Pose, hair: Colour) -> None:
    z = 0.5
    outer = [
        (-0.86, 0.02),
        (-0.62, 0.42),
        (-0.36, 0.50),
        (-0.18, 0.42),
        (0, 0.47),
        (0.18, 0.42),
        (0.36, 0.50),
        (0.62, 0.42),
        (0.86, 0.02),
        (0.95, 0.9),
        (0.4, 1.3),
        (-0.4, 1.3),
        (-0.95, 0.9),
    ]
    beard = curve([at(x, y, z if y < 0.8 else 0.25) for x, y in outer])
    brush.fill(beard, scaled(hair, 0.86))
    with brush.canvas.within(brush.at(beard)):
        random = np.random.default_rng(4)
        for tone, count in ((0.55, 46), (1.35, 30)):
            strands = []
            for _ in range(count):
                x, y = random.uniform(-0.85, 0.85), random.uniform(0.25, 1.0)
                strands.append(curve([at(x, y, z), at(1.04 * x, y + 0.09, z), at(1.02 * x, y + 0.17, z)], closed=False))
            brush.veil(strands, scaled(mixed(hair, (1, 1, 1), 0.12 if tone > 1 else 0), tone), 0.022, 0.6)


def _glasses(brush: Brush, at: Pose) -> None:
    for side in (-1, 1):
        frame = at.flat(rounded(side * EYE_X, EYE_Y + 0.015, 0.285, 0.225, 0.13), EYE_Z + 0.10)
        brush.fill(frame, (0.75, 0.85, 0.95), 0.14)
        brush.line([frame], INK, 0.062, closed=True)
        glare = curve([at(side * EYE_X - 0.17, EYE_Y + 0.06, 0.78), at(side * EYE_X - 0.05, EYE_Y - 0.13, 0.78)], closed=False)
        brush.veil([glare], (1, 1, 1), 0.045, 0.55)
        temple = [at(side * (EYE_X + 0.28), EYE_Y - 0.04, EYE_Z + 0.06), at(side * 0.80, EYE_Y - 0.02, 0.0)]
        brush.line([np.array(temple, np.float32)], INK, 0.045)
    bridge = curve([at(-0.085, EYE_Y, 0.84), at(0, EYE_Y - 0.035, 0.88), at(0.085, EYE_Y, 0.84)], closed=False)
    brush.line([bridge], INK, 0.055)


def _strands(brush: Brush, shape: Shape, lines: list[Shape], hair: Colour) -> None:
    """Draw strands of hair within a shape: dark ones, and every third bright."""
    with brush.canvas.within(brush.at(shape)):
        brush.veil([line for n, line in enumerate(lines) if n % 3], scaled(hair, 0.55), 0.022, 0.62)
        brush.veil(lines[::3], mixed(scaled(hair, 1.15), (1, 0.97, 0.9), 0.30), 0.028, 0.60)


def _hair_behind(brush: Brush, who: Identity, at: Pose, hair: Colour, sway: float) -> None:
    dark = scaled(hair, 0.72)
    if who.hair_style == "long":
        outline = [
            (0.0, -1.24),
            (0.62, -1.10),
            (0.98, -0.55),
            (1.06, 0.2),
            (1.14 + sway, 1.0),
            (1.06 + 2 * sway, 1.86),
            (0.6 + 2 * sway, 1.98),
            (-0.6 + 2 * sway, 1.98),
            (-1.06 + 2 * sway, 1.86),
            (-1.14 + sway, 1.0),
            (-1.06, 0.2),
            (-0.98, -0.55),
            (-0.62, -1.10),
        ]
        back = curve([at(x, y, -0.25) for x, y in outline])
        brush.outlined(back, dark)
        lines = [
            curve(
                [at(0.55 * x, -1.0, -0.25), at(x, 0.0, -0.25), at(1.08 * x + sway, 1.0, -0.25), at(x + 2 * sway, 1.95, -0.25)],
                closed=False,
            )
            for x in np.linspace(-1.05, 1.05, 22).tolist()
        ]
        _strands(brush, back, lines, dark)
    elif who.hair_style == "curly":
        for angle in np.linspace(-0.22, 1.22, 13) * math.pi:
            x, y = at(-0.88 * math.cos(angle), -0.16 - 0.90 * math.sin(angle), -0.2)
            brush.outlined(ellipse(x, y, 0.34, 0.34), dark, 0.02)
    elif who.hair_style == "bun":
        x, y = at(0.0, -1.30, -0.25)
        bun = ellipse(x + sway, y, 0.44, 0.37)
        brush.outlined(bun, hair)
        _strands(
            brush,
            bun,
            [
                curve([(x - 0.4, y + 0.3 - 0.12 * n), (x, y + 0.02 - 0.12 * n), (x + 0.4, y + 0.3 - 0.12 * n)], closed=False)
                for n in range(7)
            ],
            hair,
        )
        brush.soft(ellipse(x - 0.12, y - 0.14, 0.14, 0.08), mixed(hair, (1, 1, 1), 0.5), 0.5, 0.06)
    if who.hair_style in ("short", "bun"):
        brush.fill(
            curve(
                [
                    at(x, y, -0.15)
                    for x, y in ((0, -1.13), (0.6, -1.0), (0.86, -0.5), (0.82, 0.1), (-0.82, 0.1), (-0.86, -0.5), (-0.6, -1.0))
                ]
            ),
            dark,
        )


CAPS: dict[str, tuple[tuple[tuple[float, float], ...], tuple[tuple[float, float], ...]]] = {
    "short": (
        ((-0.88, 0.06), (-0.93, -0.5), (-0.66, -1.05), (-0.1, -1.22), (0.5, -1.14), (0.88, -0.72), (0.90, 0.06)),
        ((0.78, -0.02), (0.70, -0.42), (0.42, -0.62), (0.0, -0.52), (-0.42, -0.44), (-0.66, -0.60), (-0.76, -0.02)),
    ),
    "long": (
        (
            (-1.04, 1.0),
            (-1.02, 0.0),
            (-0.94, -0.62),
            (-0.52, -1.14),
            (0.0, -1.22),
            (0.52, -1.14),
            (0.94, -0.62),
            (1.02, 0.0),
            (1.04, 1.0),
        ),
        (
            (0.80, 1.0),
            (0.72, 0.25),
            (0.66, -0.28),
            (0.40, -0.64),
            (0.06, -0.84),
            (-0.30, -0.60),
            (-0.64, -0.22),
            (-0.72, 0.25),
            (-0.80, 1.0),
        ),
    ),
    "bun": (
        ((-0.84, 0.02), (-0.90, -0.5), (-0.58, -1.06), (0.0, -1.18), (0.58, -1.06), (0.90, -0.5), (0.84, 0.02)),
        ((0.74, -0.06), (0.66, -0.48), (0.36, -0.74), (0.0, -0.80), (-0.36, -0.74), (-0.66, -0.48), (-0.74, -0.06)),
    ),
    "curly": (
        ((-0.92, 0.1), (-1.0, -0.5), (-0.66, -1.12), (0.0, -1.28), (0.66, -1.12), (1.0, -0.5), (0.92, 0.1)),
        ((0.78, 0.04), (0.70, -0.36), (0.38, -0.60), (0.0, -0.56), (-0.38, -0.60), (-0.70, -0.36), (-0.78, 0.04)),
    ),
}
"""Hair style -> outer line and hairline of the hair in front of the face."""


def _hair_in_front(brush: Brush, who: Identity, at: Pose, hair: Colour, sway: float) -> None:
    if who.hair_style == "bald":
        return
    outer, hairline = CAPS[who.hair_style]
    cap = curve([*(at(x, y, -0.1) for x, y in outer), *(at(x, y, HAIRLINE_Z) for x, y in hairline)])
    with brush.canvas.within(brush.at(_face(who, at))):
        brush.soft(cap + np.array((0.03, 0.07), np.float32), scaled(SKINS[who.skin], 0.45), 0.5, 0.05)
    brush.outlined(cap, hair, 0.022)
    if who.hair_style == "curly":
        random = np.random.default_rng(6)
        for angle in np.linspace(-0.12, 1.12, 15) * math.pi:
            out = random.uniform(0.60, 0.92)
            x, y = at(-out * math.cos(angle), -0.30 - out * 0.86 * math.sin(angle), 0.15)
            curl = ellipse(x, y, 0.20, 0.20)
            brush.outlined(curl, hair, 0.02)
            brush.veil([ellipse(x, y, 0.12, 0.12)[8:40]], mixed(scaled(hair, 1.15), (1, 1, 1), 0.30), 0.03, 0.6)
            brush.veil([ellipse(x + 0.02, y + 0.02, 0.06, 0.06)[:30]], scaled(hair, 0.5), 0.03, 0.7)
        return
    part = {"short": (0.42, -1.12), "long": (0.05, -1.18), "bun": (0.0, -1.2)}[who.hair_style]
    lines = []
    for n, share in enumerate(np.linspace(0, 1, 30).tolist()):
        (ox, oy), (hx, hy) = _along(outer, share), _along(tuple(reversed(hairline)), share)
        end = at(hx, hy, HAIRLINE_Z)
        middle = at(0.5 * (ox + hx), 0.5 * (oy + hy) - 0.06, 0.3)
        start = (
            at(part[0] + 0.04 * (n % 3), part[1], 0.0)
            if who.hair_style != "bun"
            else at(0.25 * ox, oy if oy < -1 else -1.15, 0.0)
        )
        lines.append(curve([start, middle, end], closed=False))
    _strands(brush, cap, lines, hair)
    with brush.canvas.within(brush.at(cap)):
        brush.soft(
            at.flat(curve([(-0.62, -0.86), (-0.2, -1.04), (0.25, -1.02), (0.2, -0.90), (-0.2, -0.90), (-0.52, -0.74)]), 0.1),
            mixed(hair, (1, 1, 1), 0.6),
            0.45,
            0.06,
        )
        brush.soft(at.flat(ellipse(0.95, -0.3, 0.22, 0.8), 0.0), scaled(hair, 0.4), 0.5, 0.12)


def _along(points: tuple[tuple[float, float], ...], share: float) -> tuple[float, float]:
    """Return the point at a share of the way along a line."""
    place = share * (len(points) - 1)
    first = min(int(place), len(points) - 2)
    (x0, y0), (x1, y1) = points[first], points[first + 1]
    return x0 + (x1 - x0) * (place - first), y0 + (y1 - y0) * (place - first)
