"""Metadata of files: written by every executor, read back, the same bytes for the same shot, nothing that is private."""

import json
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from vidgen_ray.cli import main
from vidgen_ray.content_keys import ShotPlan, ShotPlanner, params_of
from vidgen_ray.engine.shot_writer import DIGEST_PREFIX, SIZES, SWITCHES, ShotFiles, line_with_files, script_line, shot_record
from vidgen_ray.errors import MediaError
from vidgen_ray.graph import STAGES, stages_of
from vidgen_ray.media import Mp4Settings, Mp4Writer, encode_png, open_video, read_image, write_png
from vidgen_ray.media.media_file import read_xmp
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.profile import load_profile
from vidgen_ray.provenance.record import ProvenanceRecord, ProvenanceSettings, read_provenance, xmp_packet, xmp_property
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, Item

FULL, PRIVATE, OFF = (ProvenanceSettings(metadata=detail) for detail in ("full", "private", "off"))
FRAMES = 3


def plan_of(profile, shot, settings=FULL):
    return ShotPlanner(params_of(profile, stages_of(shot)), profile.encode, provenance=settings)(shot)


def write_shot(profile, shot, folder: Path, settings=FULL) -> Path:
    """Write the files of a shot from pixels that depend on nothing. Return their folder."""
    outputs = OutputFolder(folder)
    outputs.prepare()
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (shot.height, shot.width, 3), np.uint8)
    frames = random.integers(0, 256, (FRAMES, shot.height, shot.width, 3), np.uint8)
    artefacts = Artefacts(image=image, frames=frames) if shot.generate_video else Artefacts(image=image)
    plan = plan_of(profile, shot, settings)
    with closing(ShotFiles(plan, Item(shot, artefacts), outputs, profile.encode, provenance=settings)) as files:
        if shot.generate_video and shot.upscale_video:
            hd_frames = frames.repeat(shot.scale, 1).repeat(shot.scale, 2)
            files.add(Artefacts(hd_frames=hd_frames, chunk=(0, len(frames))))
        files.commit([])
    return next(folder.rglob("shot.json")).parent


@pytest.fixture
def files(tiny, make_shot, tmp_path):
    shot = make_shot(num_frames=FRAMES, scale=2, prompt="a & <b> \u2028 'ü'")
    return write_shot(tiny, shot, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("image.png", ("flux",)),
        ("video.mp4", ("flux", "svd")),
        ("hd.mp4", ("flux", "svd", "realesrgan")),
    ],
)
def test_files_say_that_they_are_generated_by_what_and_from_what(files, name, stages):
    found = read_provenance(files / name)
    assert found.source_type == "trainedAlgorithmicMedia"
    assert found.record.stages == stages
    assert (found.record.tool, found.record.is_generated) == ("vidgen-ray", True)
    assert found.record.key == json.loads((files / "shot.json").read_text())["key"]
    assert found.record.shot["prompt"] == "a & <b> \u2028 'ü'"


def test_other_programs_find_the_mark(files):
    """Pillow and FFmpeg, which share no code with the reader."""
    with Image.open(files / "image.png") as image:
        assert b"digitalsourcetype/trainedAlgorithmicMedia" in image.info["xmp"]
        assert image.info["Comment"].startswith("AI-generated with vidgen-ray ")
    with av.open(str(files / "hd.mp4")) as clip:
        assert clip.metadata["comment"].startswith("AI-generated with vidgen-ray ")
        assert sum(1 for _ in clip.decode(video=0)) == FRAMES


def test_metadata_does_not_change_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)
    metadata = ProvenanceRecord(source_type="trainedAlgorithmicMedia").metadata()
    write_png(tmp_path / "a.png", pixels[0], metadata)
    assert (read_image(tmp_path / "a.png") == pixels[0]).all()
    assert (tmp_path / "a.png").read_bytes() != encode_png(pixels[0])
    for name, marked in (("plain.mp4", None), ("marked.mp4", metadata)):
        with Mp4Writer(tmp_path / name, 64, 48, 6, Mp4Settings(preset="ultrafast", threads=1), marked) as clip:
            clip.write(pixels)
    with open_video(tmp_path / "plain.mp4") as plain, open_video(tmp_path / "marked.mp4") as marked:
        assert (plain.frames(0, 2) == marked.frames(0, 2)).all()
    assert read_xmp(tmp_path / "plain.mp4") is None


