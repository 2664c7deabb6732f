"""Reviews of clips: files of several sessions on a disk and in an object store, and imports."""

from datetime import UTC, datetime, timedelta

import pytest

from tests.dataset.conftest import make_folder, moving
from vidgen_ray.outputs.manifest import read_manifest
from vidgen_ray.outputs.reviews import REVIEWS, Opinion, Review, ReviewSession, drop_reviews, read_reviews, reviewable_clips
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


def test_import_is_idempotent_and_refuses_unknown_clips(tmp_path):
    clip, other = moving(frames=3), moving(frames=3, seed=1)
    outputs = make_folder(tmp_path, [({"id": "clip"}, clip), ({"id": "still"}, clip[0]), ({"id": "hd", "hd": clip}, other)])
    clips = reviewable_clips(outputs.storage)
    rows = {row.id: row for row in read_manifest(tmp_path)}
    digests = {"clip": rows["clip"].video_sha256, "still": rows["still"].image_sha256, "hd": rows["hd"].video_sha256}
    assert {name: digest for digest, name in clips.items()} == digests
    at = datetime(2026, 1, 1, tzinfo=UTC)
    given = [Review(clip_sha256=digest, id="x", verdict="reject", who=None, at=at) for digest in (*clips, A)]
    assert ReviewSession(outputs.storage, "ada").add_all(given) == (3, 0, 1)
    assert ReviewSession(outputs.storage, "bo").add_all(given) == (0, 3, 1)
    assert {(each.id, each.who) for each in read_reviews(outputs.storage).values()} == {
        (name, "ada") for name in clips.values()
    }
