"""C2PA: signed files verify, changed ones do not, ingredients are kept, and keys stay secret."""

import json
import stat
import sys
from contextlib import suppress
from datetime import UTC, datetime

import numpy as np
import pytest

from tests.provenance.test_metadata import FRAMES, plan_of, write_shot
from vidgen_ray.cli import main
from vidgen_ray.errors import MediaError, SetupError
from vidgen_ray.media.decode import open_video
from vidgen_ray.media.encode import Mp4Settings, Mp4Writer
from vidgen_ray.media.images import read_image, write_png
from vidgen_ray.profile import ProvenanceSettings
from vidgen_ray.provenance.record import InputFile, ProvenanceRecord, altered_record, read_provenance
from vidgen_ray.provenance.signing import (
    Ingredient,
    create_signing_key,
    read_certificates,
    read_signature,
    read_signing_key,
    sign_file,
)
from vidgen_ray.system.cache_dir import sha256_of

GENERATED = ProvenanceRecord(source_type="trainedAlgorithmicMedia", key="0" * 64)


@pytest.fixture
def signed(tmp_path, key):
    """A signed image and a signed clip."""
    pixels = np.random.default_rng(0).integers(0, 256, (FRAMES, 48, 64, 3), np.uint8)
    write_png(tmp_path / "image.png", pixels[0], GENERATED.metadata())
    with Mp4Writer(tmp_path / "clip.mp4", 64, 48, 6, Mp4Settings(threads=1), GENERATED.metadata()) as clip:
        clip.write(pixels)
    for name in ("image.png", "clip.mp4"):
        sign_file(tmp_path / name, GENERATED, key)
    return tmp_path


def make_larger(signed, key):
    """Write large.mp4, signed with clip.mp4 as its ingredient."""
    source = InputFile.read(signed / "clip.mp4", sha256_of(signed / "clip.mp4"))
    record = altered_record(source, "upscale", ["x4plus"], ProvenanceSettings())
    with Mp4Writer(signed / "large.mp4", 64, 48, 6, Mp4Settings(threads=1), record.metadata()) as clip:
        clip.write(np.zeros((1, 48, 64, 3), np.uint8))
    sign_file(signed / "large.mp4", record, key, [Ingredient(signed / "clip.mp4", "clip.mp4")])


def test_signed_files_verify_and_keep_their_metadata_and_pixels(signed, key):
    for name in ("image.png", "clip.mp4"):
        signature = read_signature(signed / name)
        assert (signature.state, signature.problems, signature.signer) == ("Valid", (), "Test Studio")
        assert signature.actions == ("c2pa.created",)
        assert read_signature(signed / name, read_certificates(key)).state == "Trusted"
        assert read_provenance(signed / name).record == GENERATED
    assert read_image(signed / "image.png").shape == (48, 64, 3)
    with open_video(signed / "clip.mp4") as clip:
        assert clip.frames(0, FRAMES).shape == (FRAMES, 48, 64, 3)


def test_files_are_valid_for_a_second_library(signed, key, tmp_path, monkeypatch):
    """encypher-c2pa shares no code with c2pa-python, which signs and is used by `vidgen show --verify`."""
    from encypher_c2pa import verify

    # It would keep settings in the home folder. It sends nothing.
    monkeypatch.setenv("HOME", str(tmp_path))
    make_larger(signed, key)

    def verified(content, kind, anchors):
        report = verify(content, kind, trust_pem=anchors, no_default_trust=True, telemetry=False, online=False)
        return report["integrity"], report["signature"], report["hard_binding"], report["validation_state"]

    own, other = read_certificates(key), tmp_path / "other.pem"
    create_signing_key(other, "Other")
    for name, kind in (("image.png", "image/png"), ("clip.mp4", "video/mp4"), ("large.mp4", "video/mp4")):
        content = (signed / name).read_bytes()
        assert verified(content, kind, own) == ("valid", "valid", "match", "Trusted")
        assert verified(content, kind, read_certificates(other))[3] == "Valid"
        # Everything behind the manifest, which contains padding that no signature can cover.
        for place in range(content.index(b"tEXt" if name.endswith(".png") else b"moov"), len(content), 199):
            changed = bytearray(content)
            changed[place] ^= 1
            # Broken boxes may be an error instead of a report.
            with suppress(ValueError):
                assert verified(bytes(changed), kind, own)[0] == "invalid", (name, place)


