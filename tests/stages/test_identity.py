"""A person in the picture, through the whole chain: what steers, what does not, what is missing, and methods of one's own."""

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ASTRONAUT
from vidgen_ray import VideoGenerationPipeline
from vidgen_ray.cli import main
from vidgen_ray.content_keys import ShotPlanner, params_of
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import MissingWeights, ProfileError, ScriptError, SetupError, StageError
from vidgen_ray.graph import check_profile, stages_of
from vidgen_ray.profile import builtin_profiles, load_profile
from vidgen_ray.script.reader import read_script
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux_refine import FluxRefineStage
from vidgen_ray.stages.identity import INJECTORS
from vidgen_ray.stages.identity.base import FluxInjector
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.weights import resolve

LORA = "builtin:tiny/lora.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The tiny profile with a trained detector, which knows one face from two."""
    tiny = load_profile("tiny")
    faces = tiny.actors["instantid"].model_copy(update={"options": {"detector": "centerface"}})
    profile = tiny.model_copy(update={"actors": {**tiny.actors, "instantid": faces}})
    pipeline = VideoGenerationPipeline(profile, tmp_path_factory.mktemp("out"))
    yield pipeline
    pipeline.close()


@pytest.fixture
def render(pipeline):
    """The bytes of a shot's picture, and the stages it passed."""

    def rendered(prompt="a man in the rain", **fields):
        result = pipeline.generate_video(prompt, **{"generate_video": False, "seed": 7, **fields})
        image = pipeline.outputs.read(result["record"].shot.id, "image.png")
        return image, [stage.stage for stage in result["record"].stages]

    return rendered


@pytest.fixture(scope="module")
def two_people(tmp_path_factory, photo):
    """The astronaut, small, to the left of herself, mirrored and large."""
    wall = np.full((560, 900, 3), (90, 110, 140), np.uint8)
    wall[50:306, 20:276] = photo[::2, ::2]
    wall[20:532, 360:872] = photo[:, ::-1]
    file = tmp_path_factory.mktemp("photos") / "two.png"
    Image.fromarray(wall).save(file)
    return file


# What steers.


def test_a_face_changes_the_picture_and_the_stages_are_those_of_flux(render):
    nobody, stages = render()
    somebody, with_face = render(face_image=ASTRONAUT)
    assert somebody != nobody
    assert (stages, with_face) == (["flux"], ["instantid", "flux", "image_likeness"])


@pytest.mark.parametrize("fields", [{}, {"lora_path": LORA}, {"lora_path": LORA, "mode": "fast"}, {"negative_prompt": "blur"}])
def test_strength_0_and_no_identity_are_as_without_a_face_byte_for_byte(render, fields):
    nobody, _ = render(**fields)
    assert render(face_image=ASTRONAUT, identity_strength=0.0, **fields)[0] == nobody
    assert render(face_image=ASTRONAUT, identity="none", **fields)[0] == nobody
    assert render(face_image=ASTRONAUT, **fields)[0] != nobody


def test_every_setting_of_the_face_changes_the_picture(render, two_people):
    pictures = {
        "nobody": render()[0],
        "the face": render(face_image=ASTRONAUT)[0],
        "less of it": render(face_image=ASTRONAUT, identity_strength=0.4)[0],
        "later": render(face_image=ASTRONAUT, identity_start=0.5)[0],
        "not to the end": render(face_image=ASTRONAUT, identity_end=0.5)[0],
        "no pose": render(face_image=ASTRONAUT, pose="none")[0],
        "another place": render(face_image=two_people)[0],
        "another place, from the prompt": render(face_image=two_people, pose="none")[0],
        "the one on the left": render(face_image=two_people, face_index=0)[0],
        "two photos": render(face_image=[ASTRONAUT, two_people])[0],
        "the same in another order": render(face_image=[two_people, ASTRONAUT])[0],
    }
    assert len(set(pictures.values())) == len(pictures)
    assert render(face_image=two_people, face_index=1)[0] == pictures["another place"], "the largest is the second"


