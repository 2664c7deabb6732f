"""The rendered world: scenes as data, random scenes and motion. Does not draw or caption.

Coordinates: x to the right, y down. The centre of the image is (0, 0), its edges are at -1 and 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

from training.rendered.canvas import Colour
from vidgen_ray.dataset.demo_captioner import LABELS

COLOURS: dict[str, Colour] = {
    "red": (0.84, 0.13, 0.14),
    "orange": (0.96, 0.50, 0.07),
    "yellow": (0.98, 0.84, 0.18),
    "green": (0.14, 0.58, 0.24),
    "blue": (0.13, 0.36, 0.86),
    "purple": (0.50, 0.20, 0.72),
    "pink": (0.98, 0.52, 0.73),
    "white": (0.96, 0.96, 0.96),
}
"""Colours of things and clothes."""
PLACES, WEATHERS, STYLES, HAIR_STYLES = (LABELS[name] for name in ("place", "weather", "style", "hair_style"))
THINGS = LABELS["subject"][:-1]
SKINS: dict[str, Colour] = {
    "pale": (0.99, 0.84, 0.75),
    "tan": (0.88, 0.66, 0.48),
    "brown": (0.62, 0.41, 0.27),
    "dark": (0.37, 0.23, 0.16),
}
HAIRS: dict[str, Colour] = {
    "black": (0.11, 0.10, 0.13),
    "brown": (0.42, 0.24, 0.12),
    "blond": (0.93, 0.75, 0.36),
    "red": (0.78, 0.29, 0.10),
    "grey": (0.68, 0.69, 0.72),
}
FACE_SHAPES = ("round", "long", "square")
EYES: dict[str, Colour] = {"brown": (0.38, 0.20, 0.08), "blue": (0.17, 0.47, 0.88), "green": (0.18, 0.58, 0.26)}
GARMENTS = ("shirt", "sweater")
MOVES = {"boat": "sail", "car": "drive", "balloon": "rise", "house": "zoom", "tree": "zoom", "ball": "zoom"}
"""Thing -> motion in a clip. The image shows the direction: bow or bonnet."""
MIDDLE = 0.18
"""Maximum |x| of a subject in the middle."""
FRAMINGS = {"close-up": (0.40, 0.52), "half body": (0.26, 0.34), "wide": (0.17, 0.21)}
"""Framing of a person -> range of half the height of the head."""
FRAMING_SHARES = (0.68, 0.24, 0.08)
SECONDS = 1.5
"""Length of a clip in seconds, for what moves by itself: waves, leaves, hair."""
BLINK = 0.28
"""Time of the blink, as a share of the clip: eyes are open in its first, middle and last frame."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Traits of a person, the same in all images."""

    skin: str
    hair: str
    hair_style: str
    face_shape: str
    eyes: str
    glasses: bool
    beard: bool
    freckles: bool = False
    thick_brows: bool = False
    broad_nose: bool = False
    full_lips: bool = False


@dataclass(frozen=True, slots=True)
class Person:
    """A person in a scene."""

    identity: Identity
    clothes: str
    x: float
    y: float
    radius: float
    """Half the height of the head."""
    looks: float
    """Turn of the head: -1 is 20 degrees towards the left edge of the image, 1 the same towards the right edge."""
    garment: str = "shirt"
    smile: float = 0.6
    """From 0 (serious) to 1 (laughing)."""
    gaze: float = 0.0
    """Direction of the eyes relative to the head, from -1 (left edge of the image) to 1."""
    tilt: float = 0.0
    """Turn of the head in the image in radians, clockwise."""
    eyelids: float = 0.0
    """From 0 (open eyes) to 1 (closed)."""


@dataclass(frozen=True, slots=True)
class Thing:
    """A thing in a scene."""

    kind: str
    colour: str
    x: float
    size: float
    faces: int
    """Direction: -1 for left, 1 for right."""
    lift: float = 0.0
    """Height above its normal position."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A place with a subject."""

    place: str
    weather: str
    subject: Person | Thing
    clouds: float
    """Horizontal position of the clouds, 0 to 1."""
    camera: float = 0.0
    """Distance that the camera has moved to the right. The subject moves with it, the ground behind the subject does not."""
    beside: Person | None = None
    """A second person, to the right of the first one in the image."""
    land: int = 0
    """Seed of the hills, houses, trees and clouds of the background."""
    seconds: float = 0.0
    """Time, for what moves by itself."""

    @property
    def side(self) -> str:
        """Side of the subject: `left`, `right` or `middle`."""
        if abs(self.subject.x) < MIDDLE or self.beside:
            return "middle"
        return "left" if self.subject.x < 0 else "right"

    @property
    def people(self) -> list[Person]:
        return [one for one in (self.subject, self.beside) if isinstance(one, Person)]


