"""Numbers of frames and frame rates of the video models, and the defaults that depend on them."""

import pytest
from pydantic import ValidationError

from vidgen_ray.script.check import merged
from vidgen_ray.shot import Shot, wrong_defaults


def test_error_names_the_nearest_numbers_of_frames():
    for model, frames, message in (
        ("wan", 10, r"must be 4k \+ 1 for this video model \(nearest: 9, 13\), or auto"),
        ("wan", 2, r"nearest: 5, 9"),
        ("wan", 256, r"nearest: 253\)"),
        ("ltx", 26, r"must be 8k \+ 1 .*nearest: 25, 33"),
        ("ltx", 24, r"nearest: 17, 25"),
    ):
        with pytest.raises(ValidationError, match=message) as error:
            Shot(prompt="a", video_model=model, num_frames=frames)
        assert error.value.errors()[0]["loc"] == ("num_frames",)


def test_auto_is_the_allowed_number_closest_to_five_seconds():
    for fields, frames, fps in (
        ({}, 25, 5),
        ({"num_frames": "auto", "fps": 24}, 25, 24),
        ({"video_model": "wan"}, 81, 16),
        ({"video_model": "wan", "num_frames": "auto", "fps": 24}, 121, 24),
        ({"video_model": "wan", "num_frames": 33}, 33, 16),
        ({"video_model": "ltx", "fps": 8}, 41, 8),
    ):
        shot = Shot(prompt="a", **fields)
        assert (shot.num_frames, shot.fps) == (frames, fps), fields
        assert Shot.model_validate(shot.model_dump()) == shot


def test_defaults_of_another_video_model_do_not_apply():
    profile = {"num_frames": 8, "fps": 6, "width": 128}
    assert merged(profile, {"prompt": "a"}) == {**profile, "prompt": "a"}
    assert merged(profile, {"video_model": "wan"}) == {"width": 128, "video_model": "wan"}
    assert merged(profile, {"video_model": "svd"}) == {**profile, "video_model": "svd"}
    wan = {"video_model": "wan", "num_frames": 49}
    assert merged(profile, wan, {"fps": 24}) == {"width": 128, **wan, "fps": 24}
    assert merged(profile, wan, {"video_model": "svd"}) == {"width": 128, "video_model": "svd"}


def test_defaults_can_give_a_value_per_model():
    profile = {"num_frames": {"svd": 8, "wan": 9}, "fps": {"svd": 6}}
    for line, frames, fps in (
        ({}, 8, 6),
        ({"video_model": "wan"}, 9, 16),
        ({"video_model": "wan", "num_frames": 33}, 33, 16),
        ({"video_model": "ltx"}, 121, 25),
    ):
        shot = Shot.model_validate(merged(profile, {"prompt": "a"}, line))
        assert (shot.num_frames, shot.fps) == (frames, fps), line
    assert merged({"num_frames": 8}, {"num_frames": {"wan": 9}}) == {"num_frames": {"svd": 8, "wan": 9}}
    assert merged({"num_frames": {"svd": 8, "wan": 9}}, {"num_frames": {"wan": 13}}) == {"num_frames": {"svd": 8, "wan": 13}}
    for defaults in ({"num_frames": {"svd": 8, "wan": 10}}, {"num_frames": {"svd": 8, "other": 8}}, {"num_frames": {}}):
        assert [name for name, _, _ in wrong_defaults(defaults)] == ["num_frames"], defaults


def test_sizes_depend_on_the_video_model():
    for model, width in (("ltx", 96), ("wan", 80)):
        assert Shot(prompt="a", video_model=model, width=width).width == width
    for model, width in (("svd", 96), ("ltx", 80)):
        with pytest.raises(ValidationError, match=f"width {width} is not a multiple of"):
            Shot(prompt="a", video_model=model, width=width)
