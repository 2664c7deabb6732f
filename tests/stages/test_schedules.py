"""Schedules: what the networks of each profile are given, against the numbers of the authors' code, and wrong ones."""

import json
import math
import re
from inspect import signature
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stages.test_parity import gradient_image
from vidgen_ray.content_keys import ShotPlanner
from vidgen_ray.errors import ProfileError, StageError
from vidgen_ray.graph import STAGE_BY_NAME, stages_of
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.script.check import check_shot
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.ltx import LTXParams
from vidgen_ray.stages.schedules import SCHEDULES, scheduler_of
from vidgen_ray.stages.wan import WanParams, WanStage
from vidgen_ray.weights import resolve

IMAGE = gradient_image(64, 64)
SMALL = {"width": 64, "height": 64, "seed": 1}
FIELDS = {
    "klein": {"image_model": "klein"},
    "hunyuan": {"use_hunyuan_style": True, "style_strength": 1.0},
    "qwen_edit": {"use_hunyuan_style": True, "style_model": "qwen-edit"},
    "svd": {"num_frames": 2},
    "wan": {"video_model": "wan", "num_frames": 5},
    "ltx": {"video_model": "ltx", "num_frames": 9},
}
NETWORKS = ("transformer", "transformer_2", "unet")


def linear(steps):
    return [1 - step / steps for step in range(steps)]


def shifted(levels, shift):
    return [shift * level / (1 + (shift - 1) * level) for level in levels]


def stretched(levels, last):
    """Levels whose last one is `last`: `strech_shifts_to_terminal` of LTX-Video."""
    return [1 - (1 - level) * (1 - last) / (1 - levels[-1]) for level in levels]


def mu(tokens, fewest, lowest, most, highest):
    return lowest + (tokens - fewest) / (most - fewest) * (highest - lowest)


def wan(steps):
    """`FlowUniPCMultistepScheduler` of Wan 2.2 with shift 5: whole numbers from 999 on."""
    levels = np.linspace(0.999, 0, steps + 1)[:-1]
    return [int(1000 * level) for level in shifted(levels, 5)]


def karras(steps):
    """`EDMDiscretization` of generative-models, sigma 700 to 0.002, as the network sees it: a quarter of the logarithm."""
    ends = 700 ** (1 / 7), 0.002 ** (1 / 7)
    return [math.log((ends[0] + step / (steps - 1) * (ends[1] - ends[0])) ** 7) / 4 for step in range(steps)]


# Images of 64x64 pixels are 16 tokens. LTX: two frames of four tokens.
FLUX = shifted(linear(28), math.exp(mu(16, 256, 0.5, 4096, 1.15)))
# mu of FLUX.2 is linear in the steps, from 1.8998 (10 steps) to 0.4594 (200) for 16 tokens.
KLEIN = shifted(linear(4), math.exp(1.89973143 + 6 * (1.89973143 - 0.45937499) / 190))
QWEN = stretched(shifted(linear(40), math.exp(mu(16, 256, 0.5, 8192, 0.9))), 0.02)
LTX = stretched(shifted(linear(40), math.exp(mu(8, 1024, 0.95, 4096, 2.05))), 0.1)
HUNYUAN = [
    *(999, 966, 932, 899, 866, 832, 799, 766, 733, 699, 666, 633, 599, 566, 533),
    *(499, 466, 433, 400, 366, 333, 300, 266, 233, 200, 166, 133, 100, 67, 33),
]
LIGHTNING_OPTIONS = {"schedule": "wan2.2-lightning", "extra_weights": {"few_step_lora": Path("Wan2.2-Lightning")}}
LIGHTNING = [1000, 937.5, 833.3333, 625]
SCHNELL = [1000, 750, 500, 250]


def thousand(levels):
    return [1000 * level for level in levels]


# Profile, stage, weights, timesteps of each call, guidance, calls of a step.
CASES = [
    ("gpu-80gb", "flux", "flux", thousand(FLUX), 3.5, 1),
    ("gpu-80gb", "klein", "klein", thousand(KLEIN), None, 1),
    ("gpu-80gb", "hunyuan", "hunyuandit", HUNYUAN, 5, 1),
    ("gpu-80gb", "qwen_edit", "qwen-edit", thousand(QWEN), 4, 2),
    ("gpu-80gb", "svd", "svd", karras(25), [1, 3], 1),
    ("gpu-80gb", "wan", "wan", LIGHTNING, 1, 1),
    ("gpu-80gb", "ltx", "ltx", thousand(LTX), 3, 1),
    ("gpu-24gb", "wan", "wan-ti2v", wan(50), 5, 2),
    ("open", "wan", "wan", LIGHTNING, 1, 1),
    ("wan-40", "wan", "wan", wan(40), 3.5, 2),
    ("gpu-24gb-schnell", "flux", "flux-schnell", SCHNELL, None, 1),
    ("gpu-24gb-schnell", "wan", "wan-ti2v", wan(50), 5, 2),
]


