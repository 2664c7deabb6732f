"""make_film: choice and order of shots, pieces, transitions, titles, captions in decoded frames, and provenance."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest

from tests.film.conftest import BLUE, FAST, GREEN, RED, read_frames
from vidgen_ray.cli import main
from vidgen_ray.errors import MediaError, ScriptError, UsageError
from vidgen_ray.film.film_settings import ChosenShot, ClipFormat, FilmSettings, PixelSize, ShotSettings, film_settings
from vidgen_ray.film.make_film import make_film
from vidgen_ray.film.timeline import build_timeline
from vidgen_ray.media.media_file import append_xmp
from vidgen_ray.profile import ProvenanceSettings
from vidgen_ray.provenance.record import ProvenanceRecord, read_provenance
from vidgen_ray.provenance.signing import create_signing_key, read_signature
from vidgen_ray.system.cache_dir import sha256_of


@pytest.fixture
def film(shots, tmp_path):
    """Return a function that makes tmp_path/film.mp4 and returns the report and its frames."""

    def make(ids=None, **settings):
        path = tmp_path / "film.mp4"
        chosen = film_settings({"encode": FAST.model_dump(), **settings}, "test")
        report = make_film(shots.outputs, chosen, path, ids=ids)
        return report, read_frames(path)

    return make


def colours(frames) -> list[str]:
    """Return the strongest channel in the middle of each frame."""
    return ["RGB"[int(np.argmax(frame[frame.shape[0] // 2, frame.shape[1] // 2]))] for frame in frames]


def payloads(path) -> list[bytes]:
    with av.open(str(path)) as clip:
        return [bytes(packet) for packet in clip.demux(video=0) if packet.size]


def test_shots_are_in_script_order_or_in_that_of_ids(shots, film):
    shots.add("a-v10", line=2, colour=BLUE, frames=1)
    shots.add("a-v2", line=2, colour=GREEN, frames=1)
    shots.add("z", line=1, colour=RED, frames=1)
    report, frames = film()
    assert colours(frames) == ["R", "G", "B"]
    assert (report.shots, report.seconds, report.size) == (3, 0.5, "64x48")
    assert colours(film(ids=["a-v10", "z", "a-v10"])[1]) == ["B", "R", "B"]


def test_equal_clips_are_joined_by_copying_their_packets(shots, film, tmp_path):
    files = [
        shots.add(name, colour=colour, frames=frames)
        for name, colour, frames in (("a", RED, 5), ("b", GREEN, 1), ("c", BLUE, 4))
    ]
    report, frames = film()
    assert (report.copied, report.rendered) == (3, 0)
    assert payloads(tmp_path / "film.mp4") == [packet for file in files for packet in payloads(file)]
    assert np.array_equal(frames, [frame for file in files for frame in read_frames(file)])
    with av.open(str(tmp_path / "film.mp4")) as opened:
        stream = opened.streams.video[0]
        assert (stream.average_rate, stream.frames) == (6, 10)
        assert stream.codec_context.colorspace == 1  # BT.709


def test_clips_of_another_encoder_size_and_rate_are_rendered(shots, film):
    shots.add("a", colour=RED)
    shots.add("b", colour=GREEN, encode=FAST.model_copy(update={"preset": "medium"}))
    shots.add("c", colour=BLUE, size=(96, 48), fps=12, frames=12)
    report, frames = film(size="64x48", fps=6)
    assert (report.copied, report.rendered) == (1, 2)
    assert colours(frames) == ["R"] * 6 + ["G"] * 6 + ["B"] * 6
    # 96x48 in 64x48: black bars of 8 pixels above and below.
    assert frames[-1][3].max() < 20
    assert frames[-1][-4].max() < 20
    assert frames[-1][24, 2, 2] > 150


def test_only_changed_pieces_are_rendered_again(shots, film, tmp_path):
    shots.add("a", colour=RED)
    shots.add("b", colour=GREEN)
    shots.add("c", colour=BLUE)
    assert film(transition="fade", fade_s=0.34)[0].rendered == 5
    report, first = film(transition="fade", fade_s=0.34)
    assert (report.rendered, report.reused) == (0, 5)
    shots.add("c", colour=RED)
    report, second = film(transition="fade", fade_s=0.34)
    assert (report.rendered, report.reused) == (2, 3)  # c and the fade to it
    assert np.array_equal(first[:8], second[:8])
    assert colours(second)[-1] == "R"
    # Pieces of the earlier film are removed.
    assert len(list((tmp_path / "film.pieces").iterdir())) == 5


def test_fade_fades(shots, film):
    shots.add("a", colour=(255, 0, 0), frames=12)
    shots.add("b", colour=(0, 0, 255), frames=12)
    _, frames = film(transition="fade", fade_s=1)
    assert len(frames) == 18
    red = [int(frame[24, 32, 0]) for frame in frames]
    blue = [int(frame[24, 32, 2]) for frame in frames]
    assert red[5] > 250 > 5 > red[-6]
    assert red[6:12] == sorted(red[6:12], reverse=True)
    assert blue[6:12] == sorted(blue[6:12])
    assert (red[9], blue[9]) == pytest.approx((128, 128), abs=8)


def test_duration_of_a_clip_is_reached_by_holding_or_by_another_speed(shots, film):
    for settings, expected in (
        ({"fit": "slow"}, "RRGGBB"),
        ({"fit": "hold"}, "RGBBBB"),
        ({"fit": "hold", "duration_s": 0.34}, "RG"),
        ({"fit": "slow", "duration_s": 0.17}, "G"),
    ):
        shots.add("a", colour=[RED, GREEN, BLUE], metadata={"duration_s": 1, **settings})
        assert "".join(colours(film()[1])) == expected


def test_captions_are_written_beside_the_film_and_pause_during_a_fade(shots, film, tmp_path):
    shots.add("a", metadata={"caption": "One\n\n<two>"})
    shots.add("b", metadata={"caption": "Three"})
    report, _ = film(transition="fade", fade_s=0.34)
    assert report.captions == (str(tmp_path / "film.srt"), str(tmp_path / "film.vtt"))
    assert (tmp_path / "film.srt").read_text() == (
        "1\n00:00:00,000 --> 00:00:00,667\nOne\n<two>\n\n2\n00:00:01,000 --> 00:00:01,667\nThree\n"
    )
    assert (tmp_path / "film.vtt").read_text().startswith("WEBVTT\n\n00:00:00.000 --> 00:00:00.667\nOne\n&lt;two&gt;\n")
    # "Three" has 5 letters in 0.667 s. The other one has 8.
    assert [note for note in report.notes if "too short to read" in note] == []
    shots.add("b", metadata={"caption": "Thirty-three letters and a bit"})
    (note,) = film(transition="fade", fade_s=0.34)[0].notes
    assert note.startswith("captions too short to read (more than 20 letters per second): b; b is shown for 0.7 s, 39 letters")
    # A film without captions does not keep those of the film before.
    film(captions="none")
    assert not (tmp_path / "film.srt").exists()


def test_burnt_in_caption_is_drawn_into_the_lower_part(shots, film, tmp_path):
    shots.add("a", colour=(90, 90, 90), size=(320, 180), metadata={"caption": "Überfahrt nach Łódź"})
    plain, burnt = film(captions="file")[1][2], film(captions="burn")[1][2]
    assert not list(tmp_path.glob("film.[sv]*t")), "players would show the captions of files, too"
    changed = np.abs(plain.astype(int) - burnt).max(axis=2) > 60
    rows = np.flatnonzero(changed.any(axis=1))
    assert rows.min() > 140
    assert rows.max() < 178
    assert burnt[changed].max() > 220  # white letters
    assert burnt[changed].min() < 40  # black outline

    shots.add("a", size=(320, 180), metadata={"caption": "海"})
    with pytest.raises(UsageError, match=r"a: text '海': the font has no letter '海'; set a font"):
        film(captions="burn")


def test_title_card_shows_white_text_on_black(shots, film, tmp_path):
    shots.add("a", size=(320, 180), frames=1)
    report, frames = film(title="A day at sea", title_s=0.5)
    assert (report.copied, report.rendered, len(frames)) == (1, 1, 4)
    card = frames[1]
    assert card[80:100].max() > 220
    assert card[:30].max() < 20
    with av.open(str(tmp_path / "film.mp4")) as opened:
        assert opened.metadata["title"] == "A day at sea"


def test_scene_titles_are_put_before_the_first_shot_of_each_scene_and_images_are_stills(shots, film):
    for shot_id, scene in (("a", "Morning"), ("b", "Morning"), ("c", "Evening")):
        shots.add(shot_id, frames=1, image_only=shot_id == "b", metadata={"scene": scene})
    report, frames = film(scene_titles=True, title_s=0.5, still_s=0.34, fps=6)
    brightness = [bool(frame.mean() > 60) for frame in frames]
    assert brightness == [False] * 3 + [True] * 3 + [False] * 3 + [True]
    assert colours(frames[3:6]) == ["R", "G", "G"]
    assert report.shots == 3


def test_wrong_metadata_and_damaged_clips_are_named(shots, film):
    path = shots.add("a", metadata={"duration_s": 0})
    with pytest.raises(ScriptError, match="shot a, metadata, duration_s: got 0, must be greater than 0"):
        film()
    shots.add("a")
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(MediaError, match=r"video\.mp4: not a supported video format"):
        film()


def source(frames=10, fps=5, size=(64, 48), **settings) -> ChosenShot:
    clip = ClipFormat(PixelSize(*size), Fraction(fps), frames, False, b"h")
    return ChosenShot("s", ShotSettings(**settings), path="s.mp4", clip=clip)


def test_narration_keeps_the_shot_on_screen_until_it_ends():
    (item,) = build_timeline([source()._replace(speech="s.wav", speech_s=4.0)], FilmSettings(fps=24)).items
    assert item.frames == 104  # 4.3 s


def test_pieces_cover_every_frame_once_with_cross_fades():
    timeline = build_timeline(
        [source(), source(frames=3), source(transition="cut"), source()], FilmSettings(transition="fade", fade_s=1)
    )
    fades = [(item.start, item.fade_in, item.fade_out) for item in timeline.items]
    assert fades == [(0, 0, 1), (9, 1, 0), (12, 0, 5), (17, 5, 0)]
    pieces = list(timeline.pieces())
    found = [(piece.first, piece.frames, piece.fade_to is not None) for piece in pieces]
    assert found == [(0, 9, False), (9, 1, True), (1, 2, False), (0, 5, False), (5, 5, True), (5, 5, False)]
    assert sum(piece.frames for piece in pieces) == timeline.frames == 27


# Provenance

SHOT = ProvenanceRecord(
    source_type="trainedAlgorithmicMedia", key="a" * 64, stages=("flux", "svd"), shot={"prompt": "a secret"}
)


@pytest.fixture
def marked(shots, tmp_path):
    """An output folder with a marked clip and one without metadata."""
    clip = shots.add("new")
    append_xmp(clip, SHOT.metadata().xmp)
    record = json.loads((clip.parent / "shot.json").read_text())
    record["files"]["video.mp4"] |= {"sha256": sha256_of(clip), "bytes": clip.stat().st_size}
    (clip.parent / "shot.json").write_text(json.dumps(record))
    shots.add("old", colour=BLUE)
    return tmp_path / "film.mp4"


def test_film_has_the_digests_and_keys_of_its_clips(shots, marked):
    make_film(shots.outputs, FilmSettings(title="Two"), marked)
    found = read_provenance(marked)
    assert found.source_type == "trainedAlgorithmicMedia"
    assert (found.record.operation, found.record.stages) == ("film", ("flux", "svd"))
    recorded = [json.loads(path.read_text())["files"]["video.mp4"]["sha256"] for path in shots.root.rglob("shot.json")]
    assert sorted(source.sha256 for source in found.record.sources) == sorted(recorded)
    assert [(source.source_type, source.key) for source in found.record.sources] == [
        ("trainedAlgorithmicMedia", "a" * 64),
        ("trainedAlgorithmicMedia", None),
    ]
    assert b"secret" not in marked.read_bytes()
    with av.open(str(marked)) as opened:
        assert opened.metadata["comment"].startswith("AI-generated with vidgen-ray ")
        assert opened.metadata["title"] == "Two"
    # Without other settings, those of the last run.
    shots.outputs.write_run({"profile": {"provenance": {"metadata": "off"}}})
    assert make_film(shots.outputs, FilmSettings(), marked).metadata == "off"
    assert read_provenance(marked) == (None, None)
    assert main(["film", str(shots.root), "-o", str(marked), "--private"]) == 0
    assert read_provenance(marked).source_type == "trainedAlgorithmicMedia"


def test_signed_film_has_its_clips_as_ingredients(shots, marked, tmp_path):
    create_signing_key(tmp_path / "key.pem", "Studio")
    make_film(shots.outputs, FilmSettings(), tmp_path / "plain.mp4")
    make_film(shots.outputs, FilmSettings(), marked, provenance=ProvenanceSettings(c2pa_key=tmp_path / "key.pem"))
    signature = read_signature(marked)
    assert (signature.state, signature.problems, signature.signer) == ("Valid", (), "Studio")
    assert signature.actions == ("c2pa.created", "c2pa.placed", "c2pa.placed")
    assert sorted(signature.ingredients) == ["new", "old"]
    assert sha256_of(marked) != sha256_of(tmp_path / "plain.mp4")
    assert read_provenance(marked) == read_provenance(tmp_path / "plain.mp4")
