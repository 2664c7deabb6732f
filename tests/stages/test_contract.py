"""Contract tests of all stages in the graph. A new stage needs no test code here.

Results of the same call are equal to the bit: the same kernels run in the same order, and sums do not depend on addresses.
"""

import gc
import pickle
from contextlib import ExitStack
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.remote.fake_server import FakeServer, profile_of
from vidgen_ray.errors import Cancelled
from vidgen_ray.graph import STAGES
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, ChunkedStage, Item, frame_chunks, frames_after, progress_callback
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.weights import resolve

LORA = str(resolve("builtin:tiny/lora.safetensors"))


class Spy:
    """A shot that records which of its fields are read, named as in `reads`."""

    def __init__(self, target, seen, prefix=""):
        self._target, self._seen, self._prefix = target, seen, prefix

    def __getattr__(self, name):
        value = getattr(self._target, name)
        if name in ("steps", "guidance"):
            return Spy(value, self._seen, f"{name}.")
        self._seen.add("seed" if name in ("required_seed", "derived_seed") else self._prefix + name)
        return value


@pytest.fixture(scope="module")
def face(tiny, photo):
    """Features of the astronaut photo, with all embeddings."""
    with InstantIDStage(tiny.params(InstantIDStage)) as stage:
        return stage.features([photo])


@pytest.fixture(scope="module")
def item(make_shot, photo, face, loaded):
    """A shot conditioned on a face by the stage's identity method, with all artefacts."""
    y, x = np.mgrid[0:64, 0:64]
    picture = np.stack([x * 4, y * 4, x + y], -1).astype(np.uint8)
    # What the tiny detector takes for a face.
    picture[(x - 32) ** 2 + (y - 32) ** 2 < 20**2] = (224, 172, 140)
    # 9 frames are 4k + 1 and 8k + 1, which Wan and LTX need. Stages that can make any number are faster with 3.
    n_frames = 9 if "num_frames" in loaded.examples[0] else 3
    shot = make_shot(
        face_image="x.jpg",
        negative_prompt="blurred",
        lora=[LORA],
        use_hunyuan_style=True,
        style_prompt="ink",
        identity="reference" if any(each.get("identity") == "reference" for each in loaded.examples) else "infusenet",
        num_frames=n_frames,
        width=64,
    )
    # Frames of chunked stages may have any size.
    frame = picture[:32] if isinstance(loaded, ChunkedStage) else picture
    frames = np.repeat(frame[None], n_frames, axis=0)
    return Item(shot, {"photos": (photo,), "face": face, "image": picture, "frames": frames})


@pytest.fixture(scope="module", params=STAGES, ids=lambda stage: stage.name)
def loaded(request, tiny, tmp_path_factory):
    with ExitStack() as stack:
        profile = tiny
        if request.param.places(tiny.options_of(request.param)):
            server = stack.enter_context(FakeServer(tmp_path_factory.mktemp("server")))
            profile = profile_of(server.url)
        stage = request.param(profile.params(request.param))
        before = set(vars(stage))
        stage.close()
        stage.load()
        yield stage
        stage.close()
        stage.close()
        assert set(vars(stage)) == before


OTHER_CALL = {"mode": "fast", "prompt": "another", "seed": 99}
NO_IDENTITY = ({"face_image": ()}, {"identity": "none", "pose": "none"}, {"identity_strength": 0.0})
"""Fields of shots that do not use the face."""


class Rendered(NamedTuple):
    shot: Shot
    seen: set
    """Fields of the shot that the stage has read."""
    result: Artefacts
    reports: list
    """Progress: name, finished steps and steps."""


@pytest.fixture(scope="module")
def renders(loaded, item):
    """The item and variants of it, made from the artefacts that the stage declares, which must not change."""
    for_faces = NO_IDENTITY[1:] if loaded.identity_inputs else ()
    renders = []
    for fields in ({}, OTHER_CALL, NO_IDENTITY[0], *for_faces):
        shot, seen, reports = item.shot.model_copy(update=fields), set(), []
        needed = {name: item.artefacts[name] for name in loaded.needs(shot)}
        before = pickle.dumps(needed)
        with progress_callback(lambda *report, reports=reports: reports.append(report)):
            result = loaded(Item(Spy(shot, seen), needed))
        renders.append(Rendered(shot, seen, result, reports))
        assert pickle.dumps(needed) == before, "an input was modified"
    return renders


def test_declared_fields_and_artefacts_exist(loaded):
    shot = Shot(prompt="a", seed=1)
    for field in (
        loaded.chosen_by,
        *filter(None, (loaded.identity_field, loaded.lora_field)),
        *loaded.reads,
        *loaded.identity_fields,
    ):
        head, _, tail = field.partition(".")
        assert hasattr(getattr(shot, head), tail) if tail else hasattr(shot, head)
    assert {*loaded.takes, *loaded.identity_inputs, *loaded.writes} <= set(Artefacts.__annotations__)
    assert not set(loaded.reads) & set(loaded.identity_fields)
    assert not set(loaded.takes) & set(loaded.identity_inputs)
    assert loaded.params.model_config["frozen"]