def test_same_shot_gives_the_same_bytes_whatever_its_id_and_paths_are(tiny, make_shot, tmp_path):
    photo = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    written = []
    for name in ("one", "two"):
        write_png(tmp_path / f"{name}.png", photo)
        shot = make_shot(id=name, image=str(tmp_path / f"{name}.png"), num_frames=FRAMES, scale=2, metadata={"a": name})
        folder = write_shot(tiny, shot, tmp_path / name)
        written.append({file: (folder / file).read_bytes() for file in ("image.png", "video.mp4", "hd.mp4")})
    assert written[0] == written[1]
    assert str(tmp_path).encode() not in written[0]["hd.mp4"]


def test_private_files_have_the_mark_but_no_prompt_and_no_inputs(tiny, make_shot, tmp_path):
    photo = tmp_path / "photo.png"
    write_png(photo, np.zeros((64, 64, 3), np.uint8))
    shot = make_shot(prompt="a secret", image=str(photo), num_frames=FRAMES, upscale_video=False)
    folder = write_shot(tiny, shot, tmp_path / "out", PRIVATE)
    for name in ("image.png", "video.mp4"):
        content = (folder / name).read_bytes()
        assert b"secret" not in content
        assert DIGEST_PREFIX.encode() not in content
    found = read_provenance(folder / "video.mp4")
    assert found.source_type == "trainedAlgorithmicMedia"
    assert found.record.key is not None
    assert json.loads((folder / "shot.json").read_text())["provenance"] == {"metadata": "private", "label": None}


def test_record_says_that_files_have_no_provenance(tiny, make_shot, tmp_path):
    folder = write_shot(tiny, make_shot(num_frames=FRAMES, upscale_video=False), tmp_path / "out", OFF)
    assert read_provenance(folder / "image.png") == read_provenance(folder / "video.mp4") == (None, None)
    assert json.loads((folder / "shot.json").read_text())["provenance"]["metadata"] == "off"


def test_other_details_change_the_key_of_the_files_and_a_signature_does_not(tiny, make_shot):
    shot = make_shot()
    before = ShotPlanner(params_of(tiny, stages_of(shot)), tiny.encode)(shot)
    marked, private, off = (plan_of(tiny, shot, settings) for settings in (FULL, PRIVATE, OFF))
    signed = plan_of(tiny, shot, ProvenanceSettings(c2pa_key="key.pem"))
    assert marked.key == signed.key == before.key
    assert len({marked.key, private.key, off.key}) == 3
    assert marked.steps == private.steps == off.steps


