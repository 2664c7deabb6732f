"""Steps of a shot: numbers are checked, and a cache that cannot be written does not fail a shot."""

import pickle
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from tests.conftest import ASTRONAUT
from tests.fake_stages import FAKES, plan_of, use_fakes, with_actor
from vidgen_ray.engine.calls import CallResult
from vidgen_ray.engine.messages import Kind
from vidgen_ray.errors import SetupError
from vidgen_ray.nets.faces import PackRecogniser
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import shot_path
from vidgen_ray.outputs.stage_cache import entry_path
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.render.cache_writer import CacheSettings
from vidgen_ray.render.shot_files import ShotFiles
from vidgen_ray.render.step_runner import ForeignArtefacts, StepFailed, StepRunner, _is_single_colour
from vidgen_ray.script.check import check_shot
from vidgen_ray.stages.base import Artefacts, Item, pixels_to_uint8
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.weights import resolve

SMALL = {"id": "s", "seed": 7, "width": 64, "height": 64, "num_frames": 2, "scale": 2}
NOT_FINITE = "the model returned NaN or infinite values"


@pytest.fixture
def pipeline(tiny, tmp_path):
    pipeline = VideoGenerationPipeline(tiny, tmp_path / "out")
    yield pipeline
    pipeline.close()


# Numbers


def filled(source, target, value, *, only_first):
    """Write weights with this value in all tensors, or in the first one."""
    weights = load_file(source)
    for name in list(weights)[: 1 if only_first else None]:
        weights[name] = torch.full_like(weights[name], value)
    save_file(weights, target)
    return target


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_must_be_finite(value):
    pixels = torch.full((3, 4, 4), 0.5)
    assert pixels_to_uint8(pixels).max() == 128
    pixels[0, 1, 2] = value
    with pytest.raises(Exception, match=NOT_FINITE):
        pixels_to_uint8(pixels)


def test_lora_of_nan_or_huge_numbers_fails_the_step_and_is_not_cached(pipeline, tmp_path):
    lora = resolve("builtin:tiny/lora.safetensors")
    nan = filled(lora, tmp_path / "nan.safetensors", float("nan"), only_first=True)
    huge = filled(lora, tmp_path / "huge.safetensors", 1e6, only_first=False)
    for path, message in ((nan, r"lora nan\.safetensors: .*lora_A\.weight has NaN or infinite values"), (huge, NOT_FINITE)):
        with pytest.raises(StepFailed, match=rf"lora: {message}"):
            use_fakes(pipeline, "svd", "realesrgan").generate_video("a", **SMALL, lora_path=path)
    assert not list(pipeline.outputs.root.glob(f"{shot_path('s')}/*"))
    assert len(list(pipeline.outputs.root.glob("cache/*/*"))) == 1, "the base image alone"


@pytest.mark.parametrize(("stage_class", "part"), [(SVDStage, "unet"), (FluxStage, "transformer")])
def test_nan_weights_are_refused_when_loaded(tiny, tmp_path, stage_class, part):
    name = stage_class.actor
    folder = shutil.copytree(resolve(tiny.actors[name].weights), tmp_path / name)
    file = folder / part / "diffusion_pytorch_model.safetensors"
    filled(file, file, float("nan"), only_first=True)
    stage = stage_class(with_actor(tiny, name, weights=str(folder)).params(stage_class))
    with pytest.raises(SetupError, match=rf"{name}: {part}: \S+ has NaN or infinite values; copy the weights again"):
        stage.load()


def test_prompt_embeddings_must_be_finite(pipeline, monkeypatch):
    encode = T5EncoderModel.forward

    def encode_not_finite(self, *args, **kwargs):
        output = encode(self, *args, **kwargs)
        output[0][0, 0, 0] = np.inf
        return output

    monkeypatch.setattr(T5EncoderModel, "forward", encode_not_finite)
    monkeypatch.setattr(FluxTransformer2DModel, "forward", lambda *_, **__: pytest.fail("the embeddings were used"))
    with pytest.raises(StepFailed, match=f"flux: {NOT_FINITE}"):
        # The model may still cache the prompts of other tests.
        use_fakes(pipeline, "svd", "realesrgan").generate_video("a prompt with infinity", **SMALL)
    assert not (pipeline.outputs.root / "cache").exists()