def test_declarations_for_people_and_planner_are_complete(loaded):
    assert loaded.reference_s > 0
    assert set(loaded.clip_only_fields) <= set(Shot.model_fields)
    assert set(loaded.common_settings) <= {"steps", "guidance"}
    assert all(f"{setting}.{loaded.name}" in loaded.reads for setting in loaded.common_settings)
    shots = [Shot(prompt="a", seed=1, **example) for example in loaded.examples]
    assert shots
    assert all(loaded.applies(shot) for shot in shots)
    assert loaded.relative_cost(shots[0]) > 0
    if {"frames", "hd_frames"}.isdisjoint({*loaded.takes, *loaded.writes}):
        assert not loaded.clip_only_fields
        return
    # A field read by clip stages alone has no meaning for an image.
    read_for_images = {field for stage in STAGES if "image" in stage.writes for field in stage.reads}
    own = {field for field in loaded.reads if "." not in field and field not in read_for_images}
    assert own <= set(loaded.clip_only_fields)


def test_chunks_give_the_bytes_of_the_whole_clip(loaded, item):
    """Chunks end where calls of the network end, so every call has the frames that it has for the whole clip."""
    if not isinstance(loaded, ChunkedStage):
        return
    shot, (source,), (result,) = item.shot.model_copy(update=loaded.examples[0]), loaded.takes, loaded.writes
    frames = np.concatenate([item.artefacts[source]] * 4)[:11]
    frames += np.arange(11, dtype=np.uint8)[:, None, None, None]
    whole = loaded(Item(shot, {source: frames}))[result]
    per_call, scale, factor = loaded.chunk_frames(loaded.params), loaded.scale_factor(shot), loaded.frame_factor(shot)
    n_frames = frames_after(len(frames), factor)
    assert whole.shape == (n_frames, frames.shape[1] * scale, frames.shape[2] * scale, 3)
    for chunk in frame_chunks(n_frames, 2 * per_call):
        part = loaded.run_chunk(shot, frames[loaded.source_frames(shot, chunk)], chunk)
        assert np.array_equal(part, whole[chunk])


def test_stage_needs_only_declared_artefacts_and_returns_the_declared_ones(loaded, item, renders):
    for shot, result in ((render.shot, render.result) for render in renders):
        assert loaded.needs(shot) == (*loaded.takes, *(loaded.identity_inputs if loaded.uses_identity(shot) else ()))
        assert set(result) == set(loaded.writes)
        for name in {"image", "frames", "hd_frames"} & set(result):
            assert result[name].dtype == np.uint8
            assert result[name].shape[-1] == 3
        if not isinstance(loaded, ChunkedStage):
            assert result.get("image", item.artefacts["image"]).shape == (shot.height, shot.width, 3)
            frames = (shot.clip_frames, shot.height, shot.width, 3)
            assert "frames" not in result or result["frames"].shape == frames


def test_stage_reads_only_declared_fields(loaded, renders):
    """An undeclared field would change the bytes without changing the content key."""
    for render in renders:
        # The set of fields in the key already tells whether the face is used, by the fields that decide about it.
        declared = set(loaded.reads)
        loaded.uses_identity(Spy(render.shot, declared))
        if loaded.uses_identity(render.shot):
            declared |= set(loaded.identity_fields)
        assert render.seen <= declared, render.shot
        assert render.seen or not loaded.reads, render.shot


def test_weights_are_chosen_by_declared_fields(loaded, item):
    """Digests of weights are cached by these fields."""
    for fields in ({}, {"mode": "fast"}, {"identity": "none"}, {"mode": "fast", "identity": "none"}):
        seen = set()
        loaded.weight_files(loaded.params, Spy(item.shot.model_copy(update=fields), seen))
        assert seen <= set(loaded.weight_fields), fields


def test_identity_changes_the_result_only_when_it_is_used(loaded, item, renders):
    """Keys of shots that do not use identity contain no identity fields."""
    assert loaded.uses_identity(item.shot) == bool(loaded.identity_inputs)
    if not loaded.identity_inputs:
        return
    with_face, _, first, *others = renders
    for name in loaded.writes:
        assert all(np.array_equal(first.result[name], other.result[name]) for other in others)
        assert not np.array_equal(first.result[name], with_face.result[name]), "the identity has no effect"


def test_progress_is_reported_up_to_the_last_step(loaded, renders):
    if loaded.places(loaded.params):
        return
    has_steps = bool({"image", "frames", "hd_frames"} & {*loaded.writes})
    for reports in (render.reports for render in renders):
        assert bool(reports) == has_steps
        assert {name for name, _, _ in reports} <= {loaded.name}
        assert all(before < after for (_, before, _), (_, after, _) in pairwise(reports))
        assert all(done == steps for _, done, steps in reports[-1:])


def move_weights():
    """Copy the weights of all networks to addresses that are not multiples of 64 bytes, as in a mapped file."""
    for weights in [each for each in gc.get_objects() if type(each) is torch.nn.Parameter]:
        weights.data = weights.new_empty(weights.numel() + 1)[1:].view(weights.shape).copy_(weights.data)


def test_results_do_not_depend_on_earlier_calls_or_on_where_weights_lie(loaded, item, renders):
    """The call before was cancelled after its first step."""

    def cancel(stage, done, steps):
        raise Cancelled

    if renders[0].reports and not loaded.places(loaded.params):
        with pytest.raises(Cancelled), progress_callback(cancel):
            loaded(Item(item.shot.model_copy(update=OTHER_CALL), item.artefacts))
    move_weights()
    again = loaded(item)
    for name in loaded.writes:
        first, second = renders[0].result[name], again[name]
        if name == "face":
            first, second = first.embedding("antelopev2"), second.embedding("antelopev2")
        assert np.array_equal(first, second)
