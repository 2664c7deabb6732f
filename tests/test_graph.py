"""Stages of a shot, and what its content keys depend on."""

import shutil
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from tests.conftest import ASTRONAUT
from vidgen_ray import graph
from vidgen_ray.content_keys import ShotPlan, ShotPlanner, params_of
from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.graph import STAGES, stages_of
from vidgen_ray.media.encode import Mp4Settings
from vidgen_ray.remote.stages import RemoteParams
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage
from vidgen_ray.stages.flux import FluxRefineStage
from vidgen_ray.stages.flux_model import FEW_STEP_LORA
from vidgen_ray.weights import resolve

LORA = "builtin:tiny/lora.safetensors"
SDXL = {"face_image": "x", "identity": "instantid-sdxl"}
REFERENCE = {"face_image": "x", "identity": "reference", "generate_video": False}
QWEN = {"use_hunyuan_style": True, "style_model": "qwen-edit", "generate_video": False}


STAGES_OF_SHOTS = [
    ({}, "flux svd realesrgan"),
    ({"upscale_video": False}, "flux svd"),
    ({"face_image": "x.jpg"}, "instantid flux image_likeness svd clip_likeness realesrgan"),
    ({"face_image": "x.jpg", "image": "x.png", "generate_video": False}, "instantid image_likeness"),
    ({"lora": LORA, "use_hunyuan_style": True}, "flux lora hunyuan svd realesrgan"),
    ({"image": "x.png"}, "svd realesrgan"),
    ({"image": "x.png", "lora": LORA, "generate_video": False}, "lora"),
    (
        {"mode": "fast", "lora": LORA, "use_hunyuan_style": True, "face_image": "x", "upscale_video": False},
        "instantid flux image_likeness svd clip_likeness",
    ),
    ({"mode": "fast", "lora": LORA, "image": "x.png", "generate_video": False}, "lora"),
    ({"face_image": "x", "identity": "none", "generate_video": False}, "instantid flux image_likeness"),
    ({**SDXL, "generate_video": False}, "instantid instantid_sdxl refine image_likeness"),
    ({**SDXL, "lora": LORA, "mode": "fast", "generate_video": False}, "instantid instantid_sdxl lora image_likeness"),
    ({**SDXL, "use_hunyuan_style": True, "generate_video": False}, "instantid instantid_sdxl refine hunyuan image_likeness"),
    ({**SDXL, "image": "x.png", "generate_video": False}, "instantid image_likeness"),
    ({"identity": "instantid-sdxl", "generate_video": False}, "flux"),
    ({"image_model": "klein", "lora": LORA, "generate_video": False}, "klein"),
    ({**REFERENCE, "lora": LORA}, "instantid klein lora image_likeness"),
    ({**REFERENCE, "image": "x.png"}, "instantid image_likeness"),
    ({**REFERENCE, "identity_strength": 0}, "instantid flux image_likeness"),
    (QWEN, "flux qwen_edit"),
    ({**QWEN, "mode": "fast"}, "flux"),
]


def test_stages_of_a_shot():
    for fields, expected in STAGES_OF_SHOTS:
        assert [stage.name for stage in stages_of(Shot(prompt="a", **fields))] == expected.split(), fields


class OwnStage(FluxRefineStage):
    name = "own"
    follows = "lora"


def test_stage_of_another_package_comes_behind_the_one_that_it_follows(monkeypatch):
    own = EntryPoint("own", f"{__name__}:OwnStage", graph.ENTRY_POINTS)
    monkeypatch.setattr(graph, "entry_points", lambda group: EntryPoints([own]).select(group=group))
    names = [stage.name for stage in graph._with_other_packages(graph.BUILT_IN)]
    assert names[names.index("lora") + 1] == "own"
    assert len(names) == len(graph.BUILT_IN) + 1
    monkeypatch.setattr(OwnStage, "follows", "paint")
    with pytest.raises(TypeError, match="follows is 'paint', must be one of instantid, "):
        graph._with_other_packages(graph.BUILT_IN)
    monkeypatch.setattr(OwnStage, "name", "svd")
    with pytest.raises(TypeError, match="the name 'svd' is taken"):
        graph._with_other_packages(graph.BUILT_IN)


def test_stage_that_overrides_applies_decides_for_each_shot(monkeypatch):
    class Sepia(Stage):
        name = "sepia"

        @classmethod
        def applies(cls, shot):
            return shot.metadata.get("sepia") is True

    monkeypatch.setattr(graph, "STAGES", (*STAGES, Sepia))
    shots = [Shot(prompt="a", metadata={"sepia": sepia}) for sepia in (False, True, False)]
    assert [Sepia in stages_of(shot) for shot in shots] == [False, True, False]