def test_shot_is_signed_after_its_digests_are_taken(tiny, make_shot, tmp_path, key):
    shot = make_shot(num_frames=FRAMES, scale=2)
    plain = write_shot(tiny, shot, tmp_path / "plain")
    settings = ProvenanceSettings(c2pa_key=key)
    folder = write_shot(tiny, shot, tmp_path / "signed", settings)
    before, after = (json.loads((each / "shot.json").read_text())["files"] for each in (plain, folder))
    for name in ("image.png", "video.mp4", "hd.mp4"):
        assert read_signature(folder / name).state == "Valid"
        assert after[name]["sha256"] == before[name]["sha256"] == sha256_of(plain / name)
        assert after[name]["signed_sha256"] == sha256_of(folder / name)
        assert after[name]["bytes"] == (folder / name).stat().st_size
        assert before[name]["signed_sha256"] is None
    plan = plan_of(tiny, shot, settings)
    from vidgen_ray.outputs.folder import OutputFolder

    assert OutputFolder(tmp_path / "signed").find_finished(plan) is not None


def test_show_verifies(signed, key, capsys):
    file = str(signed / "clip.mp4")
    assert main(["show", file, "--verify"]) == 0
    assert "Valid: unchanged since it was signed, says it is by Test Studio" in capsys.readouterr().out
    assert main(["show", file, "--verify", "--trust", str(key.with_name("c2pa.cert.pem")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signature"]["state"] == "Trusted"
    content = bytearray((signed / "clip.mp4").read_bytes())
    content[-100] ^= 1
    (signed / "clip.mp4").write_bytes(content)
    assert main(["show", file, "--verify"]) == 1
    assert "Invalid: CHANGED after it was signed" in capsys.readouterr().out
    write_png(signed / "plain.png", np.zeros((8, 8, 3), np.uint8))
    assert main(["show", str(signed / "plain.png"), "--verify"]) == 1
    assert "signature    none" in capsys.readouterr().out


def test_key_is_readable_by_its_owner_only_and_not_shown(tmp_path, capsys):
    path = tmp_path / "c2pa.pem"
    assert main(["keys", "c2pa", "-o", str(path), "--name", "Studio"]) == 0
    printed = capsys.readouterr().out
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secret = read_signing_key(path).private_key
    assert secret.splitlines()[1] not in printed + repr(read_signing_key(path))
    assert "PRIVATE KEY" not in path.with_name("c2pa.cert.pem").read_text()
    assert main(["keys", "c2pa", "-o", str(path)]) == SetupError.exit_code
    assert "exists" in capsys.readouterr().err


def test_key_that_cannot_be_used_is_found_before_rendering(tmp_path, key, capsys):
    (tmp_path / "bad.pem").write_text("nothing")
    (tmp_path / "public.pem").write_text(key.with_name("c2pa.cert.pem").read_text())
    create_signing_key(tmp_path / "old.pem", "Old", datetime(2010, 1, 1, tzinfo=UTC))
    private = read_signing_key(key).private_key
    (tmp_path / "mixed.pem").write_text(private + read_certificates(tmp_path / "old.pem"))
    messages = {
        "none.pem": "cannot be read",
        "bad.pem": "one private key",
        "public.pem": "one private key",
        "old.pem": "was valid until 2019-12-30",
        "mixed.pem": "must be that of the private key",
    }
    for name, message in messages.items():
        path = str(tmp_path / name)
        assert main(["shot", "a", "-p", "tiny", "-o", str(tmp_path / "out"), "--c2pa-key", path]) == SetupError.exit_code
        assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("shot.json"))


def test_formats_without_signatures_and_a_missing_package_are_named(signed, key, monkeypatch):
    (signed / "clip.mkv").write_bytes(b"\x1aE\xdf\xa3" + bytes(20))
    with pytest.raises(MediaError, match="must be PNG, JPEG, WebP, MP4 or MOV"):
        sign_file(signed / "clip.mkv", GENERATED, key)
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(SetupError, match=r"pip install 'c2pa-python"):
        read_signature(signed / "image.png")
