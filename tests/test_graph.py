"""Which stages a shot passes, and what its content keys depend on."""

import pytest

from vidgen_ray.graph import STAGES, ShotPlanner, params_of, stages_of, stages_used
from vidgen_ray.shot import Shot
from vidgen_ray.weights import resolve

from .conftest import ASTRONAUT

LORA = "builtin:tiny/lora.safetensors"


def names(**fields):
    return [stage.name for stage in stages_of(Shot(prompt="a", **fields))]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "flux svd realesrgan"),
        ({"face_image": "x.jpg"}, "instantid flux svd realesrgan"),
        ({"lora": LORA}, "flux lora svd realesrgan"),
        ({"lora": LORA, "use_hunyuan_style": True}, "flux lora hunyuan svd realesrgan"),
        ({"upscale_video": False}, "flux svd"),
        ({"generate_video": False}, "flux"),
        ({"image": "x.png"}, "svd realesrgan"),
        ({"image": "x.png", "lora": LORA, "generate_video": False}, "lora"),
        ({"mode": "fast", "lora": LORA, "use_hunyuan_style": True, "face_image": "x"}, "instantid flux svd realesrgan"),
        ({"mode": "fast", "lora": LORA, "image": "x.png", "generate_video": False}, "lora"),
    ],
)
def test_the_stages_of_a_shot(fields, expected):
    assert names(**fields) == expected.split()


def test_a_stage_that_no_shot_uses_is_not_used():
    shots = [Shot(prompt="a", generate_video=False), Shot(prompt="b", upscale_video=False)]
    assert [stage.name for stage in stages_used(shots)] == ["flux", "svd"]


@pytest.fixture
def plan(tiny, make_shot):
    def planned(profile=tiny, **fields):
        shot = make_shot(**{"face_image": str(ASTRONAUT), "lora": LORA, "use_hunyuan_style": True, **fields})
        return ShotPlanner(params_of(profile, STAGES), profile.encode)(shot)

    return planned


def changed(a, b):
    """The stages whose keys differ."""
    return [x.stage for x, y in zip(a.steps, b.steps, strict=True) if x.key != y.key]


@pytest.mark.parametrize(
    ("change", "first_changed"),
    [
        ({"width": 192}, "instantid"),
        ({"prompt": "other"}, "flux"),
        ({"steps": {"flux": 3, "lora": 4, "hunyuan": 4, "svd": 2}}, "flux"),
        ({"seed": 8}, "flux"),
        ({"lora": [{"path": LORA, "weight": 0.5}]}, "lora"),
        ({"lora_strength": 0.9}, "lora"),
        ({"style_prompt": "ink"}, "hunyuan"),
        ({"motion_bucket_id": 3}, "svd"),
        ({"num_frames": 9}, "svd"),
        ({"scale": 3}, "realesrgan"),
        ({"upscaler": "x4plus-anime"}, "realesrgan"),
    ],
)
def test_a_change_renews_its_stage_and_all_after_it_and_none_before(plan, change, first_changed):
    before, after = plan(), plan(**change)
    order = [step.stage for step in before.steps]
    assert changed(before, after) == order[order.index(first_changed) :]
    assert before.key != after.key


def test_words_that_no_stage_reads_change_nothing(plan):
    assert plan().key == plan(metadata={"scene": 1}).key == plan(id="other").key


def test_files_count_by_content_not_by_name(plan, tmp_path):
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(ASTRONAUT.read_bytes())
    assert plan(face_image=str(copy)).key == plan().key
    copy.write_bytes(copy.read_bytes() + b" ")
    assert changed(plan(face_image=str(copy)), plan())[0] == "instantid"


def test_weights_count_by_content_and_options_count(plan, tiny, tmp_path):
    def with_actor(name, **changes):
        actors = {**tiny.actors, name: tiny.actors[name].model_copy(update=changes)}
        return tiny.model_copy(update={"actors": actors})

    assert changed(plan(with_actor("svd", weights=str(resolve("builtin:tiny/svd")))), plan()) == []
    schnell = plan(with_actor("flux", weights="builtin:tiny/flux-schnell"))
    assert changed(schnell, plan()) == ["flux", "lora", "hunyuan", "svd", "realesrgan"]
    assert changed(plan(with_actor("svd", options={"decode_chunk_frames": 2})), plan()) == ["svd", "realesrgan"]
    assert changed(plan(with_actor("realesrgan", dtype="bfloat16")), plan()) == ["realesrgan"]
    assert changed(plan(with_actor("svd", actors=2, gpus=0.5)), plan()) == []
    # The number of threads changes the last bits on a CPU, and a GPU has others.
    assert changed(plan(with_actor("svd", cpus=3)), plan()) == ["svd", "realesrgan"]
    assert changed(plan(with_actor("svd", device="cuda")), plan()) == ["svd", "realesrgan"]
    assert changed(plan(with_actor("svd", device="cuda")), plan(with_actor("svd", device="cuda", cpus=3))) == []
    assert changed(plan(with_actor("flux", options={"text_tokens": 64, "adapters_kept": 9})), plan()) == []


def test_encoding_is_part_of_the_shots_key_alone(plan, tiny):
    other = tiny.model_copy(update={"encode": tiny.encode.model_copy(update={"crf": 30})})
    assert changed(plan(other), plan()) == []
    assert plan(other).key != plan().key
