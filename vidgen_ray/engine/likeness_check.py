"""Likeness check: does the result look enough like the person in the reference photo?"""

from collections.abc import Sequence

from vidgen_ray.errors import StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts

LIKENESS = "likeness"
"""Failure stage of a shot whose attempts were all below `min_identity`."""


class LikenessTooLow(StageError):
    """The image or clip of an attempt is less like the person than `min_identity`."""

    def __init__(self, likeness: float | None, minimum: float, where: str, attempts: int = 1) -> None:
        self.likeness = likeness
        """-1 to 1. `None` if no face was found."""
        self.minimum = minimum
        self.where = where
        """`image` or `clip`."""
        self.attempts = attempts
        super().__init__(likeness, minimum, where, attempts)

    def __str__(self) -> str:
        got = "no face" if self.likeness is None else f"a likeness of {self.likeness:g}"
        attempts = "1 attempt" if self.attempts == 1 else f"best of {self.attempts} attempts"
        return (
            f"min_identity: got {got} in the {self.where} ({attempts}), must be at least {self.minimum:g}; raise retries or "
            "identity_strength, lower min_identity, or use a photo that shows the face more clearly"
        )


def likeness_of(artefacts: Artefacts) -> Artefacts:
    """Return only the artefacts that `check_likeness` needs. They are a few numbers."""
    selected = Artefacts()
    if "image_likeness" in artefacts:
        selected["image_likeness"] = artefacts["image_likeness"]
    if "clip_likeness" in artefacts:
        selected["clip_likeness"] = artefacts["clip_likeness"]
    return selected


def check_likeness(shot: Shot, artefacts: Artefacts) -> None:
    """Raises LikenessTooLow if the likeness of the image, or the mean over the clip, is known and below `min_identity`.

    Call it after each step: no clip is generated for an image that fails.
    """
    if shot.min_identity is None:
        return
    for where, likeness in (("image", artefacts.get("image_likeness")), ("clip", artefacts.get("clip_likeness"))):
        # Written so that NaN fails, too.
        if likeness is not None and not (likeness.mean is not None and likeness.mean >= shot.min_identity):
            raise LikenessTooLow(likeness.mean, shot.min_identity, where)


def best_attempt(failures: Sequence[LikenessTooLow]) -> LikenessTooLow:
    """Return one error for all attempts, at least one: that of the attempt with the highest likeness."""
    best = max(failures, key=lambda failure: -2 if failure.likeness is None else failure.likeness)
    return LikenessTooLow(best.likeness, best.minimum, best.where, len(failures))
