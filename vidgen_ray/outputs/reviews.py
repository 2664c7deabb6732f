"""Reviews of clips, `reviews/*.jsonl`: accepted or rejected, stars and a note, with who and when.

A review belongs to the bytes of a clip: a clip that is rendered again with others has none. Each session, such as that of
`vidgen watch`, writes a file of its own, so it needs no lease of the folder. Of several reviews of a clip the newest counts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from vidgen_ray.outputs.manifest import FILE_COLUMNS, manifest_batches, new_name
from vidgen_ray.outputs.storage import Storage

REVIEWS = "reviews"
CLIP_COLUMNS = ("id", "status", *(f"{name}_sha256" for name in FILE_COLUMNS))
"""Columns of the manifest that `clip_digest` and `reviewable_clips` need."""
MAX_NOTE, MAX_NAME = 2000, 200


class Opinion(BaseModel):
    """Verdict, stars and note of a clip. Without all three, it is not reviewed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    clip_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    verdict: Literal["accept", "reject"] | None = None
    stars: int | None = Field(default=None, ge=1, le=5)
    note: str | None = Field(default=None, max_length=MAX_NOTE)


class Review(Opinion):
    """A line of `reviews/*.jsonl`."""

    id: str
    """Id of a shot with this clip."""
    who: str | None = Field(default=None, max_length=MAX_NAME)
    at: Annotated[AwareDatetime, AfterValidator(lambda at: at.astimezone(UTC))]


def clip_digest(row: Mapping[str, Any]) -> str | None:
    """Return the digest by which the clip of a manifest row is reviewed: before upscaling, or of the image without a clip."""
    return next((row[f"{name}_sha256"] for name in FILE_COLUMNS if row[f"{name}_sha256"]), None)


def digests_by_id(storage: Storage) -> dict[str, str]:
    """Return the digest of the clip of each finished shot by its id. Raises OSError."""
    rows = (row for batch in manifest_batches(storage, CLIP_COLUMNS) for row in batch.to_pylist())
    return {row["id"]: digest for row in rows if row["status"] == "done" and (digest := clip_digest(row)) is not None}


def reviewable_clips(storage: Storage) -> dict[str, str]:
    """Return the digest of each finished clip of a folder, with the id of a shot. Raises OSError."""
    return {digest: shot_id for shot_id, digest in digests_by_id(storage).items()}


def parse_reviews(content: bytes, storage: Storage) -> list[Review]:
    """Parse reviews of a folder to import, a JSON array. Raises ValueError, a pydantic ValidationError for wrong fields.

    Without `clip_sha256`, a review is of the clip that the shot with its `id` has now; without `at`, it was made now.
    """
    given, now = from_json(content), datetime.now(UTC).isoformat()
    if isinstance(given, list) and any(isinstance(each, dict) and "clip_sha256" not in each for each in given):
        digests = digests_by_id(storage)
        for each in filter(lambda each: isinstance(each, dict), given):
            shot_id = str(each.get("id"))
            # The hash of an unknown id is the digest of no clip.
            each.setdefault("clip_sha256", digests.get(shot_id) or sha256(shot_id.encode()).hexdigest())
            each.setdefault("at", now)
    return TypeAdapter(list[Review]).validate_json(to_json(given))


def read_reviews(storage: Storage) -> dict[str, Review]:
    """Return the review of each reviewed clip by its digest. Leaves out damaged lines. Raises OSError."""
    return {digest: each for digest, each in _last_reviews(storage).items() if each.verdict or each.stars or each.note}


def _last_reviews(storage: Storage) -> dict[str, Review]:
    """Return the newest review of each clip, also those that were undone."""
    names = [f"{REVIEWS}/{name}" for name in sorted(storage.files(REVIEWS)) if name.endswith(".jsonl")]
    return _newest(review for content in storage.read_each(names) for review in _parsed(content))


def _opinion(review: Review) -> tuple[object, ...]:
    return review.verdict, review.stars, review.note


def _newest(reviews: Iterable[Review]) -> dict[str, Review]:
    newest: dict[str, Review] = {}
    for review in reviews:
        if (other := newest.get(review.clip_sha256)) is None or other.at <= review.at:
            newest[review.clip_sha256] = review
    return newest


def _parsed(content: bytes | None) -> Iterator[Review]:
    for line in (content or b"").splitlines():
        with suppress(ValidationError):
            yield Review.model_validate_json(line)


class ReviewSession:
    """Writes the reviews of one session. Methods can be called by several threads. Raises OSError."""

    def __init__(self, storage: Storage, who: str | None) -> None:
        self._storage = storage
        self._who = who
        self._path = f"{REVIEWS}/{new_name()}.jsonl"
        self._lock = threading.Lock()

    def add(self, opinion: Opinion, shot_id: str) -> Review:
        """Store an opinion. Return it as the newest review of its clip, also if the clock of another session is ahead."""
        with self._lock:
            before = _last_reviews(self._storage).get(opinion.clip_sha256)
            at = max(datetime.now(UTC), before.at + timedelta(milliseconds=1)) if before else datetime.now(UTC)
            review = Review(**opinion.model_dump(), id=shot_id, who=self._who, at=at)
            self._write([review])
        return review

    def add_all(self, reviews: Iterable[Review]) -> Imported:
        """Store reviews of clips that the folder has. Those without `who` get the name of this reviewer."""
        with self._lock:
            clips, known, given = reviewable_clips(self._storage), _last_reviews(self._storage), _newest(reviews)
            of_clips = {digest: review for digest, review in given.items() if digest in clips}
            new = [
                review.model_copy(update={"id": clips[digest], "who": review.who or self._who})
                for digest, review in of_clips.items()
                if digest not in known or (known[digest].at < review.at and _opinion(known[digest]) != _opinion(review))
            ]
            if new:
                self._write(new)
        refused = sorted(review.id for digest, review in given.items() if digest not in clips)
        return Imported(len(new), len(of_clips) - len(new), tuple(refused))

    def _write(self, reviews: Iterable[Review]) -> None:
        # Not kept in memory, since `drop_reviews` may remove some meanwhile.
        own = _newest([*_parsed(self._storage.read(self._path)), *reviews])
        self._storage.write(self._path, _lines(own.values()))


class Imported(NamedTuple):
    """Clips whose review was to be stored."""

    imported: int
    known: int
    """The folder has the same or a newer review."""
    refused: tuple[str, ...]
    """Ids in the reviews of clips that the folder does not have."""


def drop_reviews(storage: Storage, clips: Set[str]) -> None:
    """Delete all reviews of clips with these digests. Raises OSError."""
    for name in storage.files(REVIEWS):
        reviews = list(_parsed(storage.read(f"{REVIEWS}/{name}")))
        kept = [review for review in reviews if review.clip_sha256 not in clips]
        if not kept:
            storage.delete(f"{REVIEWS}/{name}")
        elif len(kept) < len(reviews):
            storage.write(f"{REVIEWS}/{name}", _lines(kept))


def _lines(reviews: Iterable[Review]) -> str:
    return "".join(f"{review.model_dump_json()}\n" for review in reviews)
