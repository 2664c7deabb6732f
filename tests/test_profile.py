"""Profiles: what is built in loads, what is wrong is named, weights are found and never fetched."""

import pytest

from vidgen_ray.cache_dir import digest
from vidgen_ray.content_keys import params_of
from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.graph import STAGES, check_profile
from vidgen_ray.profile import builtin_profiles, load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.weights import resolve


@pytest.mark.parametrize("name", builtin_profiles())
def test_built_in_profiles_have_valid_defaults_and_known_actors(name):
    profile = load_profile(name)
    assert Shot(prompt="a", **profile.defaults)
    check_profile(profile)


@pytest.mark.parametrize("name", builtin_profiles())
def test_built_in_profiles_state_memory(name):
    profile = load_profile(name)
    assert all(actor.memory_gb > 0 for actor in profile.actors.values())
    if any(actor.device == "cuda" for actor in profile.actors.values()):
        assert "has not been run on a GPU" in profile.about


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_profiles_without_downloads_run_anywhere(name):
    params = params_of(load_profile(name), STAGES)
    assert all(p.weights.exists() and p.threads == 1 for p in params.values())
    assert params["realesrgan"].dtype in ("float32", "bfloat16"), "auto is resolved before keys are made"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: x", "about: got"),
        ("[", "not YAML"),
        ("- a", "the file: got"),
        ("{name: x, about: y, actors: {svd: {weights: a, gpu: 1}}}", "actors.svd.gpu: got 1, extra inputs"),
        ("{name: x, about: y, actors: {svd: {weights: a, device: tpu}}}", "actors.svd.device: got 'tpu'"),
        ("{name: x, about: y, actors: {svd: {weights: a, cpus: 0}}}", "greater than 0"),
        ("{name: x, about: y, actors: {svd: {weights: a, cpus: .inf}}}", "finite number"),
        ("{name: x, about: y, actors: {sdv: {weights: a}}}", "actors.sdv: must be one of instantid"),
        ("{name: x, about: y, actors: {svd: {weights: a, device: cuda}}}", "memory_gb must be given with device cuda"),
        ("{name: x, about: y, actors: {svd: {weights: a, memory_gb: -1}}}", "actors.svd.memory_gb: got -1"),
        ("{name: x, about: y, actors: {svd: {weights: a, seconds: {svd: 0}}}}", "actors.svd.seconds.svd: got 0"),
        ("{name: x, about: y, actors: {svd: {weights: a, timeout_s: 0}}}", "actors.svd.timeout_s: got 0"),
        ("{name: x, about: y, layout: pools, actors: {}}", "layout: got 'pools'"),
        ("{name: x, about: y, cpu_workers: 0, actors: {}}", "cpu_workers: got 0"),
        ("{name: x, name: z, about: y, actors: {}}", "'name' stands twice"),
        ("{name: x, about: y, actors: {svd: {weights: a}, svd: {weights: b}}}", "'svd' stands twice"),
    ],
)
def test_a_wrong_profile_is_named_with_its_field(tmp_path, text, says):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=says):
        check_profile(load_profile(str(path)))


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ProfileError, match="must be one of demo"):
        load_profile("nope")


def test_an_unknown_option_is_named_with_its_actor(tiny):
    actor = tiny.actors["svd"].model_copy(update={"options": {"decode_chunk": 3}})
    with pytest.raises(ProfileError, match=r"profile tiny, actors.svd: decode_chunk: got 3"):
        tiny.model_copy(update={"actors": {"svd": actor}}).params(SVDStage)
    with pytest.raises(ProfileError, match=r"stage realesrgan needs an entry 'actors.realesrgan'"):
        tiny.model_copy(update={"actors": {}}).params(RealESRGANStage)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("builtin:nope", "there are tiny/flux"),
        ("nowhere/at/all", "nothing at /"),
        ("hub:owner/name", "no revision"),
        ("hub:owner/name@0000000000000000000000000000000000000000", "nothing is downloaded while rendering"),
    ],
)
def test_weights_that_are_not_there_say_what_to_do(reference, says):
    with pytest.raises(SetupError, match=says):
        resolve(reference)


def test_a_relative_path_is_taken_from_the_profile(tmp_path):
    (tmp_path / "w").mkdir()
    path = tmp_path / "p.yaml"
    path.write_text("{name: x, about: y, actors: {svd: {weights: w}}}")
    assert load_profile(str(path)).params(SVDStage).weights == tmp_path / "w"


def test_a_digest_follows_content_and_names(tmp_path):
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
