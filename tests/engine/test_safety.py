"""Safety checker: what is refused, that nothing passes when it fails, and what is recorded."""

import json
from typing import ClassVar

import numpy as np
import pytest

from tests.batch.test_batch import write_lines
from tests.conftest import ASTRONAUT
from tests.fake_stages import FAKES
from vidgen_ray.cli import main
from vidgen_ray.errors import ScriptError, SetupError
from vidgen_ray.graph import check_profile
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.render.step_runner import StepFailed
from vidgen_ray.safety import CHECKED_FRAMES, Safety, SafetySettings, UnsafeContent
from vidgen_ray.script.check import check_shot


class Checker:
    """Refuses images, clips or prompts, or fails."""

    version = "7"
    shapes: ClassVar[list] = []

    def __init__(self, refuse):
        self.refuse = refuse

    def check_prompt(self, text):
        return "the text is bad" if self.refuse == "prompt" else None

    def check_images(self, images):
        assert images.dtype == np.uint8
        assert images.shape[3] == 3
        self.shapes.append(images.shape[:1])
        if self.refuse == "error":
            raise RuntimeError("out of order")
        if self.refuse == "no answer":
            return False
        is_clip = len(images) > 1
        return "it is bad" if self.refuse == ("clip" if is_clip else "image") else None


def settings(refuse, on_error="refuse"):
    return SafetySettings(checker=f"{__name__}:Checker", options={"refuse": refuse}, on_error=on_error)


@pytest.fixture
def render(tiny, tmp_path):
    """Return a function that renders a shot with fake stages and a safety checker. It returns the pipeline and the record."""

    def render_shot(safety, **fields):
        pipeline = VideoGenerationPipeline(tiny.model_copy(update={"safety": safety}), tmp_path / "out")
        pipeline._loaded = {name: stage(tiny.params(stage)) for name, stage in FAKES.items()}
        shot = check_shot({"id": "s", "prompt": "a", "seed": 7, **fields}, "test", tiny.defaults)
        return pipeline.render(shot)

    return render_shot


@pytest.mark.parametrize(
    ("refuse", "stage", "message"),
    [
        ("image", "flux", "refused by the safety checker: it is bad"),
        ("clip", "svd", "refused by the safety checker: it is bad"),
        ("error", "flux", "not checked, since the safety checker failed: RuntimeError: out of order"),
        ("no answer", "flux", "not checked, since the safety checker failed: TypeError: the checker returned bool"),
    ],
)
def test_refused_content_is_neither_committed_nor_cached(render, tmp_path, refuse, stage, message):
    with pytest.raises(StepFailed) as failed:
        render(settings(refuse))
    assert failed.value.stage == stage
    assert str(failed.value.cause).startswith(message)
    assert isinstance(failed.value.cause, UnsafeContent)
    assert not list((tmp_path / "out").rglob("shot.json"))
    assert len(list((tmp_path / "out").glob("cache/*/*"))) == (stage == "svd"), "what was refused is not cached"


def test_cached_results_are_checked(render, tmp_path):
    render(None, id="first")
    assert len(list((tmp_path / "out").glob("cache/*/*"))) > 1
    with pytest.raises(StepFailed, match="flux: refused"):
        render(settings("image"), id="second")


def test_passed_shot_records_the_checker(render):
    Checker.shapes.clear()
    record = render(settings("nothing"), num_frames=9)
    assert record.safety == f"{__name__}:Checker 7"
    assert Checker.shapes == [(1,), (CHECKED_FRAMES,)], "the base image, and some frames of the clip"
    safety, seen = Safety(settings("nothing")), []
    safety.checker.check_images = lambda images: seen.extend(images[:, 0, 0, 0].tolist())
    safety.check_clip(np.arange(13, dtype=np.uint8)[:, None, None, None].repeat(3, 3))
    assert seen == [0, 4, 8, 12], "with the last frame"
    assert render(settings("error", "allow"), id="allowed").safety == f"{__name__}:Checker 7"
    assert render(None, id="unchecked").safety is None


@pytest.mark.parametrize("fields", [{"generate_video": False, "upscale_video": False}, {"upscale_video": False}])
def test_start_image_is_checked(render, tmp_path, fields):
    with pytest.raises((UnsafeContent, StepFailed), match="it is bad"):
        render(settings("image"), image=str(ASTRONAUT), **fields)
    assert not list((tmp_path / "out").rglob("shot.json"))
    assert not list((tmp_path / "out").glob("cache/*/*"))


def test_refused_prompts_are_rejected_lines(tmp_path, tiny, capsys):
    profile = tmp_path / "p.yaml"
    words = {"checker": "vidgen_ray.safety:WordList", "options": {"words": ["gore", "blood*"]}}
    profile.write_text(json.dumps({**json.loads(tiny.model_dump_json()), "safety": words}))
    lines = [
        {"id": "ok", "prompt": "a red ball", "negative_prompt": "gore"},
        {"id": "bad", "prompt": "Bloody hands"},
        {"id": "part", "prompt": "a category of infrared gorefree photos"},
        {"id": "style", "prompt": "a ball", "use_hunyuan_style": True, "style_prompt": "GORE"},
    ]
    assert main(["validate", str(write_lines(tmp_path / "s.jsonl", lines)), "-p", str(profile), "--json"]) == 3
    errors = json.loads(capsys.readouterr().out)["errors"]
    assert [(error["line"], error["field"], error["allowed"]) for error in errors] == [
        (2, "prompt", "refused by the safety checker: the text has 'Bloody'"),
        (4, "style_prompt", "refused by the safety checker: the text has 'GORE'"),
    ]


@pytest.mark.parametrize("checker", ["no_such_module:make", "vidgen_ray.safety:WordList", "builtins:dict"])
def test_checker_that_cannot_be_loaded_ends_the_run_before_it_starts(tiny, checker):
    broken = tiny.model_copy(update={"safety": SafetySettings(checker=checker)})
    with pytest.raises(SetupError, match=f"safety checker {checker}: cannot be loaded"):
        check_profile(broken)
    with pytest.raises(ScriptError, match="prompt: got 'a', not checked, since the safety checker failed"):
        check_shot({"prompt": "a"}, "test", tiny.defaults, policy=broken.policy)
    allowed = tiny.model_copy(update={"safety": SafetySettings(checker=checker, on_error="allow")})
    check_profile(allowed)
    assert check_shot({"prompt": "a"}, "test", tiny.defaults, policy=allowed.policy).prompt == "a"
