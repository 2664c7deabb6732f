"""Draw scenes. Shapes are signed distance functions, so images of any size have clean edges.

Distances are in units of half the image height, negative inside.
Source of the shapes: Quilez, 2D distance functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from training.world import COLOURS, EYES, HAIRS, SKINS, Colour, Identity, Person, Scene, Thing

Field = NDArray[np.float32]


class Paint(Protocol):
    def __call__(self, distance: Field, of: Colour, share: float = 1.0) -> None: ...


HORIZON = 0.30
SKY: dict[str, tuple[Colour, Colour]] = {
    "sunny": ((0.33, 0.62, 0.95), (0.74, 0.90, 1.00)),
    "cloudy": ((0.60, 0.65, 0.70), (0.82, 0.85, 0.87)),
    "sunset": ((0.44, 0.24, 0.55), (0.99, 0.62, 0.38)),
    "night": ((0.04, 0.06, 0.18), (0.14, 0.18, 0.40)),
}
"""Colours at the top and at the horizon."""
GROUND: dict[str, Colour] = {
    "meadow": (0.42, 0.70, 0.30),
    "sea": (0.13, 0.44, 0.70),
    "desert": (0.90, 0.75, 0.46),
    "snow": (0.93, 0.95, 0.99),
    "city": (0.52, 0.52, 0.55),
}
LIGHT: dict[str, Colour] = {
    "sunny": (1, 1, 1),
    "cloudy": (0.88, 0.90, 0.92),
    "sunset": (1.0, 0.84, 0.74),
    "night": (0.46, 0.50, 0.68),
}
"""Light on the ground."""
ON_SUBJECT: dict[str, Colour] = {
    "sunny": (1, 1, 1),
    "cloudy": (0.97, 0.97, 0.97),
    "sunset": (1.0, 0.95, 0.91),
    "night": (0.86, 0.87, 0.93),
}
"""Light on the subject. Weaker than on the ground, so that its colours are recognisable at night."""
PERIOD = 3.2
"""Width after which the ground, its hills and houses repeat. All of them are narrower than that."""
FAR = 0.7
"""Sideways motion of hills and houses in the image, relative to the ground in front."""
INK: Colour = (0.13, 0.11, 0.14)
AREA = 1 / 16
"""Spread of the blur that separates areas from details in pencil drawings, in image heights."""
EYE_X, EYE_Y, NOSE_Y, MOUTH_X, MOUTH_Y, TURN = 0.36, -0.15, 0.25, 0.27, 0.60, 0.14
"""Positions of facial features, and their shift when the head is turned, in half head heights. The proportions match the
template for face alignment: insightface's, with 112 pixels."""


@dataclass(slots=True)
class Canvas:
    """Square image: colours (H, W, 3) from 0 to 1, and the coordinates of each pixel."""

    pixels: Field
    x: Field
    y: Field

    @classmethod
    def blank(cls, size_px: int, nearer: float) -> Canvas:
        line = ((np.arange(size_px, dtype=np.float32) + 0.5) / size_px * 2 - 1) / nearer
        y, x = np.meshgrid(line + _centre_y(nearer), line, indexing="ij")
        return cls(np.zeros((size_px, size_px, 3), np.float32), x, y)

    def paint(self, distance: Field, colour: Colour | Field) -> None:
        per_unit = self.pixels.shape[0] / (self.x[0, -1] - self.x[0, 0])
        cover = np.clip(0.5 - distance * per_unit, 0, 1)[..., None]
        self.pixels += (np.asarray(colour, np.float32) - self.pixels) * cover


def draw(scene: Scene, size_px: int, nearer: float = 1.0) -> NDArray[np.uint8]:
    """Draw the scene as uint8 RGB (size_px, size_px, 3). `nearer`: zoom factor of the camera."""
    canvas = Canvas.blank(size_px, nearer)
    _sky(canvas, scene)
    _ground(canvas, scene)
    if isinstance(scene.subject, Person):
        _person(canvas, scene.subject, ON_SUBJECT[scene.weather])
    else:
        _thing(canvas, scene.subject, ON_SUBJECT[scene.weather])
    return np.rint(np.clip(canvas.pixels, 0, 1) * 255).astype(np.uint8)


