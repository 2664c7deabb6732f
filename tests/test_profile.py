"""Profiles: built-in profiles, validation errors, weight references, and defaults of the video models."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from vidgen_ray.cli import main
from vidgen_ray.content_keys import params_of
from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.graph import STAGES, check_profile
from vidgen_ray.licences import ShotLicences
from vidgen_ray.profile import ActorProfile, builtin_profiles, load_profile
from vidgen_ray.script.check import merged
from vidgen_ray.shot import Shot, wrong_defaults
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.weights import NO_WEIGHTS, resolve, with_commit


def test_builtin_profiles_have_valid_defaults_known_actors_and_memory():
    for profile in map(load_profile, builtin_profiles()):
        assert Shot(prompt="a", **profile.defaults)
        check_profile(profile)
        assert all(actor.memory_gb > 0 or actor.device == "cuda" for actor in profile.actors.values()), profile.name
        if any(actor.device == "cuda" for actor in profile.actors.values()):
            assert "has not been run on a GPU" in profile.about, profile.name


def test_stage_without_weights_needs_no_entry(tiny):
    class Sepia(RealESRGANStage):
        name, actor, has_weights = "sepia", "sepia", False

    assert (tiny.params(Sepia).device, tiny.pinned([Sepia]).actor_of(Sepia).weights) == ("cpu", NO_WEIGHTS)
    Sepia.has_weights = True
    with pytest.raises(ProfileError, match=r"stage sepia needs an entry actors\.sepia"):
        tiny.params(Sepia)


def test_tiny_and_demo_profiles_need_no_downloads():
    for profile in map(load_profile, ("tiny", "demo")):
        params = params_of(profile, [stage for stage in STAGES if stage.actor in profile.actors])
        assert all(p.weights.exists() and p.threads == 1 for p in params.values())
        assert params["realesrgan"].dtype in ("float32", "bfloat16"), "auto must be resolved before content keys are computed"


def test_invalid_profile_error_names_the_field(tmp_path, tiny):
    path = tmp_path / "p.yaml"
    for text, message in {
        "name: x": "about: got",
        "[": "invalid YAML",
        "- a": "got",
        "{name: x, about: y, actors: {svd: {weights: a, gpu: 1}}}": "actors.svd.gpu: got 1, extra inputs",
        "{name: x, about: y, actors: {svd: {memory_gb: 1}}}": "actors.svd: weights: field required",
        "{name: x, about: y, actors: {sdv: {weights: a}}}": "actors.sdv: must be one of instantid",
        "{name: x, about: y, actors: {svd: {weights: a}, svd: {weights: b}}}": "duplicate key 'svd'",
    }.items():
        path.write_text(text)
        with pytest.raises(ProfileError, match=message):
            check_profile(load_profile(str(path)))
    with pytest.raises(ProfileError, match="must be one of auto, demo"):
        load_profile("nope")
    for options, message in (({"decode_chunk": 3}, "decode_chunk: got 3"), ({"timeout_s": 9}, "timeout_s is not an option")):
        actor = tiny.actors["svd"].model_copy(update={"options": options})
        with pytest.raises(ProfileError, match=f"profile tiny, actors.svd: {message}"):
            tiny.model_copy(update={"actors": {"svd": actor}}).params(SVDStage)
    with pytest.raises(ProfileError, match=r"stage realesrgan needs an entry actors\.realesrgan"):
        tiny.model_copy(update={"actors": {}}).params(RealESRGANStage)


def test_stage_without_weights_needs_none(tiny, monkeypatch):
    class Sepia(SVDStage):
        actor = "sepia"
        has_weights = False

    monkeypatch.setattr("vidgen_ray.graph.STAGES", (*STAGES, Sepia))
    profile = tiny.model_copy(update={"actors": {**tiny.actors, "sepia": ActorProfile()}})
    check_profile(profile)
    assert Sepia.weight_files(profile.params(Sepia), Shot(prompt="a")) == (Path(NO_WEIGHTS),)
    assert digest(Path(NO_WEIGHTS)) == hashlib.sha256().hexdigest()
    assert (ShotLicences(profile).of_stage(Sepia), profile.weight_licences(["sepia"])) == ((), {})


def test_missing_weights_error_says_what_to_do():
    for reference, message in {
        "builtin:nope": "must be one of .*tiny/flux",
        "nowhere/at/all": "nothing at /",
        "hub:owner/name": "run `vidgen models pull hub:owner/name` first",
        f"hub:owner/name@{'0' * 40}": "nothing is downloaded while rendering",
    }.items():
        with pytest.raises(SetupError, match=message):
            resolve(reference)


def test_weights_path_is_relative_to_the_profile(tmp_path):
    (tmp_path / "w").mkdir()
    path = tmp_path / "p.yaml"
    path.write_text("{name: x, about: y, actors: {svd: {weights: w}}}")
    assert load_profile(str(path)).params(SVDStage).weights == tmp_path / "w"


def test_digest_depends_on_content_and_names_of_files(tmp_path):
    folder = tmp_path / "w"
    folder.mkdir()

    def digest_of(name, content):
        """Return the digest of the folder with this file only, which is old enough for its digest to be cached."""
        for file in folder.iterdir():
            file.unlink()
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (1, 1))
        (tmp_path / name).rename(folder / name)
        return digest(folder)

    first = digest_of("a", b"1")
    assert digest_of("a", b"1") == first
    assert first not in (digest_of("a", b"22"), digest_of("b", b"1"))
    assert digest_of("a", b"2") != first, "another file with the same size and time"


def test_cache_of_another_user_is_not_needed(tmp_path, own_cache, monkeypatch, capsys):
    (tmp_path / "w").write_bytes(b"1")
    monkeypatch.setattr("vidgen_ray.system.cache_dir.CLOCK_RESOLUTION_NS", -1)
    first = digest(tmp_path / "w")

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    assert digest(tmp_path / "w") == first
    # What needs the cache says what to set.
    monkeypatch.setattr("vidgen_ray.cli.app.app", lambda **_: refuse(own_cache / "builtin"))
    assert main(["doctor"]) == 4
    assert f"{own_cache / 'builtin'}: Permission denied. Or set VIDGEN_CACHE to another folder." in capsys.readouterr().err


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a function that makes a snapshot of the tiny SVD the `main` of org/svd in this machine's Hugging Face cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(commit):
        repo = tmp_path / "hub" / "models--org--svd"
        shutil.copytree(resolve("builtin:tiny/svd"), repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(commit)

    return add


COMMITS = ("1" * 40, "2" * 40)


def test_branch_is_replaced_by_its_commit(tiny, hub):
    actor = tiny.actors["svd"].model_copy(
        update={"weights": "hub:org/svd", "extra_weights": {"other": "hub:org/absent@main:sub"}}
    )
    profile = tiny.model_copy(update={"actors": {**tiny.actors, "svd": actor}})
    hub(COMMITS[0])
    pinned = profile.pinned([SVDStage])
    hub(COMMITS[1])
    assert pinned.actors["svd"].weights == f"hub:org/svd@{COMMITS[0]}"
    assert pinned.actors["svd"].extra_weights == {"other": "hub:org/absent@main:sub"}, "it is not on this machine"
    assert pinned.params(SVDStage).weights.name == COMMITS[0]
    assert pinned.with_commits() == pinned
    assert profile.params(SVDStage).weights.name == COMMITS[1]
    assert with_commit("hub:org/svd@main:unet") == f"hub:org/svd@{COMMITS[1]}:unet"
    assert resolve(f"hub:org/svd@{COMMITS[1]}:unet").name == "unet"


# Numbers of frames and frame rates of the video models, and the defaults that depend on them.


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
    for model, width, nearest in (("svd", 96, "64, 128"), ("ltx", 80, "64, 96")):
        with pytest.raises(ValidationError, match=rf"width {width} is not a multiple of .*\(nearest: {nearest}\)"):
            Shot(prompt="a", video_model=model, width=width)


def test_aspect_chooses_sizes_that_the_models_draw_and_crops():
    square = {"width": 128, "height": 128, "upscale_video": False}
    for aspect, fields, expected in (
        ("9:16", {}, (576, 1024, None, None)),
        ("9:16", square, (128, 192, 108, None)),
        (9 * 60 + 16, square | {"upscale_video": True, "scale": 4}, (128, 192, 432, None)),
        ("16:9", square, (192, 128, None, 108)),
        ("4:5", square | {"generate_video": False}, (112, 144, None, 140)),
        ("4:5", {"video_model": "ltx"}, (704, 864, 2764, None)),
        ("1:1", {}, (768, 768, None, None)),
    ):
        shot = Shot.model_validate({"prompt": "a", "aspect": aspect, **fields})
        assert (shot.width, shot.height, shot.crop_width, shot.crop_height) == expected, (aspect, fields)
        # A record has the sizes only.
        assert Shot.model_validate(shot.model_dump()) == shot.model_copy(update={"aspect": None})
    upscaled = Shot.model_validate({"prompt": "a", "aspect": "9:16", **square, "upscale_video": True})
    assert upscaled.model_copy(update={"upscale_video": False}).cropped_to_aspect().crop_width == 108
    for wrong in ("9x16", "1:9", "0:1", "9:16 ", True):
        with pytest.raises(ValidationError, match=r"must be WIDTH:HEIGHT, such as 9:16, from 1:4 to 4:1"):
            Shot(prompt="a", aspect=wrong)
    with pytest.raises(ValidationError, match="must not be together with crop_width"):
        Shot(prompt="a", aspect="9:16", crop_width=64)
