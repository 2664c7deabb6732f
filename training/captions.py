"""Generate captions of scenes. Does not draw."""

from __future__ import annotations

from random import Random

from training.world import Identity, Person, Scene, Thing

PLACE_WORDS = {
    "meadow": ("in a meadow", "on green grass", "in a green field"),
    "sea": ("by the sea", "at the sea", "on the water"),
    "desert": ("in the desert", "on the sand", "among dunes"),
    "snow": ("in the snow", "on white snow", "in the mountains"),
    "city": ("in the city", "in a city street", "among houses of a town"),
}
WEATHER_WORDS = {
    "sunny": ("on a sunny day", "under a blue sky", "in the sun"),
    "cloudy": ("on a cloudy day", "under a grey sky", "in the fog"),
    "sunset": ("at sunset", "in the evening light", "at dusk"),
    "night": ("at night", "under the stars", "in the moonlight"),
}
SIDE_WORDS = {
    "left": ("on the left", "to the left"),
    "right": ("on the right", "to the right"),
    "middle": ("", "", "in the middle"),
}
THING_WORDS = {
    "boat": ("boat", "sailing boat"),
    "house": ("house", "little house"),
    "tree": ("tree",),
    "balloon": ("balloon", "hot air balloon"),
    "car": ("car",),
    "ball": ("ball",),
}
PERSON_WORDS = ("person", "face")
OPENINGS = ("", "a picture of ", "a drawing of ")
PORTRAITS = ("a portrait of ", "", "a picture of ")
STYLE_WORDS = {
    "flat": ("a flat picture book drawing", "flat colours"),
    "sketch": ("a pencil sketch", "sketch on paper"),
    "night": ("dark night colours", "a blue night scene"),
    "pastel": ("soft pastel colours", "a pastel drawing"),
}


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
