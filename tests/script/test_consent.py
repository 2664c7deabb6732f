"""Consent: which faces may be used, what is recorded, and what enters no key."""

import json

import pytest
from PIL import Image

from tests.conftest import ASTRONAUT, EXAMPLES, SYNTHETIC
from vidgen_ray.cli import main
from vidgen_ray.content_keys import ShotPlanner, params_of
from vidgen_ray.errors import ScriptError
from vidgen_ray.graph import stages_of
from vidgen_ray.safety import Consent, ContentPolicy, parse_consent
from vidgen_ray.script.check import SHIPPED_PHOTOS, check_shot
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import read_script
from vidgen_ray.system.cache_dir import sha256_of

ANNA = {"subject": "Anna", "basis": "written", "reference": "release-12.pdf"}


@pytest.fixture
def read(tmp_path):
    (tmp_path / "me.jpg").write_bytes(b"x")

    def read_text(text, name="s.jsonl", **settings):
        (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text) + "\n")
        return read_script(ScriptSettings(tmp_path / name, **settings))

    return read_text


def test_shipped_photos_need_no_consent(tmp_path):
    files = {file.name: file for file in (EXAMPLES / "faces").iterdir()}
    known = {photo.name: (sha256, photo.bytes) for sha256, photo in SHIPPED_PHOTOS.items()}
    assert known == {name: (sha256_of(file), file.stat().st_size) for name, file in files.items()}
    copy = tmp_path / "renamed.jpg"
    copy.write_bytes(ASTRONAUT.read_bytes())
    shot = check_shot({"prompt": "a", "face_image": [str(copy), str(EXAMPLES / "faces" / "ada.png")]}, "test", {})
    assert shot.consent == Consent(
        subject="Eileen Collins, ada (drawn)", basis="demo", reference="examples/faces: astronaut.jpg, ada.png"
    )
    assert check_shot({**shot.model_dump(mode="json")}, "test", {}) == shot, "a recorded shot can be rendered again"
    # As the library stores a photo that it gets as an image or an array.
    for name, file in files.items():
        with Image.open(file) as photo:
            photo.convert("RGB").save(tmp_path / "copy.png", compress_level=1)
        fields = {"prompt": "a", "face_image": [str(tmp_path / "copy.png")]}
        assert check_shot(fields, "test", {}).consent.reference == f"examples/faces: {name}"
        assert check_shot({**fields, "consent": {"subject": "x", "basis": "demo"}}, "test", {}).consent.subject == "x"


def test_face_without_consent_is_refused(read):
    (error,) = read({"prompt": "a", "face_image": "me.jpg"}).errors
    assert str(error) == (
        's.jsonl line 1, consent: got nothing, a face needs {"subject": "NAME", "basis": "written", "reference": "FILE OR '
        'URL"}; basis: self, written, contract, public-domain, synthetic; for all lines: --consent '
        "subject=NAME,basis=written,reference=FILE"
    )
    with pytest.raises(ScriptError, match="test, consent: got nothing, a face needs"):
        check_shot({"prompt": "a", "face_image": [str(ASTRONAUT), __file__]}, "test", {})


def test_invalid_consent_is_an_error_of_its_line(read):
    for consent, field, message in (
        ({"subject": "Anna"}, "consent.basis", "this field is required"),
        ({"subject": "Anna", "basis": "yes"}, "consent.basis", "must be 'self', 'written'"),
        ({"subject": " ", "basis": "self"}, "consent.subject", "must be printable and not blank"),
        ({**ANNA, "by": "me"}, "consent.by", "consent has no such field"),
        ({"subject": "Anna", "basis": "demo"}, "consent.basis", "is for the photos of vidgen only"),
        ("Anna agreed", "consent", "must be written as subject=NAME,basis=written"),
        (True, "consent", "must be"),
    ):
        (error,) = read({"prompt": "a", "face_image": "me.jpg", "consent": consent}).errors
        assert (error.field, message in error.allowed) == (field, True), error


def test_consent_of_line_header_and_character(read):
    anna = json.dumps(ANNA)
    for text, name in (
        (f'{{"prompt": "a", "face_image": "me.jpg", "consent": {anna}}}', "s.jsonl"),
        (f"defaults: {{consent: {anna}}}\nshots: [{{prompt: a, face_image: me.jpg}}]", "s.yaml"),
        (f"characters: {{anna: {{face_image: me.jpg, consent: {anna}}}}}\nshots: ['{{anna}}']", "s.yaml"),
        ("prompt;face_image;consent\na;me.jpg;subject=Anna,basis=written,reference=release-12.pdf\n", "s.csv"),
    ):
        (shot,) = read(text, name, defaults={"consent": SYNTHETIC}).shots
        assert shot.consent == Consent(**ANNA)
    (shot,) = read({"prompt": "a", "face_image": "me.jpg"}, defaults={"consent": SYNTHETIC}).shots
    assert shot.consent == Consent(**SYNTHETIC)


def test_consent_of_a_run_is_recorded_only_where_a_person_may_be_shown(read):
    assert read({"prompt": "a"}, defaults={"consent": ANNA}).shots[0].consent is None
    assert read({"prompt": "a", "image": "me.jpg"}, defaults={"consent": ANNA}).shots[0].consent == Consent(**ANNA)
    # A profile may not require it.
    assert read({"prompt": "a", "face_image": "me.jpg"}, policy=ContentPolicy(require_consent=False)).shots[0].consent is None


def test_consent_changes_neither_id_nor_seed_nor_key(read, tiny):
    line = {"prompt": "a", "face_image": str(ASTRONAUT)}
    plain, declared = (read({**line, **more}, profile_defaults=tiny.defaults).shots[0] for more in ({}, {"consent": ANNA}))
    assert (plain.id, plain.seed) == (declared.id, declared.seed)
    planner = ShotPlanner(params_of(tiny, stages_of(plain)), tiny.encode)
    assert plain.consent != declared.consent
    assert planner(plain).key == planner(declared).key


def test_consent_is_an_option(read, tmp_path, capsys):
    read({"prompt": "a", "face_image": "me.jpg"})
    script = str(tmp_path / "s.jsonl")
    assert main(["validate", script, "--consent", "subject=A,basis=no"]) == 2
    assert "--consent: consent.basis: got 'no', must be 'self', 'written'" in capsys.readouterr().err
    assert main(["validate", script]) == 3
    parsed = parse_consent("subject=Lovelace, Ada, basis=contract,reference=a=b,c")
    assert parsed == {"subject": "Lovelace, Ada", "basis": "contract", "reference": "a=b,c"}
    assert main(["validate", script, "--consent", "subject=Anna,basis=written"]) == 0
