"""Settings that would be ignored, and files that cannot be used: noted or refused, never silent."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import SYNTHETIC
from vidgen_ray.media import write_png
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import read_script

LORA = {"transformer.x.lora_A.weight": np.ones((1, 2), np.float32), "transformer.x.lora_B.weight": np.ones((2, 1), np.float32)}


@pytest.fixture
def check(tmp_path):
    write_png(tmp_path / "face.png", np.zeros((64, 64, 3), np.uint8))
    save_file(LORA, tmp_path / "a.safetensors")

    def check(line, *, decode_files=False):
        (tmp_path / "s.jsonl").write_text(json.dumps(line) + "\n")
        settings = ScriptSettings(tmp_path / "s.jsonl", profile_defaults={"consent": SYNTHETIC})
        return read_script(settings, decode_files=decode_files)

    return check


@pytest.mark.parametrize(
    ("line", "notes"),
    [
        (
            {"style_prompt": "ink"},
            ["s.jsonl line 1, style_prompt: has no effect; set use_hunyuan_style to true, in mode quality"],
        ),
        ({"style_prompt": "ink", "use_hunyuan_style": True}, []),
        ({"style_prompt": "ink", "use_hunyuan_style": True, "mode": "fast"}, ["use_hunyuan_style to true, in mode quality"]),
        ({"face_index": 1}, ["face_index: has no effect; only these stages read it"]),
        ({"face_index": 1, "face_image": "face.png"}, []),
        ({"retries": 2}, ["retries: has no effect; set min_identity"]),
        ({"min_identity": 0.3}, ["min_identity: has no effect; set face_image"]),
        ({"lora_strength": 0.2}, ["lora_strength: has no effect; set lora"]),
        ({"steps": {"hunyuan": 3}}, ["steps.hunyuan: has no effect"]),
        ({"motion_bucket_id": 127, "generate_video": False}, []),
        ({"image": "face.png", "motion_bucket_id": 9}, []),
    ],
)
def test_settings_without_effect_are_noted(check, line, notes):
    script = check({"prompt": "a", **line})
    assert not script.errors
    assert len(script.shots) == 1
    assert len(script.notes) == len(notes)
    for note, expected in zip(script.notes, notes, strict=True):
        assert expected in note


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ({"steps.flux": 3, "steps": {"flux": 4}}, "steps.flux", "must be set once"),
        ({"lora": ["a.safetensors", "./a.safetensors"]}, "lora", "is listed twice"),
        ({"lora": "https://example.com/a.safetensors"}, "lora", "URLs are not read"),
    ],
)
def test_contradicting_settings_are_refused(check, line, field, message):
    (error,) = check({"prompt": "a", **line}).errors
    assert (error.field, message in error.allowed) == (field, True)


def test_same_prompt_twice_names_what_can_be_done(tmp_path):
    (tmp_path / "s.txt").write_text("a\na\n")
    (error,) = read_script(ScriptSettings(tmp_path / "s.txt")).errors
    assert "line 1 has the same content" in error.allowed
    assert "`variants`" in error.allowed


def test_files_that_cannot_be_used_are_found_before_rendering(check, tmp_path):
    """More such files are in tests/hostile."""
    (tmp_path / "x.png").write_bytes(b"text")
    (tmp_path / "y.safetensors").write_bytes(b"text")
    save_file({"transformer.x.lora_A.weight": np.ones((1, 1), np.int8)}, tmp_path / "z.safetensors")
    save_file({"lora_unet_single_blocks_0.hada_w1_a": np.ones((1, 1), np.float32)}, tmp_path / "h.safetensors")
    for field, name, message in (
        ("image", "x.png", "not a supported image format"),
        ("lora", "y.safetensors", "not a readable .safetensors file"),
        ("lora", "z.safetensors", "has type I8"),
        ("lora", "h.safetensors", "is a LoHa, must be a LoRA for FLUX.1"),
    ):
        line = {"prompt": "a", field: name}
        assert not check(line).errors
        (error,) = check(line, decode_files=True).errors
        assert (error.field, error.got) == (field, "an unusable file")
        assert message in error.allowed


def test_usable_files_pass(check):
    script = check({"prompt": "a", "image": "face.png", "face_image": "face.png", "lora": "a.safetensors"}, decode_files=True)
    assert not script.errors
