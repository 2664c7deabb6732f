"""`vidgen film --timeline`: the edit has the film's cuts to the frame, handles, stems and captions."""

from fractions import Fraction
from pathlib import Path
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree

import av
import numpy as np
import pytest

from tests.film.conftest import BLUE, FAST, GREEN, RED, read_frames, tone, write_sound
from vidgen_ray.cli import main
from vidgen_ray.errors import SetupError
from vidgen_ray.film import edit_files
from vidgen_ray.film.film_settings import film_settings
from vidgen_ray.film.make_film import make_film
from vidgen_ray.system.files import temporary_prefix, this_process

FPS = 6
# First frame in the film, frames, first frame of the media, frames of the media.
CUTS = [("title", 0, 6, 0, 6), ("a", 6, 10, 0, 12), ("b", 16, 10, 2, 12), ("c", 26, 6, 0, 24), ("b", 32, 18, 0, 18)]
FADE = 4, 14
"""Frames of the cross-fade from a to b, and its first frame in the film."""


def moving(colour):
    """Return a colour for each of 12 frames, all different."""
    return [tuple(max(0, value - 5 * n) for value in colour) for n in range(12)]


@pytest.fixture
def made(shots, tmp_path):
    """Return a function that makes a film with a timeline, and returns the report."""
    shots.add("a", colour=moving(RED), metadata={"caption": "<One> & \x07two"}, sound=tone(2))
    shots.add("b", colour=moving(GREEN), metadata={"transition": "fade"})
    shots.add("c", colour=moving(BLUE), fps=3, metadata={"duration_s": 1})
    music = write_sound(tmp_path / "music.wav", tone(1))
    again = {"id": "b", "duration_s": 3, "transition": "cut"}
    entries = [{"title": "One", "duration_s": 1}, {"id": "a"}, {"id": "b"}, {"id": "c"}, again]
    fields = {"encode": FAST.model_dump(), "fps": FPS, "fade_s": 4 / FPS, "music": music, "shots": entries}

    def make(kind):
        settings = film_settings({**fields, "timeline": kind}, "test")
        return make_film(shots.outputs, settings, tmp_path / "my film.mp4")

    return make


def path_of(url):
    return Path(unquote(urlparse(url).path))


def check_media(film: Path, cuts):
    """Check that the media between the cuts has the frames of the film, apart from cross-fades, and the frames it declares."""
    expected = read_frames(film)
    fade = range(FADE[1], FADE[1] + FADE[0])
    for start, count, first, total, media in cuts:
        frames = read_frames(media)
        assert len(frames) == total
        for n in range(count):
            if start + n not in fade:
                assert np.abs(frames[first + n].astype(int) - expected[start + n]).mean() < 2.5


def test_otio_has_cuts_handles_fades_stems_and_captions(made, tmp_path):
    otio = pytest.importorskip("opentimelineio")
    report = made("otio")
    edit = otio.adapters.read_from_file(report.timeline)
    (picture,), sound = edit.video_tracks(), edit.audio_tracks()
    clips = [each for each in picture if isinstance(each, otio.schema.Clip)]
    found = []
    for clip in clips:
        start, used, whole = clip.range_in_parent(), clip.source_range, clip.media_reference.available_range
        assert {start.duration.rate, used.start_time.rate, whole.duration.rate} == {FPS}
        numbers = start.start_time.value, start.duration.value, used.start_time.value, whole.duration.value
        found.append((clip.name, *map(int, numbers)))
    assert [(start, *rest) for _, start, *rest in found] == [cut[1:] for cut in CUTS]
    assert [name for name, *_ in found] == ["title card at position 1", "a", "b", "c", "b"]
    (fade,) = [each for each in picture if isinstance(each, otio.schema.Transition)]
    assert (picture.index(fade), fade.in_offset.value, fade.out_offset.value) == (2, 2, 2)
    check_media(
        tmp_path / "my film.mp4",
        [(*each[1:], path_of(c.media_reference.target_url)) for each, c in zip(found, clips, strict=True)],
    )
    assert [track.name for track in sound] == ["clips", "music"]
    for track in sound:
        with av.open(str(path_of(track[0].media_reference.target_url))) as stem:
            samples = sum(frame.samples for frame in stem.decode(audio=0))
        assert samples == track.duration().value == 48_000 * 50 / FPS
    (caption,) = edit.tracks.markers
    assert (caption.name, caption.marked_range.start_time.value, caption.marked_range.duration.value) == (
        "<One> & \x07two",
        6,
        8,
    )
    rates, handles = report.notes
    assert rates.startswith(
        "2 clips have another rate than 6 frames per second, or are held or slowed, and were rendered: c, b"
    )
    assert handles.startswith(
        "2 of 5 clips have no handles in the timeline; frames beyond a cut come from a shorter duration_s"
    )


