"""Every place that writes an image or a clip: results are marked, labelled and signed; the others are listed with a reason."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vidgen_ray
from tests.provenance.test_metadata import FULL, OFF
from tests.upscale.videos import write_video
from vidgen_ray import VideoGenerationPipeline
from vidgen_ray.cli import main
from vidgen_ray.errors import UsageError
from vidgen_ray.media import open_video, read_image, write_png
from vidgen_ray.provenance.record import ProvenanceRecord, ProvenanceSettings, read_provenance
from vidgen_ray.provenance.signing import read_signature

PACKAGE = Path(vidgen_ray.__file__).parent
ENCODERS = {
    "write_png",
    "encode_png",
    "encode_lossless",
    "VideoWriter",
    "Mp4Writer",
    "write_clip",
    "write_segment",
    "join_segments",
    "write_film",
    "append_xmp",
    "imwrite",
}
MARKED = {
    "engine/shot_writer.py": "files of a shot; its last frame, an input of another shot, is not",
    "cli/one_stage.py": "results of `vidgen stage`; drawn keypoints of a face are not, which no model has generated",
    "pipeline.py": "an upscaled image, the image in a notebook; images stored as inputs keep the mark they have",
    "film/make_film.py": "films",
    "film/pieces.py": "films; their pieces are joined to a marked film",
    "upscale/join.py": "upscaled videos",
    "upscale/run.py": "upscaled videos, clips of `vidgen stage` and of the library, previews",
    "online/api/image_routes.py": "images of the server",
    "dataset/export_formats.py": "exported clips that are encoded again; copies keep the mark they have",
    "dataset/data_card.py": "the grid of samples",
}
NOT_MARKED = {
    "media/images.py": "the encoder itself",
    "media/encode.py": "the encoder itself",
    "outputs/stage_cache.py": "results of stages, whose digests are keys",
    "upscale/frames.py": "segments, which are joined to a marked video",
    "upscale/job.py": "segments, which are joined to a marked video",
    "film/sound.py": "sound",
    "online/api/input_routes.py": "photo of a character, from the user's video",
    "online/previews.py": "previews while a shot is rendered",
    "report/gallery_page.py": "thumbnails of the gallery",
    "cli/inspect.py": "photos with the detected face, drawn for their owner",
    "remote/stages.py": "the start image in a request to a server",
    "bench/tiny_faces.py": "weights",
    "bench/tiny_weights.py": "weights",
}


def writes_media(tree: ast.Module) -> bool:
    """Return whether a module calls an encoder, `save` of an image, or opens a container to write."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = (
            call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""
        )
        owner = call.func.value.id if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) else ""
        modes = {each.value for each in call.args[1:] if isinstance(each, ast.Constant)}
        if name in ENCODERS or (name == "save" and isinstance(call.func, ast.Attribute)) or (owner == "av" and "w" in modes):
            return True
    return False


