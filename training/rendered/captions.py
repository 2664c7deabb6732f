"""Generate captions of scenes of the rendered world. Does not draw."""

from __future__ import annotations

from random import Random

from training.rendered.world import FRAMINGS, Identity, Person, Scene, Thing
from vidgen_ray.dataset.demo_captioner import PHRASES

PLACE_WORDS, WEATHER_WORDS, STYLE_WORDS = (PHRASES[name] for name in ("place", "weather", "style"))
SIDE_WORDS = {
    "left": ("on the left", "to the left"),
    "right": ("on the right", "to the right"),
    "middle": ("", "", "in the middle"),
}
THING_WORDS = PHRASES["subject"]
OPENINGS = ("", "a picture of ", "a drawing of ")
FRAMING_WORDS: dict[str, tuple[str, ...]] = {
    "close-up": ("", "", "a portrait of ", "a close-up of ", "a picture of "),
    "half body": ("a half body picture of ", "half body, "),
    "wide": ("a wide shot of ", "a full body picture of "),
}
MOST_TRAITS = 3
"""Traits told of each of two people. More would not fit in the tokens of a prompt."""


def caption(scene: Scene, random: Random, *, names: tuple[str, ...] = (), side: bool = True) -> str:
    """Return a random caption of the scene.

    `names` replace the descriptions of the people, so that a model has to learn the traits that belong to a name. With
    `side=False` the caption does not mention left or right.
    """
    if isinstance(scene.subject, Thing):
        told = random.choice(OPENINGS) + _thing(scene.subject, random)
    else:
        told = _people(scene, random, names)
    side_words = random.choice(SIDE_WORDS[scene.side]) if side and not scene.beside else ""
    where = [random.choice(PLACE_WORDS[scene.place]), random.choice(WEATHER_WORDS[scene.weather])]
    if random.random() < 0.3:
        where.reverse()
    comma = random.choice(("", ","))
    return " ".join(part for part in (told, side_words + comma if side_words else "", *where) if part)


def styled_caption(scene: Scene, style: str, random: Random) -> str:
    """Return a caption followed by the style, joined as in the HunyuanDiT stage."""
    return f"{caption(scene, random)}, {random.choice(STYLE_WORDS[style])}"


def framing(person: Person) -> str:
    """Return the name of the framing whose range is nearest to the size of the person."""
    return min(FRAMINGS, key=lambda name: abs(sum(FRAMINGS[name]) / 2 - person.radius))


def _people(scene: Scene, random: Random, names: tuple[str, ...]) -> str:
    told = []
    for n, person in enumerate(scene.people):
        most_traits = MOST_TRAITS if scene.beside else None
        who = names[n] if n < len(names) else description(person, random, most_traits)
        told.append(who + _clothes(person, random))
    if scene.beside:
        return random.choice(("", "a picture of ")) + " and ".join(told)
    return random.choice(FRAMING_WORDS[framing(scene.people[0])]) + told[0]


def description(person: Person, random: Random, most_traits: int | None = None) -> str:
    """Return words for a person, such as "a man with short black hair, green eyes and a beard"."""
    identity = person.identity
    noun = random.choice(("person", "face")) if framing(person) == "close-up" else "person"
    if identity.beard and random.random() < 0.5:
        noun = "man"
    if identity.hair_style in ("long", "bun") and random.random() < 0.5:
        noun = "woman"
    traits = [hair(identity)]
    if random.random() < 0.6:
        traits.append(f"{identity.skin} skin")
    if random.random() < 0.6:
        traits.append(f"{identity.eyes} eyes")
    if identity.beard:
        traits.append("a beard" if identity.hair_style != "bald" else f"a {identity.hair} beard")
    if identity.glasses:
        traits.append("glasses")
    if identity.freckles and random.random() < 0.6:
        traits.append("freckles")
    random.shuffle(traits)
    traits = traits[:most_traits]
    listed = traits[0] if len(traits) == 1 else f"{', '.join(traits[:-1])} and {traits[-1]}"
    return f"a {noun} with {listed}"


def hair(identity: Identity) -> str:
    if identity.hair_style == "bald":
        return "a bald head"
    if identity.hair_style == "bun":
        return f"{identity.hair} hair in a bun"
    return f"{identity.hair_style} {identity.hair} hair"


def _thing(thing: Thing, random: Random) -> str:
    word = random.choice(THING_WORDS[thing.kind])
    article = "an" if thing.colour == "orange" and not word.startswith("little") else "a"
    if word.startswith("little"):
        return f"a little {thing.colour} {word.removeprefix('little ')}"
    return f"{article} {thing.colour} {word}"


def _clothes(person: Person, random: Random) -> str:
    article = "an" if person.clothes == "orange" else "a"
    return f" {random.choice(('in', 'wearing'))} {article} {person.clothes} {person.garment}"
