"""Likeness: measurement, the check against min_identity, other seeds, and the recorded values."""

import pickle

import numpy as np
import pytest

from tests import fake_stages
from tests.conftest import ASTRONAUT
from tests.fake_stages import FakeSVD, use_fakes
from tests.nets.test_faces import GROUP, WALL, head, on_a_wall
from vidgen_ray.cli import main
from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.errors import StageError, UsageError
from vidgen_ray.media.images import read_image, write_png
from vidgen_ray.nets.faces import norm_crop
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.records import LikenessRecord, shot_path
from vidgen_ray.outputs.stage_cache import likeness_from_json, likeness_to_json
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.render.step_runner import LikenessTooLow, StepFailed, best_try, check_likeness
from vidgen_ray.report.gallery_page import likeness_text, write_gallery
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Item, Likeness
from vidgen_ray.stages.instantid import (
    ClipLikenessStage,
    FaceModels,
    ImageLikenessStage,
    InstantIDParams,
    InstantIDStage,
    measure_likeness,
    sampled_frames,
)
from vidgen_ray.weights import resolve

PARAMS = InstantIDParams(weights=resolve("builtin:tiny/antelopev2"), detector="centerface", threads=1)


@pytest.fixture(scope="module")
def models():
    return FaceModels.shared(PARAMS)


@pytest.fixture(scope="module")
def face(models, photo):
    """Features of the astronaut photo."""
    with InstantIDStage(PARAMS) as stage:
        return stage.features([photo])


def wall():
    return np.full((256, 256, 3), WALL, np.uint8)


def test_image_without_a_large_face_has_no_similarity(models, face, photo):
    # Detected, but smaller than min_face_px.
    small = on_a_wall((head(photo, 16), (200, 200)))
    likeness = measure_likeness([wall(), photo, small], face, models)
    assert likeness == Likeness((None, 1.0, None))
    assert (likeness.mean, likeness.worst, likeness.without_face) == (1.0, 1.0, 2)
    assert likeness_from_json(likeness_to_json(likeness)) == likeness


def test_similarity_is_the_cosine_with_the_most_similar_of_several_faces(models, face, photo):
    group = read_image(GROUP)
    (strangers,) = measure_likeness([group], face, models).similarities
    crowd = np.concatenate([group, on_a_wall((head(photo, 91), (300, 300)), size=(1280, 600))])
    faces = models.detect(crowd)
    assert len(faces) == 7
    embeddings = models.embed([norm_crop(crowd, one.keypoints)[:, :, ::-1] for one in faces])
    cosines = embeddings @ face.embedding("antelopev2") / np.linalg.norm(embeddings, axis=1)
    cosines /= np.linalg.norm(face.embedding("antelopev2"))
    assert faces[cosines.argmax()].box[1] > len(group), "the face of the photo"
    assert measure_likeness([crowd], face, models).similarities == (pytest.approx(cosines.max(), abs=1e-4),)
    assert cosines.max() > strangers + 0.02


def test_clip_likeness_samples_five_frames_evenly_with_first_and_last(face, photo, make_shot):
    for count, seen in ((1, [0]), (2, [0, 1]), (6, [0, 1, 2, 4, 5]), (14, [0, 3, 6, 10, 13])):
        assert sampled_frames(count) == seen
    shot = make_shot(face_image="x.jpg")
    frames = np.stack([np.full_like(photo, 90)] * 25)
    frames[[0, 12, 1]] = photo
    with ClipLikenessStage(PARAMS) as clip, ImageLikenessStage(PARAMS) as image:
        sampled = Likeness((1.0, None, 1.0, None, None))
        assert clip(Item(shot, {"face": face, "frames": frames})) == {"clip_likeness": sampled}
        assert image(Item(shot, {"face": face, "image": photo})) == {"image_likeness": Likeness((1.0,))}
        assert clip._models is image._models, "stages share the weights"


def measured(image, clip=None):
    return {"image_likeness": Likeness(image)} | ({"clip_likeness": Likeness(clip)} if clip else {})


def test_likeness_below_minimum_or_without_face_fails(make_shot):
    shot = make_shot(min_identity=0.5)
    for passes in ({}, measured((0.5,)), measured((0.5,), (0.9, 0.1))):
        check_likeness(shot, passes)
    for fails, message in (
        (measured((0.49,), (0.9,)), r"got a likeness of 0\.49 in the image \(1 try\), must be at least 0\.5"),
        (measured((0.9,), (0.6, 0.2, None)), r"got a likeness of 0\.4 in the clip"),
        (measured((None,)), "got no face in the image"),
        (measured((0.9,), (None, None)), "got no face in the clip"),
        (measured((float("nan"),)), "in the image"),
    ):
        check_likeness(make_shot(), fails)
        with pytest.raises(LikenessTooLow, match=message):
            check_likeness(shot, fails)