@pytest.mark.parametrize("mode", ["quality", "fast"])
def test_face_and_lora_act_together_in_both_modes(render, mode):
    both, stages = render(face_image=ASTRONAUT, lora_path=LORA, mode=mode)
    assert stages == ["instantid", "flux", *(["lora"] if mode == "quality" else []), "image_likeness"]
    assert len({both, render(lora_path=LORA, mode=mode)[0], render(face_image=ASTRONAUT, mode=mode)[0]}) == 3


def test_in_quality_the_face_steers_the_lora_pass_too(render):
    """From one base picture, that of nobody."""
    plain = render(lora_path=LORA, image=str(ASTRONAUT))[0]
    assert render(lora_path=LORA, image=str(ASTRONAUT), face_image=ASTRONAUT)[0] != plain


def test_a_face_that_is_not_there_is_said_with_the_number_of_those_that_are(pipeline, two_people):
    with pytest.raises(StepFailed, match="face_index: got 2, must be from 0 to 1: 2 faces"):
        pipeline.generate_video("a", face_image=two_people, face_index=2, generate_video=False)


def test_features_are_computed_once_for_a_person_whatever_the_shots_are_like(pipeline):
    shots = [{"width": 192}, {"height": 128}, {"seed": 11}, {"pose": "none"}, {"identity_strength": 0.3}]
    records = [
        pipeline.generate_video("a", face_image=[ASTRONAUT, ASTRONAUT], generate_video=False, **{"seed": 7, **fields})["record"]
        for fields in shots
    ]
    assert [record.stages[0].cached for record in records] == [False, True, True, True, True]


# SDXL.


def test_sdxl_draws_the_person_and_flux_goes_over_it(render):
    picture, stages = render(face_image=ASTRONAUT, identity="instantid-sdxl")
    assert stages == ["instantid", "instantid_sdxl", "refine", "image_likeness"]
    untouched = render(face_image=ASTRONAUT, identity="instantid-sdxl", refine_strength=0.0)[0]
    stronger = render(face_image=ASTRONAUT, identity="instantid-sdxl", refine_strength=0.8)[0]
    weaker = render(face_image=ASTRONAUT, identity="instantid-sdxl", identity_strength=0.3)[0]
    assert len({picture, untouched, stronger, weaker, render(face_image=ASTRONAUT)[0]}) == 5


@pytest.mark.parametrize("mode", ["quality", "fast"])
def test_after_sdxl_a_lora_has_the_pass_of_flux(render, mode):
    picture, stages = render(face_image=ASTRONAUT, identity="instantid-sdxl", lora_path=LORA, mode=mode)
    assert stages == ["instantid", "instantid_sdxl", "lora", "image_likeness"]
    assert picture != render(face_image=ASTRONAUT, identity="instantid-sdxl", mode=mode)[0]


def test_a_refinement_of_strength_0_gives_the_picture_back_and_less_than_a_step_is_refused(tiny, make_shot, photo):
    with FluxRefineStage(tiny.params(FluxRefineStage)) as stage:
        item = Item(make_shot(), {"image": photo[:64, :128]})
        assert np.array_equal(stage([Item(make_shot(refine_strength=0.0), item.artefacts)])[0]["image"], photo[:64, :128])
        with pytest.raises(StageError, match=r"refine_strength: got 0\.1 of 4 steps, .*use at least 0\.250"):
            stage([Item(make_shot(refine_strength=0.1), item.artefacts)])


# What is refused, and when.


def test_a_wrong_name_is_refused_with_line_and_field(tmp_path, capsys):
    script = tmp_path / "s.jsonl"
    script.write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "b", "identity": "pulid"}) + "\n")
    says = "s.jsonl line 2, identity: got 'pulid', must be one of infusenet, instantid-sdxl, none"
    assert [str(error) for error in read_script(script).errors] == [says]
    assert main(["validate", str(script)]) == 3
    assert says in capsys.readouterr().err