def test_latents_must_be_finite(pipeline, monkeypatch):
    """The pipeline clamps pixels, so infinity would become white."""
    step = EulerDiscreteScheduler.step

    def step_to_infinity(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        return EulerDiscreteSchedulerOutput(torch.full_like(result.prev_sample, float("inf")))

    monkeypatch.setattr(EulerDiscreteScheduler, "step", step_to_infinity)
    with pytest.raises(StepFailed, match=f"svd: {NOT_FINITE}"):
        use_fakes(pipeline, "flux", "realesrgan").generate_video("a", **SMALL)
    assert not list(pipeline.outputs.root.glob("cache/*/*/frames.mkv"))


def test_face_features_must_be_finite(pipeline, monkeypatch):
    monkeypatch.setattr(PackRecogniser, "embed", lambda self, crops: np.full((len(crops), 512), np.nan, np.float32))
    with pytest.raises(StepFailed, match=f"instantid: {NOT_FINITE}"):
        use_fakes(pipeline, *FAKES.keys() - {"instantid"}).generate_video("a", **SMALL, face_image=ASTRONAUT)
    assert not (pipeline.outputs.root / "cache").exists()


def test_upscaler_of_nan_or_huge_numbers_fails_the_step(tiny, tmp_path):
    weights = resolve("builtin:realesrgan") / "animevideov3.safetensors"
    filled(weights, tmp_path / "nan.safetensors", float("nan"), only_first=True)
    save_file({name: tensor * 1e30 for name, tensor in load_file(weights).items()}, tmp_path / "huge.safetensors")
    profile = with_actor(tiny, "realesrgan", weights=str(tmp_path))
    pipeline = use_fakes(VideoGenerationPipeline(profile, tmp_path / "out"), "flux", "svd")
    for name, message in (("nan", r"upscaler nan: body\.0\.bias has NaN or infinite values"), ("huge", NOT_FINITE)):
        with pytest.raises(StepFailed, match=rf"realesrgan: .*{message}"):
            pipeline.generate_video("a", **SMALL, upscaler=name)
    assert not list(pipeline.outputs.root.glob(f"{shot_path('s')}/*"))


# The stage cache, and results that cannot be right


def planned(profile, shot, cache=None):
    """Return the plan of a shot, its fake stages by name, and a runner with them."""
    plan = plan_of(profile, shot)
    stages = {step.stage: FAKES[step.stage](profile.params(FAKES[step.stage])) for step in plan.steps}
    opened = None if cache is None else CacheSettings("all", wait=True).open(cache)
    return plan, stages, StepRunner(list(stages.values()), 0, opened)


def test_unwritable_cache_does_not_fail_the_shot(pipeline):
    # A file in place of the folder: permissions do not stop root.
    (pipeline.outputs.root / "cache").write_bytes(b"")
    record = use_fakes(pipeline).generate_video("a", **SMALL)["record"]
    assert set(record.files) == {"image.png", "video.mp4", "hd.mp4"}


def test_result_that_depends_on_lower_memory_settings_is_not_cached(tiny, tmp_path):
    profile = with_actor(tiny, "svd", options={"decode_chunk_frames": 4})
    fields = {**SMALL, "prompt": "decoder-oom", "face_image": str(ASTRONAUT), "identity": "none", "upscale_video": False}
    shot = check_shot(fields, "test", profile.defaults)
    cache = OutputFolder(tmp_path).stage_cache
    plan, _, _ = planned(profile, shot)
    artefacts, records = Artefacts(), []
    # One process per step: what a step was made from must be known in the next process.
    for step in plan.steps:
        _, _, runner = planned(profile, shot, cache)
        runner.load()
        item, step_records = runner.run(plan, Item(shot, artefacts), [step.stage])
        artefacts = pickle.loads(pickle.dumps(item.artefacts))
        records += step_records
    assert [record.recovered for record in records] == [None, None, None, "decode_chunk_frames=2", None]
    assert {step.stage: cache.has(step.key) for step in plan.steps} == {
        "instantid": True, "flux": True, "image_likeness": True, "svd": False, "clip_likeness": False
    }  # fmt: skip


@pytest.mark.parametrize("stage", ["flux", "svd"])
def test_result_of_another_size_or_type_or_of_a_single_colour_fails_its_step_and_is_never_taken_from_the_cache(
    tiny, make_shot, tmp_path, stage
):
    shot, cache = make_shot(prompt="a", upscale_video=False), OutputFolder(tmp_path).stage_cache
    plan, stages, runner = planned(tiny, shot, cache)
    keys = {step.stage: step.key for step in plan.steps}
    item, _ = runner.run(plan, Item(shot), keys)
    small = {"flux": {"image": item.artefacts["image"][:16]}, "svd": {"frames": item.artefacts["frames"][:1]}}[stage]
    cache.drop([keys[stage]])
    cache.put(keys[stage], small)
    again, records = runner.run(plan, Item(shot), keys)
    assert {record.stage: record.cached for record in records} == {"flux": stage != "flux", "svd": stage != "svd"}
    np.testing.assert_array_equal(again.artefacts["frames"], item.artefacts["frames"])
    assert runner.run(plan, Item(shot), keys)[1][0].cached

    cache.drop(keys.values())
    (name,) = small
    for wrong, text in (
        (small, r"of shape \(.*\) instead of"),
        ({name: np.full_like(item.artefacts[name], 7)}, "of a single colour"),
        ({name: item.artefacts[name] / 255}, "of float64 instead of uint8"),
    ):
        stages[stage].one = lambda *_, wrong=wrong: wrong
        with pytest.raises(StepFailed, match=rf"{stage}: the model made an? \w+ {text}"):
            runner.run(plan, Item(shot), keys)
        assert not cache.has(keys[stage])


def test_look_for_a_single_colour_ends_at_the_first_part_with_another():
    clip = np.full((25, 64, 64, 3), 7, np.uint8)
    assert [*map(_is_single_colour, (clip, clip[0]))] == [True, True]
    clip[:, -1, -1] = 0
    tracemalloc.start()
    try:
        assert [*map(_is_single_colour, (clip, clip[0]))] == [False, False]
        assert tracemalloc.get_traced_memory()[1] < clip.nbytes / 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("receiver", ["svd", "realesrgan", "the encoder"])
def test_artefacts_of_another_shot_are_refused_by_every_receiver(tiny, make_shot, tmp_path, receiver):
    """The shot runs again: the receiver is not the cause."""
    items = []
    for prompt in "ab":
        plan, _, runner = planned(tiny, make_shot(prompt=prompt, scale=2))
        items.append(runner.run(plan, Item(plan.shot), ["flux"] if receiver == "svd" else ["flux", "svd"])[0])
    foreign = items[0]
    receive = {
        "svd": lambda: runner.run(plan, Item(plan.shot, foreign.artefacts), ["svd"]),
        "realesrgan": lambda: runner.run_chunk(plan, ["realesrgan"], slice(0, 1), foreign.artefacts),
        "the encoder": lambda: ShotFiles(plan, foreign, OutputFolder(tmp_path), tiny.encode),
    }[receiver]
    with pytest.raises((StepFailed, ForeignArtefacts), match=r"of the step \w{12}, must be of \w{12}") as raised:
        receive()
    failed = raised.value if isinstance(raised.value, StepFailed) else StepFailed("output", raised.value)
    assert CallResult.of_failure(failed).kind is Kind.FOREIGN


def test_cache_entry_of_another_step_is_not_used(tiny, make_shot, tmp_path):
    cache = OutputFolder(tmp_path).stage_cache
    keys = []
    for seed, prompt in enumerate("ab"):
        plan, _, runner = planned(tiny, make_shot(prompt=prompt, seed=seed, generate_video=False), cache)
        image = runner.run(plan, Item(plan.shot), ["flux"])[0].artefacts["image"]
        keys.append(plan.steps[0].key)
    first, second = (tmp_path / entry_path(key) for key in keys)
    shutil.rmtree(second)
    shutil.copytree(first, second)
    again, (record,) = runner.run(plan, Item(plan.shot), ["flux"])
    assert not record.cached
    np.testing.assert_array_equal(again.artefacts["image"], image)
    assert cache.has(keys[0])
