"""Reviews of clips: files of several sessions on a disk and in an object store, and imports."""

from datetime import timedelta

import pytest

from vidgen_ray.outputs.reviews import REVIEWS, Opinion, ReviewSession, drop_reviews, read_reviews
from vidgen_ray.outputs.storage import storage_at

A, B = "a" * 64, "b" * 64


@pytest.fixture(params=["disk", "object store"])
def storage(request, tmp_path):
    return storage_at(tmp_path if request.param == "disk" else request.getfixturevalue("url"))


def test_newest_review_of_several_sessions_counts(storage):
    one, two = ReviewSession(storage, "ada"), ReviewSession(storage, "bo")
    one.add(Opinion(clip_sha256=A, verdict="accept", stars=4, note="« 'quoted' \"twice\" שלום 🎬\nnext line"), "shot")
    two.add(Opinion(clip_sha256=B, verdict="accept"), "other")
    ahead = two.add(Opinion(clip_sha256=A, verdict="reject"), "shot")
    # The clock of another session is a day ahead. What is written later counts all the same.
    late = ahead.model_copy(update={"at": ahead.at + timedelta(days=1)})
    storage.write(f"{REVIEWS}/z.jsonl", f"{late.model_dump_json()}\nnot a review\n")
    undone = one.add(Opinion(clip_sha256=A, stars=4, note="« 'quoted' \"twice\" שלום 🎬\nnext line"), "shot")
    found = read_reviews(storage)
    assert found[A] == undone
    assert (found[A].who, found[A].note.splitlines()[0]) == ("ada", "« 'quoted' \"twice\" שלום 🎬")
    assert found[A].at > late.at
    assert found[B].verdict == "accept"
    assert len(storage.files(REVIEWS)) == 3
    drop_reviews(storage, {A})
    assert set(read_reviews(storage)) == {B}
    assert len(storage.files(REVIEWS)) == 1
    # A session that is still open does not write the deleted ones again.
    one.add(Opinion(clip_sha256=B, verdict="reject"), "other")
    assert {digest: review.verdict for digest, review in read_reviews(storage).items()} == {B: "reject"}
