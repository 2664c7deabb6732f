"""Consent: which faces may be used, what is recorded, and what enters no key."""

import hashlib
import json

import pytest

from tests.conftest import ASTRONAUT, EXAMPLES, SYNTHETIC
from vidgen_ray.cli import main
from vidgen_ray.content_keys import ShotPlanner, params_of
from vidgen_ray.errors import ScriptError
from vidgen_ray.graph import stages_of
from vidgen_ray.safety import Consent, ContentPolicy, parse_consent
from vidgen_ray.script.check import SHIPPED_PHOTOS, check_shot
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import read_script

ANNA = {"subject": "Anna", "basis": "written", "reference": "release-12.pdf"}


@pytest.fixture
def read(tmp_path):
    (tmp_path / "me.jpg").write_bytes(b"x")

    def read_text(text, name="s.jsonl", **settings):
        (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text) + "\n")
        return read_script(ScriptSettings(tmp_path / name, **settings))

    return read_text


def test_every_shipped_photo_is_known():
    files = {file.name: file for file in (EXAMPLES / "faces").iterdir()}
    known = {photo.name: (sha256, photo.bytes) for sha256, photo in SHIPPED_PHOTOS.items()}
    assert known == {name: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size) for name, file in files.items()}


def test_shipped_photos_need_no_consent(tmp_path):
    copy = tmp_path / "renamed.jpg"
    copy.write_bytes(ASTRONAUT.read_bytes())
    shot = check_shot({"prompt": "a", "face_image": [str(copy), str(EXAMPLES / "faces" / "ada.png")]}, "test", {})
    assert shot.consent == Consent(
        subject="Eileen Collins, ada (drawn)", basis="demo", reference="examples/faces: astronaut.jpg, ada.png"
    )
    assert check_shot({**shot.model_dump(mode="json")}, "test", {}) == shot, "a recorded shot can be rendered again"


def test_face_without_consent_is_refused(read):
    (error,) = read({"prompt": "a", "face_image": "me.jpg"}).errors
    assert str(error) == (
        's.jsonl line 1, consent: got nothing, a face needs {"subject": "NAME", "basis": "written", "reference": "FILE OR '
        'URL"}; basis: self, written, contract, public-domain, synthetic; for all lines: --consent '
        "subject=NAME,basis=written,reference=FILE"
    )
    with pytest.raises(ScriptError, match="test, consent: got nothing, a face needs"):
        check_shot({"prompt": "a", "face_image": [str(ASTRONAUT), __file__]}, "test", {})


@pytest.mark.parametrize(
    ("consent", "field", "message"),
    [
        ({"subject": "Anna"}, "consent.basis", "this field is required"),
        ({"subject": "Anna", "basis": "yes"}, "consent.basis", "must be 'self', 'written'"),
        ({"subject": " ", "basis": "self"}, "consent.subject", "must be printable and not blank"),
        ({**ANNA, "by": "me"}, "consent.by", "consent has no such field"),
        ({"subject": "Anna", "basis": "demo"}, "consent.basis", "is for the photos of vidgen only"),
        ("Anna agreed", "consent", "must be written as subject=NAME,basis=written"),
        (True, "consent", "must be"),
    ],
)
def test_invalid_consent_is_an_error_of_its_line(read, consent, field, message):
    (error,) = read({"prompt": "a", "face_image": "me.jpg", "consent": consent}).errors
    assert error.field == field
    assert message in error.allowed


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (json.dumps({"prompt": "a", "face_image": "me.jpg", "consent": ANNA}), "s.jsonl"),
        (f"defaults: {{consent: {json.dumps(ANNA)}}}\nshots: [{{prompt: a, face_image: me.jpg}}]", "s.yaml"),
        (f"characters: {{anna: {{face_image: me.jpg, consent: {json.dumps(ANNA)}}}}}\nshots: ['{{anna}}']", "s.yaml"),
        ("prompt;face_image;consent\na;me.jpg;subject=Anna,basis=written,reference=release-12.pdf\n", "s.csv"),
    ],
)
def test_consent_of_line_header_and_character(read, text, name):
    (shot,) = read(text, name, defaults={"consent": SYNTHETIC}).shots
    assert shot.consent == Consent(**ANNA)
    assert read('{"prompt": "a", "face_image": "me.jpg"}', defaults={"consent": SYNTHETIC}).shots[0].consent == Consent(
        **SYNTHETIC
    )


def test_consent_of_a_run_is_recorded_only_where_a_person_may_be_shown(read):
    assert read({"prompt": "a"}, defaults={"consent": ANNA}).shots[0].consent is None
    assert read({"prompt": "a", "image": "me.jpg"}, defaults={"consent": ANNA}).shots[0].consent == Consent(**ANNA)


def test_text_of_a_consent_may_contain_commas():
    assert parse_consent("subject=Lovelace, Ada, basis=contract,reference=a=b,c") == {
        "subject": "Lovelace, Ada", "basis": "contract", "reference": "a=b,c"
    }  # fmt: skip


def test_consent_changes_neither_id_nor_seed_nor_key(read, tiny):
    line = {"prompt": "a", "face_image": str(ASTRONAUT)}
    plain, declared = (read({**line, **more}, profile_defaults=tiny.defaults).shots[0] for more in ({}, {"consent": ANNA}))
    assert (plain.id, plain.seed) == (declared.id, declared.seed)
    planner = ShotPlanner(params_of(tiny, stages_of(plain)), tiny.encode)
    assert plain.consent != declared.consent
    assert planner(plain).key == planner(declared).key


def test_profile_may_not_require_consent(read):
    assert read({"prompt": "a", "face_image": "me.jpg"}, policy=ContentPolicy(require_consent=False)).shots[0].consent is None


def test_invalid_option_is_a_usage_error(read, tmp_path, capsys):
    read({"prompt": "a", "face_image": "me.jpg"})
    script = str(tmp_path / "s.jsonl")
    assert main(["validate", script, "--consent", "subject=A,basis=no"]) == 2
    assert "--consent: consent.basis: got 'no', must be 'self', 'written'" in capsys.readouterr().err
    assert main(["validate", script]) == 3
    assert main(["validate", script, "--consent", "subject=Anna,basis=written"]) == 0
