"""Timeline of a film: frames of items and pieces, durations, cross-fades, and samples without drift."""

from fractions import Fraction

from vidgen_ray.film.film_settings import ChosenShot, ClipFormat, FilmSettings, PixelSize, ShotSettings
from vidgen_ray.film.timeline import build_timeline


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
    assert [(item.start, item.fade_in, item.fade_out) for item in timeline.items] == [
        (0, 0, 1),
        (9, 1, 0),
        (12, 0, 5),
        (17, 5, 0),
    ]
    pieces = list(timeline.pieces())
    assert [(piece.first, piece.frames, piece.fade_to is not None) for piece in pieces] == [
        (0, 9, False),
        (9, 1, True),
        (1, 2, False),
        (0, 5, False),
        (5, 5, True),
        (5, 5, False),
    ]
    assert sum(piece.frames for piece in pieces) == timeline.frames == 27
