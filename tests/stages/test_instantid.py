"""Face features: embeddings, keypoints, the pose image, and errors of photos and weights."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from tests.conftest import EXAMPLES
from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.media import read_image
from vidgen_ray.nets.faces import CenterFace, draw_keypoints, map_to_canvas
from vidgen_ray.profile import load_profile
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.identity import pose_image
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.weights import resolve

POINTS = np.array([[40.0, 30.0], [80.0, 32.0], [60.5, 55.0], [45.0, 75.0], [76.0, 76.0]], np.float32)


@pytest.fixture(scope="module")
def stage(tiny):
    with InstantIDStage(tiny.params(InstantIDStage)) as stage:
        yield stage


def portrait(*centres, size=(512, 512), radius=70):
    """Return a plain wall with skin-coloured discs."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    image = np.full((size[1], size[0], 3), (40, 60, 120), np.uint8)
    for cx, cy in centres:
        image[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = (224, 172, 140)
    return image


def test_portrait_gives_face_features_and_a_pose_image(stage, make_shot, photo):
    shot = make_shot(face_image="x.jpg")
    face = stage(Item(shot, {"photos": (photo,)}))["face"]
    assert face.embedding("antelopev2").shape == (512,)
    assert face.embedding("antelopev2").dtype == np.float32
    assert face.keypoints.shape == (5, 2)
    left, top, right, bottom = face.box
    # The astronaut's face: eyes near (205, 105) and (245, 105).
    assert left < 225 < right
    assert top < 115 < bottom
    assert face.photo_size == (512, 512)
    pose = pose_image(face, shot)
    assert pose.shape == (64, 128, 3)
    assert pose.any()
    assert not pose_image(face, make_shot(pose="none", width=64)).any()
    assert pose_image(face, make_shot(pose="none", width=64)).shape == (64, 64, 3)


def test_only_embeddings_that_the_shot_needs_are_computed(stage, make_shot, photo):
    def recognisers(**fields):
        return set(stage(Item(make_shot(face_image="x.jpg", **fields), {"photos": (photo,)}))["face"].embeddings)

    assert recognisers() == {"antelopev2", "ir_se50"}
    for fields in ({"identity": "none"}, {"identity": "instantid-sdxl"}, {"identity_strength": 0.0}):
        assert recognisers(**fields) == {"antelopev2"}


def test_photos_of_different_people_are_noted():
    ada, bo = (read_image(EXAMPLES / "faces" / f"{name}.png") for name in ("ada", "bo"))
    with InstantIDStage(load_profile("demo").params(InstantIDStage)) as stage:
        for photos, noted in (((ada,), []), ((ada, ada[:, ::-1]), []), ((ada, ada[:, ::-1], bo), ["face_image 3 of 3"])):
            stage.features(photos)
            assert [note.partition(":")[0] for note in stage.take_notes()] == noted


def test_photo_without_a_face_raises_stage_error(stage, make_shot):
    with pytest.raises(StageError, match=r"face_image \(wall\.png\): no face found"):
        stage(Item(make_shot(face_image="wall.png"), {"photos": (portrait(),)}))


def test_pack_may_be_in_a_nested_folder(tiny, tmp_path):
    pack = resolve("builtin:tiny/antelopev2")
    shutil.copytree(pack, tmp_path / "antelopev2" / "antelopev2")
    params = tiny.params(InstantIDStage).model_copy(update={"weights": tmp_path / "antelopev2"})
    with InstantIDStage(params) as stage:
        assert stage.features([portrait((256, 200))]).faces_found == 1


def test_incomplete_pack_raises_setup_error(tiny, tmp_path):
    params = tiny.params(InstantIDStage).model_copy(update={"weights": tmp_path})
    for files, message in (
        ((), r"no \.onnx files in this folder; unpack antelopev2 into it"),
        (("glintr100.onnx",), "no detection model among .*; antelopev2 has scrfd_10g_bnkps.onnx, unpack all of it"),
        (("scrfd_10g_bnkps.onnx",), "no recognition model among .*; antelopev2 has glintr100.onnx, unpack all of it"),
    ):
        for old in tmp_path.iterdir():
            old.unlink()
        for name in files:
            shutil.copy(resolve("builtin:tiny/antelopev2") / name, tmp_path)
        with pytest.raises(SetupError, match=message):
            InstantIDStage(params).load()


def model(kind, shape, *outputs):
    """Return an ONNX model with one node of this kind per output name."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
    nodes = [helper.make_node(kind, ["image"], [name]) for name in outputs]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    return helper.make_model(
        helper.make_graph(nodes, "g", [image], values), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )


def test_pack_with_a_wrong_or_damaged_model_raises_setup_error(tiny, tmp_path):
    recogniser, detector = "glintr100.onnx", "scrfd_10g_bnkps.onnx"
    for number, (file, replacement, message) in enumerate(
        (
            (recogniser, None, "glintr100.onnx: cannot be loaded, use an intact ONNX file"),
            (
                recogniser,
                model("Flatten", ["b", 3, 112, 112], "embedding"),
                "must be an ArcFace recogniser from 112x112 pixels to 512 numbers, .*: it returns 37632 numbers",
            ),
            (recogniser, model("Flatten", ["b", 3, 128, 128], "embedding"), "it takes 128x128 pixels"),
            (
                detector,
                model("Flatten", [1, 3, "h", "w"], "s8", "s16", "s32", "b8", "b16", "b32"),
                "must be a SCRFD detector with five keypoints, .*: it returns no keypoints",
            ),
            (detector, model("Flatten", [1, 3, "h", "w"], *"abcdefghi"), "must be a SCRFD detector"),
        )
    ):
        pack = tmp_path / str(number)
        shutil.copytree(resolve("builtin:tiny/antelopev2"), pack)
        (pack / file).write_bytes(b"damaged" if replacement is None else replacement.SerializeToString())
        with pytest.raises(SetupError, match=message):
            InstantIDStage(tiny.params(InstantIDStage).model_copy(update={"weights": pack})).load()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("detector", ["pack", "centerface"])
def test_onnxruntime_fallback_to_the_cpu_raises_setup_error(tiny, detector):
    params = tiny.params(InstantIDStage).model_copy(update={"device": "cuda", "detector": detector})
    with pytest.raises(
        SetupError, match=r"face pack .*\.onnx runs on CPU.*, the profile asks for CUDA.*; check onnxruntime-gpu"
    ):
        InstantIDStage(params).load()
    with pytest.raises(SetupError, match=r"the detector .*centerface\.onnx runs on CPU"):
        CenterFace(min_score=0.5, device="cuda")


@pytest.mark.parametrize(
    ("points", "size", "digest"),
    [
        (POINTS, (128, 128), "e190d134d79d4eec"),
        (POINTS * 8, (1024, 576), "e646d364dec1f454"),
        (POINTS[::-1] - 50, (64, 96), "34a34eb7ea5afd45"),
    ],
    ids=["128x128", "1024x576", "partly outside"],
)
def test_keypoint_image_matches_instantid(points, size, digest):
    """The digests belong to images drawn by InstantID's published `draw_kps` for these points."""
    assert hashlib.sha256(draw_keypoints(points, *size).tobytes()).hexdigest()[:16] == digest


def test_map_to_canvas_follows_the_centred_photo():
    points = np.array([[0.0, 0.0], [400.0, 200.0]])
    assert map_to_canvas(points, (400, 200), (100, 100)).tolist() == [[0, 25], [100, 75]]
    assert map_to_canvas(points, (400, 200), (100, 50)).tolist() == [[0, 0], [100, 50]]
    assert map_to_canvas(points, (200, 400), (128, 64)).tolist() == [[48, 0], [48 + 64, 32]]
