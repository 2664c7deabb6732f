"""Provenance of films: marked as AI-generated, with the digests and keys of their clips, signed with them as ingredients."""

import json

import av
import pytest

from vidgen_ray.cli import main
from vidgen_ray.film.film_settings import FilmSettings
from vidgen_ray.film.make_film import make_film
from vidgen_ray.media.media_file import append_xmp
from vidgen_ray.provenance.record import ProvenanceRecord, ProvenanceSettings, read_provenance
from vidgen_ray.provenance.signing import create_signing_key, read_signature
from vidgen_ray.system.cache_dir import sha256_of

SHOT = ProvenanceRecord(
    source_type="trainedAlgorithmicMedia", key="a" * 64, stages=("flux", "svd"), shot={"prompt": "a secret"}
)


@pytest.fixture
def film(shots, tmp_path):
    """An output folder with a marked clip and one without metadata."""
    clip = shots.add("new")
    append_xmp(clip, SHOT.metadata().xmp)
    record = json.loads((clip.parent / "shot.json").read_text())
    record["files"]["video.mp4"] |= {"sha256": sha256_of(clip), "bytes": clip.stat().st_size}
    (clip.parent / "shot.json").write_text(json.dumps(record))
    shots.add("old", colour=(30, 30, 200))
    return tmp_path / "film.mp4"


def test_film_has_the_digests_and_keys_of_its_clips(shots, film):
    make_film(shots.outputs, FilmSettings(title="Two"), film)
    found = read_provenance(film)
    assert found.source_type == "trainedAlgorithmicMedia"
    assert (found.record.operation, found.record.stages) == ("film", ("flux", "svd"))
    recorded = [json.loads(path.read_text())["files"]["video.mp4"]["sha256"] for path in shots.root.rglob("shot.json")]
    assert sorted(source.sha256 for source in found.record.sources) == sorted(recorded)
    assert [(source.source_type, source.key) for source in found.record.sources] == [
        ("trainedAlgorithmicMedia", "a" * 64),
        ("trainedAlgorithmicMedia", None),
    ]
    assert b"secret" not in film.read_bytes()
    with av.open(str(film)) as opened:
        assert opened.metadata["comment"].startswith("AI-generated with vidgen-ray ")
        assert opened.metadata["title"] == "Two"
    # Without other settings, those of the last run.
    shots.outputs.write_run({"profile": {"provenance": {"metadata": "off"}}})
    assert make_film(shots.outputs, FilmSettings(), film).metadata == "off"
    assert read_provenance(film) == (None, None)
    assert main(["film", str(shots.root), "-o", str(film), "--private"]) == 0
    assert read_provenance(film).source_type == "trainedAlgorithmicMedia"


def test_signed_film_has_its_clips_as_ingredients(shots, film, tmp_path):
    create_signing_key(tmp_path / "key.pem", "Studio")
    make_film(shots.outputs, FilmSettings(), tmp_path / "plain.mp4")
    make_film(shots.outputs, FilmSettings(), film, provenance=ProvenanceSettings(c2pa_key=tmp_path / "key.pem"))
    signature = read_signature(film)
    assert (signature.state, signature.problems, signature.signer) == ("Valid", (), "Studio")
    assert signature.actions == ("c2pa.created", "c2pa.placed", "c2pa.placed")
    assert sorted(signature.ingredients) == ["new", "old"]
    assert sha256_of(film) != sha256_of(tmp_path / "plain.mp4")
    assert read_provenance(film) == read_provenance(tmp_path / "plain.mp4")
