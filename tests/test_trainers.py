"""Rules of LoRA trainers. Tables for trainers without a package are made by hand from their code; see also tests/dataset."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidgen_ray.cli import main
from vidgen_ray.graph import clip_length
from vidgen_ray.shot import Shot
from vidgen_ray.trainers import TARGETS, SourceClip, parse_target, use_text
from vidgen_ray.video_models import VIDEO_MODELS

CLIPS = st.builds(
    SourceClip,
    num_frames=st.integers(1, 400),
    fps=st.sampled_from([5, 8, 12, 15, 16, 23.976, 24, 25, 29.97, 30, 50, 60, 120]),
    width=st.integers(32, 2400).map(lambda side: side * 2),
    height=st.integers(32, 2400).map(lambda side: side * 2),
)


@pytest.mark.parametrize(
    ("target", "clip", "status", "seen", "frames", "size"),
    [
        # int(frames * 16 / fps); Wan 14B: 4k + 1 frames, 16 pixels.
        ("diffusion-pipe:wan21-14b", SourceClip(25, 5, 1024, 576), "cut", 80, 77, (1024, 576)),
        ("diffusion-pipe:wan22-14b", SourceClip(81, 16, 832, 480), "used", 81, 81, (832, 480)),
        ("diffusion-pipe:wan22-14b", SourceClip(161, 16, 832, 480), "cut", 161, 81, (832, 480)),
        ("diffusion-pipe:wan21-14b", SourceClip(1, 5, 832, 480), "dropped", 3, 1, (832, 480)),
        # 24, with 32 pixels for the 5B.
        ("diffusion-pipe:wan22-5b", SourceClip(120, 24, 1280, 720), "cut", 120, 117, (1248, 704)),
        ("diffusion-pipe:hunyuan", SourceClip(121, 24, 1280, 720), "used", 121, 121, (1280, 720)),
        ("diffusion-pipe:ltx-video", SourceClip(121, 25, 1024, 576), "used", 121, 121, (1024, 576)),
        ("diffusion-pipe:ltx2", SourceClip(121, 25, 1024, 576), "cut", 116, 113, (1024, 576)),
        # Frames are skipped: int(0), int(16 / 25), int(32 / 25), ... But none are repeated.
        ("musubi:wan22-14b", SourceClip(121, 25, 1024, 576), "used", 77, 77, (1024, 576)),
        ("musubi:wan21-14b", SourceClip(120, 24, 1024, 576), "cut", 80, 77, (1024, 576)),
        ("musubi:wan21-14b", SourceClip(25, 5, 1024, 576), "dropped", 25, 25, (1024, 576)),
        ("musubi:hunyuan", SourceClip(121, 24, 832, 480), "used", 121, 121, (832, 480)),
    ],
)
def test_rules_of_trainers_without_a_package(target, clip, status, seen, frames, size):
    use = parse_target(target).use(clip)
    assert (use.status, use.seen, use.frames, (use.width, use.height)) == (status, seen, frames, size)


@given(target=st.sampled_from(TARGETS), clip=CLIPS)
def test_a_used_clip_has_what_the_model_takes_and_a_fitted_one_is_used_as_a_whole(target, clip):
    found = parse_target(target)
    model, use = found.model, found.use(clip)
    if not use.problem:
        assert model.frame_step < use.frames <= min(use.seen, model.frames)
        assert (use.frames - 1) % model.frame_step == use.width % model.side_step_px == use.height % model.side_step_px == 0
        assert abs(use.speed - 1) <= 0.05
    fitted = found.fitted(clip)
    if fitted is None:
        assert not use.problem
        assert use.frames == min(use.seen, model.frames)
    else:
        again = found.use(fitted)
        assert (again.problem, again.speed, fitted.fps) == (None, 1, model.fps)
        assert again.frames in (fitted.num_frames, fitted.num_frames - 1)
        # As long as the clip, within half a step of frames.
        wanted = min(clip.num_frames * model.fps / clip.fps, model.frames)
        assert abs(again.frames - max(wanted, model.frame_step + 1)) <= model.frame_step / 2
    assert use_text(fitted or clip, found).startswith(use.status if fitted is None else "used")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", sorted({"svd", "wan", "ltx", "remote"} & {*VIDEO_MODELS}))
@pytest.mark.parametrize("extend", [0, 1])
def test_num_frames_for_a_trainer_loses_the_fewest_frames(target, model, extend):
    fields = {"prompt": "x", "width": 832, "height": 448, "video_model": model, "extend": extend}
    found = parse_target(target)
    try:
        shot = Shot(**fields, num_frames=f"for:{target}")
    except ValueError as error:
        assert f"set fps or fps_out to {found.model.fps}" in str(error)  # noqa: PT017  # one of two results
        assert VIDEO_MODELS[model].fps > found.model.fps
        return
    use = found.use(SourceClip(*clip_length(shot), 832, 448))
    assert use.status != "dropped"
    lost = [use.seen - use.frames]
    for frames in filter(VIDEO_MODELS[model].allows, range(2, VIDEO_MODELS[model].most_auto_frames + 1)):
        other = found.use(SourceClip(*clip_length(shot.model_copy(update={"num_frames": frames})), 832, 448))
        lost += [other.seen - other.frames] if not other.problem else []
        # Of those that lose nothing, it is the longest.
        assert other.problem or other.seen - other.frames > lost[0] or other.frames <= use.frames
    assert lost[0] == min(lost)


def test_fields_of_the_shot_are_kept_and_wrong_targets_name_those_that_are_known():
    shot = Shot(prompt="x", num_frames="for:diffusion-pipe:wan21-14b", fps_out=24)
    assert (shot.fps_out, Fraction(*clip_length(shot)) * 16) == (24, Fraction(116, 24) * 16)
    table = Shot.model_validate({"prompt": "x", "num_frames": "for:musubi:wan21-14b", "fps": "8", "fps_out": "16"})
    assert clip_length(table) == (50, 16)
    for value, known in (("for:kohya:wan21-14b", "diffusion-pipe:wan21-14b, "), ("for:musubi:ltx2", "one of musubi:wan21-14b")):
        with pytest.raises(ValueError, match=f"num_frames {value}: must be TRAINER:MODEL, one of .*{known.split()[-1]}"):
            Shot(prompt="x", num_frames=value)


def test_plan_names_what_a_trainer_does_with_each_group(tmp_path, capsys):
    script = tmp_path / "script.jsonl"
    lines = ('{"prompt": "a"}', '{"prompt": "b"}', '{"prompt": "c", "num_frames": "for:musubi:wan21-14b"}')
    script.write_text("\n".join(lines))
    options = ["plan", str(script), "-o", str(tmp_path / "out"), "--gpus", "1x80GB"]
    assert main([*options, "--for", "musubi:wan21-14b"]) == 0
    assert "clips: 1 used, 0 cut, 2 dropped, 2 resampled" in capsys.readouterr().out
    assert main([*options, "--for", "musubi:wan21-14b", "--json"]) == 0
    dropped, used = json.loads(capsys.readouterr().out)["uses"]
    assert (dropped["clips"], dropped["num_frames"], dropped["fps"], dropped["width"], dropped["height"]) == (
        2,
        25,
        5,
        4096,
        2304,
    )
    assert dropped["result"].startswith("dropped: would be trained at 3.2 times its speed")
    assert dropped["fits_with"] == {"num_frames": 24, "fps_out": 16}
    assert (used["clips"], used["status"], used["fits_with"]) == (1, "used", {})
    assert main([*options, "--for", "musubi:flux"]) == 2
    assert "must be TRAINER:MODEL, one of musubi:wan21-14b, musubi:wan22-14b, musubi:hunyuan" in capsys.readouterr().err
