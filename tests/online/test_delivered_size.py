"""Sizes that clients ask for: what the models draw, and that the files have exactly the requested size."""

import pytest

from vidgen_ray.graph import file_sizes, uncropped_size
from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.delivered_size import (
    SizeRules,
    clip_fields,
    clip_fields_with_hd,
    delivered_artefact,
    image_size_fields,
)
from vidgen_ray.profile import load_profile
from vidgen_ray.shot import Shot

PEER_SIZES = [
    *((1280, 720), (720, 1280), (1792, 1024), (1024, 1792)),  # OpenAI
    *((832, 480), (480, 832), (854, 480), (480, 320), (640, 480)),  # vLLM-Omni
    *((1024, 1024), (1920, 1080), (1080, 1920), (768, 512), (720, 720), (3840, 2160)),  # SGLang, LiteLLM
    *((128, 64), (1024, 576), (64, 64), (256, 128)),
]


def rules_of(profile: str, can_upscale: bool = True) -> SizeRules:
    default = Shot(prompt="a", **load_profile(profile).defaults)
    return SizeRules(default.width, default.height, can_upscale, uncropped_size(default))


def shot_with(fields: dict) -> Shot:
    return Shot(prompt="a", num_frames=2, **fields)


def test_every_clip_has_exactly_the_requested_size():
    for profile in ("gpu-80gb", "demo", "tiny"):
        rules = rules_of(profile)
        for size in PEER_SIZES:
            shot = shot_with(clip_fields(*size, rules))
            assert file_sizes(shot)[delivered_artefact(shot, hd_beside=False)] == size
            # Drawn at about the default area, unless even the largest factor needs more.
            area = rules.default_width * rules.default_height
            assert shot.width * shot.height <= 1.1 * area or (shot.upscale_video and shot.scale == 4)


def test_full_size_is_drawn_without_upscaling_and_images_at_the_next_multiple_of_16():
    for rules in (rules_of("gpu-80gb", can_upscale=False), rules_of("gpu-80gb")):
        shot = shot_with(clip_fields(1280, 720, rules, may_upscale=False))
        assert (shot.width, shot.height, shot.upscale_video, shot.crop_height) == (1280, 768, False, 720)
        assert file_sizes(shot)["frames"] == (1280, 720)
    for size in ((1024, 1024), (1000, 562), (500, 700), (64, 64)):
        shot = shot_with({**image_size_fields(*size), "generate_video": False})
        assert file_sizes(shot)["image"] == size
        assert max(shot.width - size[0], shot.height - size[1]) < 16


def test_explicit_scale_gives_a_larger_clip_beside():
    for scale in (2, 3, 4):
        for width, height in ((854, 480), (128, 64), (1280, 720)):
            shot = shot_with(clip_fields_with_hd(width, height, scale))
            sizes = file_sizes(shot)
            assert sizes[delivered_artefact(shot, hd_beside=True)] == (width, height)
            assert sizes["hd_frames"] == (scale * width, scale * height)
    with pytest.raises(ApiError, match="from 64 to 2048"):
        clip_fields_with_hd(2560, 1440, 2)


def test_unreachable_size_is_refused_with_the_nearest():
    for size, can_upscale, message in (
        ((853, 480), True, r"got 853x480, width and height must be even numbers from 64 to 8192 \(nearest: 852x480\)"),
        ((9000, 64), True, r"nearest: 8192x64"),
        ((2560, 1440), False, r"from 64 to 2048 \(nearest: 2048x1440\)"),
        ((32, 64), True, r"nearest: 64x64"),
    ):
        with pytest.raises(ApiError, match=message) as raised:
            clip_fields(*size, rules_of("gpu-80gb", can_upscale))
        assert (raised.value.param, raised.value.code) == ("size", "invalid_size")
