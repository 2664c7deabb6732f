"""Face features: embeddings, keypoints, the pose image, and errors of photos and weights."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from tests.conftest import EXAMPLES
from vidgen_ray.errors import SetupError
from vidgen_ray.media.images import read_image
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


def portrait(*centres):
    """Return a plain wall with skin-coloured discs."""
    y, x = np.mgrid[0:512, 0:512]
    image = np.full((512, 512, 3), (40, 60, 120), np.uint8)
    for cx, cy in centres:
        image[(x - cx) ** 2 + (y - cy) ** 2 < 70**2] = (224, 172, 140)
    return image


def test_portrait_gives_a_pose_image_and_the_embeddings_that_the_shot_needs(stage, make_shot, photo):
    def face_of(**fields):
        return stage(Item(make_shot(face_image="x.jpg", **fields), {"photos": (photo,)}))["face"]

    face = face_of()
    assert set(face.embeddings) == {"antelopev2", "ir_se50"}
    for fields in ({"identity": "none"}, {"identity": "instantid-sdxl"}, {"identity_strength": 0.0}):
        assert set(face_of(**fields).embeddings) == {"antelopev2"}
    left, top, right, bottom = face.box
    # The astronaut's face: eyes near (205, 105) and (245, 105).
    assert left < 225 < right
    assert top < 115 < bottom
    pose = pose_image(face, make_shot())
    assert pose.shape == (64, 128, 3)
    assert pose.any()
    assert not pose_image(face, make_shot(pose="none")).any()


def test_photos_of_different_people_are_noted():
    ada, bo = (read_image(EXAMPLES / "faces" / f"{name}.png") for name in ("ada", "bo"))
    with InstantIDStage(load_profile("demo").params(InstantIDStage)) as stage:
        for photos, noted in (((ada,), []), ((ada, ada[:, ::-1]), []), ((ada, ada[:, ::-1], bo), ["face_image 3 of 3"])):
            stage.features(photos)
            assert [note.partition(":")[0] for note in stage.take_notes()] == noted


def test_pack_is_found_in_a_nested_folder_and_must_be_complete(tiny, tmp_path):
    params = tiny.params(InstantIDStage).model_copy(update={"weights": tmp_path / "antelopev2"})
    for files, message in (
        ((), r"no \.onnx files in this folder; unpack antelopev2 into it"),
        (("glintr100.onnx",), "no detection model among .*; antelopev2 has scrfd_10g_bnkps.onnx, unpack all of it"),
    ):
        (tmp_path / "antelopev2").mkdir(exist_ok=True)
        for name in files:
            shutil.copy(resolve("builtin:tiny/antelopev2") / name, tmp_path / "antelopev2")
        with pytest.raises(SetupError, match=message):
            InstantIDStage(params).load()
    shutil.rmtree(tmp_path / "antelopev2")
    shutil.copytree(resolve("builtin:tiny/antelopev2"), tmp_path / "antelopev2" / "antelopev2")
    with InstantIDStage(params) as stage:
        assert stage.features([portrait((256, 200))]).faces_found == 1


def model(kind, shape, *outputs):
    """Return an ONNX model with one node of this kind per output name."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
    nodes = [helper.make_node(kind, ["image"], [name]) for name in outputs]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", [image], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def test_pack_with_a_wrong_or_damaged_model_raises_setup_error(tiny, tmp_path):
    recogniser, detector = "glintr100.onnx", "scrfd_10g_bnkps.onnx"
    for number, (file, content, message) in enumerate(
        (
            (
                recogniser,
                model("Flatten", ["b", 3, 112, 112], "embedding"),
                "from 112x112 .* it returns 37632 numbers",
            ),
            (recogniser, model("Flatten", ["b", 3, 128, 128], "embedding"), "it takes 128x128 pixels"),
            (detector, model("Flatten", [1, 3, "h", "w"], *"abcdef"), "must be a SCRFD detector .*: it returns no keypoints"),
        )
    ):
        pack = tmp_path / str(number)
        shutil.copytree(resolve("builtin:tiny/antelopev2"), pack)
        (pack / file).write_bytes(content)
        with pytest.raises(SetupError, match=message):
            InstantIDStage(tiny.params(InstantIDStage).model_copy(update={"weights": pack})).load()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_onnxruntime_fallback_to_the_cpu_raises_setup_error(tiny):
    params = tiny.params(InstantIDStage).model_copy(update={"device": "cuda"})
    message = r"face pack .*\.onnx runs on CPU.*, the profile asks for CUDA.*; check onnxruntime-gpu"
    with pytest.raises(SetupError, match=message):
        InstantIDStage(params).load()
    with pytest.raises(SetupError, match=r"the detector .*centerface\.onnx runs on CPU"):
        CenterFace(min_score=0.5, device="cuda")


def test_keypoint_image_matches_instantid():
    """The digests belong to images drawn by InstantID's published `draw_kps` for these points."""
    for points, size, digest in (
        (POINTS, (128, 128), "e190d134d79d4eec"),
        (POINTS * 8, (1024, 576), "e646d364dec1f454"),
        # Partly outside.
        (POINTS[::-1] - 50, (64, 96), "34a34eb7ea5afd45"),
    ):
        assert hashlib.sha256(draw_keypoints(points, *size).tobytes()).hexdigest()[:16] == digest, size


def test_map_to_canvas_follows_the_centred_photo():
    points = np.array([[0.0, 0.0], [400.0, 200.0]])
    assert map_to_canvas(points, (400, 200), (100, 100)).tolist() == [[0, 25], [100, 75]]
    assert map_to_canvas(points, (400, 200), (100, 50)).tolist() == [[0, 0], [100, 50]]
    assert map_to_canvas(points, (200, 400), (128, 64)).tolist() == [[48, 0], [48 + 64, 32]]
