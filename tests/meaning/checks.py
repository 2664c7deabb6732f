"""What pictures and clips of the profile `demo` must show, as shares of cases, and how each input is taken away.

Every check is `measure(chain, cases, cut)`: with `cut` the input that it is about does not reach its stage, and the result
must fall below the goal. Goals lie between the two distributions; the benchmark `meaning.py` prints both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tests.meaning.chain import Chain
from training import classifier as reading
from training.captions import PLACE_WORDS, WEATHER_WORDS
from training.cast import CAST
from training.world import COLOURS, PLACES, THINGS, WEATHERS
from vidgen_ray.errors import StageError
from vidgen_ray.stages.face_models import RECOGNISER

CLASSIFIER = reading.load(Path(__file__).with_name("classifier.safetensors"))
NOBODY = "a picture"
"""What a stage that drops its prompt would go by."""
PERSON_LORA, STYLE_LORA = "builtin:demo/ada.safetensors", "builtin:demo/sketch.safetensors"
LORA_PERSON, LORA_STYLE = "ada", "sketch"
STYLES = {"sketch": "a pencil sketch", "night": "dark night colours", "pastel": "soft pastel colours"}
SLOW, FAST = 20, 240
ASIDE = 0.36
"""Of half a picture's width: how far from its middle a face may stand and be whole."""
Cut = Mapping[str, Mapping[str, Any]]
UNCUT: Cut = {}


@dataclass(frozen=True, slots=True)
class Check:
    """`goal` is the least share of cases in which what is checked holds."""

    measure: Callable[[Chain, int, Cut], float]
    goal: float
    cut: Cut
    """The mutation: the input that is disconnected."""


