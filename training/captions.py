"""Generate captions of scenes. Does not draw."""

from __future__ import annotations

from random import Random

from training.world import Identity, Person, Scene, Thing
from vidgen_ray.dataset.demo_captioner import PHRASES

PLACE_WORDS, WEATHER_WORDS, STYLE_WORDS = (PHRASES[name] for name in ("place", "weather", "style"))
SIDE_WORDS = {
    "left": ("on the left", "to the left"),
    "right": ("on the right", "to the right"),
    "middle": ("", "", "in the middle"),
}
THING_WORDS = PHRASES["subject"]
PERSON_WORDS = ("person", "face")
OPENINGS = ("", "a picture of ", "a drawing of ")
PORTRAITS = ("a portrait of ", "", "a picture of ")


def caption(scene: Scene, random: Random, *, name: str | None = None, side: bool = True) -> str:
    """Return a random caption of the scene.

    `name` replaces the description of the person, so that a model has to learn the traits that belong to the name. With
    `side=False` the caption does not mention left or right.
    """
    subject = scene.subject
    if isinstance(subject, Person):
        who = _person(subject, random) if name is None else f"{name}{_clothes(subject, random)}"
        told = random.choice(PORTRAITS) + who
    else:
        told = random.choice(OPENINGS) + _thing(subject, random)
    parts = [told, random.choice(SIDE_WORDS[scene.side]) if side else ""]
    where = [random.choice(PLACE_WORDS[scene.place]), random.choice(WEATHER_WORDS[scene.weather])]
    if random.random() < 0.3:
        where.reverse()
    comma = random.choice(("", ","))
    return " ".join(part for part in (*parts[:1], parts[1] + comma if parts[1] else "", *where) if part)


def styled_caption(scene: Scene, style: str, random: Random) -> str:
    """Return a caption followed by the style, joined as in the HunyuanDiT stage."""
    return f"{caption(scene, random)}, {random.choice(STYLE_WORDS[style])}"


def _thing(thing: Thing, random: Random) -> str:
    word = random.choice(THING_WORDS[thing.kind])
    article = "an" if thing.colour == "orange" and not word.startswith("little") else "a"
    if word.startswith("little"):
        return f"a little {thing.colour} {word.removeprefix('little ')}"
    return f"{article} {thing.colour} {word}"


def _person(person: Person, random: Random) -> str:
    identity = person.identity
    noun = random.choice(PERSON_WORDS) if not identity.beard else random.choice((*PERSON_WORDS, "man", "man"))
    if identity.hair_style in ("long", "bun") and random.random() < 0.5:
        noun = "woman"
    skin = random.choice(("", f"{identity.skin} skin"))
    traits = [hair(identity)]
    if skin:
        traits.append(skin)
    if identity.beard:
        traits.append("a beard" if identity.hair_style != "bald" else f"a {identity.hair} beard")
    if identity.glasses:
        traits.append("glasses")
    random.shuffle(traits)
    listed = traits[0] if len(traits) == 1 else f"{', '.join(traits[:-1])} and {traits[-1]}"
    return f"a {noun} with {listed}{_clothes(person, random)}"


def hair(identity: Identity) -> str:
    if identity.hair_style == "bald":
        return "a bald head"
    if identity.hair_style == "bun":
        return f"{identity.hair} hair in a bun"
    return f"{identity.hair_style} {identity.hair} hair"


def _clothes(person: Person, random: Random) -> str:
    garment = random.choice(("shirt", "sweater"))
    article = "an" if person.clothes == "orange" else "a"
    return random.choice((f" in {article} {person.clothes} {garment}", f" wearing {article} {person.clothes} {garment}"))