def keypoints_px(person: Person, size_px: int) -> NDArray[np.float32]:
    """Return eyes, nose and mouth corners of a drawn person, from left to right in the image: (5, 2), x and y in pixels."""
    turn = TURN * person.looks
    places = np.array(
        [
            (turn - EYE_X, EYE_Y),
            (turn + EYE_X, EYE_Y),
            (turn * 1.3, NOSE_Y),
            (turn - MOUTH_X, MOUTH_Y),
            (turn + MOUTH_X, MOUTH_Y),
        ]
    )
    units = places * person.radius + (person.x, person.y)
    return ((units + 1) / 2 * size_px).astype(np.float32)


def face_box_px(person: Person, size_px: int) -> NDArray[np.float32]:
    """Return left, top, right and bottom of a drawn face in pixels."""
    half = person.radius * np.array([0.86, 1.0])
    middle = np.array([person.x, person.y])
    corners = np.concatenate([middle - half, middle + half])
    return ((corners + 1) / 2 * size_px).astype(np.float32)


def subject_box(subject: Person | Thing) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the subject with a margin, in scene units."""
    if isinstance(subject, Person):
        return subject.x - 1.3 * subject.radius, subject.y - 1.5 * subject.radius, subject.x + 1.3 * subject.radius, 1.0
    reach = 1.1 * subject.size
    left, right = subject.x - reach, subject.x + reach
    if subject.kind == "balloon":
        middle = -0.32 - subject.lift
        return left, middle - subject.size, right, middle + 1.6 * subject.size
    return left, HORIZON + 0.22 - 2.0 * subject.size, right, HORIZON + 0.22 + 0.2 * subject.size


def head_box(person: Person) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of a head with its hair, in scene units."""
    r = person.radius
    return person.x - 1.2 * r, person.y - 1.5 * r, person.x + 1.2 * r, person.y + 1.2 * r


def detail_box(subject: Person | Thing) -> tuple[float, float, float, float]:
    """Return the box of a thing, or of a person's head, in scene units. Most details of a scene are within it."""
    return head_box(subject) if isinstance(subject, Person) else subject_box(subject)


def in_image(box: tuple[float, float, float, float], nearer: float) -> tuple[float, float, float, float]:
    """Return a box given in scene units, as the camera shows it: left, top, right and bottom, from -1 to 1 within the image."""
    left, top, right, bottom = box
    centre_y = _centre_y(nearer)
    return left * nearer, (top - centre_y) * nearer, right * nearer, (bottom - centre_y) * nearer


def _centre_y(nearer: float) -> float:
    """Return the y of the scene at the centre of the image. The camera moves towards the horizon when it moves in."""
    return HORIZON * (1 - 1 / nearer) * 0.5


def _circle(x: Field, y: Field, radius: float) -> Field:
    return np.hypot(x, y) - np.float32(radius)


def _ellipse(x: Field, y: Field, rx: float, ry: float) -> Field:
    """Return the approximate distance to an ellipse. Almost exact near its edge."""
    length = np.hypot(x / rx, y / ry)
    gradient = np.hypot(x / rx**2, y / ry**2) + np.float32(1e-6)
    return length * (length - 1) / gradient


def _box(x: Field, y: Field, rx: float, ry: float, rounding: float = 0.0) -> Field:
    dx, dy = np.abs(x) - (rx - rounding), np.abs(y) - (ry - rounding)
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - np.float32(rounding)


def _triangle(x: Field, y: Field, rx: float, ry: float) -> Field:
    """Return the distance to a triangle that points up. `ry` is half of its height."""
    slope = (np.abs(x) * 2 * ry - (y + ry) * rx) / math.hypot(2 * ry, rx)
    return np.maximum(y - ry, slope)


def _lit(colour: Colour, light: Colour, share: float = 1.0) -> Field:
    return np.clip(np.asarray(colour, np.float32) * np.asarray(light, np.float32) * share, 0, 1)