def scene_case(n: int) -> dict[str, str]:
    """The n-th of some thousand prompts of a thing somewhere, and what must be seen."""
    kind = THINGS[n % len(THINGS)]
    place = PLACES[(n * 3 + n // 6) % len(PLACES)]
    if kind == "boat":
        place = "sea"
    elif place == "sea":
        place = "meadow"
    weather, colour = WEATHERS[(n * 5 + n // 4) % len(WEATHERS)], list(COLOURS)[(n * 3 + n // 8) % len(COLOURS)]
    words = f"a {colour} {kind} {PLACE_WORDS[place][0]} {WEATHER_WORDS[weather][0]}"
    return {"prompt": words, "subject": kind, "place": place, "weather": weather, "colour": colour}


def person_prompt(n: int) -> str:
    clothes, place, weather = list(COLOURS)[n * 3 % 8], PLACES[n * 2 % 5], WEATHERS[n % 2]
    return f"a person in a {clothes} shirt {PLACE_WORDS[place][0]} {WEATHER_WORDS[weather][0]}"


def _seen(pictures: Sequence[NDArray[np.uint8]]) -> list[dict[str, str]]:
    return reading.classified(CLASSIFIER, np.stack(pictures))


def _prompted(label: str) -> Callable[[Chain, int, Cut], float]:
    def share(chain: Chain, cases: int, cut: Cut) -> float:
        wanted = [scene_case(n) for n in range(cases)]
        pictures = [chain.make(prompt=case["prompt"], seed=n, disconnected=cut)["image"] for n, case in enumerate(wanted)]
        return float(np.mean([seen[label] == case[label] for seen, case in zip(_seen(pictures), wanted, strict=True)]))

    return share


def seeds_differ(chain: Chain, cases: int, cut: Cut) -> float:
    """Share of prompts for which two seeds differ in more than what noise of encoding would explain."""
    differ = []
    for n in range(cases):
        one, other = (
            chain.make(prompt=scene_case(n)["prompt"], seed=seed, disconnected=cut)["image"] for seed in (n, n + 1000)
        )
        differ.append(np.abs(one.astype(int) - other.astype(int)).mean() > 2.0)
    return float(np.mean(differ))


def _likeness(chain: Chain, picture: NDArray[np.uint8]) -> dict[str, float] | None:
    """Cosine to everybody of the cast; none where no face is found."""
    try:
        face = chain.faces.features([picture], recognisers=[RECOGNISER]).embedding(RECOGNISER)
    except StageError:
        return None
    known = {name: _embedding(chain, name) for name in CAST}
    return {name: float(face @ other / np.linalg.norm(face) / np.linalg.norm(other)) for name, other in known.items()}


def _embedding(chain: Chain, name: str) -> NDArray[np.float32]:
    from training.cast import portrait

    return chain.faces.features([portrait(name)], recognisers=[RECOGNISER]).embedding(RECOGNISER)


def person_recognised(chain: Chain, cases: int, cut: Cut) -> float:
    """Share of pictures whose face is nearer to the person of the photo than to the nine others of the cast."""
    hits = []
    for n in range(cases):
        name = list(CAST)[n % len(CAST)]
        picture = chain.make(prompt=person_prompt(n), face_image=chain.photo(name), seed=n, disconnected=cut)["image"]
        likeness = _likeness(chain, picture)
        hits.append(likeness is not None and max(likeness, key=likeness.__getitem__) == name)
    return float(np.mean(hits))


def photo_towards_person(chain: Chain, cases: int, cut: Cut) -> float:
    """Share of pictures whose face is nearer to the person with the photo than without it."""
    hits = []
    for n in range(cases):
        name = list(CAST)[n % len(CAST)]
        told = {"prompt": person_prompt(n), "seed": n}
        without = _likeness(chain, chain.make(**told)["image"])
        with_it = _likeness(chain, chain.make(**told, face_image=chain.photo(name), disconnected=cut)["image"])
        hits.append(with_it is not None and with_it[name] > (without or {name: -1.0})[name] + 0.02)
    return float(np.mean(hits))


def face_stands_where_told(chain: Chain, cases: int, cut: Cut) -> float:
    """Share of pictures whose face is on the side where it is in the photo, of which the prompt says nothing."""
    hits = []
    for n in range(cases):
        x = ASIDE if n % 2 else -ASIDE
        photo = chain.photo(list(CAST)[n % len(CAST)], x)
        picture = chain.make(prompt=person_prompt(n), face_image=photo, seed=n, disconnected=cut)["image"]
        try:
            keypoints = chain.faces.features([picture], recognisers=[RECOGNISER]).keypoints
        except StageError:
            hits.append(False)
            continue
        seen = float(keypoints[:, 0].mean()) / picture.shape[1] * 2 - 1
        hits.append(bool(seen * np.sign(x) > ASIDE / 2))
    return float(np.mean(hits))


def lora_towards_person(chain: Chain, cases: int, cut: Cut) -> float:
    """Share of pictures that the LoRA stage moves nearer to its person."""
    hits = []
    for n in range(cases):
        plain = {"prompt": person_prompt(n), "seed": n}
        before = _likeness(chain, chain.make(**plain)["image"])
        after = _likeness(chain, chain.make(**plain, lora=PERSON_LORA, lora_strength=0.8, disconnected=cut)["image"])
        hits.append(after is not None and after[LORA_PERSON] > (before or {LORA_PERSON: -1.0})[LORA_PERSON] + 0.02)
    return float(np.mean(hits))


def lora_towards_style(chain: Chain, cases: int, cut: Cut) -> float:
    """Share of pictures that are in the style of the LoRA after its stage."""
    pictures = [
        chain.make(prompt=scene_case(n)["prompt"], seed=n, lora=STYLE_LORA, lora_strength=0.8, disconnected=cut)["image"]
        for n in range(cases)
    ]
    return float(np.mean([seen["style"] == LORA_STYLE for seen in _seen(pictures)]))


def restyled(chain: Chain, cases: int, cut: Cut) -> float:
    """Share of pictures that are seen in the style that the style prompt names."""
    wanted = [list(STYLES)[n % len(STYLES)] for n in range(cases)]
    pictures = [_restyled(chain, n, style, cut) for n, style in enumerate(wanted)]
    return float(np.mean([seen["style"] == style for seen, style in zip(_seen(pictures), wanted, strict=True)]))


def layout_kept(chain: Chain, cases: int, cut: Cut) -> float:
    """Share of restyled pictures whose edges agree with those before more than with those of another picture."""
    hits = []
    for n in range(cases):
        style = list(STYLES)[n % len(STYLES)]
        before, other = (chain.make(prompt=scene_case(k)["prompt"], seed=k)["image"] for k in (n, n + 1))
        after = _restyled(chain, n, style, cut)
        hits.append(_edges_agree(before, after) > _edges_agree(other, after) + 0.1)
    return float(np.mean(hits))


def _restyled(chain: Chain, n: int, style: str, cut: Cut) -> NDArray[np.uint8]:
    case = scene_case(n)
    return chain.make(
        prompt=case["prompt"], seed=n, use_hunyuan_style=True, style_prompt=STYLES[style], style_strength=0.6, disconnected=cut
    )["image"]


def _edges_agree(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Correlation of how strong edges are, a little blurred."""
    maps = []
    for picture in (one, other):
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
        strength = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
        maps.append(cv2.GaussianBlur(strength, (0, 0), 2).ravel())
    return float(np.corrcoef(*maps)[0, 1])


def _clip(chain: Chain, n: int, bucket: int, cut: Cut) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    made = chain.make(prompt=scene_case(n)["prompt"], seed=n, generate_video=True, motion_bucket_id=bucket, disconnected=cut)
    return made["image"], made["frames"]


def starts_with_picture(chain: Chain, cases: int, cut: Cut) -> float:
    """Share of clips whose first frame is nearer than 12 of 255 levels, on average, to the picture."""
    pairs = [_clip(chain, n, SLOW, cut) for n in range(cases)]
    return float(np.mean([np.abs(frames[0].astype(int) - picture.astype(int)).mean() < 12 for picture, frames in pairs]))


def bucket_moves(chain: Chain, cases: int, cut: Cut) -> float:
    """Share of pictures whose clip with a large motion bucket moves more than that with a small one."""
    hits = []
    for n in range(cases):
        slow, fast = (_motion_px(_clip(chain, n, bucket, cut)[1]) for bucket in (SLOW, FAST))
        hits.append(fast > 1.3 * slow)
    return float(np.mean(hits))


def _motion_px(frames: NDArray[np.uint8]) -> float:
    """Mean length of the optical flow from the first frame to the last, in pixels. Source: Farnebaeck 2003."""
    first, last = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (frames[0], frames[-1]))
    flow = cv2.calcOpticalFlowFarneback(first, last, None, 0.5, 3, 21, 3, 5, 1.2, 0)
    return float(np.linalg.norm(flow, axis=2).mean())


def fast_agrees(chain: Chain, cases: int, cut: Cut) -> float:
    """Share of prompts with a person LoRA for which both modes show the same place, weather and subject."""
    same = []
    for n in range(cases):
        told = {"prompt": person_prompt(n), "seed": n, "lora": PERSON_LORA}
        one, other = _seen([chain.make(**told, mode=mode, disconnected=cut)["image"] for mode in ("quality", "fast")])
        same.append(all(one[label] == other[label] for label in ("place", "weather", "subject")))
    return float(np.mean(same))


def _without_prompt(*stages: str) -> Cut:
    return {stage: {"prompt": NOBODY} for stage in stages}


GREY = np.full((128, 128, 3), 128, np.uint8)
CHECKS: dict[str, Check] = {
    "the thing of the prompt is drawn": Check(_prompted("subject"), 0.8, _without_prompt("flux")),
    "it has the colour of the prompt": Check(_prompted("colour"), 0.45, _without_prompt("flux")),
    "it is at the place of the prompt": Check(_prompted("place"), 0.8, _without_prompt("flux")),
    "it is the time of day of the prompt": Check(_prompted("weather"), 0.8, _without_prompt("flux")),
    "another seed is another picture": Check(seeds_differ, 0.85, {"flux": {"seed": 7}}),
    "the person of the photo is recognised among ten": Check(person_recognised, 0.7, {"flux": {"identity_strength": 0.0}}),
    "a photo moves towards its person": Check(photo_towards_person, 0.8, {"flux": {"identity_strength": 0.0}}),
    "a face stands where it stands in the photo": Check(face_stands_where_told, 0.7, {"flux": {"pose": "none"}}),
    "a person's LoRA moves towards the person": Check(lora_towards_person, 0.5, {"lora": {"lora_strength": 0.0}}),
    "a style's LoRA moves towards the style": Check(lora_towards_style, 0.6, {"lora": {"lora_strength": 0.0}}),
    "the restyle follows its prompt": Check(restyled, 0.7, {"hunyuan": {"style_prompt": None}}),
    "the restyle keeps the layout": Check(layout_kept, 0.8, {"hunyuan": {"style_strength": 1.0}}),
    "a clip starts with its picture": Check(starts_with_picture, 0.9, {"svd": {"image": GREY}}),
    "a larger motion bucket moves more": Check(bucket_moves, 0.8, {"svd": {"motion_bucket_id": 127}}),
    "fast and quality show the same": Check(
        fast_agrees, 0.8, {"flux": {"prompt": NOBODY}, "lora": {"prompt": "a red boat by the sea at night"}}
    ),
}
