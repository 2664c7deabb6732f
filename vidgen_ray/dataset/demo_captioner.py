"""Captions of clips of the demo models: a small classifier of the world that they draw, and the words of that world.

`training/classifier.py` trains it on degraded drawings. It never sees generated images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from vidgen_ray.weights.builtin import SHIPPED

CAPTIONER_FILE = SHIPPED / "captioner.safetensors"
SEEN_PX, _WIDTHS = 96, (16, 32, 64, 96)
Shown = Literal["yes", "no", "unclear"]
SURE = 0.5
"""Probability from which a value is said."""
_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
LABELS: dict[str, tuple[str, ...]] = {
    "subject": ("boat", "house", "tree", "balloon", "car", "ball", "person"),
    "colour": _COLOURS,
    "side": ("left", "middle", "right"),
    "place": ("meadow", "sea", "desert", "snow", "city"),
    "weather": ("sunny", "cloudy", "sunset", "night"),
    "style": ("flat", "sketch", "night", "pastel"),
    "hair": ("black", "brown", "blond", "red", "grey"),
    "hair_style": ("short", "long", "curly", "bun", "bald"),
    "skin": ("pale", "tan", "brown", "dark"),
    "glasses": ("no", "yes"),
    "beard": ("no", "yes"),
}
"""Label -> values. `colour` is the colour of the thing or of the clothes; those from `hair` on are of people."""
PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "subject": {
        **{name: (name,) for name in ("tree", "car", "ball")},
        "boat": ("boat", "sailing boat"),
        "house": ("house", "little house"),
        "balloon": ("balloon", "hot air balloon"),
        "person": ("person", "face", "man", "woman"),
    },
    "side": {"left": ("on the left", "to the left"), "right": ("on the right", "to the right"), "middle": ("in the middle",)},
    "place": {
        "meadow": ("in a meadow", "on green grass", "in a green field"),
        "sea": ("by the sea", "at the sea", "on the water"),
        "desert": ("in the desert", "on the sand", "among dunes"),
        "snow": ("in the snow", "on white snow", "in the mountains"),
        "city": ("in the city", "in a city street", "among houses of a town"),
    },
    "weather": {
        "sunny": ("on a sunny day", "under a blue sky", "in the sun"),
        "cloudy": ("on a cloudy day", "under a grey sky", "in the fog"),
        "sunset": ("at sunset", "in the evening light", "at dusk"),
        "night": ("at night", "under the stars", "in the moonlight"),
    },
    "style": {
        "flat": ("a flat picture book drawing", "flat colours"),
        "sketch": ("a pencil sketch", "sketch on paper"),
        "night": ("dark night colours", "a blue night scene"),
        "pastel": ("soft pastel colours", "a pastel drawing"),
    },
}
"""Label -> value -> phrases for it in prompts. The first one is that of captions."""
COLOURED = "(?:sailing |little |hot air )?(?:boat|house|tree|balloon|car|ball|shirt|sweater)"
PATTERNS: dict[str, dict[str, tuple[str, ...]]] = {
    **PHRASES,
    "colour": {value: (f"{value} {COLOURED}",) for value in _COLOURS},
    "hair": {value: (f"{value} (?:hair|beard)",) for value in LABELS["hair"]},
    "hair_style": {
        **{value: (rf"{value}(?= (?:\w+ )?hair)",) for value in ("short", "long", "curly")},
        "bun": ("hair in a bun",),
        "bald": ("bald",),
    },
    "skin": {value: (f"{value} skin",) for value in LABELS["skin"]},
    "glasses": {"yes": ("glasses",)},
    "beard": {"yes": ("beard",)},
}
"""Label -> value -> regular expressions of prompts that ask for it."""
Seen = Mapping[str, Mapping[str, float]]
"""Label -> value -> probability. Those of people only if a person is seen."""


class Classifier(nn.Module):
    """Images (B, 3, SEEN_PX, SEEN_PX) from -1 to 1 -> logits of each label."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        before = 3
        for width in _WIDTHS:
            blocks += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(), nn.MaxPool2d(2)]
            before = width
        self.body = nn.Sequential(*blocks, nn.Conv2d(before, before, 3, padding=1), nn.ReLU())
        # No global average pooling, because positions matter.
        size = before * (SEEN_PX // 2 ** len(_WIDTHS)) ** 2
        self.heads = nn.ModuleDict({name: nn.Linear(size, len(values)) for name, values in LABELS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        seen = self.body(images).flatten(1)
        return {name: head(seen) for name, head in self.heads.items()}


def small(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image (H, W, 3) in the size that the classifier sees."""
    return np.asarray(cv2.resize(image, (SEEN_PX, SEEN_PX), interpolation=cv2.INTER_AREA), np.uint8)


def load() -> Classifier:
    """Return the classifier that is shipped."""
    classifier = Classifier()
    classifier.load_state_dict({name: tensor.float() for name, tensor in load_file(CAPTIONER_FILE).items()})
    return classifier.eval().requires_grad_(False)


def read(classifier: Classifier, frames: NDArray[np.uint8]) -> Seen:
    """Return what frames (T, H, W, 3) of one clip show, averaged over them."""
    images = torch.from_numpy(np.stack([small(frame) for frame in frames])).permute(0, 3, 1, 2).float() / 127.5 - 1
    means = {name: logits.softmax(1).mean(0).tolist() for name, logits in classifier(images).items()}
    seen = {name: dict(zip(LABELS[name], values, strict=True)) for name, values in means.items()}
    of_people = [*LABELS].index("hair")
    return seen if seen["subject"]["person"] >= SURE else {name: seen[name] for name in [*LABELS][:of_people]}


def most_likely(seen: Seen) -> dict[str, str]:
    """Return the most likely value of each label."""
    return {name: max(values, key=values.__getitem__) for name, values in seen.items()}


def labels(seen: Seen) -> dict[str, str]:
    """Return the value of each label that is sure."""
    return {name: value for name, value in most_likely(seen).items() if seen[name][value] >= SURE}


def caption_text(seen: Seen) -> str:
    """Return phrases for all that is sure."""
    said = labels(seen)
    subject, style = said.get("subject", "thing"), said.get("hair_style", "")
    is_person, hair = subject == "person", " ".join(filter(None, (style.replace("bun", ""), said.get("hair"), "hair")))
    coloured = f"{said['colour']} {'shirt' if is_person else subject}" if "colour" in said else ""
    parts = [
        subject if is_person else coloured or subject,
        "bald head" if style == "bald" else f"{hair} in a bun" if style == "bun" else hair if hair != "hair" else "",
        f"{said['skin']} skin" if "skin" in said else "",
        *(name for name in ("beard", "glasses") if said.get(name) == "yes"),
        coloured if is_person else "",
        *(words[said[name]][0] for name, words in PHRASES.items() if said.get(name) and name != "subject"),
    ]
    usual = (PHRASES["side"]["middle"][0], PHRASES["style"]["flat"][0])
    return ", ".join(part for part in parts if part and part not in usual)


class KnownFact(NamedTuple):
    """A fact of a prompt that has a label."""

    label: str
    value: str
    words: str
    shown: Shown


def facts(prompt: str, seen: Seen) -> Iterator[KnownFact]:
    """Yield the facts of a prompt that have a label."""
    for name, values in PATTERNS.items():
        chances = seen.get(name, {})
        is_unclear = bool(chances) and max(chances.values()) < SURE
        for value, patterns in values.items():
            alternatives = "|".join(each.removeprefix("a ") for each in sorted(patterns, key=len, reverse=True))
            if match := re.search(rf"\b(?:{alternatives})\b", prompt.lower()):
                shown: Shown = "yes" if chances.get(value, 0) >= SURE else "unclear" if is_unclear else "no"
                yield KnownFact(name, value, match[0], shown)