@pytest.fixture
def without(tiny):
    """The tiny profile with further weights of an actor that are elsewhere."""

    def changed(actor, name, reference="/nowhere/weights"):
        section = tiny.actors[actor].model_copy(update={"extra_weights": {name: reference}})
        return tiny.model_copy(update={"actors": {**tiny.actors, actor: section}})

    return changed


MISSING = [
    ("flux", "infusenet", {}, r"infusenet: weights '/nowhere/weights': nothing at /nowhere/weights"),
    ("instantid", "ir_se50", {}, r"ir_se50: weights '/nowhere/weights'"),
    ("instantid_sdxl", "instantid", {"identity": "instantid-sdxl"}, r"instantid: weights '/nowhere/weights'"),
]


@pytest.mark.parametrize(("actor", "name", "fields", "says"), MISSING)
def test_missing_weights_are_missed_by_shots_that_need_them_and_no_others(
    without, make_shot, tmp_path, actor, name, fields, says
):
    pipeline = VideoGenerationPipeline(without(actor, name), tmp_path)
    other = {"identity": "none"} if fields else {"identity": "instantid-sdxl"}
    pipeline.plan(make_shot())
    pipeline.plan(make_shot(face_image=str(ASTRONAUT), **other))
    with pytest.raises(MissingWeights, match=says) as raised:
        pipeline.render(make_shot(face_image=str(ASTRONAUT), **fields))
    assert isinstance(raised.value, SetupError)


def test_stages_load_and_work_without_the_weights_that_a_shot_does_not_need(without, make_shot, photo):
    face_stage = InstantIDStage(without("instantid", "ir_se50").params(InstantIDStage))
    flux_stage = FluxStage(without("flux", "infusenet").params(FluxStage))
    shot = make_shot(face_image="x.jpg")
    with face_stage, flux_stage:
        face = face_stage([Item(make_shot(face_image="x.jpg", identity="none"), {"photos": (photo,)})])[0]["face"]
        assert set(face.embeddings) == {"antelopev2"}
        assert flux_stage([Item(make_shot())])[0]["image"].any()
        with pytest.raises(MissingWeights, match="ir_se50: "):
            face_stage([Item(shot, {"photos": (photo,)})])
        with pytest.raises(MissingWeights, match="infusenet: "):
            flux_stage([Item(shot, {"face": face})])


def test_the_command_ends_with_the_sentence_and_the_code_of_the_environment(tmp_path, capsys):
    profile = tmp_path / "p.yaml"
    profile.write_text(
        "{name: x, about: y, actors: {instantid: {weights: 'builtin:tiny/antelopev2', also: {ir_se50: no.pth}}, "
        "flux: {weights: 'builtin:tiny/flux', also: {infusenet: 'hub:ByteDance/InfiniteYou@main:infu_flux_v1.0/sim_stage1'}}}}"
    )
    shot = ["shot", "a", "-p", str(profile), "--until", "image", "-o", str(tmp_path), "--face", str(ASTRONAUT)]
    assert main([*shot, "--face", str(ASTRONAUT)]) == 4
    assert f"ir_se50: weights 'no.pth': nothing at {tmp_path / 'no.pth'}" in capsys.readouterr().err
    (tmp_path / "no.pth").write_bytes(resolve("builtin:tiny/ir_se50.pth").read_bytes())
    assert main(shot) == 4
    assert "infusenet: weights 'hub:ByteDance/InfiniteYou@main" in (err := capsys.readouterr().err)
    assert "run `hf download ByteDance/InfiniteYou --revision main` first" in err


def test_an_injector_without_the_recogniser_that_it_needs_is_refused_with_the_profile(tiny):
    def changed(**extra_weights):
        actors = {name: tiny.actors[name].model_copy(update={"extra_weights": names}) for name, names in extra_weights.items()}
        return tiny.model_copy(update={"actors": {**tiny.actors, **actors}})

    check_profile(changed(flux={}, instantid={}))
    with pytest.raises(
        ProfileError,
        match=r"actors\.flux\.extra_weights: infusenet needs face embeddings by ir_se50; add `extra_weights: ",
    ):
        check_profile(changed(instantid={}))
    with pytest.raises(ProfileError, match=r"actors\.flux\.extra_weights: got 'infusnet', must be one of infusenet"):
        check_profile(changed(flux={"infusnet": "x"}))
    with pytest.raises(ProfileError, match=r"actors\.svd\.extra_weights: got 'x', this actor has no extra weights"):
        check_profile(changed(svd={"x": "x"}))