def small(profile, stage, weights, fields=None, **options):
    """Return the stage with the options of the profile, and small weights in place of the published ones."""
    profile, stage_class = load_profile(profile), STAGE_BY_NAME[stage]
    given = profile.options_of(stage_class)
    here = {"device": "cpu", "dtype": "float32", "weights": resolve(f"builtin:tiny/{weights}"), "extra_weights": {}}
    kept = {"schedule": given.schedule} if hasattr(given, "schedule") else {}
    tiny = {"hunyuan": {"standard_shapes": False}, "klein": {"text_layers": (1, 2, 3)}}.get(stage, {})
    made = stage_class(stage_class.Params.model_validate({**here, **kept, **tiny, **options}))
    made.load()
    shot = check_shot({"prompt": "a man", **SMALL, **FIELDS.get(stage, {}), **(fields or {})}, "line", profile.defaults)
    return made, Item(shot, {"image": IMAGE})


def recorded(stage, item):
    """Run the stage. Return network and timestep of each call, and the pipeline's guidance."""
    pipe = getattr(stage, "pipe", None) or stage.model.text_to_image
    calls, hooks = [], []
    for name in NETWORKS:
        if (network := getattr(pipe, name, None)) is None:
            continue

        def record(module, args, kwargs, name=name):
            timestep = kwargs.get("timestep", kwargs.get("timestep_cond"))
            timestep = args[1] if timestep is None else timestep
            calls.append((name, float(torch.as_tensor(timestep).max())))

        hooks.append(network.register_forward_pre_hook(record, with_kwargs=True))
    stage(item)
    for hook in hooks:
        hook.remove()
    return calls, pipe


@pytest.mark.parametrize(("profile", "name", "weights", "timesteps", "guidance", "passes"), CASES)
def test_networks_of_a_profile_get_the_timesteps_of_the_authors(profile, name, weights, timesteps, guidance, passes):
    if profile == "wan-40":
        # Without the LoRA that the profiles merge.
        stage, item = small("gpu-80gb", name, weights, schedule="wan2.2-i2v-a14b")
        item = Item(
            item.shot.model_copy(update={"steps": Shot(prompt="-").steps, "guidance": Shot(prompt="-").guidance}),
            {"image": IMAGE},
        )
    else:
        stage, item = small(profile, name, weights)
    calls, pipe = recorded(stage, item)
    # FLUX and Qwen divide by 1000.
    factor = 1000 if name in ("flux", "klein", "qwen_edit") else 1
    seen = [factor * timestep for _, timestep in calls]
    assert seen[::passes] == pytest.approx(timesteps, abs=2e-3)
    assert len(seen) == passes * len(timesteps)
    if name == "svd":
        ends = pipe.guidance_scale.flatten()
        assert [float(ends[0]), float(ends[-1])] == guidance
    elif guidance is not None:
        used = pipe._guidance_scale if name != "qwen_edit" else 4
        assert used == guidance
    if timesteps is LIGHTNING:
        assert [network for network, _ in calls] == ["transformer"] * 2 + ["transformer_2"] * 2


@pytest.mark.parametrize(
    ("name", "mu_at_1024x576", "timesteps"),
    [
        ("flux.1-dev", 0.8467, "1000 to 79.5"),
        ("flux.1-schnell", None, "1000, 750, 500, 250"),
        ("flux.2-klein", 2.1392, "1000, 962.2, 894.7, 739"),
        ("sdxl", None, "958 to 1"),
        ("hunyuandit-1.2", None, "999 to 33"),
        ("qwen-image-edit", 0.6032, "1000 to 20"),
        ("wan2.2-i2v-a14b", None, "999 to 113"),
        ("wan2.2-ti2v-5b", None, "999 to 92"),
        ("wan2.2-lightning", None, "1000, 937.5, 833.3, 625"),
        ("ltx-0.9", 2.05, "1000 to 100"),
        ("ltx-0.9.8-distilled", None, "1000, 993.7, 987.5, 981.2, 975, 909.4, 725"),
    ],
)
def test_documented_timesteps_are_those_of_the_schedule(name, mu_at_1024x576, timesteps):
    schedule = SCHEDULES[name]
    scheduler = scheduler_of(schedule)
    if schedule.scheduler == "FlowMatchEulerDiscreteScheduler":
        scheduler.set_timesteps(sigmas=linear(schedule.steps), mu=mu_at_1024x576)
    else:
        scheduler.set_timesteps(schedule.steps)
    seen = [f"{round(timestep, 1):g}" for timestep in scheduler.timesteps.tolist()]
    assert (", ".join(seen) if len(seen) < 8 else f"{seen[0]} to {seen[-1]}") == timesteps == schedule.timesteps