def test_error_of_several_tries_names_the_best():
    failures = [LikenessTooLow(None, 0.5, "image"), LikenessTooLow(0.3125, 0.5, "clip"), LikenessTooLow(-0.2, 0.5, "image")]
    failure = pickle.loads(pickle.dumps(best_try(failures)))
    assert str(failure).startswith("min_identity: got a likeness of 0.3125 in the clip (best of 3 tries), must be")
    assert isinstance(failure, StageError)


@pytest.fixture
def plan_of(tiny, make_shot):
    def make(**fields) -> ShotPlan:
        return fake_stages.plan_of(tiny, make_shot(**{"face_image": str(ASTRONAUT), **fields}))

    return make


def test_min_identity_changes_the_shot_key_but_no_stage_key(plan_of):
    plans = [plan_of(), plan_of(min_identity=0.3), plan_of(min_identity=0.4), plan_of(min_identity=0.3, max_tries=3)]
    assert len({plan.key for plan in plans}) == 4
    assert all(plan.steps == plans[0].steps for plan in plans)
    # Without a minimum or a face, they have no effect.
    assert plan_of(max_tries=4) == plan_of().model_copy(update={"shot": plan_of(max_tries=4).shot})
    assert plan_of(face_image=None, min_identity=0.3, max_tries=4).key == plan_of(face_image=None).key


def test_tries_have_other_seeds_and_the_same_key(plan_of):
    plan = plan_of(min_identity=0.3, max_tries=4)
    tries = [plan, *plan.again]
    assert [one.number for one in tries] == [1, 2, 3, 4]
    assert {one.key for one in tries} == {plan.key}
    assert len({one.shot.seed for one in tries}) == 4
    assert len({one.steps[1].key for one in tries}) == 4, "other images"
    assert len({one.steps[0].key for one in tries}) == 1, "the same face"
    assert all(one.shot == plan.shot.model_copy(update={"seed": one.shot.seed}) for one in tries)
    fewer = plan_of(min_identity=0.3, max_tries=3).again[1]
    assert fewer.steps == plan.again[1].steps, "try n does not depend on the number of tries"
    assert ShotPlan.model_validate_json(plan.model_dump_json()) == plan
    assert plan_of(min_identity=0.3).again == plan_of(max_tries=4).again == plan_of(face_image=None, max_tries=4).again == ()


@pytest.fixture
def pipeline(tiny, tmp_path):
    pipeline = use_fakes(VideoGenerationPipeline(tiny, tmp_path), "flux", "svd")
    yield pipeline
    pipeline.close()


@pytest.fixture
def clips(monkeypatch):
    """Seeds of the clips that SVD has generated, from noise."""
    seeds = []

    def one(self, shot, artefacts):
        seeds.append(shot.seed)
        noise = np.random.default_rng(shot.seed)
        return {"frames": noise.integers(0, 256, (shot.clip_frames, shot.height, shot.width, 3), np.uint8)}

    monkeypatch.setattr(FakeSVD, "one", one)
    return seeds


@pytest.fixture
def set_likeness(monkeypatch):
    """Replaces measured likenesses by given ones, in order."""

    def replace(images=(), clips=()):
        for stage, name, values in (
            (ImageLikenessStage, "image_likeness", iter(images)),
            (ClipLikenessStage, "clip_likeness", iter(clips)),
        ):
            monkeypatch.setattr(stage, "run", lambda self, item, name=name, values=values: {name: Likeness(next(values))})

    return replace


SMALL = {"face_image": ASTRONAUT, "id": "p", "seed": 7, "num_frames": 2, "upscale_video": False}


def test_measured_likeness_decides_before_the_clip_and_after_it(pipeline, clips):
    """In noise there is no face. The start image is the photo itself."""
    with pytest.raises(StepFailed, match=r"likeness: min_identity: got no face in the image \(best of 2 tries\)") as raised:
        pipeline.generate_video("a", **SMALL, min_identity=-1, max_tries=2)
    assert clips == []
    failure = raised.value.failure()
    assert (failure.stage, failure.error) == ("likeness", "LikenessTooLow")
    assert not list(pipeline.outputs.root.glob(f"{shot_path('p')}/*"))

    whole = {**SMALL, "image": str(ASTRONAUT), "width": 256, "height": 256}
    with pytest.raises(StepFailed, match=r"got no face in the clip \(1 try\)"):
        pipeline.generate_video("a", **whole, min_identity=0.5)
    assert clips == [7]
    record = pipeline.generate_video("a", **whole)["record"]
    assert record.likeness.image > 0.5
    assert (record.likeness.clip_mean, record.likeness.clip_worst, record.likeness.frames_without_face) == (None, None, 2)
    assert [(step.stage, step.cached) for step in record.stages] == [
        ("instantid", True), ("image_likeness", True), ("svd", True), ("clip_likeness", True)
    ]  # fmt: skip


