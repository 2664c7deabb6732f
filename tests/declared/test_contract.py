"""Contract of each declaration with its diffusers class, on small random networks: the stage gives what the pipeline gives, and
every declared input has an effect."""

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image

from tests.stages.test_parity import as_uint8, gradient_image
from vidgen_ray.bench.declared_pipelines import tiny_pipeline
from vidgen_ray.declared.arguments import class_of
from vidgen_ray.declared.declaration import ValueSource, shipped
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.declared import stage_of

IMAGE = gradient_image(64, 64)
LAST = IMAGE[::-1, ::-1].copy()
OTHER = 255 - IMAGE
WITHOUT_STAGE = {"kandinsky_6_sr"}
"""Declarations that no generic stage runs: there is none for the slot upscale."""
NAMES = [name for name in shipped() if name not in WITHOUT_STAGE]
BORROWED = {"video": "wan", "image": "klein", "restyle": "qwen_edit"}
"""Slot -> name of a stage whose settings shots have."""
OTHER_FIELDS = {
    ValueSource.PROMPT: {"prompt": "two dogs in the snow"},
    ValueSource.INSTRUCTION: {"style_prompt": "two dogs in the snow"},
    ValueSource.NEGATIVE_PROMPT: {"negative_prompt": "two dogs in the snow"},
    ValueSource.FPS: {"fps": 30},
    ValueSource.STRENGTH: {"identity_strength": 0.2, "style_strength": 0.2},
    ValueSource.STEPS: {"steps": 3},
    ValueSource.GUIDANCE: {"guidance": 4.0},
}
"""Source -> shot fields with another value of it."""

UNCHANGED = {ValueSource.PIXELS, ValueSource.WIDTH, ValueSource.HEIGHT, ValueSource.NUM_FRAMES}


class Contract:
    """A loaded stage of a declaration, and what a shot gives to it."""

    def __init__(self, name, folder, make_shot, photo):
        self.declaration, self.folder, self.make_shot = shipped()[name], folder, make_shot
        tiny_pipeline(self.declaration).save_pretrained(folder)
        self.of = BORROWED[self.declaration.slot]
        self.stage_class = stage_of(self.declaration.model_copy(update={"name": self.of}))
        self.stage = self.stage_class(self.stage_class.Params(weights=folder, cpu_offload=False, threads=1))
        self.stage.load()
        self.sources = set(self.declaration.inputs.values())
        self.photos = (photo[:128, :128], photo[100:228, 100:228])[: self.declaration.most_references]
        rule = self.declaration.frames
        self.width = self.height = 64
        self.frames = next(filter(rule.allows, range(rule.most + 1))) if rule else None

    def shot(self, steps=2, guidance=2.0, **fields):
        """Return a shot that reaches every source of the declaration."""
        made = {"width": self.width, "height": self.height, "seed": 3, "negative_prompt": "blurred", "steps": {self.of: steps}}
        if self.declaration.guidance:
            made["guidance"] = {self.of: guidance}
        if self.declaration.slot == "video":
            clip = {
                "generate_video": True,
                "video_model": "wan",
                "num_frames": self.frames,
                "fps": 8,
                "motion_prompt": "he walks",
            }
            made |= clip
        if self.declaration.slot == "restyle":
            made |= {"use_hunyuan_style": True, "style_model": "qwen-edit", "style_prompt": "ink"}
        if self.declaration.slot == "image" or self.takes_photos:
            made |= {"image_model": "klein"}
        if self.takes_photos:
            made |= {"face_image": "x.jpg", "identity": "reference"}
        if ValueSource.LAST_IMAGE in self.sources:
            made |= {"last_image": "last.png"}
        return self.make_shot(**{**made, **fields})

    @property
    def takes_photos(self):
        return bool(self.sources & {ValueSource.REFERENCES, ValueSource.IMAGE_AND_REFERENCES})

    def item(self, shot, **seen):
        return Item(shot, {"image": IMAGE, "last_image": LAST, "photos": self.photos, **seen})

    def rendered(self, shot=None, **seen):
        """Return what the stage makes, (H, W, 3) or (frames, H, W, 3)."""
        (result,) = self.stage(self.item(shot or self.shot(), **seen)).values()
        return result

    def rendered_with_few_tokens(self):
        """Return what the stage makes if the text encoder reads only the beginning of the prompt."""
        stage = self.stage_class(self.stage.params.model_copy(update={"text_tokens": 8}))
        stage.load()
        (result,) = stage(self.item(self.shot())).values()
        return result

    def called(self, shot):
        """Return what the pipeline itself makes of the same values."""
        declaration, picture = self.declaration, Image.fromarray(IMAGE)
        photos = [Image.fromarray(each) for each in self.photos]
        values = {
            ValueSource.PROMPT: "a photo of a man, he walks" if declaration.slot == "video" else "a photo of a man",
            ValueSource.INSTRUCTION: (declaration.instruction or "").replace("{style}", "ink"),
            ValueSource.NEGATIVE_PROMPT: "blurred",
            ValueSource.IMAGE: picture,
            ValueSource.LAST_IMAGE: Image.fromarray(LAST),
            ValueSource.REFERENCES: photos,
            ValueSource.IMAGE_AND_REFERENCES: [picture, *photos],
            ValueSource.PIXELS: self.width * self.height,
            ValueSource.WIDTH: self.width,
            ValueSource.HEIGHT: self.height,
            ValueSource.NUM_FRAMES: self.frames,
            ValueSource.FPS: 8,
            ValueSource.STRENGTH: 0.5 if declaration.slot == "restyle" else 1.0,
            ValueSource.STEPS: 2,
            ValueSource.GUIDANCE: 2.0,
            ValueSource.TEXT_TOKENS: declaration.text.tokens,
        }
        arguments = {argument: values[source] for argument, source in declaration.inputs.items()}
        pipe = class_of(declaration).from_pretrained(str(self.folder))
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator("cpu").manual_seed(self.stage_class.generator_seed(shot))
        result = pipe(**arguments, **declaration.constants, generator=generator, output_type="np")
        assert hasattr(pipe, "load_lora_weights") == declaration.has_loras
        assert hasattr(pipe.vae, "enable_tiling") == declaration.tiles
        if declaration.returns.sound:
            sound = getattr(result, declaration.returns.sound)
            assert abs(sound.shape[-1] / declaration.returns.sound_hz - self.frames / 8) < 0.1
        return as_uint8(getattr(result, declaration.returns.images)[0])[..., :3]


