"""The drawn world: scenes as data, random scenes and motion. Does not draw or caption.

Coordinates: x to the right, y down. The centre of the image is (0, 0), its edges are at -1 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from vidgen_ray.dataset.demo_captioner import LABELS

Colour = tuple[float, float, float]
"""Red, green, blue, 0 to 1."""

COLOURS: dict[str, Colour] = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.97, 0.84, 0.20),
    "green": (0.16, 0.58, 0.24),
    "blue": (0.14, 0.36, 0.86),
    "purple": (0.52, 0.22, 0.72),
    "pink": (0.97, 0.52, 0.72),
    "white": (0.96, 0.96, 0.96),
}
"""Colours of things and clothes."""
PLACES, WEATHERS, STYLES, HAIR_STYLES = (LABELS[name] for name in ("place", "weather", "style", "hair_style"))
THINGS = LABELS["subject"][:-1]
SKINS: dict[str, Colour] = {
    "pale": (0.98, 0.85, 0.76),
    "tan": (0.87, 0.66, 0.48),
    "brown": (0.62, 0.41, 0.27),
    "dark": (0.38, 0.24, 0.16),
}
HAIRS: dict[str, Colour] = {
    "black": (0.10, 0.09, 0.11),
    "brown": (0.42, 0.24, 0.11),
    "blond": (0.95, 0.78, 0.36),
    "red": (0.80, 0.30, 0.10),
    "grey": (0.68, 0.69, 0.72),
}
FACE_SHAPES = ("round", "long", "square")
EYES: dict[str, Colour] = {"brown": (0.36, 0.20, 0.10), "blue": (0.20, 0.45, 0.85), "green": (0.20, 0.55, 0.30)}
MOVES = {"boat": "sail", "car": "drive", "balloon": "rise", "house": "zoom", "tree": "zoom", "ball": "zoom"}
"""Thing -> motion in a clip. The image shows the direction: bow or bonnet."""
MIDDLE = 0.18
"""Maximum |x| of a subject in the middle."""


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
    """Turn of the head: -1 towards the left edge of the image, 1 towards the right edge."""


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

    @property
    def side(self) -> str:
        """Side of the subject: `left`, `right` or `middle`."""
        if abs(self.subject.x) < MIDDLE:
            return "middle"
        return "left" if self.subject.x < 0 else "right"


def some_identity(random: Random) -> Identity:
    hair_style = random.choice(HAIR_STYLES)
    return Identity(
        skin=random.choice(list(SKINS)),
        hair=random.choice(list(HAIRS)),
        hair_style=hair_style,
        face_shape=random.choice(FACE_SHAPES),
        eyes=random.choice(list(EYES)),
        glasses=random.random() < 0.35,
        beard=hair_style in ("short", "bald", "curly") and random.random() < 0.45,
    )


def some_person(random: Random, identity: Identity | None = None) -> Person:
    return Person(
        identity=identity or some_identity(random),
        clothes=random.choice(list(COLOURS)),
        x=random.choice((-0.38, 0.0, 0.0, 0.38)) + random.uniform(-0.06, 0.06),
        y=random.uniform(-0.10, 0.06),
        radius=random.uniform(0.40, 0.52),
        looks=random.choice((-1.0, 0.0, 1.0)) * random.uniform(0.6, 1.0),
    )


def some_thing(random: Random) -> Thing:
    return Thing(
        kind=random.choice(THINGS),
        colour=random.choice(list(COLOURS)),
        x=random.choice((-0.42, 0.0, 0.42)) + random.uniform(-0.06, 0.06),
        size=random.uniform(0.36, 0.46),
        faces=random.choice((-1, 1)),
    )


def some_scene(random: Random, *, identity: Identity | None = None, people: float = 0.5) -> Scene:
    """Return a random scene, with a person with probability `people`, or always if `identity` is given."""
    person = identity is not None or random.random() < people
    subject: Person | Thing = some_person(random, identity) if person else some_thing(random)
    place = random.choice(PLACES)
    # Boats are always on water, and most subjects on water are boats.
    if isinstance(subject, Thing):
        if subject.kind == "boat":
            place = "sea"
        elif place == "sea" and subject.kind in ("house", "car", "tree"):
            place = random.choice(("meadow", "desert", "snow", "city"))
    return Scene(place=place, weather=random.choice(WEATHERS), subject=subject, clouds=random.random())


def moved(scene: Scene, time: float, speed: float) -> tuple[Scene, float]:
    """Return the scene at a later time, and the zoom factor of the camera (1: unchanged).

    `time`: 0 to 1, from the start to the end of a clip. `speed`: 0 to 1, relative to the maximum.
    """
    way, subject = time * speed, scene.subject
    scene = replace(scene, clouds=(scene.clouds + 0.10 * way) % 1.0)
    if isinstance(subject, Person):
        # The camera walks beside people. A face that moves within the image is more than a small model can keep.
        return replace(scene, camera=-0.35 * way if subject.looks < -0.3 else 0.35 * way), 1.0
    move = MOVES[subject.kind]
    if move in ("sail", "drive"):
        subject = replace(subject, x=subject.x + 0.15 * subject.faces * way)
        return replace(scene, subject=subject, camera=0.3 * subject.faces * way), 1.0
    if move == "rise":
        return replace(scene, subject=replace(subject, lift=0.2 * way)), 1.0
    return scene, 1.0 + 0.2 * way