def test_retries_end_with_the_first_success(pipeline, clips, set_likeness):
    set_likeness([(0.2,), (0.6,), (0.7,), (0.9,)], [(0.4, None), (0.5, 0.7)])
    record = pipeline.generate_video("a", **SMALL, min_identity=0.5, max_tries=6)["record"]
    assert (record.tries, record.shot.seed) == (3, Shot(prompt="a", seed=7).with_seed_of_try(3).seed)
    assert clips == [Shot(prompt="a", seed=7).with_seed_of_try(number).seed for number in (2, 3)]
    assert record.seeds["flux"] == record.shot.seed
    assert record.likeness == LikenessRecord(image=0.7, clip_mean=0.6, clip_worst=0.5, frames_without_face=0)
    again = pipeline.generate_video("a", **SMALL, min_identity=0.5, max_tries=6)["record"]
    assert again == record, "a finished shot stays finished, whichever try it was"
    planned = record.shot.model_copy(update={"seed": 7})
    assert ManifestRow.of_shot("r", "s", planned, 1, record, "rendered").seed == record.shot.seed


def test_changed_rule_keeps_the_finished_shots_that_it_would_make_again(pipeline, clips, set_likeness):
    set_likeness([(0.2,), (0.7,), (0.25,)], [(0.6, 0.6), (0.3, 0.3), (0.7, 0.7)])
    first = pipeline.generate_video("a", **SMALL, min_identity=0.5, max_tries=2)["record"]
    assert (first.tries, len(clips)) == (2, 1)
    for minimum, tries in ((0.5, 4), (0.55, 2), (0.6, 3)):
        assert pipeline.generate_video("a", **SMALL, min_identity=minimum, max_tries=tries)["record"] == first
    for minimum, tries in ((0.65, 2), (0.5, 1)):
        with pytest.raises(StepFailed, match="likeness"):
            pipeline.generate_video("a", **SMALL, min_identity=minimum, max_tries=tries)
    lower = pipeline.generate_video("a", **SMALL, min_identity=0.2, max_tries=2)["record"]
    assert (lower.tries, len(clips)) == (1, 2), "the first try reaches the lower minimum"
    assert pipeline.generate_video("a", **SMALL)["record"] == lower, "no rule keeps the first try"
    pipeline.generate_video("a", **{**SMALL, "num_frames": 3}, min_identity=0.2)
    assert len(clips) == 3, "it is another result"


COLUMNS = ("image_likeness", "clip_likeness_mean", "clip_likeness_worst", "frames_without_face")


@pytest.mark.parametrize(
    ("likeness", "num_frames", "columns", "text"),
    [
        (measured((0.6249,), (0.7, 0.51, 0.54, 0.57, None)), 25, (0.6249, 0.58, 0.51, 1),
         "face 0.62, clip 0.58, worst 0.51; 1 of 5 frames without a face"),
        (measured((None,)), None, (None, None, None, 1), "no face found in the image"),
    ],
)  # fmt: skip
def test_manifest_and_gallery_show_likeness(pipeline, plan_of, likeness, num_frames, columns, text):
    outputs, plan = pipeline.outputs, plan_of(generate_video=num_frames is not None, num_frames=num_frames or 8)
    with outputs.draft(plan) as draft:
        write_png(draft.path("image.png"), wall())
        committed = draft.commit([], LikenessRecord.of(likeness))
    assert outputs.find_finished(plan) == committed
    row = ManifestRow.of_shot("r", "s", plan.shot, 1, outputs.find_finished(plan), "rendered")
    assert [getattr(row, name) for name in COLUMNS] == [value if value is None else pytest.approx(value) for value in columns]
    assert likeness_text(vars(row)) == text
    assert row.shows_no_face == (columns[0] is None)
    writer = ManifestWriter(outputs, "r", "s")
    writer.add(row)
    writer.close()
    page = write_gallery(outputs.root).read_text()
    assert text in page
    assert ('"no_face": true' in page) == row.shows_no_face


def test_likeness_stages_run_alone_on_a_file(tmp_path, capsys):
    arguments = ["stage", "image_likeness", str(ASTRONAUT), "-o", str(tmp_path / "l.json"), "-p", "demo", "-s", "width=512"]
    assert main([*arguments, "-s", "height=512", "-s", f"face_image={ASTRONAUT}"]) == 0
    assert likeness_from_json((tmp_path / "l.json").read_text()) == Likeness((1.0,))
    assert main(arguments) == UsageError.exit_code
    assert "face_image: got nothing, the stage needs a face" in capsys.readouterr().err
