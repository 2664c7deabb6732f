"""How much a result looks like its person: what is measured, what fails, what is tried again, and where it is written down."""

import pickle
from functools import partial

import cv2
import numpy as np
import pytest

from tests.conftest import ASTRONAUT
from tests.nets.test_faces import GROUP, WALL, head, on_a_wall
from vidgen_ray.content_keys import ShotPlan, ShotPlanner, params_of
from vidgen_ray.engine.likeness_check import LikenessTooLow, best_attempt, check_likeness
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import StageError, UsageError
from vidgen_ray.graph import stages_of
from vidgen_ray.media import read_image, write_png
from vidgen_ray.nets.face_alignment import norm_crop
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.records import LikenessRecord
from vidgen_ray.outputs.stage_cache import likeness_from_json, likeness_to_json
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.report.gallery import likeness_text, write_gallery
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Item, Likeness
from vidgen_ray.stages.face_models import FaceModels
from vidgen_ray.stages.instantid import InstantIDParams, InstantIDStage
from vidgen_ray.stages.likeness import ClipLikenessStage, ImageLikenessStage, measure_likeness, sampled_frames
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.weights import resolve

PARAMS = InstantIDParams(weights=resolve("builtin:tiny/antelopev2"), detector="centerface", threads=1)


@pytest.fixture(scope="module")
def models():
    return FaceModels.shared(PARAMS)


@pytest.fixture(scope="module")
def face(models, photo):
    """The astronaut's features."""
    with InstantIDStage(PARAMS) as stage:
        return stage.features([photo])


def wall():
    return np.full((256, 256, 3), WALL, np.uint8)


class TestMeasure:
    def test_similarity_is_the_cosine_of_the_recognisers_embeddings(self, models, face, photo):
        changed = cv2.GaussianBlur(photo[20:400, 60:500], None, 3)
        (found,) = models.detect(changed)
        crop = norm_crop(changed, found.keypoints)[:, :, ::-1]
        a, b = models.embedders["antelopev2"].embed(crop[None])[0].tolist(), face.embedding("antelopev2").tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        expected = dot / (sum(x * x for x in a) ** 0.5 * sum(y * y for y in b) ** 0.5)
        assert -1 < expected < 0.9999
        assert measure_likeness([changed], face, models).similarities[0] == pytest.approx(expected, abs=1e-4)

    def test_the_photo_itself_is_wholly_alike(self, models, face, photo):
        assert measure_likeness([photo, photo], face, models) == Likeness((1.0, 1.0))

    def test_a_picture_without_a_face_is_none_and_not_zero(self, models, face, photo):
        likeness = measure_likeness([wall(), photo], face, models)
        assert likeness == Likeness((None, 1.0))
        assert (likeness.mean, likeness.worst, likeness.without_face) == (1.0, 1.0, 1)

    def test_a_face_too_small_to_tell_is_none(self, models, face, photo):
        # Found, and less than min_face_px.
        assert measure_likeness([on_a_wall((head(photo, 16), (200, 200)))], face, models) == Likeness((None,))

    def test_of_several_faces_the_most_alike_counts(self, models, face, photo):
        group = read_image(GROUP)
        (strangers,) = measure_likeness([group], face, models).similarities
        crowd = np.concatenate([group, on_a_wall((head(photo, 91), (300, 300)), size=(1280, 600))])
        found = models.detect(crowd)
        assert len(found) == 7
        embeddings = models.embed([norm_crop(crowd, one.keypoints)[:, :, ::-1] for one in found])
        cosines = embeddings @ face.embedding("antelopev2") / np.linalg.norm(embeddings, axis=1)
        cosines /= np.linalg.norm(face.embedding("antelopev2"))
        assert found[cosines.argmax()].box[1] > len(group), "hers"
        assert measure_likeness([crowd], face, models).similarities == (pytest.approx(cosines.max(), abs=1e-4),)
        assert cosines.max() > strangers + 0.02

    def test_mean_and_worst_are_of_the_pictures_with_a_face(self):
        likeness = Likeness((0.5, None, -0.25, 0.2))
        assert (likeness.mean, likeness.worst, likeness.without_face) == (pytest.approx(0.15), -0.25, 1)
        nobody = Likeness((None, None))
        assert (nobody.mean, nobody.worst, nobody.without_face) == (None, None, 2)
        assert likeness_from_json(likeness_to_json(likeness)) == likeness

    @pytest.mark.parametrize(
        ("count", "seen"),
        [(1, [0]), (2, [0, 1]), (5, [0, 1, 2, 3, 4]), (6, [0, 1, 2, 4, 5]), (25, [0, 6, 12, 18, 24]), (14, [0, 3, 6, 10, 13])],
    )
    def test_frames_are_evenly_spread_with_the_first_and_the_last(self, count, seen):
        assert sampled_frames(count) == seen

    def test_a_clip_is_its_five_frames(self, face, photo, make_shot):
        shot = make_shot(face_image="x.jpg")
        frames = np.stack([np.full_like(photo, 90)] * 25)
        frames[[0, 12, 1]] = photo
        with ClipLikenessStage(PARAMS) as clip, ImageLikenessStage(PARAMS) as image:
            assert clip([Item(shot, {"face": face, "frames": frames})]) == [
                {"clip_likeness": Likeness((1.0, None, 1.0, None, None))}
            ]
            assert image([Item(shot, {"face": face, "image": photo})]) == [{"image_likeness": Likeness((1.0,))}]
            assert clip._models is image._models, "the weights are there once"