@pytest.mark.parametrize("name", builtin_profiles())
def test_built_in_profiles_have_what_every_identity_needs(name):
    profile = load_profile(name)
    check_profile(profile)
    extra_weights = {actor: set(section.extra_weights) for actor, section in profile.actors.items() if section.extra_weights}
    assert extra_weights == {"flux": {"infusenet"}, "instantid": {"ir_se50"}, "instantid_sdxl": {"instantid"}}


# A method of one's own.


class Brighter(FluxInjector):
    """Draws everybody brighter, and brightest those whose embedding is long."""

    name = "toy"
    embedding = "antelopev2"
    passes = 0.0

    def __init__(self, model, weights):
        self.model = model
        self.by = float(weights.read_text())

    def move(self, device):
        """Nothing to move."""

    @contextmanager
    def inject(self, embedding, pose, shot, stage, *, start=0.0, end=1.0):
        def brighter(call):
            def uses_identity(**arguments):
                pictures = call(**arguments)
                pictures.images[0] = np.clip(pictures.images[0] + self.by * shot.identity_strength, 0, 1)
                return pictures

            return uses_identity

        yield Calls(brighter(self.model.text_to_image), brighter(self.model.image_to_image))


@dataclass
class Calls:
    text_to_image: object
    image_to_image: object


@pytest.fixture
def with_toy(monkeypatch, tiny, tmp_path):
    module = ModuleType("toy")
    module.Brighter = Brighter
    monkeypatch.setitem(sys.modules, "vidgen_ray.stages.identity.toy", module)
    # The one line of the registry.
    monkeypatch.setitem(INJECTORS, "toy", ("toy", "Brighter"))
    weights = tmp_path / "toy.txt"
    weights.write_text("0.2")
    flux = tiny.actors["flux"].model_copy(update={"extra_weights": {"toy": str(weights)}})
    pipeline = VideoGenerationPipeline(
        tiny.model_copy(update={"actors": {**tiny.actors, "flux": flux}}), tmp_path / "out", use_cache=False
    )
    yield pipeline
    pipeline.close()


def test_a_method_of_ones_own_is_one_line_and_one_file(with_toy, tmp_path):
    check_profile(with_toy.profile)

    def picture(**fields):
        result = with_toy.generate_video("a", face_image=ASTRONAUT, generate_video=False, seed=7, **fields)
        return np.asarray(result["image"], int)

    plain = picture(identity="none")
    assert np.abs(picture(identity="toy") - np.clip(plain + 51, 0, 255)).max() <= 1
    assert np.abs(picture(identity="toy", identity_strength=0.5) - np.clip(plain + 25.5, 0, 255)).max() <= 1
    with pytest.raises(ScriptError, match="must be one of infusenet, toy, instantid-sdxl, none"):
        picture(identity="toi")
    with pytest.raises(MissingWeights, match=r"infusenet: not in the profile; add `extra_weights: \{infusenet"):
        picture(identity="infusenet")


def test_its_weights_are_part_of_the_key_of_shots_that_it_steers(with_toy, make_shot, tmp_path):
    def keys(identity):
        shot = make_shot(face_image=str(ASTRONAUT), identity=identity, generate_video=False)
        planned = ShotPlanner(params_of(with_toy.profile, stages_of(shot)), with_toy.profile.encode)(shot)
        return [step.key for step in planned.steps]

    toy, plain = keys("toy"), keys("none")
    (tmp_path / "toy.txt").write_text("0.25")
    assert keys("none") == plain
    assert keys("toy")[0] == toy[0], "the features are the same"
    assert keys("toy")[1] != toy[1]
