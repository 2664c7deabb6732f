"""Identity conditioning through the whole pipeline: settings, SDXL, missing weights and custom injectors."""

import io
import logging
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ASTRONAUT, SYNTHETIC
from tests.decoded import frames_of
from vidgen_ray import VideoGenerationPipeline
from vidgen_ray.content_keys import ShotPlanner, params_of
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import MissingWeights, ProfileError, ScriptError, SetupError, StageError
from vidgen_ray.graph import check_profile, stages_of
from vidgen_ray.profile import builtin_profiles, load_profile
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.flux import FluxRefineStage, FluxStage
from vidgen_ray.stages.identity import INJECTORS, FluxInjector, FluxPipelines


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline with the tiny profile and a trained detector, which can tell two faces apart."""
    tiny = load_profile("tiny")
    faces = tiny.actors["instantid"].model_copy(update={"options": {"detector": "centerface"}})
    profile = tiny.model_copy(update={"actors": {**tiny.actors, "instantid": faces}})
    pipeline = VideoGenerationPipeline(profile, tmp_path_factory.mktemp("out"))
    yield pipeline
    pipeline.close()


@pytest.fixture
def render(pipeline):
    """A function that renders an image and returns its pixels as bytes and the names of the stages."""

    def render_image(prompt="a man in the rain", **fields):
        result = pipeline.generate_video(prompt, **{"generate_video": False, "seed": 7, "consent": SYNTHETIC, **fields})
        image = pipeline.outputs.read(result["record"].shot.id, "image.png")
        return frames_of(image).tobytes(), [stage.stage for stage in result["record"].stages]

    return render_image


@pytest.fixture(scope="module")
def two_people(tmp_path_factory, photo):
    """A photo with two faces: the astronaut, small, on the left, and mirrored, large, on the right."""
    wall = np.full((560, 900, 3), (90, 110, 140), np.uint8)
    wall[50:306, 20:276] = photo[::2, ::2]
    wall[20:532, 360:872] = photo[:, ::-1]
    file = tmp_path_factory.mktemp("photos") / "two.png"
    Image.fromarray(wall).save(file)
    return file


def test_messages_and_logs_contain_no_features(pipeline, monkeypatch):
    """A stage that fails with all that it was given in the message is the worst case."""
    lines = io.StringIO()
    handler, root = logging.StreamHandler(lines), logging.getLogger()
    root.addHandler(handler)
    monkeypatch.setattr(root, "level", logging.DEBUG)
    given = []

    def fail(stage, item):
        given.append(item)
        raise RuntimeError(f"{item} {item.artefacts}")

    monkeypatch.setattr(FluxStage, "run", fail)
    with pytest.raises(StepFailed) as failed:
        pipeline.generate_video("a", face_image=ASTRONAUT, generate_video=False, seed=9)
    root.removeHandler(handler)
    (face,) = (item.artefacts["face"] for item in given)
    text = f"{lines.getvalue()} {failed.value} {failed.value.failure()} {face}"
    values = np.concatenate([face.embeddings["antelopev2"], face.keypoints.ravel()])
    digits = [f"{abs(value):.8f}"[:6] for value in values if abs(value) > 0.1]
    assert len(digits) > 20
    assert all(each in str(values.tolist()) for each in digits), "as they would be shown"
    assert not any(each in text for each in digits)


# InfuseNet.


def test_photos_face_index_and_strength_change_the_image(render, two_people):
    images = {
        "no face": render()[0],
        "face": render(face_image=ASTRONAUT)[0],
        "left face": render(face_image=two_people, face_index=0)[0],
        "two photos": render(face_image=[ASTRONAUT, two_people])[0],
    }
    assert len(set(images.values())) == len(images)
    assert render(face_image=ASTRONAUT, identity_strength=0.0)[0] == images["no face"]


def test_invalid_face_index_fails_the_shot(pipeline, two_people):
    with pytest.raises(StepFailed, match="face_index: got 2, must be from 0 to 1: 2 faces"):
        pipeline.generate_video("a", face_image=two_people, face_index=2, consent=SYNTHETIC, generate_video=False)


def test_shots_of_one_character_share_cached_face_features(pipeline):
    shots = [{"width": 64}, {"seed": 11, "pose": "none", "identity_strength": 0.3}]
    records = [
        pipeline.generate_video("a", face_image=[ASTRONAUT, ASTRONAUT], generate_video=False, **{"seed": 7, **fields})["record"]
        for fields in shots
    ]
    assert [record.stages[0].cached for record in records] == [False, True]


# SDXL.


def test_instantid_sdxl_image_is_refined_by_flux(render):
    image, stages = render(face_image=ASTRONAUT, identity="instantid-sdxl")
    assert stages == ["instantid", "instantid_sdxl", "refine", "image_likeness"]
    assert image != render(face_image=ASTRONAUT, identity="instantid-sdxl", refine_strength=0.0)[0]


def test_refine_strength_0_returns_the_image_and_less_than_a_step_is_rejected(tiny, make_shot, photo):
    with FluxRefineStage(tiny.params(FluxRefineStage)) as stage:
        item = Item(make_shot(), {"image": photo[:64, :128]})
        assert np.array_equal(stage(Item(make_shot(refine_strength=0.0), item.artefacts))["image"], photo[:64, :128])
        with pytest.raises(StageError, match=r"refine_strength: got 0\.1 of 4 steps, .*must be at least 0\.250"):
            stage(Item(make_shot(refine_strength=0.1), item.artefacts))


# Errors.


@pytest.fixture
def without(tiny):
    """A function that returns the tiny profile with missing extra weights of one actor."""

    def profile_without(actor, name, reference="/nowhere/weights"):
        section = tiny.actors[actor].model_copy(update={"extra_weights": {name: reference}})
        return tiny.model_copy(update={"actors": {**tiny.actors, actor: section}})

    return profile_without


MISSING = [
    ("flux", "infusenet", {}, r"infusenet: weights '/nowhere/weights': nothing at /nowhere/weights"),
    ("instantid", "ir_se50", {}, r"ir_se50: weights '/nowhere/weights'"),
    ("instantid_sdxl", "instantid", {"identity": "instantid-sdxl"}, r"instantid: weights '/nowhere/weights'"),
]


@pytest.mark.parametrize(("actor", "name", "fields", "message"), MISSING, ids=["infusenet", "ir_se50", "instantid"])
def test_missing_extra_weights_fail_only_shots_that_need_them(without, make_shot, tmp_path, actor, name, fields, message):
    pipeline = VideoGenerationPipeline(without(actor, name), tmp_path)
    other = {"identity": "none"} if fields else {"identity": "instantid-sdxl"}
    pipeline.plan(make_shot())
    pipeline.plan(make_shot(face_image=str(ASTRONAUT), **other))
    with pytest.raises(MissingWeights, match=message) as raised:
        pipeline.render(make_shot(face_image=str(ASTRONAUT), **fields))
    assert isinstance(raised.value, SetupError)


def test_profile_with_an_injector_but_without_its_recogniser_is_rejected(tiny):
    def profile_with(**extra_weights):
        actors = {name: tiny.actors[name].model_copy(update={"extra_weights": names}) for name, names in extra_weights.items()}
        return tiny.model_copy(update={"actors": {**tiny.actors, **actors}})

    check_profile(profile_with(flux={}, instantid={}))
    with pytest.raises(
        ProfileError,
        match=r"actors\.flux\.extra_weights: infusenet needs face embeddings by ir_se50; add `extra_weights: ",
    ):
        check_profile(profile_with(instantid={}))
    with pytest.raises(ProfileError, match=r"actors\.flux\.extra_weights: got 'infusnet', must be one of infusenet"):
        check_profile(profile_with(flux={"infusnet": "x"}))
    with pytest.raises(ProfileError, match=r"actors\.svd\.extra_weights: got 'x', this actor has no extra weights"):
        check_profile(profile_with(svd={"x": "x"}))


# InfuseNet is for FLUX.1-dev, which these profiles do not have.
@pytest.mark.parametrize("name", sorted({*builtin_profiles()} - {"open", "gpu-24gb-schnell"}))
def test_built_in_profiles_have_the_extra_weights_of_every_identity(name):
    profile = load_profile(name)
    check_profile(profile)
    extra_weights = {actor: set(section.extra_weights) for actor, section in profile.actors.items() if section.extra_weights}
    extra_weights.pop("wan", None)
    assert extra_weights == {"flux": {"infusenet"}, "instantid": {"ir_se50"}, "instantid_sdxl": {"instantid"}}


# Custom injectors.


class Brighter(FluxInjector):
    """An injector that brightens the image in proportion to the identity strength."""

    name = "toy"
    embedding = "antelopev2"
    passes_per_step = 0.0

    def __init__(self, model, weights):
        self.model = model
        self.by = float(weights.read_text())

    def move(self, device):
        """Nothing to move."""

    @contextmanager
    def inject(self, embedding, pose, shot, stage):
        def brightened(pipeline):
            def run(**arguments):
                output = pipeline(**arguments)
                output.images[0] = np.clip(output.images[0] + self.by * shot.identity_strength, 0, 1)
                return output

            return run

        yield FluxPipelines(brightened(self.model.text_to_image), brightened(self.model.image_to_image))


@pytest.fixture
def with_toy(monkeypatch, tiny, tmp_path):
    monkeypatch.setitem(INJECTORS, "toy", f"{__name__}:Brighter")
    weights = tmp_path / "toy.txt"
    weights.write_text("0.2")
    flux = tiny.actors["flux"].model_copy(update={"extra_weights": {"toy": str(weights)}})
    pipeline = VideoGenerationPipeline(
        tiny.model_copy(update={"actors": {**tiny.actors, "flux": flux}}), tmp_path / "out", cache="none"
    )
    yield pipeline
    pipeline.close()


def test_custom_injector_needs_one_class_and_one_registry_entry(with_toy):
    check_profile(with_toy.profile)

    def image(**fields):
        result = with_toy.generate_video("a", face_image=ASTRONAUT, generate_video=False, seed=7, **fields)
        return np.asarray(result["image"], int)

    plain = image(identity="none")
    assert np.abs(image(identity="toy") - np.clip(plain + 51, 0, 255)).max() <= 1
    assert np.abs(image(identity="toy", identity_strength=0.5) - np.clip(plain + 25.5, 0, 255)).max() <= 1
    with pytest.raises(ScriptError, match="must be one of infusenet, toy, instantid-sdxl, reference, none"):
        image(identity="toi")
    with pytest.raises(MissingWeights, match=r"infusenet: not in the profile; add `extra_weights: \{infusenet"):
        image(identity="infusenet")


def test_injector_weights_change_only_the_content_keys_of_its_shots(with_toy, make_shot, tmp_path):
    def keys(identity):
        shot = make_shot(face_image=str(ASTRONAUT), identity=identity, generate_video=False)
        planned = ShotPlanner(params_of(with_toy.profile, stages_of(shot)), with_toy.profile.encode)(shot)
        return [step.key for step in planned.steps]

    toy, plain = keys("toy"), keys("none")
    (tmp_path / "toy.txt").write_text("0.25")
    assert keys("none") == plain
    assert keys("toy")[0] == toy[0], "the features are the same"
    assert keys("toy")[1] != toy[1]
