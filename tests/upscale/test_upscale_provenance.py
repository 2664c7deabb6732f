"""Provenance of upscaled videos: recorded media is not called generated, generated media keeps its record and manifest."""

from dataclasses import replace
from fractions import Fraction

import av
import pytest

from tests.upscale.conftest import FAST, SETTINGS
from tests.upscale.videos import write_video
from vidgen_ray.errors import MediaError
from vidgen_ray.media.media_file import append_xmp
from vidgen_ray.provenance.record import ProvenanceRecord, ProvenanceSettings, read_provenance
from vidgen_ray.provenance.signing import create_signing_key, read_signature, sign_file
from vidgen_ray.system.cache_dir import sha256_of
from vidgen_ray.upscale.job import Threads
from vidgen_ray.upscale.run import UpscaleOptions, upscale_file

SHOT = ProvenanceRecord(source_type="trainedAlgorithmicMedia", key="a" * 64, stages=("svd",), shot={"prompt": "a dog"})


@pytest.fixture
def options(tiny_model):
    return UpscaleOptions(tiny_model, FAST)


@pytest.fixture
def recorded(tmp_path):
    return write_video(tmp_path / "recorded.mp4", 2, metadata={"comment": "my holiday"})


@pytest.fixture
def generated(tmp_path):
    video = write_video(tmp_path / "generated.mp4", 2)
    append_xmp(video, SHOT.metadata().xmp)
    return video


def run(video, out, options):
    return upscale_file(video, out, options, SETTINGS, Threads(1))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_recorded_video_is_enhanced_and_generated_video_stays_generated(tmp_path, options, recorded, generated, suffix):
    out = tmp_path / f"large{suffix}"
    run(recorded, out, options)
    found = read_provenance(out)
    assert (found.source_type, found.record.key, found.record.stages) == ("algorithmicallyEnhanced", None, ("tiny",))
    assert not found.record.is_generated
    assert [source.sha256 for source in found.record.sources] == [sha256_of(recorded)]
    with av.open(str(out)) as opened:
        assert {key.lower(): value for key, value in opened.metadata.items()}["comment"] == "my holiday"
    assert run(recorded, out, options).was_finished
    # Another marking is another result. The present one is kept unless it is forced.
    with pytest.raises(MediaError, match="exists and is not the result of this command"):
        run(recorded, out, replace(options, provenance=ProvenanceSettings(metadata="off")))
    run(generated, out, replace(options, force=True))
    found = read_provenance(out)
    assert (found.source_type, found.record.key, found.record.stages) == ("trainedAlgorithmicMedia", "a" * 64, ("svd", "tiny"))
    assert found.record.shot == SHOT.shot
    assert found.record.sources[0].key == "a" * 64


def test_drawn_frames_make_a_composite_and_private_drops_the_shot(options, recorded, generated):
    smooth = replace(options, fps=Fraction(24), provenance=ProvenanceSettings(metadata="private"))
    assert smooth.record(recorded).source_type == "compositeWithTrainedAlgorithmicMedia"
    assert smooth.record(generated).source_type == "trainedAlgorithmicMedia"
    assert (smooth.record(generated).key, smooth.record(generated).shot) == ("a" * 64, None)
    assert replace(options, provenance=ProvenanceSettings(metadata="off")).record(generated) is None


def test_signed_result_has_the_signed_source_as_its_parent(tmp_path, options, recorded):
    key = tmp_path / "key.pem"
    create_signing_key(key, "Studio")
    sign_file(recorded, SHOT, key)
    signing = replace(options, provenance=ProvenanceSettings(c2pa_key=key))
    run(recorded, tmp_path / "out.mp4", signing)
    signature = read_signature(tmp_path / "out.mp4")
    assert (signature.state, signature.problems) == ("Valid", ())
    assert (signature.actions, signature.ingredients) == (("c2pa.opened", "c2pa.edited"), ("recorded.mp4",))
    assert run(recorded, tmp_path / "out.mp4", signing).was_finished
    with pytest.raises(MediaError, match="Matroska files cannot be signed"):
        run(recorded, tmp_path / "out.mkv", signing)