def record(image, clip=None):
    artefacts = {"image_likeness": Likeness(image)} | ({"clip_likeness": Likeness(clip)} if clip else {})
    return LikenessRecord.of(artefacts)


class TestRule:
    @pytest.mark.parametrize(
        ("image", "clip", "says"),
        [
            ((0.5,), None, None),
            ((0.5,), (0.9, 0.1), None),
            ((0.49,), (0.9,), r"got a likeness of 0\.49 in the picture \(1 try\), a likeness of at least 0\.5 is asked"),
            ((0.9,), (0.6, 0.2, None), r"got a likeness of 0\.4 in the clip"),
            ((None,), None, "got no face in the picture"),
            ((0.9,), (None, None), "got no face in the clip"),
            ((float("nan"),), None, "in the picture"),
        ],
    )
    def test_what_is_less_than_asked_or_has_no_face_is_too_unlike(self, make_shot, image, clip, says):
        artefacts = {"image_likeness": Likeness(image)} | ({"clip_likeness": Likeness(clip)} if clip else {})
        check_likeness(make_shot(), artefacts)
        shot = make_shot(min_identity=0.5)
        if says is None:
            check_likeness(shot, artefacts)
        else:
            with pytest.raises(LikenessTooLow, match=says):
                check_likeness(shot, artefacts)

    def test_what_is_not_measured_yet_is_not_judged(self, make_shot):
        check_likeness(make_shot(min_identity=1), {})

    def test_of_all_tries_the_closest_is_told(self):
        tries = [
            LikenessTooLow(None, 0.5, "picture"),
            LikenessTooLow(0.3125, 0.5, "clip"),
            LikenessTooLow(-0.2, 0.5, "picture"),
        ]
        reason = pickle.loads(pickle.dumps(best_attempt(tries)))
        assert str(reason).startswith("min_identity: got a likeness of 0.3125 in the clip (the best of 3 tries), a likeness of")
        assert isinstance(reason, StageError)
        assert "got no face in the picture (the best of 2 tries)" in str(best_attempt(tries[:1] * 2))

    def test_the_fields_have_bounds(self):
        for wrong in ({"min_identity": 1.1}, {"min_identity": float("nan")}, {"retries": -1}, {"retries": 11}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                Shot(prompt="a", **wrong)


@pytest.fixture
def plan_of(tiny, make_shot):
    def make(**fields) -> ShotPlan:
        shot = make_shot(**{"face_image": str(ASTRONAUT), **fields})
        return ShotPlanner(params_of(tiny, stages_of(shot)), tiny.encode)(shot)

    return make


class TestPlan:
    def test_what_is_asked_counts_for_the_shot_and_for_no_stage(self, plan_of):
        plans = [plan_of(), plan_of(min_identity=0.3), plan_of(min_identity=0.4), plan_of(min_identity=0.3, retries=2)]
        assert len({plan.key for plan in plans}) == 4
        assert all(plan.steps == plans[0].steps for plan in plans)

    def test_what_has_no_effect_changes_no_key(self, plan_of):
        assert plan_of(retries=3) == plan_of().model_copy(update={"shot": plan_of(retries=3).shot})
        assert plan_of(face_image=None, min_identity=0.3, retries=3).key == plan_of(face_image=None).key

    def test_further_tries_have_other_seeds_under_the_same_key(self, plan_of):
        plan = plan_of(min_identity=0.3, retries=3)
        tries = [plan, *plan.again]
        assert [one.number for one in tries] == [1, 2, 3, 4]
        assert {one.key for one in tries} == {plan.key}
        assert plan.shot.seed == 7
        assert len({one.shot.seed for one in tries}) == 4
        assert len({one.steps[1].key for one in tries}) == 4, "other pictures"
        assert len({one.steps[0].key for one in tries}) == 1, "the same face"
        assert all(one.shot == plan.shot.model_copy(update={"seed": one.shot.seed}) for one in tries)
        assert plan.again[1] == plan_of(min_identity=0.3, retries=2).again[1].model_copy(
            update={"key": plan.key, "shot": plan.again[1].shot}
        ), "the n-th try is the same one, however many may follow"
        assert ShotPlan.model_validate_json(plan.model_dump_json()) == plan
        assert plan_of(min_identity=0.3).again == plan_of(retries=3).again == plan_of(face_image=None, retries=3).again == ()


@pytest.fixture
def pipeline(tiny, tmp_path):
    pipeline = VideoGenerationPipeline(tiny, tmp_path)
    yield pipeline
    pipeline.close()


@pytest.fixture
def clips(monkeypatch):
    """The seeds of the clips that SVD was asked for."""
    seeds, run = [], SVDStage.run

    def counting(self, items):
        seeds.extend(item.shot.seed for item in items)
        return run(self, items)

    monkeypatch.setattr(SVDStage, "run", counting)
    return seeds


@pytest.fixture
def pretended(monkeypatch):
    """Likenesses in place of measured ones: of each picture, and of each clip, the next."""

    def pretend(pictures=(), clips=()):
        for stage, name, values in (
            (ImageLikenessStage, "image_likeness", iter(pictures)),
            (ClipLikenessStage, "clip_likeness", iter(clips)),
        ):
            monkeypatch.setattr(
                stage, "run", lambda self, items, name=name, values=values: [{name: Likeness(next(values))} for _ in items]
            )

    return pretend


SMALL = {"face_image": ASTRONAUT, "id": "p", "seed": 7, "num_frames": 2, "upscale_video": False}


class TestTries:
    def test_a_bad_picture_costs_no_clip(self, pipeline, clips):
        """Nothing is pretended: in noise there is no face."""
        with pytest.raises(
            StepFailed, match=r"likeness: min_identity: got no face in the picture \(the best of 2 tries\)"
        ) as told:
            pipeline.generate_video("a", **SMALL, min_identity=-1, retries=1)
        assert clips == []
        failure = told.value.failure()
        assert (failure.stage, failure.error) == ("likeness", "LikenessTooLow")
        assert not list(pipeline.outputs.root.glob("shots/p/*"))

    def test_a_picture_that_is_the_person_passes_for_real(self, pipeline, clips, tmp_path):
        """The whole way with measured numbers: from a start picture that is the photo, as the shot crops it."""
        whole = {**SMALL, "image": str(ASTRONAUT), "width": 256, "height": 256}
        with pytest.raises(StepFailed, match=r"got no face in the clip \(1 try\)"):
            # The tiny SVD makes noise of it.
            pipeline.generate_video("a", **whole, min_identity=0.5)
        assert clips == [7]
        found = pipeline.generate_video("a", **whole)["record"]
        assert found.likeness.image > 0.5
        assert (found.likeness.clip_mean, found.likeness.clip_worst, found.likeness.frames_without_face) == (None, None, 2)
        assert [(step.stage, step.cached) for step in found.stages] == [
            ("instantid", True), ("image_likeness", True), ("svd", True), ("clip_likeness", True)
        ]  # fmt: skip

    def test_tries_end_with_the_first_that_is_like_enough(self, pipeline, clips, pretended):
        pretended([(0.2,), (0.6,), (0.7,), (0.9,)], [(0.4, None), (0.5, 0.7)])
        found = pipeline.generate_video("a", **SMALL, min_identity=0.5, retries=5)["record"]
        assert (found.tries, found.shot.seed) == (3, Shot(prompt="a", seed=7).again(2).seed)
        assert clips == [Shot(prompt="a", seed=7).again(number).seed for number in (1, 2)]
        assert found.seeds["flux"] == found.shot.seed
        assert found.likeness == LikenessRecord(image=0.7, clip_mean=0.6, clip_worst=0.5, frames_without_face=0)
        again = pipeline.generate_video("a", **SMALL, min_identity=0.5, retries=5)["record"]
        assert again == found, "done is done, whichever try it was"

    def test_after_the_last_try_the_best_is_told_and_a_lower_bar_reuses_it(self, pipeline, clips, pretended):
        pretended([(0.2,), (0.45,), (0.3,)], [(0.5, 0.5)])
        with pytest.raises(StepFailed, match=r"got a likeness of 0\.45 in the picture \(the best of 3 tries\)"):
            pipeline.generate_video("a", **SMALL, min_identity=0.5, retries=2)
        found = pipeline.generate_video("a", **SMALL, min_identity=0.4, retries=1)["record"]
        assert (found.tries, len(clips)) == (2, 1)
        assert {step.stage: step.cached for step in found.stages} == {
            "instantid": True, "flux": True, "image_likeness": True, "svd": False, "clip_likeness": False
        }  # fmt: skip

    def test_without_a_bar_the_likeness_is_told_all_the_same(self, pipeline, pretended):
        pretended([(-0.1,)], [(None, None)])
        found = pipeline.generate_video("a", **SMALL, retries=3)["record"]
        assert (found.tries, found.shot.seed) == (1, 7)
        assert found.likeness == LikenessRecord(image=-0.1, clip_mean=None, clip_worst=None, frames_without_face=2)

    def test_a_shot_without_a_face_has_no_likeness(self, pipeline):
        found = pipeline.generate_video("a", seed=7, generate_video=False, min_identity=0.9, retries=3)["record"]
        assert (found.likeness, found.tries) == (None, 1)


COLUMNS = ("image_likeness", "clip_likeness_mean", "clip_likeness_worst", "frames_without_face")


class TestAccount:
    @pytest.mark.parametrize(
        ("likeness", "num_frames", "columns", "text"),
        [
            (None, 25, (None, None, None, None), None),
            (record((0.6249,), (0.7, 0.51, 0.54, 0.57, None)), 25, (0.6249, 0.58, 0.51, 1),
             "face 0.62, clip 0.58, worst 0.51; 1 of 5 frames without a face"),
            (record((0.6,), (0.5, 0.5)), 2, (0.6, 0.5, 0.5, 0), "face 0.60, clip 0.50, worst 0.50"),
            (record((None,), (0.5, None)), 2, (None, 0.5, 0.5, 1),
             "no face found in the picture, clip 0.50, worst 0.50; 1 of 2 frames without a face"),
            (record((0.6,), (None, None)), 2, (0.6, None, None, 2), "face 0.60, no face found in the clip"),
            (record((None,)), None, (None, None, None, 1), "no face found in the picture"),
            (record((-0.02,)), None, (-0.02, None, None, 0), "face -0.02"),
        ],
    )  # fmt: skip
    def test_manifest_and_gallery_tell_a_likeness_from_no_face_and_from_no_person(
        self, pipeline, plan_of, likeness, num_frames, columns, text
    ):
        outputs, plan = pipeline.outputs, plan_of(generate_video=num_frames is not None, num_frames=num_frames or 8)
        with outputs.draft(plan) as draft:
            write_png(draft.path("image.png"), wall())
            committed = draft.commit([], likeness)
        assert outputs.done(plan).summary == committed.summary
        row = ManifestRow.of_shot("r", "s", plan.shot, 1, outputs.done(plan), "done")
        assert [getattr(row, name) for name in COLUMNS] == [
            value if value is None else pytest.approx(value) for value in columns
        ]
        assert likeness_text(vars(row)) == text
        writer = ManifestWriter(outputs, "r", "s")
        writer.add(row)
        writer.close()
        page = write_gallery(outputs.root).read_text()
        assert (text in page) if text else ("face" not in page)

    def test_the_seed_in_the_manifest_is_the_one_that_was_used(self, pipeline, plan_of):
        plan = plan_of(min_identity=0.3, retries=1)
        with pipeline.outputs.draft(plan.again[0]) as draft:
            draft.commit([])
        row = partial(ManifestRow.of_shot, "r", "s", plan.shot, 1, status="done")
        assert (
            row(pipeline.outputs.done(plan)).seed == row(pipeline.outputs.done(plan).record()).seed == plan.again[0].shot.seed
        )
        assert pipeline.outputs.done(plan).record().tries == 2


def test_the_stages_that_look_run_alone_on_a_file(tmp_path, capsys):
    from vidgen_ray.cli import main

    arguments = ["stage", "image_likeness", str(ASTRONAUT), "-o", str(tmp_path / "l.json"), "-p", "demo", "-s", "width=512"]
    assert main([*arguments, "-s", "height=512", "-s", f"face_image={ASTRONAUT}"]) == 0
    assert likeness_from_json((tmp_path / "l.json").read_text()) == Likeness((1.0,))
    assert main(arguments) == UsageError.exit_code
    assert "face_image: got nothing, the stage needs a face" in capsys.readouterr().err
    assert main([*arguments[:4], str(tmp_path / "l.png")]) == UsageError.exit_code
    assert "image_likeness writes .json" in capsys.readouterr().err
