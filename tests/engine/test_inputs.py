"""Inputs and weights are compared with their planned digests when they are read."""

import shutil
from weakref import WeakValueDictionary

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import ASTRONAUT, SYNTHETIC
from tests.fake_stages import FAKES, plan_of, with_actor
from vidgen_ray.engine.calls import CallResult
from vidgen_ray.engine.messages import Kind
from vidgen_ray.errors import InputChanged, OtherWeights
from vidgen_ray.media.images import read_image, write_png
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.render.shot_files import ShotFiles
from vidgen_ray.render.step_runner import StepFailed, StepRunner
from vidgen_ray.script.check import check_shot
from vidgen_ray.stages.base import Artefacts, Item
from vidgen_ray.stages.flux_model import FluxModel
from vidgen_ray.weights import resolve

SMALL = {"id": "s", "prompt": "a", "seed": 7, "width": 64, "height": 64, "num_frames": 2, "upscale_video": False}


def planned(profile, **fields):
    return plan_of(profile, check_shot({**SMALL, "consent": SYNTHETIC, **fields}, "test", profile.defaults))


def run(profile, plan, stages=FAKES):
    runner = StepRunner([stages[step.stage](profile.params(stages[step.stage])) for step in plan.steps], 0, None)
    runner.load()
    return runner.run(plan, Item(plan.shot), [step.stage for step in plan.steps])


def test_photo_replaced_after_planning_fails_the_shot(tiny, tmp_path):
    photo = tmp_path / "photo.jpg"
    shutil.copy(ASTRONAUT, photo)
    plan = planned(tiny, face_image=str(photo))
    write_png(photo, read_image(photo)[:, ::-1])
    with pytest.raises(StepFailed, match=r"instantid: \S+photo\.jpg: changed since the run planned this shot") as raised:
        run(tiny, plan)
    assert isinstance(raised.value.cause, InputChanged)
    assert CallResult.of_failure(raised.value).kind is Kind.INPUT
    run(tiny, planned(tiny, face_image=str(photo)))


def test_start_image_replaced_after_planning_is_not_committed(tiny, tmp_path):
    image = tmp_path / "red.png"
    write_png(image, np.full((64, 64, 3), (255, 0, 0), np.uint8))
    plan = planned(tiny, image=str(image))
    red = image.read_bytes()
    write_png(image, np.full((64, 64, 3), (0, 0, 255), np.uint8))
    with pytest.raises(StepFailed, match=r"svd: \S+red\.png: changed since"):
        run(tiny, plan)
    outputs = OutputFolder(tmp_path / "out")
    with pytest.raises(InputChanged):
        ShotFiles(plan, Item(plan.shot, Artefacts(frames=np.zeros((2, 64, 64, 3), np.uint8))), outputs, tiny.encode)
    assert not list((tmp_path / "out").glob("shots/*"))
    image.write_bytes(red)
    item, _ = run(tiny, plan)
    assert item.artefacts["frames"][0, 0, 0].tolist() == [255, 0, 0]


def test_lora_replaced_after_planning_is_not_loaded(tiny, tmp_path, monkeypatch):
    lora = tmp_path / "style.safetensors"
    shutil.copy(resolve("builtin:tiny/lora.safetensors"), lora)
    pipeline = VideoGenerationPipeline(tiny, tmp_path / "out")
    fields = {**SMALL, "generate_video": False, "lora": str(lora)}
    first = pipeline.render(check_shot(fields, "test", tiny.defaults))
    plan = planned(tiny, generate_video=False, lora=str(lora))
    content = lora.read_bytes()
    save_file({name: -tensor for name, tensor in load_file(lora).items()}, lora)
    runner = StepRunner(list(pipeline._loaded.values()), 0, None)
    # The content of the plan is loaded already.
    item, records = runner.run(plan, Item(plan.shot), ["flux", "lora"])
    assert records[1].adapter_loads == 0
    pipeline.close()
    # The model of another process, without loaded LoRAs.
    monkeypatch.setattr(FluxModel, "_instances", WeakValueDictionary())
    runner = StepRunner([type(stage)(stage.params) for stage in runner.stages.values()], 0, None)
    runner.load()
    with pytest.raises(StepFailed, match=r"lora: \S+style\.safetensors: changed since the run planned this shot"):
        runner.run(plan, Item(plan.shot), ["flux", "lora"])
    lora.write_bytes(content)
    again, _ = runner.run(plan, Item(plan.shot), ["flux", "lora"])
    np.testing.assert_array_equal(again.artefacts["image"], item.artefacts["image"])
    assert [step.key for step in first.stages] == [step.key for step in plan.steps]


def test_weights_that_are_not_those_of_the_plan_are_noticed(tiny, tmp_path):
    folder = shutil.copytree(resolve("builtin:tiny/svd"), tmp_path / "svd")
    profile = with_actor(tiny, "svd", weights=str(folder))
    plan = planned(profile)
    (folder / "README.md").write_text("changes nothing")
    run(profile, plan)
    assert planned(profile).key == plan.key

    with (folder / "unet" / "config.json").open("a") as config:
        config.write(" ")
    # On a node with other weights, before a result is made.
    with pytest.raises(
        StepFailed, match=r"svd: node \S+ has other weights of svd than the driver: \S+svd has the digest"
    ) as raised:
        run(profile, plan)
    assert isinstance(raised.value.cause, OtherWeights)
    result = CallResult.of_failure(raised.value)
    assert (result.kind, result.context_broken) == (Kind.ERROR, True), "not the line's fault; a new process loads again"

    # Replaced after loading.
    runner = StepRunner([FAKES[name](profile.params(FAKES[name])) for name in ("flux", "svd")], 0, None)
    runner.load()
    with (folder / "model_index.json").open("a") as index:
        index.write(" ")
    plan = planned(profile)
    with pytest.raises(StepFailed, match=r"model_index\.json changed after svd loaded it; load the weights again"):
        runner.run(plan, Item(plan.shot), ["flux", "svd"])
    runner.load()
    runner.run(plan, Item(plan.shot), ["flux", "svd"])
