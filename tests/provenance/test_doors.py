"""Every place that writes an image or a clip: results are marked, labelled and signed; the others are listed with a reason."""

import ast
import json
import re
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
    *("write_png", "encode_png", "encode_lossless", "append_xmp", "imwrite"),
    *("VideoWriter", "Mp4Writer", "write_clip", "write_segment", "join_segments", "write_film"),
}
MAY_WRITE = re.compile("|".join([*ENCODERS, r"\.save\(", r"av\.open"]))
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
        owner, _, name = ast.unparse(call.func).rpartition(".")
        modes = {each.value for each in call.args[1:] if isinstance(each, ast.Constant)}
        if name in ENCODERS or (name == "save" and owner) or (owner == "av" and "w" in modes):
            return True
    return False


def test_every_place_that_writes_an_image_or_a_clip_is_known():
    texts = {path: path.read_text("utf-8") for path in PACKAGE.rglob("*.py")}
    writing = [path for path, text in texts.items() if MAY_WRITE.search(text) and writes_media(ast.parse(text))]
    assert {str(path.relative_to(PACKAGE)) for path in writing} == MARKED.keys() | NOT_MARKED.keys()


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A recorded clip and a generated image."""
    # OpenVINO compiles the network for seconds.
    monkeypatch.setattr("vidgen_ray.upscale.network.has_openvino", lambda: False)
    write_video(tmp_path / "recorded.mp4", 2)
    write_png(tmp_path / "generated.png", np.full((48, 64, 3), 90, np.uint8), GENERATED.metadata())
    return tmp_path


GENERATED = ProvenanceRecord(source_type="trainedAlgorithmicMedia", key="a" * 64, stages=("flux",), shot={"prompt": "a secret"})


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


def test_result_of_a_stage_is_marked_labelled_and_signed(sources, key, capsys):
    """A generated image stays AI-generated."""
    out = sources / "large.png"
    command = ["stage", "realesrgan", str(sources / "generated.png"), "-s", "scale=2", "-o", str(out), "-p", "tiny", "--json"]
    assert main([*command, "--private", "--label", "AI", "--c2pa-key", str(key)]) == 0
    note = {"metadata": "private", "label": "AI", "signed": True}
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "provenance": note}
    record = read_provenance(out).record
    assert (record.source_type, record.key, record.shot) == ("trainedAlgorithmicMedia", "a" * 64, None)
    assert (record.operation, record.stages[-1]) == ("stage", "realesrgan")
    signature = read_signature(out)
    assert (signature.state, signature.problems) == ("Valid", ())
    assert (signature.actions, signature.ingredients) == (("c2pa.opened", "c2pa.edited"), ("generated.png",))
    labelled = frame_of(out)
    assert main([*command, "--no-provenance"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"] == {"metadata": "off", "label": None, "signed": False}
    assert read_provenance(out) == (None, None)
    assert has_label(labelled, frame_of(out))
    assert read_signature(out) is None


def test_upscaled_file_of_the_library_is_marked_labelled_and_signed(sources, key, tiny):
    settings = ProvenanceSettings(label="AI", c2pa_key=key)
    out, plain = sources / "large.mp4", sources / "plain.mp4"
    with VideoGenerationPipeline(tiny.with_provenance(settings), sources / "out") as pipeline:
        pipeline.upscale(sources / "recorded.mp4", scale=2, out=out)
        assert read_provenance(out).source_type == "algorithmicallyEnhanced"
        assert read_signature(out).ingredients == ("recorded.mp4",)
        pipeline.upscale(sources / "generated.png", scale=2, out=sources / "large.png")
        assert read_signature(sources / "large.png").ingredients == ("generated.png",)
        pipeline.profile = tiny.with_provenance(OFF)
        pipeline.upscale(sources / "recorded.mp4", scale=2, out=plain)
        assert read_provenance(plain) == (None, None)
        assert has_label(frame_of(out), frame_of(plain))
        result = pipeline.upscale(sources / "generated.png", scale=2)
        assert not result.info
        with pytest.raises(UsageError, match=r"must end in \.png for an image"):
            pipeline.upscale(sources / "generated.png", out=sources / "x.jpg")


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
