"""Draw scenes of the rendered world, restyle drawings, and say where things are in them."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from training.rendered import people
from training.rendered.backdrops import HORIZON, draw_ground, draw_sky
from training.rendered.canvas import Canvas
from training.rendered.people import EYE_X, EYE_Y, draw_person
from training.rendered.things import draw_thing
from training.rendered.world import Person, Scene, Thing

Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""
AREA = 1 / 16
"""Spread of the blur that separates areas from details in pencil drawings, in image heights."""


def draw(scene: Scene, size_px: int, nearer: float = 1.0) -> NDArray[np.uint8]:
    """Draw the scene as uint8 RGB (size_px, size_px, 3). `nearer`: zoom factor of the camera."""
    canvas = Canvas.blank(size_px, nearer, _centre_y(nearer))
    draw_sky(canvas, scene)
    draw_ground(canvas, scene)
    if isinstance(scene.subject, Thing):
        draw_thing(canvas, scene, scene.subject)
    for person in scene.people:
        draw_person(canvas, scene, person)
    return canvas.image()


def keypoints_px(person: Person, size_px: int) -> NDArray[np.float32]:
    """Return eyes, nose and mouth corners of a drawn person, from left to right in the image: (5, 2), x and y in pixels."""
    return np.asarray((people.keypoints(person) + 1) / 2 * size_px, np.float32)


def face_box_px(person: Person, size_px: int) -> NDArray[np.float32]:
    """Return left, top, right and bottom of a drawn face in pixels."""
    half = person.radius * np.array([0.84, 1.02])
    middle = np.array([person.x, person.y])
    return np.asarray((np.concatenate([middle - half, middle + half]) + 1) / 2 * size_px, np.float32)


def subject_box(subject: Person | Thing) -> Box:
    """Return the box of the subject with a margin, in scene units."""
    if isinstance(subject, Person):
        r = subject.radius
        return subject.x - 1.45 * r, subject.y - 1.6 * r, subject.x + 1.45 * r, 1.0
    reach = 1.1 * subject.size
    left, right = subject.x - reach, subject.x + reach
    if subject.kind == "balloon":
        middle = -0.32 - subject.lift
        return left, middle - subject.size, right, middle + 1.6 * subject.size
    return left, HORIZON + 0.24 - 2.1 * subject.size, right, HORIZON + 0.24 + 0.2 * subject.size


def head_box(person: Person) -> Box:
    """Return the box of a head with its hair, in scene units."""
    r = person.radius
    return person.x - 1.25 * r, person.y - 1.6 * r, person.x + 1.25 * r, person.y + 1.2 * r


def eyes_box(person: Person) -> Box:
    """Return the box of both eyes, in scene units."""
    half, r, y = EYE_X + 0.2, person.radius, person.y + EYE_Y * person.radius
    return person.x - half * r, y - 0.15 * r, person.x + half * r, y + 0.15 * r


def detail_boxes(scene: Scene) -> list[Box]:
    """Return the boxes of the thing, or of the heads, in scene units. Most details of a scene are within them."""
    if isinstance(scene.subject, Thing):
        return [subject_box(scene.subject)]
    return [head_box(person) for person in scene.people]


def in_image(box: Box, nearer: float) -> Box:
    """Return a box given in scene units, as the camera shows it: from -1 to 1 within the image."""
    left, top, right, bottom = box
    centre_y = _centre_y(nearer)
    return left * nearer, (top - centre_y) * nearer, right * nearer, (bottom - centre_y) * nearer


def _centre_y(nearer: float) -> float:
    """Return the y of the scene at the centre of the image. The camera moves towards the horizon when it moves in."""
    return HORIZON * (1 - 1 / nearer) * 0.5


def styled(picture: NDArray[np.uint8], style: str) -> NDArray[np.uint8]:
    """Return a flat image (H, W, 3) in another style: `flat` (unchanged), `sketch`, `night` or `pastel`."""
    flat = picture.astype(np.float32) / 255
    grey = flat @ np.array([0.30, 0.59, 0.11], np.float32)
    if style == "sketch":
        # Shading, thin pencil lines and warm paper. Large areas are light, and details have more contrast than in the flat
        # image: with less, or with dark lines, eyes in dark faces would be lost in the autoencoder.
        area = cv2.GaussianBlur(grey, (0, 0), AREA * len(grey))
        fine = cv2.GaussianBlur(grey, (0, 0), len(grey) / 256)
        dy, dx = np.gradient(fine)
        lines = np.clip(np.hypot(dx, dy) * 3.0 * len(grey) / 256, 0, 1)
        tone = np.clip(0.60 + 0.32 * area + 1.4 * (grey - area) - 0.35 * lines, 0, 1)[..., None]
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
