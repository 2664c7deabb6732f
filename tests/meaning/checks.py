"""Checks of the images and clips of the profile `demo`, each with the input that it depends on.

Every check is a function `holds(chain, n, cut)` of the n-th case. With `cut`, the input is disconnected from its stage and the
share of cases in which it holds must fall below the goal. `benchmarks/meaning.py` prints both shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tests.meaning.chain import Chain
from training.captions import PLACE_WORDS, WEATHER_WORDS
from training.cast import CAST
from training.world import COLOURS, PLACES, THINGS, WEATHERS
from vidgen_ray.dataset import demo_captioner
from vidgen_ray.errors import StageError
from vidgen_ray.stages.instantid import RECOGNISER

CLASSIFIER = demo_captioner.load()
NEUTRAL_PROMPT = "a picture"
"""Prompt of a stage whose prompt is disconnected."""
PERSON_LORA, STYLE_LORA = "builtin:demo/ada.safetensors", "builtin:demo/sketch.safetensors"
LORA_PERSON, LORA_STYLE = "ada", "sketch"
PENCIL_PROMPTS = ("a pencil sketch", "sketch on paper")
STYLES = {"sketch": "a pencil sketch", "night": "dark night colours", "pastel": "soft pastel colours"}
SVD_SLOW, SVD_FAST = {"motion_bucket_id": 20}, {"motion_bucket_id": 255}
WAN_SLOW = {"video_model": "wan", "motion_prompt": "moving slowly"}
WAN_FAST = {"video_model": "wan", "motion_prompt": "moving fast"}
ASIDE = 0.36
"""Largest distance of a whole face from the centre of the image, in half image widths."""
Cut = Mapping[str, Mapping[str, Any]]
Holds = Callable[[Chain, int, Cut], bool]
UNCUT: Cut = {}


@dataclass(frozen=True, slots=True)
class Check:
    """A check of one input."""

    holds: Holds
    goal: float
    """Minimum share of cases that pass, between the shares with and without the input."""
    cut: Cut
    """The input to disconnect, with its replacement."""

    def measure(self, chain: Chain, cases: int, cut: Cut) -> float:
        """Return the share of cases that pass."""
        return float(np.mean([self.holds(chain, n, cut) for n in range(cases)]))


def scene_case(n: int) -> dict[str, str]:
    """Return the n-th of several thousand prompts, with the labels that the image must have."""
    kind = THINGS[n % len(THINGS)]
    place = PLACES[(n * 3 + n // 6) % len(PLACES)]
    if kind == "boat":
        place = "sea"
    elif place == "sea":
        place = "meadow"
    weather, colour = WEATHERS[(n * 5 + n // 4) % len(WEATHERS)], list(COLOURS)[(n * 3 + n // 8) % len(COLOURS)]
    prompt = f"a {colour} {kind} {PLACE_WORDS[place][0]} {WEATHER_WORDS[weather][0]}"
    return {"prompt": prompt, "subject": kind, "place": place, "weather": weather, "colour": colour}


def person_prompt(n: int) -> str:
    clothes, place, weather = list(COLOURS)[n * 3 % 8], PLACES[n * 2 % 5], WEATHERS[n % 2]
    return f"a person in a {clothes} shirt {PLACE_WORDS[place][0]} {WEATHER_WORDS[weather][0]}"


def _labels(image: NDArray[np.uint8]) -> dict[str, str]:
    return demo_captioner.most_likely(demo_captioner.read(CLASSIFIER, image[None]))


def _subject_fields(chain: Chain, n: int) -> dict[str, Any]:
    """Return the fields of the n-th shot of a subject: a thing if n is even, otherwise a person with a photo."""
    if n % 2:
        return {"prompt": person_prompt(n), "face_image": chain.photo(list(CAST)[n // 2 % len(CAST)]), "seed": n}
    return {"prompt": scene_case(n // 2)["prompt"], "seed": n}


def _shows_subject(chain: Chain, n: int, image: NDArray[np.uint8]) -> bool:
    """Return if the image shows the subject of `_subject_fields`: the classifier reads the thing, or a face is detected."""
    if n % 2:
        return _keypoints(chain, image) is not None
    return _labels(image)["subject"] == scene_case(n // 2)["subject"]


def _keypoints(chain: Chain, image: NDArray[np.uint8]) -> NDArray[np.float32] | None:
    try:
        return chain.faces.features([image], recognisers=[RECOGNISER]).keypoints
    except StageError:
        return None


def _label_check(label: str) -> Holds:
    def holds(chain: Chain, n: int, cut: Cut) -> bool:
        case = scene_case(n)
        return _labels(chain.make(prompt=case["prompt"], seed=n, disconnected=cut)["image"])[label] == case[label]

    return holds


def seeds_differ(chain: Chain, n: int, cut: Cut) -> bool:
    """The images of a prompt for two seeds differ by more than encoding noise."""
    prompt = scene_case(n)["prompt"]
    one, other = (chain.make(prompt=prompt, seed=seed, disconnected=cut)["image"].astype(int) for seed in (n, n + 1000))
    return bool(np.abs(one - other).mean() > 2.0)


def _likeness(chain: Chain, image: NDArray[np.uint8]) -> dict[str, float] | None:
    """Return the cosine similarity to each cast member, or `None` if no face is found."""
    try:
        face = chain.faces.features([image], recognisers=[RECOGNISER]).embedding(RECOGNISER)
    except StageError:
        return None
    return {
        name: float(face @ other / np.linalg.norm(face) / np.linalg.norm(other))
        for name, other in chain.cast_embeddings.items()
    }


def person_recognised(chain: Chain, n: int, cut: Cut) -> bool:
    """The face is closer to the person of the photo than to the other nine of the cast."""
    name = list(CAST)[n % len(CAST)]
    image = chain.make(prompt=person_prompt(n), face_image=chain.photo(name), seed=n, disconnected=cut)["image"]
    likeness = _likeness(chain, image)
    return likeness is not None and max(likeness, key=likeness.__getitem__) == name


def face_position_follows_photo(chain: Chain, n: int, cut: Cut) -> bool:
    """The face is on the same side as in the photo. The prompt does not mention the side."""
    x = ASIDE if n % 2 else -ASIDE
    photo = chain.photo(list(CAST)[n % len(CAST)], x)
    image = chain.make(prompt=person_prompt(n), face_image=photo, seed=n, disconnected=cut)["image"]
    keypoints = _keypoints(chain, image)
    if keypoints is None:
        return False
    position = float(keypoints[:, 0].mean()) / image.shape[1] * 2 - 1
    return bool(position * np.sign(x) > ASIDE / 2)


def lora_increases_likeness(chain: Chain, n: int, cut: Cut) -> bool:
    """The LoRA stage brings the image closer to the person of the LoRA."""
    fields = {"prompt": person_prompt(n), "seed": n}
    before = _likeness(chain, chain.make(**fields)["image"])
    after = _likeness(chain, chain.make(**fields, lora=PERSON_LORA, lora_strength=0.8, disconnected=cut)["image"])
    return after is not None and after[LORA_PERSON] > (before or {LORA_PERSON: -1.0})[LORA_PERSON] + 0.02


def lora_applies_style(chain: Chain, n: int, cut: Cut) -> bool:
    """The image has the style of the LoRA after the LoRA stage."""
    fields = {"prompt": scene_case(n)["prompt"], "seed": n, "lora": STYLE_LORA, "lora_strength": 0.8}
    return _labels(chain.make(**fields, disconnected=cut)["image"])["style"] == LORA_STYLE


def restyle_follows_prompt(chain: Chain, n: int, cut: Cut) -> bool:
    """The image has the style of the style prompt."""
    style = list(STYLES)[n % len(STYLES)]
    fields = {"use_hunyuan_style": True, "style_prompt": STYLES[style], "style_strength": 0.6}
    return _labels(chain.make(prompt=scene_case(n)["prompt"], seed=n, **fields, disconnected=cut)["image"])["style"] == style


def pencil_keeps_subject(chain: Chain, n: int, cut: Cut) -> bool:
    """The image still shows its subject after a restyle as a pencil drawing."""
    style = {"use_hunyuan_style": True, "style_prompt": PENCIL_PROMPTS[n // 2 % 2], "style_strength": 0.6}
    return _shows_subject(chain, n, chain.make(**_subject_fields(chain, n), **style, disconnected=cut)["image"])


def _clip(chain: Chain, n: int, cut: Cut, motion: Mapping[str, Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    artefacts = chain.make(prompt=scene_case(n)["prompt"], seed=n, generate_video=True, disconnected=cut, **motion)
    return artefacts["image"], artefacts["frames"]


def starts_with_image(chain: Chain, n: int, cut: Cut) -> bool:
    """The first frame differs from the image by less than 12 of 255 levels on average."""
    image, frames = _clip(chain, n, cut, SVD_FAST)
    return bool(np.abs(frames[0].astype(int) - image.astype(int)).mean() < 12)


def _faster(slow: Mapping[str, Any], fast: Mapping[str, Any]) -> Holds:
    def holds(chain: Chain, n: int, cut: Cut) -> bool:
        """The fast clip has more motion than the slow one."""
        slow_px, fast_px = (_motion_px(_clip(chain, n, cut, motion)[1]) for motion in (slow, fast))
        return fast_px > 1.3 * slow_px

    return holds


def _whole_at_the_end(motion: Mapping[str, Any]) -> Holds:
    def holds(chain: Chain, n: int, cut: Cut) -> bool:
        """The last frame still shows the subject."""
        frames = chain.make(**_subject_fields(chain, n), generate_video=True, disconnected=cut, **motion)["frames"]
        return _shows_subject(chain, n, frames[-1])

    return holds


def _motion_px(frames: NDArray[np.uint8]) -> float:
    """Return the mean length of the optical flow from the first to the last frame, in pixels. Source: Farnebaeck 2003."""
    first, last = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (frames[0], frames[-1]))
    flow = cv2.calcOpticalFlowFarneback(first, last, None, 0.5, 3, 21, 3, 5, 1.2, 0)
    return float(np.linalg.norm(flow, axis=2).mean())


def modes_agree(chain: Chain, n: int, cut: Cut) -> bool:
    """Both modes show the same place, weather and subject for a prompt with a person LoRA."""
    fields = {"prompt": person_prompt(n), "seed": n, "lora": PERSON_LORA}
    one, other = (_labels(chain.make(**fields, mode=mode, disconnected=cut)["image"]) for mode in ("quality", "fast"))
    return all(one[label] == other[label] for label in ("place", "weather", "subject"))


def _without_prompt(*stages: str) -> Cut:
    return {stage: {"prompt": NEUTRAL_PROMPT} for stage in stages}


GREY = np.full((128, 128, 3), 128, np.uint8)
CHECKS: dict[str, Check] = {
    "the thing of the prompt is drawn": Check(_label_check("subject"), 0.8, _without_prompt("flux")),
    "it has the colour of the prompt": Check(_label_check("colour"), 0.7, _without_prompt("flux")),
    "it is at the place of the prompt": Check(_label_check("place"), 0.8, _without_prompt("flux")),
    "it is the time of day of the prompt": Check(_label_check("weather"), 0.8, _without_prompt("flux")),
    "another seed gives another image": Check(seeds_differ, 0.85, {"flux": {"seed": 7}}),
    "the person of the photo is recognised among ten": Check(person_recognised, 0.7, {"flux": {"identity_strength": 0.0}}),
    "a face is where it is in the photo": Check(face_position_follows_photo, 0.7, {"flux": {"pose": "none"}}),
    "a person's LoRA increases the likeness to the person": Check(
        lora_increases_likeness, 0.5, {"lora": {"lora_strength": 0.0}}
    ),
    "a style's LoRA increases the likeness to the style": Check(lora_applies_style, 0.7, {"lora": {"lora_strength": 0.0}}),
    "the restyle follows its prompt": Check(restyle_follows_prompt, 0.7, {"hunyuan": {"style_prompt": None}}),
    "a pencil restyle keeps its subject recognisable": Check(
        pencil_keeps_subject, 0.6, {"hunyuan": {"image": GREY, "prompt": NEUTRAL_PROMPT}}
    ),
    "a clip starts with its image": Check(starts_with_image, 0.9, {"svd": {"image": GREY}}),
    "a larger motion bucket gives more motion": Check(_faster(SVD_SLOW, SVD_FAST), 0.8, {"svd": {"motion_bucket_id": 127}}),
    "the last frame shows the subject": Check(_whole_at_the_end(SVD_FAST), 0.75, {"svd": {"image": GREY}}),
    "a prompt for fast motion gives more motion": Check(_faster(WAN_SLOW, WAN_FAST), 0.8, {"wan": {"motion_prompt": None}}),
    "the last frame shows the subject, Wan": Check(_whole_at_the_end(WAN_FAST), 0.75, {"wan": {"image": GREY}}),
    "fast and quality show the same": Check(
        modes_agree, 0.8, {"flux": {"prompt": NEUTRAL_PROMPT}, "lora": {"prompt": "a red boat by the sea at night"}}
    ),
}