def some_identity(random: Random) -> Identity:
    hair_style = random.choice(HAIR_STYLES)
    return Identity(
        skin=random.choice(list(SKINS)),
        hair=random.choice(list(HAIRS)),
        hair_style=hair_style,
        face_shape=random.choice(FACE_SHAPES),
        eyes=random.choice(list(EYES)),
        glasses=random.random() < 0.4,
        beard=hair_style in ("short", "bald", "curly") and random.random() < 0.5,
        freckles=random.random() < 0.2,
        thick_brows=random.random() < 0.5,
        broad_nose=random.random() < 0.5,
        full_lips=random.random() < 0.5,
    )


def some_person(random: Random, identity: Identity | None = None) -> Person:
    (framing,) = random.choices(list(FRAMINGS), FRAMING_SHARES)
    radius = random.uniform(*FRAMINGS[framing])
    looks = random.choice((-1.0, 0.0, 0.0, 1.0)) * random.uniform(0.5, 1.0)
    return Person(
        identity=identity or some_identity(random),
        clothes=random.choice(list(COLOURS)),
        x=random.choice((-0.38, 0.0, 0.0, 0.38)) + random.uniform(-0.06, 0.06),
        y=random.uniform(-0.10, 0.06) - 0.9 * (0.46 - min(0.46, radius)),
        radius=radius,
        looks=looks,
        garment=random.choice(GARMENTS),
        smile=random.random(),
        gaze=random.uniform(-0.5, 0.5),
        tilt=random.uniform(-0.10, 0.10),
    )


def two_people(random: Random, identities: tuple[Identity | None, Identity | None] = (None, None)) -> tuple[Person, Person]:
    """Return two people side by side, from left to right."""
    radius = random.uniform(0.27, 0.34)
    y = random.uniform(-0.15, 0.0)
    pair = []
    for side, identity in zip((-1, 1), identities, strict=True):
        one = some_person(random, identity)
        x = side * random.uniform(0.42, 0.48)
        pair.append(replace(one, x=x, y=y + random.uniform(-0.06, 0.06), radius=radius * random.uniform(0.95, 1.05)))
    return pair[0], pair[1]


def some_thing(random: Random) -> Thing:
    return Thing(
        kind=random.choice(THINGS),
        colour=random.choice(list(COLOURS)),
        x=random.choice((-0.42, 0.0, 0.42)) + random.uniform(-0.06, 0.06),
        size=random.uniform(0.36, 0.46),
        faces=random.choice((-1, 1)),
    )


def some_scene(
    random: Random, *, identity: Identity | None = None, people: float = 0.5, pairs: float = 0.0, lands: int = 8
) -> Scene:
    """Return a random scene, with a person with probability `people`, or always if `identity` is given.

    `pairs`: share of the scenes with people that show two of them.
    """
    person = identity is not None or random.random() < people
    beside = None
    subject: Person | Thing
    if person and random.random() < pairs:
        subject, beside = two_people(random, (identity, None))
    else:
        subject = some_person(random, identity) if person else some_thing(random)
    place = random.choice(PLACES)
    # Boats are always on water, and most subjects on water are boats.
    if isinstance(subject, Thing):
        if subject.kind == "boat":
            place = "sea"
        elif place == "sea" and subject.kind in ("house", "car", "tree"):
            place = random.choice(("meadow", "desert", "snow", "city"))
    return Scene(
        place=place,
        weather=random.choice(WEATHERS),
        subject=subject,
        clouds=random.random(),
        beside=beside,
        land=random.randrange(lands),
        seconds=random.uniform(0, 6),
    )


def moved(scene: Scene, time: float, speed: float) -> tuple[Scene, float]:
    """Return the scene at a later time, and the zoom factor of the camera (1: unchanged).

    `time`: 0 to 1, from the start to the end of a clip. `speed`: 0 to 1, relative to the maximum.
    """
    way, subject = time * speed, scene.subject
    scene = replace(scene, clouds=(scene.clouds + 0.08 * way) % 1.0, seconds=scene.seconds + SECONDS * way)
    if isinstance(subject, Person):
        beside = scene.beside and _moved_person(scene.beside, time, speed)
        towards = -1 if subject.looks < -0.3 else 1
        return replace(scene, subject=_moved_person(subject, time, speed), beside=beside, camera=0.22 * towards * way), 1.0
    move = MOVES[subject.kind]
    if move in ("sail", "drive"):
        subject = replace(subject, x=subject.x + 0.12 * subject.faces * way)
        return replace(scene, subject=subject, camera=0.22 * subject.faces * way), 1.0
    if move == "rise":
        return replace(scene, subject=replace(subject, lift=0.2 * way)), 1.0
    return scene, 1.0 + 0.2 * way


def _moved_person(person: Person, time: float, speed: float) -> Person:
    """Turn the head and look further in its direction; blink in the second quarter of the clip."""
    way = time * speed
    towards = -1 if person.looks > 0.3 else 1
    eyelids = max(0.0, 1 - abs(time - BLINK) / 0.13) if speed > 0 else 0.0
    return replace(
        person,
        looks=max(-1.0, min(1.0, person.looks + 0.55 * towards * way)),
        tilt=person.tilt + 0.05 * math.sin(2 * math.pi * way),
        gaze=max(-0.6, min(0.6, person.gaze + 0.4 * towards * way)),
        eyelids=eyelids,
    )
