"""The contract that every stage keeps, whatever it does; a new stage is tested by being in the graph."""

import pickle

import numpy as np
import pytest

from vidgen_ray.graph import STAGES
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, Item
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.weights import resolve

LORA = str(resolve("builtin:tiny/lora.safetensors"))


class Spy:
    """A shot that notes which of its fields are looked at, as `reads` names them."""

    def __init__(self, target, seen, prefix=""):
        self._target, self._seen, self._prefix = target, seen, prefix

    def __getattr__(self, name):
        value = getattr(self._target, name)
        if name in ("steps", "guidance"):
            return Spy(value, self._seen, f"{name}.")
        self._seen.add("seed" if name == "generator_seed" else self._prefix + name)
        return value


@pytest.fixture(scope="module")
def face(tiny, photo):
    """The astronaut's features, with every embedding."""
    with InstantIDStage(tiny.params(InstantIDStage)) as stage:
        return stage.features([photo])


@pytest.fixture
def item(make_shot, photo, face):
    """Of a person who steers FLUX."""
    y, x = np.mgrid[0:64, 0:128]
    picture = np.stack([x * 2, y * 4, x + y], -1).astype(np.uint8)
    # The tiny detector's idea of a face.
    picture[(x - 64) ** 2 + (y - 32) ** 2 < 20**2] = (224, 172, 140)
    shot = make_shot(
        face_image="x.jpg",
        negative_prompt="blurred",
        lora=[LORA],
        use_hunyuan_style=True,
        style_prompt="ink",
        num_frames=4,
    )
    frames = np.repeat(picture[None], 4, axis=0)
    return Item(shot, {"photos": (photo,), "face": face, "image": picture, "frames": frames})


def varied(item, **fields):
    return Item(item.shot.model_copy(update=fields), item.artefacts)


@pytest.fixture(scope="module", params=STAGES, ids=lambda stage: stage.name)
def loaded(request, tiny):
    with request.param(tiny.params(request.param)) as stage:
        yield stage


def test_a_stage_declares_real_fields_and_artefacts(loaded):
    shot = Shot(prompt="a", seed=1)
    for field in (*loaded.reads, *loaded.identity_fields):
        head, _, tail = field.partition(".")
        assert hasattr(getattr(shot, head), tail) if tail else hasattr(shot, head)
    assert {*loaded.takes, *loaded.identity_inputs, *loaded.writes} <= set(Artefacts.__annotations__)
    assert not set(loaded.reads) & set(loaded.identity_fields)
    assert not set(loaded.takes) & set(loaded.identity_inputs)
    assert loaded.params.model_config["frozen"]


def test_a_stage_gives_what_it_writes_and_needs_no_more_than_it_takes(loaded, item):
    for shot in (item.shot, varied(item, identity="none").shot):
        needed = loaded.needs(shot)
        assert needed == (*loaded.takes, *(loaded.identity_inputs if loaded.uses_identity(shot) else ()))
        given = loaded([Item(shot, {name: item.artefacts[name] for name in needed})])
        assert len(given) == 1
        assert set(given[0]) == set(loaded.writes)
        for name in {"image", "frames", "hd_frames"} & set(given[0]):
            assert given[0][name].dtype == np.uint8
            assert given[0][name].shape[-1] == 3


@pytest.mark.parametrize("mode", ["quality", "fast"])
@pytest.mark.parametrize("person", [{}, {"identity": "none"}, {"identity_strength": 0.0}, {"face_image": ()}, {"pose": "none"}])
def test_a_stage_looks_only_at_the_fields_it_declares(loaded, item, mode, person):
    """A field that is read but not declared would change the bytes under an unchanged content key."""
    seen, shot = set(), varied(item, mode=mode, **person).shot
    loaded([Item(Spy(shot, seen), item.artefacts)])
    declared = set(loaded.reads)
    if loaded.uses_identity(shot):
        declared |= set(loaded.identity_fields)
    elif loaded.identity_fields:
        # That nobody steers is told by the set of fields that are in the key.
        declared.add("flux_identity")
        assert shot.flux_identity is None
    assert seen <= declared
    assert seen or not loaded.reads


def test_a_stage_that_a_person_steers_does_what_others_do_where_nobody_does(loaded, item):
    """Its keys of such shots have nothing of a person in them."""
    if not loaded.identity_inputs:
        assert not loaded.uses_identity(item.shot)
        return
    assert loaded.uses_identity(item.shot)
    uses_identity = loaded([item])[0]
    nobody = [varied(item, face_image=()), varied(item, identity="none", pose="none"), varied(item, identity_strength=0.0)]
    first, *others = [loaded([one])[0] for one in nobody]
    for name in loaded.writes:
        assert all(np.array_equal(first[name], other[name]) for other in others)
        assert not np.array_equal(first[name], uses_identity[name]), "the person does nothing"


def test_the_same_item_gives_the_same_bytes_alone_and_among_others(loaded, item):
    other = Item(item.shot.model_copy(update={"seed": 99, "prompt": "another"}), item.artefacts)
    alone = loaded([item])[0]
    among = loaded([other, item])[1]
    for name in loaded.writes:
        if name == "face":
            assert np.array_equal(alone[name].embedding("antelopev2"), among[name].embedding("antelopev2"))
        else:
            assert np.array_equal(alone[name], among[name])


def test_what_a_stage_is_given_stays_as_it_was(loaded, item):
    face = item.artefacts["face"]
    arrays = {
        **{name: item.artefacts[name] for name in ("image", "frames")},
        "photo": item.artefacts["photos"][0],
        "keypoints": face.keypoints,
        **face.embeddings,
    }
    for value in arrays.values():
        value.setflags(write=False)
    before = {name: value.copy() for name, value in arrays.items()}
    loaded([item])
    assert all(np.array_equal(before[name], value) for name, value in arrays.items())


def test_parameters_travel_to_other_processes(loaded):
    assert pickle.loads(pickle.dumps(loaded.params)) == loaded.params


@pytest.mark.parametrize("stage_class", STAGES, ids=lambda stage: stage.name)
def test_a_stage_closes_twice_and_unloaded(stage_class, tiny):
    stage = stage_class(tiny.params(stage_class))
    stage.close()
    stage.load()
    stage.close()
    stage.close()
