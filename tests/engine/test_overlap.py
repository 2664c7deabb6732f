"""Overlap of the calls of a worker: a clip is decoded while the next one is denoised, with the same bytes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stages.test_parity import gradient_image
from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine.cache_writer import CacheSettings
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.worker import MAX_CONCURRENT_CALLS, CallTurns, Worker
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.layout import WorkerSpec
from vidgen_ray.profile import Profile
from vidgen_ray.shot import VideoLora
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.ltx import LTXStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.weights import resolve

MODELS = {"svd": SVDStage, "wan": WanStage, "ltx": LTXStage}
TIMEOUT_S = 60
LORA = VideoLora(path=str(resolve("builtin:tiny/wan-lora.safetensors")))


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


def profile_with(tiny, model, *, device="cpu", **options):
    """Return the profile `tiny` with these options of a video model."""
    content = tiny.model_dump(mode="json")
    content["actors"][model] |= {"device": device, "options": content["actors"][model]["options"] | options}
    return Profile.model_validate(content)


class Observed:
    """Mixin of a video stage: sets `begun[id]` when it generates the clip of a shot, and decodes when shot 1 has begun."""

    overlaps = True
    failures = 0

    def load(self):
        self.begun = {"0": threading.Event(), "1": threading.Event()}
        self.waited = []
        super().load()
        self._observe_decoder()

    def move(self, device):
        super().move(device)
        self._observe_decoder()

    def _observe_decoder(self):
        decode = self._decoder.decode

        def wait_and_decode(*args, **kwargs):
            self.waited.append(self.begun["1"].wait(TIMEOUT_S if self.overlaps else 0))
            if self.failures:
                self.failures -= 1
                raise RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB")
            return decode(*args, **kwargs)

        self._decoder.decode = wait_and_decode

    def _generate(self, item):
        self.begun[item.shot.id].set()
        return super()._generate(item)


def worker_of(tiny, tmp_path, model, *, device="cpu", swap_groups=(), **attributes):
    """Return a worker whose video model is observed. `attributes`: those of the observed class."""
    observed = type("ObservedStage", (Observed, MODELS[model]), attributes)
    outputs = OutputFolder(tmp_path)
    profile = profile_with(tiny, model, device=device, overlap_shots=True)
    config = EngineConfig("test", profile, outputs, {model: observed}, CacheSettings("none"))
    worker = Worker(config, WorkerSpec((model,), cpus=1, gpus=0, swap_groups=swap_groups))
    assert worker.load() is None
    return worker


def call(worker, shot, model):
    inputs = {lora.path: digest(Path(lora.path)) for lora in shot.video_lora}
    plan = ShotPlan(shot=shot, steps=(Step(stage=model, key=64 * "0", weights=()),), key=64 * "0", inputs=inputs)
    result, artefacts = worker.run(int(shot.id), plan, (model,), {"image": gradient_image()})
    assert result.failure is None, result.failure
    return result.records[0], artefacts["frames"]


def run_at_once(worker, shots, model):
    """Send the calls of two shots as the engine does, the second one while the first one runs."""
    with ThreadPoolExecutor(MAX_CONCURRENT_CALLS) as threads:
        first = threads.submit(call, worker, shots[0], model)
        assert worker._loaded.stages[model].begun["0"].wait(TIMEOUT_S)
        second = threads.submit(call, worker, shots[1], model)
        return [first.result(), second.result()]


def expected(tiny, shot, model, device="cpu"):
    stage = MODELS[model](profile_with(tiny, model, device=device).params(MODELS[model]))
    with stage:
        return stage([Item(shot, {"image": gradient_image()})])[0]["frames"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_clip_is_decoded_while_the_next_one_is_denoised(tiny, make_shot, tmp_path, model, device):
    shots = [make_shot(id=str(n), seed=n, video_model=model, num_frames=9, fps=25) for n in range(2)]
    worker = worker_of(tiny, tmp_path, model, device=device)
    clips = [clip for _, clip in run_at_once(worker, shots, model)]
    assert all(worker._loaded.stages[model].waited), "the second shot began only after the first one had been decoded"
    for shot, clip in zip(shots, clips, strict=True):
        assert np.array_equal(clip, expected(tiny, shot, model, device))


def test_lora_loads_are_counted_for_their_own_shot(tiny, make_shot, tmp_path):
    shots = [make_shot(id=str(n), video_model="wan", num_frames=9, fps=25) for n in range(2)]
    shots[1] = shots[1].model_copy(update={"video_lora": (LORA,)})
    records = [record for record, _ in run_at_once(worker_of(tiny, tmp_path, "wan"), shots, "wan")]
    assert [record.adapter_loads for record in records] == [0, 1]


def test_decoding_that_runs_out_of_memory_is_repeated_alone(tiny, make_shot, tmp_path):
    shots = [make_shot(id=str(n), seed=n, video_model="wan", num_frames=9, fps=25) for n in range(2)]
    (record, clip), (_, other) = run_at_once(worker_of(tiny, tmp_path, "wan", failures=2), shots, "wan")
    assert record.recovered in ("memory freed", "overlap_shots=False")
    assert np.array_equal(clip, expected(tiny, shots[0], "wan"))
    assert np.array_equal(other, expected(tiny, shots[1], "wan"))


def test_stages_that_are_swapped_do_not_overlap(tiny, make_shot, tmp_path):
    worker = worker_of(tiny, tmp_path, "wan", swap_groups=(("wan",),), overlaps=False)
    run_at_once(worker, [make_shot(id=str(n), video_model="wan", num_frames=9, fps=25) for n in range(2)], "wan")
    assert worker._loaded.stages["wan"].waited == [False, True], "decoded before the second shot began"


def test_texts_are_encoded_before_the_turn(tiny, make_shot, monkeypatch):
    shot = make_shot(video_model="wan", num_frames=9, fps=25, negative_prompt="blurred")
    stage = WanStage(profile_with(tiny, "wan", overlap_shots=True).params(WanStage))
    with stage:
        stage.prepare(shot)
        monkeypatch.setattr(stage.pipe, "encode_prompt", lambda *_, **__: pytest.fail("encoded again"), raising=True)
        # The pipeline itself returns given embeddings.
        assert set(stage._text_arguments(shot)) == {"prompt_embeds", "negative_prompt_embeds"}


def test_failed_end_gets_its_turn_back_while_another_call_waits_for_its_end():
    turns, order = CallTurns(), []
    second_has_turn, first_at_end = threading.Event(), threading.Event()

    def first():
        with turns.next() as turn:
            try:
                with turn.end():
                    first_at_end.set()
                    assert second_has_turn.wait(TIMEOUT_S)
                    raise ValueError
            except ValueError:
                order.append("first has its turn again")

    def second():
        assert first_at_end.wait(TIMEOUT_S)
        with turns.next() as turn:
            second_has_turn.set()
            with turn.end():
                order.append("second is at its end")

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(first), threads.submit(second)]:
            done.result(TIMEOUT_S)
    assert sorted(order) == ["first has its turn again", "second is at its end"]
    with turns.next():
        pass  # both locks are free again
