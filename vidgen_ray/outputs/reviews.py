"""Reviews of clips by people: verdict, stars and a note, keyed by the digest of the clip.

Each session (a `vidgen watch`, or an import) writes a file of its own, so that sessions never overwrite each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vidgen_ray.outputs.storage import Storage

REVIEWS = "reviews"
"""Folder with a `.jsonl` file per session."""
Verdict = Literal["accept", "reject"]


class Review(BaseModel):
    """State of the review of one clip. Without verdict, stars and note, the clip counts as not reviewed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    clip_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Digest of the clip before upscaling, or of the image of a shot without a clip."""
    id: str
    verdict: Verdict | None = None
    stars: int | None = Field(None, ge=1, le=5)
    note: str | None = Field(None, max_length=10_000)
    who: str | None = Field(None, max_length=200)
    at: datetime
    """Time of the review, in UTC."""


def read_reviews(storage: Storage) -> dict[str, Review]:
    """Return the newest review of each clip by its digest. Raises OSError."""
    newest: dict[str, Review] = {}
    for review in _all_reviews(storage):
        known = newest.get(review.clip_sha256)
        if known is None or known.at <= review.at:
            newest[review.clip_sha256] = review
    return {digest: each for digest, each in newest.items() if (each.verdict, each.stars, each.note) != (None, None, None)}


def _all_reviews(storage: Storage) -> Iterator[Review]:
    for name in sorted(storage.files(REVIEWS)):
        if name.endswith(".jsonl"):
            for line in (storage.read(f"{REVIEWS}/{name}") or b"").splitlines():
                # A damaged line is left out.
                with suppress(ValidationError):
                    yield Review.model_validate_json(line)