@pytest.fixture(scope="module")
def planner(tiny):
    return ShotPlanner(params_of(tiny, STAGES), tiny.encode)


@pytest.fixture
def plan(planner, make_shot):
    def planned(profile=None, **fields):
        shot = make_shot(**{"face_image": str(ASTRONAUT), "lora": LORA, "use_hunyuan_style": True, **fields})
        return ShotPlanner(params_of(profile, STAGES), profile.encode)(shot) if profile else planner(shot)

    return planned


def changed(a, b):
    """Return the stages whose keys differ."""
    return [x.stage for x, y in zip(a.steps, b.steps, strict=True) if x.key != y.key]


CHANGES = [
    ({"width": 192, "height": 192}, "flux"),
    ({"face_index": 0}, "instantid"),
    ({"face_image": [str(ASTRONAUT), str(ASTRONAUT)]}, "instantid"),
    ({"identity_strength": 0.5}, "flux"),
    ({"prompt": "other"}, "flux"),
    ({"steps": {"flux": 3, "lora": 4, "hunyuan": 4, "svd": 2}}, "flux"),
    ({"seed": 8}, "flux"),
    ({"lora": [{"path": LORA, "weight": 0.5}]}, "lora"),
    ({"style_prompt": "ink"}, "hunyuan"),
    ({"num_frames": 9}, "svd"),
    ({"scale": 3}, "realesrgan"),
    ({"upscaler": "x4plus-anime"}, "realesrgan"),
]
CHANGES_WITH_SDXL = [({"pose": "none"}, "instantid_sdxl"), ({"steps": {"refine": 5}}, "refine")]


def test_change_invalidates_its_stage_and_the_following_ones(plan):
    sdxl = {"identity": "instantid-sdxl", "lora": None, "generate_video": False, "steps": {"refine": 4}}
    for fields, changes in (({}, CHANGES), (sdxl, CHANGES_WITH_SDXL)):
        before = plan(**fields)
        order = [step.stage for step in before.steps]
        for change, first_changed in changes:
            after = plan(**{**fields, **change})
            assert changed(before, after) == order[order.index(first_changed) :], change
            assert before.key != after.key, change


def test_unread_fields_do_not_change_keys(plan):
    assert plan().key == plan(metadata={"scene": 1}).key == plan(id="other").key
    faceless = plan(face_image=None)
    for field in ("identity", "none"), ("identity_strength", 0.5), ("identity_start", 0.5), ("pose", "none"), ("face_index", 1):
        assert plan(face_image=None, **dict([field])).key == faceless.key, field
    assert plan(identity="none", identity_strength=0.5).key == plan(identity="none").key


def test_files_are_keyed_by_content(plan, tmp_path):
    (tmp_path / "copy.jpg").write_bytes(ASTRONAUT.read_bytes())
    (tmp_path / "changed.jpg").write_bytes(ASTRONAUT.read_bytes() + b" ")
    assert plan(face_image=str(tmp_path / "copy.jpg")).key == plan().key
    assert changed(plan(face_image=str(tmp_path / "changed.jpg")), plan())[0] == "instantid"


def test_weights_are_keyed_by_content_and_options(plan, tiny, tmp_path):
    def with_actor(name, **changes):
        actors = {**tiny.actors, name: tiny.actors[name].model_copy(update=changes)}
        return tiny.model_copy(update={"actors": actors})

    after_flux = ["flux", "lora", "hunyuan", "image_likeness", "svd", "clip_likeness", "realesrgan"]
    after_svd = after_flux[4:]
    # On a CUDA device, the number of threads does not change the bytes.
    on_cuda = with_actor("svd", device="cuda")
    assert changed(plan(on_cuda), plan(with_actor("svd", device="cuda", cpus=3))) == []
    for profile, expected in (
        (with_actor("svd", weights=str(resolve("builtin:tiny/svd"))), []),
        (with_actor("flux", weights="builtin:tiny/flux-schnell"), after_flux),
        (with_actor("svd", options={"decode_chunk_frames": 2}), after_svd),
        (with_actor("realesrgan", dtype="bfloat16"), ["realesrgan"]),
        (with_actor("svd", memory_gb=9.0, seconds={"svd": 3.0}, timeout_s=5.0), []),
        (with_actor("svd", cpus=3), after_svd),
        (on_cuda, after_svd),
        (with_actor("flux", options={"text_tokens": 64, "adapters_kept": 9}), []),
    ):
        assert changed(plan(profile), plan()) == expected, profile
    moved = shutil.copytree(resolve("builtin:tiny/infusenet"), tmp_path / "infusenet")
    other = with_actor("flux", extra_weights={"infusenet": str(moved)})
    assert changed(plan(other), plan()) == []
    (moved / "note.txt").write_text("another")
    assert changed(plan(other), plan())[0] == "flux"
    assert changed(plan(other, identity="none"), plan(identity="none")) == []
    assert changed(plan(with_actor("flux", extra_weights={}), face_image=None), plan(face_image=None)) == []