def test_source_type_of_an_image_that_the_user_brings(make_shot, tmp_path):
    """A photo stays a photo, an edited one is a composite, and what was generated before stays generated."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    photo, generated = tmp_path / "photo.png", tmp_path / "generated.png"
    write_png(photo, pixels)
    write_png(generated, pixels, ProvenanceRecord(source_type="trainedAlgorithmicMedia").metadata())

    def type_of(artefact, **fields):
        plan = ShotPlan(shot=make_shot(**fields), steps=(), key="0" * 64, inputs={fields["image"]: "0" * 64})
        return shot_record(plan, artefact, FULL).source_type

    assert type_of("image", image=str(photo)) is None
    assert type_of("frames", image=str(photo)) == "trainedAlgorithmicMedia"
    assert type_of("image", image=str(photo), use_hunyuan_style=True) == "compositeWithTrainedAlgorithmicMedia"
    assert type_of("image", image=str(generated)) == "trainedAlgorithmicMedia"
    assert type_of("image", image=str(photo), continue_from="other", use_hunyuan_style=True) == "trainedAlgorithmicMedia"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_script_line_of_a_record_gives_the_same_key(stage, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for example in stage.examples:
        shot = Shot(**{**tiny.defaults, "prompt": "a man", "id": "a", "seed": 3, **example})
        files = [path for path in (shot.image, shot.last_image, *shot.face_image) if path]
        files += [lora.path for lora in shot.all_loras]
        for number, name in enumerate(files):
            (tmp_path / name).write_text(str(number))
        plan = plan_of(tiny, shot)
        record = script_line(plan)
        assert not [name for name in files if json.dumps(name) in json.dumps(record)]
        line, unknown = line_with_files(record, {digest: path for path, digest in plan.inputs.items()})
        assert not unknown
        assert plan_of(tiny, Shot(**line, id="b")).key == plan.key


def test_fields_that_no_stage_reads_are_not_in_the_record(tiny, make_shot, tmp_path):
    """They are not part of the key either: another client with this key must not see them."""
    (tmp_path / "start.png").write_text("start")
    start = str(tmp_path / "start.png")
    other = {
        "prompt": "a secret",
        "mode": "fast",
        "style_model": "qwen-edit",
        "style_prompt": "ink",
        "steps": {**tiny.defaults["steps"], "flux": 9},
    }
    one, two = (plan_of(tiny, make_shot(image=start, **fields)) for fields in ({}, other))
    assert one.key == two.key
    assert shot_record(one, "frames", FULL) == shot_record(two, "frames", FULL)


def test_every_field_is_a_switch_or_read_by_a_stage_or_does_not_decide_the_files():
    read = {name.partition(".")[0] for stage in STAGES for name in (*stage.reads, *stage.identity_fields)}
    without_effect = {
        "id",
        "metadata",
        "variants",
        "character",
        "continue_from",
        "min_identity",
        "retries",
        "consent",
        "priority",
    }
    assert Shot.model_fields.keys() - read - {*SIZES, "image"} == {*SWITCHES, *without_effect} - {"lora", "video_lora"}


def test_script_line_of_a_continued_shot_gives_the_same_key(tiny, make_shot, tmp_path):
    (tmp_path / "last_frame.png").write_text("frame")
    (tmp_path / "one.safetensors").write_text("lora")
    lora = ({"path": str(tmp_path / "one.safetensors")},)
    shot = make_shot(continue_from="a", lora=lora, use_hunyuan_style=True).continued(str(tmp_path / "last_frame.png"))
    plan = plan_of(tiny, shot)
    line, unknown = line_with_files(script_line(plan), {digest: path for path, digest in plan.inputs.items()})
    assert (unknown, line["image"]) == ([], str(tmp_path / "last_frame.png"))
    assert plan_of(tiny, Shot(**line, id="b")).key == plan.key


def test_show_prints_the_record_and_the_line(files, capsys):
    assert main(["show", str(files / "hd.mp4")]) == 0
    shown = capsys.readouterr().out
    assert "trainedAlgorithmicMedia: generated by a trained model" in shown
    assert "stages       flux, svd, realesrgan" in shown
    assert main(["show", str(files / "hd.mp4"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["record"]
    assert main(["show", str(files / "hd.mp4"), "--line"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line == record["shot"]
    assert line["steps"].keys() == {"flux", "svd"}


def test_show_finds_files_by_their_digest(tiny, make_shot, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos" / "me.png"
    write_png(photo, np.zeros((64, 64, 3), np.uint8))
    folder = write_shot(tiny, make_shot(image=str(photo), generate_video=False), tmp_path / "out")
    assert main(["show", str(folder / "image.png"), "--line"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["image"].startswith(DIGEST_PREFIX)
    assert "image: the file names only the digest" in shown.err
    assert main(["show", str(folder / "image.png"), "--line", "--inputs", str(photo.parent)]) == 0
    shown = capsys.readouterr()
    assert (json.loads(shown.out)["image"], shown.err) == (str(photo), "")


def test_show_of_files_without_provenance(tmp_path, capsys):
    write_png(tmp_path / "plain.png", np.zeros((8, 8, 3), np.uint8))
    assert main(["show", str(tmp_path / "plain.png")]) == 0
    assert "no provenance metadata" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "plain.png"), "--line"]) == MediaError.exit_code
    assert "no metadata of vidgen-ray" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("nothing")
    assert main(["show", str(tmp_path / "text.png")]) == MediaError.exit_code
    assert main(["show", str(tmp_path / "none.png")]) == MediaError.exit_code


def test_packets_of_other_tools_are_read_and_hostile_ones_ignored():
    name = "Iptc4xmpExt:DigitalSourceType"
    attribute = xmp_packet({}).replace('rdf:about=""', 'rdf:about="" Iptc4xmpExt:DigitalSourceType="x/digitalCapture"')
    assert xmp_property(attribute, name) == "x/digitalCapture"
    assert xmp_property("<not xml", name) is None
    bomb = '<!DOCTYPE x [<!ENTITY a "1">]>' + xmp_packet({name: "&a;"}).replace("&amp;", "&")
    assert xmp_property(bomb, name) is None


@pytest.mark.parametrize("cut", [0, 4, 20, -30])
def test_damaged_file_is_an_error_or_has_no_metadata(files, tmp_path, cut):
    content = (files / "video.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[:cut])
    try:
        assert read_provenance(tmp_path / "cut.mp4").record is None
    except MediaError:
        assert cut < 12


def test_settings_of_a_profile_apply(tmp_path, capsys):
    profile = load_profile("tiny")
    assert profile.provenance == FULL
    assert profile.with_provenance(PRIVATE).model_dump(mode="json")["provenance"]["metadata"] == "private"
    assert main(["shot", "a", "--private", "--no-provenance", "-o", str(tmp_path)]) == 2
    assert "cannot be combined" in capsys.readouterr().err