def _sky(canvas: Canvas, scene: Scene) -> None:
    top, bottom = (np.asarray(colour, np.float32) for colour in SKY[scene.weather])
    share = np.clip((canvas.y + 1) / (1 + HORIZON), 0, 1)[..., None]
    canvas.pixels[:] = top + (bottom - top) * share
    if scene.weather == "sunny":
        canvas.paint(_circle(canvas.x - 0.68, canvas.y + 0.70, 0.17), (1.0, 0.92, 0.45))
    elif scene.weather == "sunset":
        canvas.paint(_circle(canvas.x + 0.66, canvas.y - 0.16, 0.24), (1.0, 0.86, 0.52))
    elif scene.weather == "night":
        canvas.paint(_circle(canvas.x + 0.68, canvas.y + 0.70, 0.15), (0.97, 0.95, 0.82))
        canvas.paint(_circle(canvas.x + 0.61, canvas.y + 0.73, 0.13), SKY["night"][0])
        for x, y in ((-0.30, -0.82), (0.05, -0.62), (0.38, -0.86), (0.72, -0.60), (0.86, -0.88), (-0.88, -0.36)):
            canvas.paint(_circle(canvas.x - x, canvas.y - y, 0.028), (0.97, 0.95, 0.82))
    if scene.weather in ("sunny", "cloudy"):
        colour = (0.99, 0.99, 1.0) if scene.weather == "sunny" else (0.92, 0.93, 0.94)
        for offset, y, scale in ((0.0, -0.72, 1.0), (0.55, -0.56, 0.8))[: 1 if scene.weather == "sunny" else 2]:
            x = canvas.x - (((scene.clouds + offset) % 1.0) * 2.4 - 1.2)
            puffs = [_ellipse(x - dx * scale, canvas.y - y - dy, rx * scale, ry * scale) for dx, dy, rx, ry in _PUFFS]
            canvas.paint(np.minimum.reduce(puffs), colour)


_PUFFS = ((-0.16, 0.02, 0.16, 0.08), (0.0, -0.03, 0.17, 0.12), (0.17, 0.02, 0.15, 0.08))


def _ground(canvas: Canvas, scene: Scene) -> None:
    light, y = LIGHT[scene.weather], canvas.y
    near, far = ((canvas.x + camera + PERIOD / 2) % PERIOD - PERIOD / 2 for camera in (scene.camera, FAR * scene.camera))
    ground = _lit(GROUND[scene.place], light)
    if scene.place == "city":
        for left, width, height in (
            (-0.80, 0.17, 0.72),
            (-0.42, 0.15, 0.45),
            (-0.06, 0.16, 0.86),
            (0.34, 0.18, 0.52),
            (0.76, 0.19, 0.76),
        ):
            canvas.paint(_box(far - left, y - HORIZON, width, height), _lit((0.44, 0.46, 0.54), light, 0.8))
            for row in range(int(height / 0.2)):
                for side in (-0.5, 0.5):
                    window = _box(far - left - side * width, y - HORIZON + 0.17 + row * 0.2, 0.038, 0.05)
                    canvas.paint(window, (1.0, 0.87, 0.45) if scene.weather in ("night", "sunset") else (0.74, 0.84, 0.92))
    if scene.place == "desert":
        canvas.paint(_ellipse(far - 0.55, y - HORIZON - 0.05, 0.8, 0.26), _lit(GROUND["desert"], light, 0.86))
    if scene.place == "snow":
        for left, width, height in ((-0.55, 0.62, 0.30), (0.50, 0.75, 0.38)):
            canvas.paint(_triangle(far - left, y - HORIZON + height, width, height), _lit((0.66, 0.72, 0.82), light))
            canvas.paint(
                _triangle(far - left, y - HORIZON + 1.62 * height, width * 0.38, height * 0.38), _lit((0.97, 0.98, 1.0), light)
            )
    if scene.place == "meadow":
        canvas.paint(_ellipse(far + 0.50, y - HORIZON - 0.10, 0.85, 0.30), _lit((0.33, 0.60, 0.27), light))
    canvas.paint(HORIZON - y, ground)
    if scene.place == "sea":
        for row, left in ((0.42, -0.5), (0.55, 0.35), (0.70, -0.2), (0.86, 0.55)):
            canvas.paint(_box(near - left, y - row, 0.34, 0.014, 0.014), _lit((0.45, 0.72, 0.90), light))
    if scene.place == "city":
        for left in (-0.7, -0.1, 0.5):
            canvas.paint(_box(near - left, y - 0.78, 0.17, 0.02), _lit((0.90, 0.88, 0.80), light))