def test_steps_of_lightning_are_eulers_in_float32():
    """The network predicts in the precision of its weights, which the latents keep out of."""
    scheduler = scheduler_of(SCHEDULES["wan2.2-lightning"])
    scheduler.set_timesteps(4)
    sample = expected = torch.randn(8, generator=torch.Generator().manual_seed(1))
    levels = [*(each / 1000 for each in (1000, 937.5, 2500 / 3, 625)), 0]
    for timestep, (level, following) in zip(scheduler.timesteps, pairwise(levels), strict=True):
        predicted = torch.sin(expected).bfloat16()
        sample = scheduler.step(predicted, timestep, sample, return_dict=False)[0]
        expected = expected + (following - level) * predicted.float()
    assert sample.dtype == torch.float32
    assert torch.allclose(sample, expected, atol=1e-6)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == pytest.approx([1000, 2500 / 3])


def test_distilled_ltx_runs_its_stated_levels_whatever_the_pipeline_asks_for():
    fields = {"steps": {"ltx": 7}, "guidance": {"ltx": 1}}
    stage, item = small("gpu-80gb", "ltx", "ltx-distilled", fields, schedule="ltx-0.9.8-distilled")
    calls, _ = recorded(stage, item)
    assert [timestep for _, timestep in calls] == pytest.approx([1000, 993.7, 987.5, 981.2, 975, 909.4, 725], abs=1e-3)


def test_sdxl_runs_the_steps_of_euler_with_leading_timesteps():
    stage, _ = small("gpu-80gb", "instantid_sdxl", "sdxl", extra_weights={"instantid": resolve("builtin:tiny/instantid-sdxl")})
    stage.pipe.scheduler.set_timesteps(stage.params.steps)
    assert stage.pipe.scheduler.timesteps.tolist() == [958 - 33 * step for step in range(29)] + [1]
    assert stage.params.guidance == 5


def wan_profile(**options):
    actors = {"wan": {"weights": "builtin:tiny/wan", "options": options}}
    return Profile.model_validate({"name": "own", "about": "-", "actors": actors})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "fast"}, r"profile own, actors.wan: schedule: got 'fast', must be wan2.2-i2v-a14b or "),
        ({"schedule": "svd-xt"}, r"schedule: got 'svd-xt', must be wan2.2-.*\(svd-xt is for SVD-XT\)"),
        ({"schedule": "wan2.2-lightning", "flow_shift": 3}, "flow_shift must be left out with schedule wan2.2-lightning"),
    ],
)
def test_wrong_schedules_are_refused_with_the_field(options, message):
    with pytest.raises(ProfileError, match=message):
        wan_profile(**options).params(WanStage)


def test_steps_that_a_distilled_schedule_has_not_are_refused_before_the_shot_starts():
    def check(steps, guidance, schedule="wan2.2-lightning"):
        settings = {"steps": {"wan": steps}, "guidance": {"wan": guidance}}
        shot = Shot.model_validate({"prompt": "a", "video_model": "wan", "num_frames": 5, **settings})
        profile = load_profile("tiny")
        params = {stage.name: profile.params(stage) for stage in stages_of(shot)}
        params["wan"] = wan_profile(schedule=schedule).params(WanStage)
        ShotPlanner(params, profile.encode)(shot.model_copy(update={"id": "a", "seed": 1}))

    check(4, 1)
    check(4, 3.5)
    check(20, None, "wan2.2-i2v-a14b")
    with pytest.raises(
        StageError, match=r"steps.wan: got 40, the weights of this profile were distilled to 4 \(schedule .*; set "
    ):
        check(40, 1)
    with pytest.raises(StageError, match=r"guidance.wan: got none, .* set guidance: {wan: 1} in the line or in the profile's"):
        check(4, None)


def test_one_step_of_a_schedule_with_a_fixed_last_timestep_is_refused():
    params = LTXParams(weights="ltx", schedule="ltx-0.9")
    params.check_shot(Shot(prompt="a", video_model="ltx", steps={"ltx": 2}), "ltx")
    with pytest.raises(StageError, match=r"steps.ltx: got 1, must be at least 2 with schedule ltx-0"):
        params.check_shot(Shot(prompt="a", video_model="ltx", steps={"ltx": 1}), "ltx")


def test_one_step_of_stored_weights_with_a_fixed_last_timestep_is_refused():
    params = LTXParams(weights=resolve("builtin:tiny/ltx"))
    with pytest.raises(StageError, match=r"steps.ltx: got 1, must be at least 2 with the scheduler of these weights"):
        params.check_shot(Shot(prompt="a", video_model="ltx", steps={"ltx": 1}), "ltx")


