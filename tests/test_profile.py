"""Profiles: built-in profiles, validation errors and weight references."""

import os
import shutil

import pytest

from vidgen_ray.content_keys import params_of
from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.graph import STAGES, check_profile
from vidgen_ray.profile import builtin_profiles, load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.weights import resolve, with_commit


def test_builtin_profiles_have_valid_defaults_known_actors_and_memory():
    for profile in map(load_profile, builtin_profiles()):
        assert Shot(prompt="a", **profile.defaults)
        check_profile(profile)
        assert all(actor.memory_gb > 0 or actor.device == "cuda" for actor in profile.actors.values()), profile.name
        if any(actor.device == "cuda" for actor in profile.actors.values()):
            assert "has not been run on a GPU" in profile.about, profile.name


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_tiny_and_demo_profiles_need_no_downloads(name):
    profile = load_profile(name)
    params = params_of(profile, [stage for stage in STAGES if stage.actor in profile.actors])
    assert all(p.weights.exists() and p.threads == 1 for p in params.values())
    assert params["realesrgan"].dtype in ("float32", "bfloat16"), "auto must be resolved before content keys are computed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x", "about: got"),
        ("[", "invalid YAML"),
        ("- a", "got"),
        ("{name: x, about: y, actors: {svd: {weights: a, gpu: 1}}}", "actors.svd.gpu: got 1, extra inputs"),
        ("{name: x, about: y, actors: {sdv: {weights: a}}}", "actors.sdv: must be one of instantid"),
        ("{name: x, name: z, about: y, actors: {}}", "duplicate key 'name'"),
        ("{name: x, about: y, actors: {svd: {weights: a}, svd: {weights: b}}}", "duplicate key 'svd'"),
    ],
)
def test_invalid_profile_error_names_the_field(tmp_path, text, message):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=message):
        check_profile(load_profile(str(path)))


def test_unknown_profile_name_lists_the_builtin_profiles():
    with pytest.raises(ProfileError, match="must be one of auto, demo"):
        load_profile("nope")


def test_unknown_option_error_names_the_actor(tiny):
    for options, message in (({"decode_chunk": 3}, "decode_chunk: got 3"), ({"timeout_s": 9}, "timeout_s is not an option")):
        actor = tiny.actors["svd"].model_copy(update={"options": options})
        with pytest.raises(ProfileError, match=f"profile tiny, actors.svd: {message}"):
            tiny.model_copy(update={"actors": {"svd": actor}}).params(SVDStage)
    with pytest.raises(ProfileError, match=r"stage realesrgan needs an entry actors\.realesrgan"):
        tiny.model_copy(update={"actors": {}}).params(RealESRGANStage)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("builtin:nope", "must be one of .*tiny/flux"),
        ("nowhere/at/all", "nothing at /"),
        ("hub:owner/name", "run `vidgen models pull hub:owner/name` first"),
        ("hub:owner/name@0000000000000000000000000000000000000000", "nothing is downloaded while rendering"),
    ],
)
def test_missing_weights_error_says_what_to_do(reference, message):
    with pytest.raises(SetupError, match=message):
        resolve(reference)


def test_weights_path_is_relative_to_the_profile(tmp_path):
    (tmp_path / "w").mkdir()
    path = tmp_path / "p.yaml"
    path.write_text("{name: x, about: y, actors: {svd: {weights: w}}}")
    assert load_profile(str(path)).params(SVDStage).weights == tmp_path / "w"


def test_folder_digest_depends_on_content_and_file_names(tmp_path):
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    first = digest(folder)
    (folder / "a").write_bytes(b"22")
    assert digest(folder) != first
    (folder / "a").write_bytes(b"1")
    assert digest(folder) == first
    (folder / "a").rename(folder / "b")
    assert digest(folder) != first


def test_replaced_file_with_the_same_size_and_time_has_another_digest(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"1")
    # Old enough for its digest to be cached.
    os.utime(file, (1, 1))
    first = digest(file)
    other = tmp_path / "b"
    other.write_bytes(b"2")
    os.utime(other, (1, 1))
    other.rename(file)
    assert digest(file) != first


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


@pytest.mark.parametrize("reference", ["hub:org/svd@main", "hub:org/svd"])
def test_branch_is_replaced_by_its_commit(tiny, hub, reference):
    actor = tiny.actors["svd"].model_copy(update={"weights": reference, "extra_weights": {"other": "hub:org/absent@main:sub"}})
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
