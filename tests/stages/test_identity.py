"""Identity conditioning through the whole pipeline: settings, SDXL, missing weights and custom injectors."""

import io
import logging
from contextlib import contextmanager

import numpy as np
import pytest

from tests.conftest import ASTRONAUT
from tests.fake_stages import with_actor
from vidgen_ray import VideoGenerationPipeline
from vidgen_ray.errors import MissingWeights, ProfileError, ScriptError, StageError
from vidgen_ray.graph import check_profile
from vidgen_ray.profile import builtin_profiles, load_profile
from vidgen_ray.render.step_runner import StepFailed
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.flux import FluxFamilyStage, FluxRefineStage, FluxStage
from vidgen_ray.stages.identity import INJECTORS, FluxInjector, FluxPipelines


@pytest.fixture
def pipeline(tiny, tmp_path):
    with VideoGenerationPipeline(tiny, tmp_path / "out") as pipeline:
        yield pipeline


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


def test_refine_strength_0_returns_the_image_and_less_than_a_step_is_rejected(tiny, make_shot, photo):
    with FluxRefineStage(tiny.params(FluxRefineStage)) as stage:
        item = Item(make_shot(), {"image": photo[:64, :128]})
        assert np.array_equal(stage(Item(make_shot(refine_strength=0.0), item.artefacts))["image"], photo[:64, :128])
        with pytest.raises(StageError, match=r"refine_strength: got 0\.1 of 4 steps, .*must be at least 0\.250"):
            stage(Item(make_shot(refine_strength=0.1), item.artefacts))


# Errors.


def test_missing_extra_weights_fail_only_shots_that_need_them(tiny, make_shot, tmp_path):
    for actor, name, fields, other in (
        ("flux", "infusenet", {}, {"identity": "instantid-sdxl"}),
        ("instantid_sdxl", "instantid", {"identity": "instantid-sdxl"}, {"identity": "none"}),
    ):
        profile = with_actor(tiny, actor, extra_weights={name: "/nowhere/weights"})
        pipeline = VideoGenerationPipeline(profile, tmp_path / name)
        pipeline.plan(make_shot(face_image=str(ASTRONAUT), **other))
        message = f"{name}: weights '/nowhere/weights': nothing at /nowhere/weights"
        with pytest.raises(MissingWeights, match=message):
            pipeline.render(make_shot(face_image=str(ASTRONAUT), **fields))


def test_extra_weights_must_be_known_and_have_their_recogniser(tiny):
    check_profile(with_actor(with_actor(tiny, "flux", extra_weights={}), "instantid", extra_weights={}))
    for name in builtin_profiles():
        check_profile(load_profile(name))
    for actor, extra_weights, message in (
        ("instantid", {}, r"flux\.extra_weights: infusenet needs face embeddings by ir_se50; add `extra_weights: "),
        ("flux", {"infusnet": "x"}, r"actors\.flux\.extra_weights: got 'infusnet', must be one of infusenet"),
        ("svd", {"x": "x"}, r"actors\.svd\.extra_weights: got 'x', this actor has no extra weights"),
    ):
        with pytest.raises(ProfileError, match=message):
            check_profile(with_actor(tiny, actor, extra_weights=extra_weights))


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


def test_custom_injector_needs_one_class_and_one_registry_entry(tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(INJECTORS, "toy", Brighter)
    monkeypatch.setattr(FluxFamilyStage, "extra_weights", tuple(INJECTORS))
    weights = tmp_path / "toy.txt"
    weights.write_text("0.2")
    profile = with_actor(tiny, "flux", extra_weights={"toy": str(weights)})
    check_profile(profile)
    with VideoGenerationPipeline(profile, tmp_path / "out", cache="none") as pipeline:

        def image(**fields):
            result = pipeline.generate_video("a", face_image=ASTRONAUT, generate_video=False, seed=7, **fields)
            return np.asarray(result["image"], int)

        plain = image(identity="none")
        assert np.abs(image(identity="toy", identity_strength=0.5) - np.clip(plain + 25.5, 0, 255)).max() <= 1
        with pytest.raises(ScriptError, match="must be one of infusenet, toy, instantid-sdxl, reference, none"):
            image(identity="toi")
        with pytest.raises(MissingWeights, match=r"infusenet: not in the profile; add `extra_weights: \{infusenet"):
            image(identity="infusenet")
