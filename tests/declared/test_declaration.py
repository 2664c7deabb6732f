"""Declarations of diffusers pipelines: the shipped ones fit the installed classes, and what is wrong is said with its line."""

from pathlib import Path

import pytest

from vidgen_ray import declared
from vidgen_ray.declared.arguments import problems_of
from vidgen_ray.declared.declaration import FrameRule, lines_of, read_declaration, shipped
from vidgen_ray.errors import ScriptError

FOLDER = Path(declared.__file__).parent
FILES = sorted(FOLDER.glob("*.yaml"))
VACE = (FOLDER / "wan_vace.yaml").read_text()


def said(folder, text):
    """Return what is said about a declaration, with the class of its pipeline if the file can be read."""
    file = folder / "mine.yaml"
    file.write_text(text)
    try:
        declaration = read_declaration(file)
    except ScriptError as error:
        return str(error)
    return "\n".join(map(str, problems_of(declaration, file.name, lines_of(file))))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_shipped_declaration_fits_the_installed_class(file):
    declaration = read_declaration(file)
    assert declaration.name == file.stem
    assert problems_of(declaration, file.name, lines_of(file)) == []
    assert len(file.read_text().splitlines()) <= 41


def test_shipped_declarations_have_a_name_each():
    assert len(shipped()) == len(FILES)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("WanVACEPipeline", "WanVACEPipelin", "line 4, pipeline: got 'WanVACEPipelin', must match pattern"),
        ("pipeline: WanVACEPipeline", "pipeline: WanVaceePipeline", "line 4, pipeline: got WanVaceePipeline, which diffusers"),
        ("  reference_images: ", "  references: ", "line 8, inputs.references: got references, WanVACEPipeline has no such"),
        ("  prompt: prompt", "  prompt: text", "line 6, inputs.prompt: got 'text', must be 'prompt'"),
        ("  prompt: prompt", "  generator: prompt", "line 6, inputs.generator: got generator, is given by the stage"),
        ("  width: width", "  width: video", "line 5, inputs: got fields that do not fit together, video is no source"),
        (
            "steps: 50",
            "steps: 50\nconstants: {num_videos_per_prompt: one}",
            "constants.num_videos_per_prompt: got 'one', must be a valid int",
        ),
        ("steps: 50", "steps: 50\nconstants: {width: 3}", "constants.width: got fields that do not fit together, is an input"),
        ("steps: 50", "steps: 50\nsteps: 40", "duplicate key 'steps'"),
        ("steps: 50", "stepps: 50", "line 20, stepps: got an unknown field, did you mean steps?"),
        ("4k + 1", "4k+1", "line 17, frames.rule: got '4k+1', must match pattern"),
        ("most: 121, auto: 81", "most: 4, auto: 4", "no number from"),
        ("auto: 81", "auto: 80", "auto is 80, must be 4k + 1"),
        ("float32: [vae]", "float32: [vea]", "line 23, float32: got vea, WanVACEPipeline has the components tokenizer"),
        ("fps: 16\n", "", "fps: got fields that do not fit together, belongs to the slot video"),
        ("guidance: {default: 5.0}\n", "", "guidance: got fields that do not fit together, belongs to the source guidance"),
        ("slot: video", "slot: upscale", "is no source for the slot upscale"),
        ("size: {multiple: 16}", "size: {multiple: 16, buckets: [[100, 64]]}", "100x64 is not a multiple of 16"),
    ],
)
def test_what_is_wrong_is_said_with_line_and_field(old, new, expected, tmp_path):
    assert VACE.count(old) >= 1
    assert expected in said(tmp_path, VACE.replace(old, new, 1))


@pytest.mark.parametrize("text", ["", "- a\n", "name: [\n", "\x00", "a: &b 1\nc: *b\n"])
def test_file_that_is_no_declaration(text, tmp_path):
    assert "mine.yaml" in said(tmp_path, text)


def test_pipeline_that_cannot_report_or_be_seeded_or_called(tmp_path):
    hunyuan = (FOLDER / "hunyuan_video.yaml").read_text()
    assert "progress: got true, must be false" in said(tmp_path, hunyuan.replace("progress: false\n", ""))
    without_image = hunyuan.replace("  image: image\n", "")
    assert "got no source of image, HunyuanVideo15ImageToVideoPipeline cannot be called" in said(tmp_path, without_image)


def test_frame_rules():
    rule = FrameRule(rule="4k + 1", most=17, auto=9)
    assert [frames for frames in range(30) if rule.allows(frames)] == [5, 9, 13, 17]
    assert [frames for frames in range(30) if FrameRule(rule="any", most=5, auto=5).allows(frames)] == [2, 3, 4, 5]