@pytest.mark.parametrize(
    ("repository", "shift", "options", "note"),
    [
        ("Wan2.2-I2V-A14B-Diffusers", 3.0, {}, "UniPCMultistepScheduler, flow_shift 3.0, .* which is used; set the option"),
        ("Wan2.2-I2V-A14B-Diffusers", 3.0, {"schedule": "wan2.2-i2v-a14b"}, "flow_shift 3.0, .* wan2.2-i2v-a14b is used"),
        ("Wan2.2-I2V-A14B-Diffusers", 3.0, LIGHTNING_OPTIONS, "UniPC.* wan2.2-lightning is used"),
        ("Wan2.2-I2V-A14B-Diffusers", 5.0, {}, None),
        (
            "Wan2.2-I2V-A14B-Diffusers",
            5.0,
            {**LIGHTNING_OPTIONS, "schedule": "wan2.2-i2v-a14b"},
            "for Wan 2.2 I2V-A14B, but",
        ),
        ("Wan2.2-I2V-A14B-Diffusers", 3.0, {"schedule": "wan2.2-lightning"}, "UniPC.* wan2.2-lightning is used"),
        ("my-own", 3.0, {}, None),
    ],
)
def test_scheduler_folder_that_contradicts_the_authors_is_noted_once(tmp_path, repository, shift, options, note):
    folder = tmp_path / f"models--Wan-AI--{repository}" / "scheduler"
    folder.mkdir(parents=True)
    stored = {"_class_name": "UniPCMultistepScheduler", "flow_shift": shift, "use_flow_sigmas": True}
    (folder / "scheduler_config.json").write_text(json.dumps(stored))
    stage = WanStage(WanParams(weights=folder.parent, **options))
    stage.run = lambda item: {}
    for expected in (note, None):
        stage(Item(None))
        notes = stage.take_notes()
        assert len(notes) == (expected is not None)
        assert expected is None or re.search(expected, notes[0])


def in_the_cache(reference):
    """Return where a snapshot of the hub lies."""
    owner, name, commit = re.fullmatch(r"hub:(.+)/(.+)@(.+)", reference).groups()
    return Path(f"/hub/models--{owner}--{name}/snapshots/{commit.replace(':', '/')}")


@pytest.mark.parametrize("name", ["gpu-16gb", "gpu-24gb", "gpu-48gb", "gpu-80gb", "open", "gpu-24gb-schnell"])
def test_schedules_of_the_profiles_are_those_of_their_weights(name):
    profile = load_profile(name)
    for actor, section in profile.actors.items():
        params = profile.options_of(STAGE_BY_NAME[actor])
        if not hasattr(params, "schedule"):
            continue
        extra = {extra: in_the_cache(reference) for extra, reference in section.extra_weights.items()}
        here = params.model_copy(update={"weights": in_the_cache(section.weights), "extra_weights": extra})
        assert here.schedule is not None, actor
        assert list(here.notes()) == [], actor
        other = next(each for each, schedule in SCHEDULES.items() if schedule is not here.stated)
        (note,) = here.model_copy(update={"schedule": other}).notes()
        assert note == f"schedule {other} is for {SCHEDULES[other].weights}, but the weights are {here.stated.weights}"


@pytest.mark.parametrize(
    ("name", "weights", "schedule", "words"),
    [
        ("wan", "wan-ti2v", "wan2.2-ti2v-5b", "JPEG压缩残留"),
        ("ltx", "ltx", "ltx-0.9", "worst quality, inconsistent motion, blurry, jittery, distorted"),
        ("hunyuan", "hunyuandit", "hunyuandit-1.2", "糟糕的人脸"),
    ],
)
def test_negative_prompt_of_the_authors_is_used_unless_a_line_has_one(monkeypatch, name, weights, schedule, words):
    for own, expected in (({}, words), ({"negative_prompt": "blurred"}, "blurred")):
        stage, item = small("gpu-24gb", name, weights, {"steps": {name: 2}, **own}, schedule=schedule)
        given = []
        monkeypatch.setattr(stage.pipe, "encode_prompt", recording(stage.pipe.encode_prompt, given))
        stage(item)
        assert expected in given[0]


def recording(encode_prompt, given):
    """Record the negative prompt of each call."""
    names = signature(encode_prompt)

    def record(*args, **kwargs):
        given.append(names.bind(*args, **kwargs).arguments.get("negative_prompt"))
        return encode_prompt(*args, **kwargs)

    return record


def test_schedule_changes_the_content_key_and_its_absence_does_not():
    assert "schedule" not in wan_profile().params(WanStage).for_key()
    assert wan_profile(schedule="wan2.2-lightning").params(WanStage).for_key()["schedule"] == "wan2.2-lightning"