@pytest.fixture(scope="module")
def small_edits():
    """Qwen-Image-Edit shrinks its images to 128x128 in place of 1024x1024, which takes many seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
            patch.setattr(pipeline_qwenimage_edit_plus, name, 128 * 128)
        yield


@pytest.fixture(scope="module", params=NAMES)
def contract(request, tmp_path_factory, make_shot, photo, small_edits):
    return Contract(request.param, tmp_path_factory.mktemp(request.param), make_shot, photo)


def test_stage_gives_the_bytes_of_the_pipeline(contract):
    shot = contract.shot()
    made = contract.rendered(shot)
    assert np.array_equal(made, contract.called(shot))
    assert made.min() != made.max()


def test_same_seed_gives_the_same_bytes_after_another_shot(contract):
    first = contract.rendered()
    assert not np.array_equal(contract.rendered(contract.shot(seed=4)), first)
    assert np.array_equal(contract.rendered(), first)


def test_every_input_has_an_effect(contract):
    first = contract.rendered()
    without_effect = []
    for source in sorted(contract.sources - UNCHANGED):
        results = [contract.rendered(contract.shot(**OTHER_FIELDS[source]))] if source in OTHER_FIELDS else []
        if source in (ValueSource.IMAGE, ValueSource.IMAGE_AND_REFERENCES):
            results.append(contract.rendered(image=OTHER))
        if source is ValueSource.LAST_IMAGE:
            results += [contract.rendered(last_image=OTHER), contract.rendered(contract.shot(last_image=None))]
        if source in (ValueSource.REFERENCES, ValueSource.IMAGE_AND_REFERENCES):
            results.append(contract.rendered(photos=tuple(255 - each for each in contract.photos)))
            results.append(contract.rendered(contract.shot(identity_strength=0)))
        if source is ValueSource.TEXT_TOKENS:
            results.append(contract.rendered_with_few_tokens())
        without_effect += [str(source) for result in results if np.array_equal(result, first)]
    assert without_effect == []


def test_upscaler_can_be_called():
    declaration = shipped()["kandinsky_6_sr"]
    pipe = tiny_pipeline(declaration)
    pipe.set_progress_bar_config(disable=True)
    frames = [Image.fromarray(gradient_image(128, 128)[::turn]) for turn in (1, -1, 1, -1, 1)]
    generator = torch.Generator("cpu").manual_seed(0)
    made = pipe(video=frames, num_inference_steps=2, **declaration.constants, generator=generator, output_type="pt")
    side = round(128 * declaration.scale)
    assert getattr(made, declaration.returns.images).shape == (1, 5, 3, side, side)