def _thing(canvas: Canvas, thing: Thing, light: Colour) -> None:
    s = thing.size
    x, y = (canvas.x - thing.x) / s, (canvas.y + thing.lift) / s
    colour = COLOURS[thing.colour]
    flip = x * thing.faces

    def paint(distance: Field, of: Colour, share: float = 1.0) -> None:
        canvas.paint(distance * s, _lit(of, light, share))

    at = (HORIZON + 0.22) / s
    if thing.kind == "boat":
        hull = np.maximum(_box(flip + 0.05, y - at + 0.02, 1.0, 0.24, 0.06), (np.abs(flip) + (y - at) * 0.7 - 0.98) * 0.8)
        paint(hull, (0.46, 0.28, 0.16))
        paint(_box(flip, y - at + 1.05, 0.045, 0.85), (0.30, 0.20, 0.13))
        sail = np.maximum.reduce(
            [-(flip - 0.09), (flip * 1.5 - 0.09 + (y - at + 0.35) * 0.0 - (y - at + 1.85) * 1.0) * 0.555, y - at + 0.36]
        )
        paint(sail, colour)
        back = np.maximum.reduce([flip + 0.09, (-flip * 2.4 - 0.1 - (y - at + 1.55)) * 0.385, y - at + 0.36])
        paint(back, colour, 0.8)
    elif thing.kind == "house":
        paint(_box(x, y - at + 0.60, 0.82, 0.62), colour)
        paint(_triangle(x, y - at + 1.58, 1.05, 0.38), colour, 0.55)
        paint(_box(x, y - at + 0.32, 0.17, 0.34), (0.36, 0.22, 0.13))
        for side in (-0.5, 0.5):
            paint(_box(x - side, y - at + 0.72, 0.17, 0.17), (0.98, 0.93, 0.70))
    elif thing.kind == "tree":
        paint(_box(x, y - at + 0.35, 0.13, 0.42), (0.44, 0.28, 0.16))
        for dx, dy, r in ((0.0, -1.55, 0.55), (-0.42, -1.12, 0.5), (0.42, -1.12, 0.5)):
            paint(_circle(x - dx, y - at - dy, r), colour)
    elif thing.kind == "balloon":
        top = -0.32 / s
        paint(_ellipse(x, y - top, 0.80, 0.92), colour)
        paint(_ellipse(x, y - top, 0.34, 0.92), colour, 0.78)
        for side in (-1, 1):
            paint(_box(x - side * (0.24 - (y - top - 1.05) * 0.3), y - top - 1.05, 0.025, 0.22), (0.30, 0.22, 0.16))
        paint(_box(x, y - top - 1.38, 0.22, 0.16, 0.04), (0.50, 0.32, 0.18))
    elif thing.kind == "car":
        paint(_box(flip + 0.15, y - at + 0.72, 0.56, 0.34, 0.18), colour, 0.85)
        paint(_box(flip + 0.15, y - at + 0.70, 0.44, 0.20, 0.10), (0.80, 0.91, 0.97))
        paint(_box(flip, y - at + 0.36, 1.05, 0.28, 0.12), colour)
        paint(_circle(flip - 0.93, y - at + 0.40, 0.09), (1.0, 0.94, 0.55))
        for side in (-0.58, 0.58):
            paint(_circle(x - side, y - at + 0.08, 0.25), INK)
            paint(_circle(x - side, y - at + 0.08, 0.10), (0.75, 0.75, 0.78))
    else:
        paint(_circle(x, y - at + 0.72, 0.78), colour)
        paint(_ellipse(x, y - at + 0.72, 0.26, 0.78), (0.98, 0.96, 0.90), 0.95)


def _person(canvas: Canvas, person: Person, light: Colour) -> None:
    identity, r = person.identity, person.radius
    x, y = (canvas.x - person.x) / r, (canvas.y - person.y) / r
    skin, hair = SKINS[identity.skin], HAIRS[identity.hair]
    turn = TURN * person.looks

    def paint(distance: Field, of: Colour, share: float = 1.0) -> None:
        canvas.paint(distance * r, _lit(of, light, share))

    if identity.hair_style == "long":
        paint(_box(x, y - 0.35, 1.0, 1.42, 0.85), hair, 0.85)
    if identity.hair_style == "curly":
        for angle in np.linspace(-0.15, 1.15, 7) * math.pi:
            paint(_circle(x - 0.78 * math.cos(angle), y + 0.22 + 0.78 * math.sin(angle), 0.44), hair, 0.92)
    if identity.hair_style == "bun":
        paint(_circle(x, y + 1.18, 0.36), hair, 0.92)
    paint(_box(x, y - 1.15, 0.30, 0.50), skin, 0.86)
    paint(_box(x, y - 2.15, 1.25, 0.95, 0.55), COLOURS[person.clothes])
    paint(_ellipse(x, y - 1.22, 0.36, 0.22), skin, 0.86)
    face = _face(identity, x, y)
    if identity.hair_style != "bald":
        paint(_ellipse(x, y + 0.12, 0.92, 0.98), hair, 0.92)
    paint(face, skin)
    if identity.beard:
        paint(np.maximum(face, 0.30 - y + 0.22 * np.abs(x - turn)), hair, 0.95)
    if identity.hair_style != "bald":
        # The hairline is an arc over the forehead that moves when the head turns.
        inside = np.maximum(_ellipse(x, y + 0.10, 0.92, 1.0), y + 0.30)
        paint(np.maximum(inside, -_ellipse(x - turn, y - 0.30, 0.78, 0.80)), hair)
    _features(paint, identity, x - turn, y, skin, turn)


