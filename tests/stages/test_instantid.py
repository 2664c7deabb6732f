"""Features of a face: who, where, and what happens when there is none."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.nets.centerface import CenterFace
from vidgen_ray.nets.keypoints import draw_keypoints, map_to_canvas
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.identity.pose import pose_image
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.weights import resolve

POINTS = np.array([[40.0, 30.0], [80.0, 32.0], [60.5, 55.0], [45.0, 75.0], [76.0, 76.0]], np.float32)


@pytest.fixture(scope="module")
def stage(tiny):
    with InstantIDStage(tiny.params(InstantIDStage)) as stage:
        yield stage


def portrait(*centres, size=(512, 512), radius=70):
    """Plain walls with skin-coloured discs."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    picture = np.full((size[1], size[0], 3), (40, 60, 120), np.uint8)
    for cx, cy in centres:
        picture[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = (224, 172, 140)
    return picture


def test_a_real_portrait_gives_features_and_a_pose_of_the_shots_size(stage, make_shot, photo):
    shot = make_shot(face_image="x.jpg")
    face = stage([Item(shot, {"photos": (photo,)})])[0]["face"]
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


def test_the_embeddings_are_those_that_the_shot_will_use(stage, make_shot, photo):
    def made(**fields):
        return set(stage([Item(make_shot(face_image="x.jpg", **fields), {"photos": (photo,)})])[0]["face"].embeddings)

    assert made() == {"antelopev2", "ir_se50"}
    assert made(identity="none") == made(identity="instantid-sdxl") == made(identity_strength=0.0) == {"antelopev2"}


def test_several_faces_give_one_and_say_how_many(stage):
    face = stage.features([portrait((140, 150), (380, 360))])
    assert face.faces_found == 2


def test_no_face_is_a_sentence(stage, make_shot):
    with pytest.raises(StageError, match="no face found"):
        stage([Item(make_shot(), {"photos": (portrait(),)})])


def test_a_small_face_is_refused_with_its_size(tiny, make_shot):
    params = tiny.params(InstantIDStage).model_copy(update={"min_face_px": 200})
    with InstantIDStage(params) as strict, pytest.raises(StageError, match="is 82 px, must be at least 200 px"):
        strict([Item(make_shot(), {"photos": (portrait((256, 200)),)})])


def test_a_photo_is_looked_at_once(tiny):
    with InstantIDStage(tiny.params(InstantIDStage)) as stage:
        first = stage.features([portrait((256, 200))])
        assert stage.features([portrait((256, 200))]) is first
        assert stage.features([portrait((256, 264))]) is not first


def test_a_pack_may_be_nested_as_its_zip_unpacks(tiny, tmp_path):
    pack = resolve("builtin:tiny/antelopev2")
    shutil.copytree(pack, tmp_path / "antelopev2" / "antelopev2")
    params = tiny.params(InstantIDStage).model_copy(update={"weights": tmp_path / "antelopev2"})
    with InstantIDStage(params) as stage:
        assert stage.features([portrait((256, 200))]).faces_found == 1


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ((), r"no \.onnx files there; unpack antelopev2 into it"),
        (("glintr100.onnx",), "no detection model among .*; antelopev2 has scrfd_10g_bnkps.onnx, unpack all of it"),
        (("scrfd_10g_bnkps.onnx",), "no recognition model among .*; antelopev2 has glintr100.onnx, unpack all of it"),
    ],
)
def test_an_incomplete_pack_is_named(tiny, tmp_path, kept, says):
    for name in kept:
        shutil.copy(resolve("builtin:tiny/antelopev2") / name, tmp_path)
    stage = InstantIDStage(tiny.params(InstantIDStage).model_copy(update={"weights": tmp_path}))
    with pytest.raises(SetupError, match=says):
        stage.load()


def model(kind, shape, *outputs):
    """An ONNX model of one node, `kind`, and as many copies of what it gives as there are names."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
    nodes = [helper.make_node(kind, ["image"], [name]) for name in outputs]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    return helper.make_model(
        helper.make_graph(nodes, "g", [image], values), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )


@pytest.mark.parametrize(
    ("file", "replacement", "says"),
    [
        ("glintr100.onnx", b"", "glintr100.onnx: cannot be loaded, unpack antelopev2 anew"),
        ("scrfd_10g_bnkps.onnx", b"half of it", "scrfd_10g_bnkps.onnx: cannot be loaded, unpack antelopev2 anew"),
        (
            "glintr100.onnx",
            model("Flatten", ["b", 3, 112, 112], "embedding"),
            "must be an ArcFace recogniser from 112x112 pixels to 512 numbers, .*: it gives 37632 numbers",
        ),
        ("glintr100.onnx", model("Flatten", ["b", 3, 128, 128], "embedding"), "it takes 128x128 pixels"),
        ("glintr100.onnx", model("Flatten", ["b", 3, 96, 96], "embedding"), "no recognition model"),
        (
            "scrfd_10g_bnkps.onnx",
            model("Flatten", [1, 3, "h", "w"], "s8", "s16", "s32", "b8", "b16", "b32"),
            "must be a SCRFD detector with five keypoints, as scrfd_10g_bnkps.onnx of antelopev2 is: it gives no keypoints",
        ),
        ("scrfd_10g_bnkps.onnx", model("Flatten", [1, 3, "h", "w"], *"abcdefghi"), "must be a SCRFD detector"),
    ],
)
def test_a_pack_with_a_wrong_or_damaged_model_is_named(tiny, tmp_path, file, replacement, says):
    shutil.copytree(resolve("builtin:tiny/antelopev2"), tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes(replacement if isinstance(replacement, bytes) else replacement.SerializeToString())
    stage = InstantIDStage(tiny.params(InstantIDStage).model_copy(update={"weights": tmp_path}))
    with pytest.raises(SetupError, match=says):
        stage.load()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(("detector", "what"), [("pack", "the detection model"), ("centerface", "the recognition model")])
def test_a_gpu_that_is_not_used_is_an_error(tiny, detector, what):
    """onnxruntime falls back to the CPU without a word."""
    params = tiny.params(InstantIDStage).model_copy(update={"device": "cuda", "detector": detector})
    with pytest.raises(SetupError, match=f"{what} runs on CPU.*, the profile asks for CUDA.*; check onnxruntime-gpu"):
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
)
def test_the_keypoint_picture_follows_the_published_rule(points, size, digest):
    """The digests are of pictures drawn by InstantID's published `draw_kps` for these points."""
    assert hashlib.sha256(draw_keypoints(points, *size).tobytes()).hexdigest()[:16] == digest


def test_points_fall_where_the_centred_photo_falls():
    points = np.array([[0.0, 0.0], [400.0, 200.0]])
    assert map_to_canvas(points, (400, 200), (100, 100)).tolist() == [[0, 25], [100, 75]]
    assert map_to_canvas(points, (400, 200), (100, 50)).tolist() == [[0, 0], [100, 50]]
    assert map_to_canvas(points, (200, 400), (128, 64)).tolist() == [[48, 0], [48 + 64, 32]]
