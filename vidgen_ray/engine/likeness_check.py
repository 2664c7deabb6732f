"""Whether a shot's result is like enough to its person, and what is said where no try was. Knows no loop over the tries:
the pipeline has one, the director of a batch another."""

from collections.abc import Sequence

from vidgen_ray.errors import StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts

LIKENESS = "likeness"
"""Stage of the failure of a shot of which no try was like enough."""


class LikenessTooLow(StageError):
    """A try whose picture or clip is less like the person than `min_identity` asks."""

    def __init__(self, reached: float | None, asked: float, where: str, tries: int = 1) -> None:
        self.reached = reached
        """-1 to 1; none where no face was found."""
        self.asked = asked
        self.where = where
        """`picture` or `clip`."""
        self.tries = tries
        super().__init__(reached, asked, where, tries)

    def __str__(self) -> str:
        got = "no face" if self.reached is None else f"a likeness of {self.reached:g}"
        tries = "1 try" if self.tries == 1 else f"the best of {self.tries} tries"
        return (
            f"min_identity: got {got} in the {self.where} ({tries}), a likeness of at least {self.asked:g} is asked; "
            "raise retries or identity_strength, lower min_identity, or give a photo that shows the face more clearly"
        )


def likeness_of(artefacts: Artefacts) -> Artefacts:
    """Of the artefacts those by which a shot is judged, which are some numbers."""
    judged_by = Artefacts()
    if "image_likeness" in artefacts:
        judged_by["image_likeness"] = artefacts["image_likeness"]
    if "clip_likeness" in artefacts:
        judged_by["clip_likeness"] = artefacts["clip_likeness"]
    return judged_by


def check_likeness(shot: Shot, artefacts: Artefacts) -> None:
    """Raises LikenessTooLow where the likeness of the picture, or the mean of the clip, is known and less than the shot asks.

    To be called after each step: what a bad picture fails needs no clip.
    """
    if shot.min_identity is None:
        return
    for where, likeness in (("picture", artefacts.get("image_likeness")), ("clip", artefacts.get("clip_likeness"))):
        # Written so that what is no number fails, too.
        if likeness is not None and not (likeness.mean is not None and likeness.mean >= shot.min_identity):
            raise LikenessTooLow(likeness.mean, shot.min_identity, where)


def best_attempt(unlike: Sequence[LikenessTooLow]) -> LikenessTooLow:
    """One reason for all the tries that were made, at least one: that of the try which came closest."""
    best = max(unlike, key=lambda reason: -2 if reason.reached is None else reason.reached)
    return LikenessTooLow(best.reached, best.asked, best.where, len(unlike))
