"""The rendered world: what a drawing shows is what its scene and its caption say."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np

from training.rendered.captions import caption
from training.rendered.cast import CAST, differing, others, pose
from training.rendered.drawing import draw, keypoints_px
from training.rendered.world import COLOURS, EYES, HAIRS, SKINS, Scene, Thing, moved, some_scene

SIZE_PX = 256


def test_eyes_are_at_their_keypoints_in_their_colour() -> None:
    """The iris at both eyes is nearest to the colour of the traits, at every turn of the head and after a move."""
    for number, (name, who) in enumerate(CAST.items()):
        looks = (-1.0, 0.0, 1.0)[number % 3]
        person = replace(pose(name), looks=looks, tilt=0.1 * looks, identity=replace(who, glasses=False))
        scene, nearer = moved(Scene("meadow", "cloudy", person, clouds=0.2), 1.0, 1.0)
        (seen,) = scene.people
        image = draw(scene, SIZE_PX, nearer)
        for x, y in keypoints_px(seen, SIZE_PX)[:2].round().astype(int):
            around = image[y - 6 : y + 7, x - 8 : x + 9].reshape(-1, 3) / 255
            off = {eyes: np.sort(np.abs(around - colour).sum(axis=1))[:8].mean() for eyes, colour in EYES.items()}
            assert min(off, key=off.__getitem__) == who.eyes, (name, off)


def test_captions_say_nothing_that_the_scene_does_not_have() -> None:
    random = Random(5)
    for scene in (some_scene(random, people=0.7, pairs=0.2) for _ in range(300)):
        told = caption(scene, random)
        subjects = [scene.subject] if isinstance(scene.subject, Thing) else scene.people
        have = {one.colour if isinstance(one, Thing) else one.clothes for one in subjects}
        identities = [person.identity for person in scene.people]
        for eyes in EYES:
            assert f"{eyes} eyes" not in told or eyes in {who.eyes for who in identities}
        for skin in SKINS:
            assert f"{skin} skin" not in told or skin in {who.skin for who in identities}
        for hair in HAIRS:
            assert f"{hair} hair" not in told or hair in {who.hair for who in identities}
        for colour in COLOURS:
            assert f" {colour} shirt" not in told or colour in have
        assert "glasses" not in told or any(who.glasses for who in identities)
        assert "beard" not in told or any(who.beard for who in identities)


def test_thirty_people_differ() -> None:
    everybody = [*CAST.values(), *others()]
    assert len(everybody) == 30
    assert min(differing(one, other) for n, one in enumerate(everybody) for other in everybody[:n]) >= 3


def test_a_clip_changes_only_as_its_speed_says() -> None:
    """Nothing moves at a speed of 0; at full speed the end of a clip differs from its start more than at half speed."""
    random = Random(2)
    for scene in (some_scene(random, people=0.5) for _ in range(8)):
        start, still, slow, fast = (draw(*_sized(moved(scene, time, speed))).astype(int) for time, speed in _MOVES)
        assert (start == still).all()
        assert np.abs(fast - start).mean() > np.abs(slow - start).mean() > 0


_MOVES = ((0.0, 1.0), (1.0, 0.0), (1.0, 0.3), (1.0, 1.0))


def _sized(at: tuple[Scene, float]) -> tuple[Scene, int, float]:
    scene, nearer = at
    return scene, 96, nearer