def _face(identity: Identity, x: Field, y: Field) -> Field:
    if identity.face_shape == "round":
        return _ellipse(x, y, 0.86, 0.98)
    if identity.face_shape == "long":
        return _ellipse(x, y - 0.03, 0.72, 1.03)
    return _box(x, y, 0.80, 0.98, 0.50)


def _features(paint: Paint, identity: Identity, x: Field, y: Field, skin: Colour, turn: float) -> None:
    dark = identity.hair if identity.hair_style != "bald" or identity.beard else "brown"
    for side in (-1, 1):
        ex, ey = x - side * EYE_X, y - EYE_Y
        paint(_ellipse(ex, ey, 0.185, 0.165), (0.99, 0.99, 0.99))
        paint(_circle(ex - 0.25 * turn, ey, 0.125), EYES[identity.eyes])
        paint(_circle(ex - 0.25 * turn, ey, 0.060), INK)
        paint(_box(ex, ey + 0.265, 0.17, 0.038, 0.035), HAIRS[dark], 0.75)
    paint(_ellipse(x - 0.3 * turn, y - NOSE_Y + 0.03, 0.085, 0.13), skin, 0.80)
    lips = (0.74, 0.22, 0.24)
    smile = np.abs(_ellipse(x, y - MOUTH_Y + 0.17, 0.30, 0.22)) - 0.045
    paint(np.maximum(smile, MOUTH_Y - 0.12 - y), lips)
    if identity.glasses:
        for side in (-1, 1):
            paint(np.abs(_ellipse(x - side * EYE_X, y - EYE_Y, 0.29, 0.26)) - 0.036, INK)
        paint(_box(x, y - EYE_Y, 0.09, 0.030), INK)


def styled(picture: NDArray[np.uint8], style: str) -> NDArray[np.uint8]:
    """Return a flat image (H, W, 3) in another style: `flat` (unchanged), `sketch`, `night` or `pastel`."""
    flat = picture.astype(np.float32) / 255
    grey = flat @ np.array([0.30, 0.59, 0.11], np.float32)
    if style == "sketch":
        # Shading, thin pencil lines and warm paper. Large areas are light, and details have more contrast than in the flat
        # image: with less, or with dark lines, eyes in dark faces would be lost in the autoencoder.
        area = cv2.GaussianBlur(grey, (0, 0), AREA * len(grey))
        dy, dx = np.gradient(grey)
        lines = np.clip(np.hypot(dx, dy) * 2.5, 0, 1)
        tone = np.clip(0.55 + 0.35 * area + 1.5 * (grey - area) - 0.2 * lines, 0, 1)[..., None]
        drawn = np.array([0.98, 0.96, 0.90], np.float32) * tone
    elif style == "night":
        drawn = (
            0.55 * grey[..., None] * np.array([0.35, 0.50, 1.0], np.float32)
            + 0.18 * flat
            + np.array([0, 0.01, 0.06], np.float32)
        )
    elif style == "pastel":
        soft = grey[..., None] + 0.62 * (flat - grey[..., None])
        drawn = 0.50 + 0.50 * soft + np.array([0.04, -0.01, 0.02], np.float32)
    elif style == "flat":
        return picture
    else:
        raise ValueError(f"style: got {style!r}, must be flat, sketch, night or pastel")
    return np.rint(np.clip(drawn, 0, 1) * 255).astype(np.uint8)