def test_every_place_that_writes_an_image_or_a_clip_is_known():
    found = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if writes_media(ast.parse(path.read_text("utf-8")))
    }
    assert found == MARKED.keys() | NOT_MARKED.keys()
    assert not MARKED.keys() & NOT_MARKED.keys()


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A recorded clip and a generated image."""
    # OpenVINO compiles the network for seconds.
    monkeypatch.setattr("vidgen_ray.upscale.network.has_openvino", lambda: False)
    write_video(tmp_path / "recorded.mp4", 2)
    write_png(tmp_path / "generated.png", np.full((48, 64, 3), 90, np.uint8), GENERATED.metadata())
    return tmp_path


GENERATED = ProvenanceRecord(source_type="trainedAlgorithmicMedia", key="a" * 64, stages=("flux",), shot={"prompt": "a secret"})
EXPECTED = {"recorded.mp4": ("algorithmicallyEnhanced", None), "generated.png": ("trainedAlgorithmicMedia", "a" * 64)}


def frame_of(path):
    if path.suffix == ".png":
        return read_image(path).astype(int)
    with open_video(path) as clip:
        return clip.frames(1, 2)[0].astype(int)


def has_label(labelled, plain):
    """Return whether two versions of a frame differ in the lower right corner only, apart from compression."""
    difference = np.abs(labelled - plain)
    height, width, _ = difference.shape
    return difference[-8:, -16:].mean() > 20 and difference[: height // 2, : width // 2].mean() < 5


@pytest.mark.parametrize("name", EXPECTED)
def test_result_of_a_stage_is_marked_labelled_and_signed(sources, key, name, capsys):
    out = sources / f"large{name[-4:]}"
    command = ["stage", "realesrgan", str(sources / name), "-s", "scale=2", "-o", str(out), "-p", "tiny", "--json"]
    assert main([*command, "--private", "--label", "AI", "--c2pa-key", str(key)]) == 0
    note = {"metadata": "private", "label": "AI", "signed": True}
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "provenance": note}
    record = read_provenance(out).record
    assert (record.source_type, record.key) == EXPECTED[name]
    assert (record.operation, record.stages[-1], record.shot) == ("stage", "realesrgan", None)
    signature = read_signature(out)
    assert (signature.state, signature.problems) == ("Valid", ())
    assert (signature.actions, signature.ingredients) == (("c2pa.opened", "c2pa.edited"), (name,))
    labelled = frame_of(out)
    assert main([*command, "--no-provenance"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"] == {"metadata": "off", "label": None, "signed": False}
    assert read_provenance(out) == (None, None)
    assert has_label(labelled, frame_of(out))
    assert read_signature(out) is None


@pytest.mark.parametrize("name", EXPECTED)
def test_upscaled_file_of_the_library_is_marked_labelled_and_signed(sources, key, tiny, name):
    settings = ProvenanceSettings(label="AI", c2pa_key=key)
    out = sources / f"large{name[-4:]}"
    with VideoGenerationPipeline(tiny.with_provenance(settings), sources / "out") as pipeline:
        result = pipeline.upscale(sources / name, scale=2, out=out)
        found = read_provenance(out)
        assert (found.source_type, found.record.key) == EXPECTED[name]
        assert read_signature(out).ingredients == (name,)
        pipeline.profile = tiny.with_provenance(OFF)
        plain = pipeline.upscale(sources / name, scale=2, out=sources / f"plain{name[-4:]}")
        assert read_provenance(sources / f"plain{name[-4:]}") == (None, None)
        assert has_label(frame_of(out), frame_of(sources / f"plain{name[-4:]}"))
        if name.endswith(".png"):
            assert np.array_equal(np.asarray(result), read_image(out))
            assert not plain.info
            with pytest.raises(UsageError, match=r"must end in \.png for an image"):
                pipeline.upscale(sources / name, out=sources / "x.jpg")


def test_image_in_memory_keeps_its_mark(sources, tiny):
    """An image that one call returns is the input of another, or is uploaded: it stays AI-generated."""
    from vidgen_client.image_inputs import file_of

    with Image.open(sources / "generated.png") as image, Image.open(sources / "generated.png") as holiday:
        holiday.info["xmp"] = b"<x:xmpmeta>private notes of a camera</x:xmpmeta>"
        with VideoGenerationPipeline(tiny.with_provenance(FULL), sources / "out") as pipeline:
            larger = pipeline.upscale(image, scale=2)
            stored = Path(pipeline._as_file("image", larger))
            assert read_provenance(stored).record.sources[0].key == "a" * 64
            assert Path(pipeline._as_file("image", image)).read_bytes() == (sources / "generated.png").read_bytes()
            assert read_provenance(Path(pipeline._as_file("image", holiday))) == (None, None)
        _, uploaded = file_of(image)
        (sources / "uploaded.png").write_bytes(uploaded)
        assert read_provenance(sources / "uploaded.png").record == GENERATED
        assert b"private notes" not in file_of(holiday)[1]