def seconds(text):
    return Fraction(text.removesuffix("s"))


def test_fcpxml_has_cuts_handles_fades_stems_and_captions(made, tmp_path):
    report = made("fcpxml")
    root = ElementTree.parse(report.timeline).getroot()
    assets = {asset.get("id"): asset for asset in root.iter("asset")}
    spine = root.find(".//spine")
    found = []
    for clip in spine.findall("asset-clip"):
        asset = assets[clip.get("ref")]
        times = clip.get("offset"), clip.get("duration"), clip.get("start"), asset.get("duration")
        found.append((*(int(seconds(time) * FPS) for time in times), path_of(asset.get("src"))))
    assert [each[:4] for each in found] == [cut[1:] for cut in CUTS]
    check_media(tmp_path / "my film.mp4", found)
    (fade,) = spine.findall("transition")
    assert (seconds(fade.get("duration")) * FPS, seconds(fade.get("offset")) * FPS) == FADE
    stems = spine[0].findall("asset-clip")
    assert [(stem.get("ref"), stem.get("lane"), seconds(stem.get("duration"))) for stem in stems] == [
        ("clips", "-1", Fraction(50, FPS)),
        ("music", "-2", Fraction(50, FPS)),
    ]
    (caption,) = spine[0].findall("caption")
    assert (seconds(caption.get("offset")) * FPS, seconds(caption.get("duration")) * FPS) == (6, 8)
    assert "".join(caption.find("text").itertext()) == "<One> & two"


def test_temporary_files_of_a_killed_process_are_removed(made, tmp_path):
    made("fcpxml")
    ended = temporary_prefix(this_process()._replace(started=1))
    left = [folder / f"{ended}x" for folder in (tmp_path, tmp_path / "my film.media", tmp_path / "my film.pieces")]
    for path in left:
        path.touch()
    made("fcpxml")
    assert not any(path.exists() for path in left)


def test_fcpxml_is_read_by_opentimelineio(shots, tmp_path):
    otio = pytest.importorskip("opentimelineio")
    pytest.importorskip("otio_fcpx_xml_adapter.fcpx_xml")
    for name, frames in (("a", 5), ("b", 7), ("c", 1)):
        shots.add(name, frames=frames)
    report = make_film(shots.outputs, film_settings({"timeline": "fcpxml"}, "test"), tmp_path / "film.mp4")
    (edit,) = otio.adapters.read_from_file(report.timeline).find_children(descended_from_type=otio.schema.Timeline)
    clips = edit.find_clips()
    starts = [clip.transformed_time_range(clip.visible_range(), edit.tracks) for clip in clips]
    assert [(clip.name, time.start_time.value, time.duration.value) for clip, time in zip(clips, starts, strict=True)] == [
        ("a", 0, 5),
        ("b", 5, 7),
        ("c", 12, 1),
    ]


def test_timelines_that_cannot_be_written_are_explained(shots, tmp_path, capsys, monkeypatch):
    shots.add("a")
    words = ["film", str(tmp_path / "out"), "-o", str(tmp_path / "film.mp4"), "--timeline"]
    assert main([*words, "avid"]) == 3
    assert "film, timeline: got 'avid', must be 'otio' or 'fcpxml'" in capsys.readouterr().err
    assert main([*words, "fcpxml"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(tmp_path / "film.fcpxml")
    assert "the film has no sound, and the timeline no stems" in printed.err
    monkeypatch.setattr(edit_files, "find_spec", lambda name: None)
    assert main([*words, "otio"]) == 4
    assert "opentimelineio" in capsys.readouterr().err
    with pytest.raises(SetupError, match="needs the clips on this machine"):
        edit_files.check_edit(film_settings({"timeline": "fcpxml"}, "test"), None)