def test_encoding_changes_only_the_shot_key(plan, tiny):
    other = plan(tiny.model_copy(update={"encode": tiny.encode.model_copy(update={"crf": 30})}))
    assert changed(other, plan()) == []
    assert other.key != plan().key


@pytest.fixture
def fixed(tmp_path):
    """A planner over weights of constant content, and files that shots may name."""

    def put(name):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
        return str(tmp_path / name)

    for stage in STAGES:
        put(f"{stage.name}/model.safetensors")
    for name in ("face.jpg", "picture.png", "one.safetensors", "two.safetensors", "realesrgan/animevideov3.safetensors"):
        put(name)
    for name in ("ir_se50", "infusenet"):
        put(name)
    return ShotPlanner(fixed_params(tmp_path), Mp4Settings())


def fixed_params(folder):
    return {
        stage.name: stage.Params(
            weights=folder / stage.name,
            extra_weights={name: folder / name for name in stage.extra_weights if name != FEW_STEP_LORA},
        )
        for stage in STAGES
        if not issubclass(stage.Params, RemoteParams)
    }


EVERYTHING = {
    "prompt": 'Grüße, "%s" \u2028\\ 🎈',
    "negative_prompt": "100% blur",
    "face_image": "face.jpg",
    "lora": [{"path": "one.safetensors"}, {"path": "two.safetensors", "weight": -0.25}],
    "lora_strength": 0.7,
    "use_hunyuan_style": True,
    "style_prompt": "ink",
    "style_strength": 0.3,
    "steps": {"flux": 4, "lora": 5, "hunyuan": 6, "svd": 7},
    "guidance": {"flux": 2, "lora": 0.5, "hunyuan": 1e-7, "svd": 3},
    "noise_aug_strength": 1,
    "metadata": {"a": 1},
}


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({}, "4666808b645024e53e071db2c82f9ecf685dd1890a55904d1913cfc16a48657a"),
        (EVERYTHING, "67fa7fcd3a471160f8ff77cb788f9ae8583c583c6c2d8dce6c13b93b453286c1"),
        (
            {"prompt": "a", "mode": "fast", "lora": "one.safetensors", "generate_video": False},
            "e5f0b586760130f7ab991d374647b524dd49f71a2da40f2923b4d470cff0129b",
        ),
        (
            {"prompt": "a", "image": "picture.png", "scale": 2, "seed": 2**32 - 1},
            "2c0a17da07ba9ae7659feaf496f90fd399de4ed8cedc7da98e2c294b19c6f927",
        ),
    ],
)
def test_keys_are_pinned(fixed, tmp_path, monkeypatch, fields, key):
    """A changed key renders all shots again. If bytes change, raise the stage's version and write the new key here."""
    monkeypatch.chdir(tmp_path)
    assert fixed(Shot(**{"id": "s", "prompt": "a red ball", "seed": 7, **fields})).key == key


def test_weights_are_chosen_by_mode_identity_loras_and_upscaler(tmp_path, fixed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = Shot(prompt="a", face_image="face.jpg", lora="one.safetensors")
    other = Shot(**{**EVERYTHING, "image": "picture.png", "generate_video": False, "lora": "one.safetensors"})
    assert plain.flux_identity == other.flux_identity == "infusenet"
    all_params = fixed_params(tmp_path)
    for stage in (stage for stage in STAGES if stage.name in all_params):
        params = all_params[stage.name]
        assert stage.weight_files(params, plain) == stage.weight_files(params, other), stage.name


def test_planner_hashes_each_file_once_and_a_plan_round_trips_through_json(fixed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shot = Shot(**{"id": "s", "seed": 7, **EVERYTHING})
    before = fixed(shot)
    for file in ("face.jpg", "one.safetensors", "flux/model.safetensors"):
        (tmp_path / file).write_text("other")
    assert fixed(shot) == before == ShotPlan.model_validate_json(before.model_dump_json())


def test_missing_lora_or_upscaler_fails_each_time(fixed, tmp_path):
    for _ in range(2):
        with pytest.raises(SetupError, match=r"nothing at .*missing"):
            fixed(Shot(id="s", prompt="a", seed=7, lora=str(tmp_path / "missing.safetensors")))
        with pytest.raises(StageError, match="must be one of animevideov3"):
            fixed(Shot(id="s", prompt="a", seed=7, upscaler="missing"))
