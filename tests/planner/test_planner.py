"""The planner: what it accepts packs, what it refuses cannot be packed, and a simple scheduler reaches what it predicts."""

import heapq
import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from itertools import count, product

import pytest

from vidgen_ray.cli.plan import Counts, plan_command
from vidgen_ray.errors import ProfileError, SetupError, TooExpensive, UsageError
from vidgen_ray.graph import STAGE_BY_NAME, STAGES
from vidgen_ray.planner import (
    TURN_SHOTS,
    Cluster,
    Demand,
    Node,
    cpus_needed,
    demand_of,
    load_calibration,
    parse_gpus,
    plan,
    save_calibration,
    this_machine,
)
from vidgen_ray.planner.gpu_assignment import CONTEXT_GB, PROCESS_HOST_GB
from vidgen_ray.profile import ActorProfile, Profile, load_profile
from vidgen_ray.shot import Shot

ROOM = 1e-6
B6 = {
    "instantid": (1, {"instantid": 0.1}),
    "flux": (34, {"flux": 4.3, "lora": 2.0}),
    "hunyuan": (13, {"hunyuan": 6.0}),
    "svd": (20, {"svd": 22.6}),
    "realesrgan": (6, {"realesrgan": 3.0}),
}
"""Published numbers of an H100: actor -> GB, seconds."""
STAGES_OF = {actor: list(seconds) for actor, (_, seconds) in B6.items()}
CHAIN = tuple(stage.name for stage in STAGES if stage.name in STAGES_OF.get(stage.actor, ()))
"""The stages of a shot with everything that FLUX draws; to look whom it shows takes next to no time."""


def gpu_profile(actors, **fields):
    """Of actor -> (GB, seconds)."""
    sections = {
        name: ActorProfile(weights="w", device="cuda", memory_gb=gb, seconds=seconds) for name, (gb, seconds) in actors.items()
    }
    return Profile(name="made-up", about="for a test", actors=sections, **fields)


def demand(shots, stages=CHAIN, *, encoded_mpx=0.0):
    """So many reference shots that pass these stages."""
    return Demand(shots, dict.fromkeys(stages, float(shots)), shots, encoded_mpx, 1e6, 1e6, 0)


WITHOUT_STYLE = demand(400, [name for name in CHAIN if name != "hunyuan"])


# What the reference numbers give


@pytest.mark.parametrize("gpus", ["1x80GB", "2x80GB", "4x80GB", "8x80GB", "16x8x80GB"])
@pytest.mark.parametrize("asked", [WITHOUT_STYLE, demand(400)])
def test_where_everything_fits_on_a_gpu_each_holds_everything(gpus, asked):
    planned = plan(gpu_profile(B6), asked, parse_gpus(gpus))
    assert planned.layout.kind == "fused"
    assert planned.efficiency > 0.999
    assert all(slot.workers[0].gpus == 1 and len(slot.workers) == 1 for slot in planned.layout.slots)


@pytest.mark.parametrize(("gpus", "least"), [("8x48GB", 0.96), ("4x48GB", 0.96), ("2x48GB", 0.90), ("1x48GB", 0.90)])
@pytest.mark.parametrize("asked", [WITHOUT_STYLE, demand(400)])
def test_smaller_gpus_divide_the_stages_or_take_turns_and_stay_busy(gpus, least, asked):
    planned = plan(gpu_profile(B6), asked, parse_gpus(gpus))
    assert planned.layout.kind == "hybrid"
    assert planned.efficiency >= least


def test_different_gpus_are_used_for_what_each_can_hold():
    planned = plan(gpu_profile(B6), WITHOUT_STYLE, parse_gpus("2x24GB+2x48GB+1x80GB+1x8GB"))
    held = {memory: set() for memory in (8, 24, 48, 80)}
    for slot, node in zip(planned.layout.slots, planned.nodes, strict=True):
        held[(24, 48, 80, 8)[node]].update(slot.workers[0].stages)
    assert "flux" not in held[24]
    assert "svd" in held[24]
    assert {"flux", "svd"} <= held[80]
    assert held[8] <= {"instantid", "realesrgan"}


def test_gpus_too_small_for_anything_stay_idle_and_are_told():
    planned = plan(gpu_profile({"svd": (20, {"svd": 1})}), demand(9, ["svd"]), parse_gpus("2x16GB+2x24GB"))
    assert planned.nodes == (1, 1)
    assert any("2 of 4 GPUs have nothing to do" in note for note in planned.notes)


def test_a_stage_that_no_shot_uses_has_no_worker(make_shot):
    picture = demand_of([make_shot(generate_video=False)])
    planned = plan(gpu_profile(B6), picture, parse_gpus("1x48GB"))
    assert planned.layout.workers[0].stages == ("flux",)


def test_flux_and_lora_live_in_one_process_in_every_layout():
    for kind in ("auto", "fused", "colocated", "staged"):
        planned = plan(gpu_profile(B6, layout=kind), demand(50), parse_gpus("5x80GB"))
        assert all(("flux" in worker.stages) == ("lora" in worker.stages) for worker in planned.layout.workers)
        assert planned.layout.kind == ("fused" if kind == "auto" else kind)


def test_colocated_processes_share_a_gpu_by_their_memory():
    planned = plan(gpu_profile(B6, layout="colocated"), demand(50), parse_gpus("2x80GB"))
    for slot in planned.layout.slots:
        assert len(slot.workers) == 5
        assert 0.99 < sum(worker.gpus for worker in slot.workers) <= 1
        assert slot.memory_gb == pytest.approx(74 + 5 * CONTEXT_GB)


def test_staged_gives_the_slow_stage_most_processes_and_lets_small_ones_share():
    planned = plan(gpu_profile(B6, layout="staged"), WITHOUT_STYLE, parse_gpus("8x48GB"))
    workers = Counter(worker.stages for worker in planned.layout.workers)
    assert workers["svd",] > workers["flux", "lora"] >= 1
    assert all(len({worker.stages for worker in slot.workers}) == len(slot.workers) for slot in planned.layout.slots)
    assert planned.efficiency > 0.9


def test_an_actor_on_the_cpu_lives_in_the_gpu_workers_process_and_takes_no_gpu_memory():
    profile = gpu_profile(B6)
    face = ActorProfile(weights="w", cpus=2, memory_gb=0.7, seconds={"instantid": 0.1})
    for kind in ("auto", "colocated", "staged"):
        mixed = profile.model_copy(update={"actors": {**profile.actors, "instantid": face}, "layout": kind})
        planned = plan(mixed, WITHOUT_STYLE, parse_gpus("2x80GB"))
        homes = [worker for worker in planned.layout.workers if "instantid" in worker.stages]
        assert homes
        assert all("flux" in worker.stages and worker.cpus == 2 and worker.gpus > 0 for worker in homes)


def test_the_plan_is_the_same_in_every_process():
    program = (
        "from tests.planner.test_planner import *; from dataclasses import asdict;"
        "print(asdict(plan(gpu_profile(B6), demand(400), parse_gpus('3x48GB+2x24GB'))))"
    )
    said = {
        subprocess.run([sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1


# Profiles without GPUs


@pytest.mark.parametrize(
    ("name", "cpus", "shots", "slots"), [("demo", 2, 9, 2), ("demo", 16, 9, 2), ("demo", 16, 1, 1), ("tiny", 2, 9, 1)]
)
def test_a_laptop_gets_a_worker_a_core_and_no_more_than_the_profile_allows(name, cpus, shots, slots):
    planned = plan(load_profile(name), demand(shots), Cluster((Node((), cpus, 8),)))
    assert planned.layout.kind == "fused"
    assert len(planned.layout.slots) == slots
    assert all(worker.gpus == 0 for worker in planned.layout.workers)
    assert all(slot.memory_gb == 0 for slot in planned.layout.slots)
    assert planned.gpu_hours == 0
    assert planned.cost is None
    assert cpus_needed(planned.layout) <= cpus


def test_cpu_workers_are_no_more_than_the_memory_holds(tiny):
    roomy = tiny.model_copy(update={"cpu_workers": None})
    sizes = [len(plan(roomy, demand(99), Cluster((Node((), 16, gb),))).layout.slots) for gb in (1.5, 3, 6, 100)]
    assert sizes == [1, 2, 5, 16]


def test_staged_on_cpus_is_a_process_an_actor_in_one_slot(tiny):
    staged = tiny.model_copy(update={"layout": "staged"})
    planned = plan(staged, demand(9), Cluster((Node((), 8, None),)))
    assert [worker.stages for slot in planned.layout.slots for worker in slot.workers] == [
        ("instantid",),
        ("flux", "lora"),
        ("hunyuan",),
        ("svd",),
        ("realesrgan",),
    ]
    assert len(planned.layout.slots) == 1


def test_lines_that_need_no_model_need_no_worker(tiny, make_shot):
    planned = plan(tiny, demand_of([make_shot(image="a.png", generate_video=False)]), Cluster((Node((), 1, 4),)))
    assert planned.layout.slots == ()
    assert planned.layout.encoders == 1
    assert planned.layout.window == 1


# Refusals


@pytest.mark.parametrize(
    ("profile", "cluster", "error", "says"),
    [
        (gpu_profile(B6), Cluster((Node((), 8, 64),)), SetupError, r"stage instantid needs 1.6 GB.*there is no GPU"),
        (gpu_profile(B6), parse_gpus("8x24GB"), SetupError, r"stages flux and lora need 34.6 GB.*the largest GPU has 24 GB"),
        (gpu_profile(B6, layout="fused"), parse_gpus("8x48GB"), ProfileError, r"layout: fused.*74.6 GB.*8 GPUs has 48 GB"),
        (
            gpu_profile(B6),
            Cluster((Node((48,), 8, 32),)),
            SetupError,
            r"host memory.*up to 74 GB a worker; the nodes have 32 GB",
        ),
        (gpu_profile(B6), Cluster((Node((80,), 2, None),)), SetupError, r"a worker needs up to 1 CPUs.*the nodes have 2"),
        (load_profile("demo"), Cluster((Node((), 1, 8),)), SetupError, r"needs up to 0.25 CPUs.*the nodes have 1"),
        (load_profile("gpu-24gb"), parse_gpus("8x24GB"), SetupError, r"stages flux and lora need 41.6 GB"),
    ],
)
def test_a_refusal_names_what_is_missing(profile, cluster, error, says):
    with pytest.raises(error, match=says):
        plan(profile, demand(9), cluster)


@pytest.mark.parametrize("name", ["gpu-80gb", "gpu-48gb", "gpu-24gb"])
def test_each_gpu_profile_suits_its_cards(name):
    stages = [stage.name for stage in STAGES if name != "gpu-24gb" or stage.actor != "flux"]
    planned = plan(load_profile(name), demand(100, stages), parse_gpus(f"4x{name[4:6]}GB"))
    assert planned.efficiency > 0.95
    assert not any("no seconds" in note for note in planned.notes)


def test_seconds_of_a_stage_that_lives_elsewhere_are_refused():
    profile = gpu_profile({"svd": (20, {"flux": 1.0})})
    with pytest.raises(ProfileError, match=r"actors.svd.seconds: got 'flux', must be one of svd"):
        plan(profile, demand(1, ["svd"]), parse_gpus("1x80GB"))


def test_seconds_that_nobody_told_are_assumed_aloud():
    planned = plan(gpu_profile({"svd": (20, {})}), demand(1, ["svd"]), parse_gpus("1x80GB"))
    assert any("no seconds of svd" in note for note in planned.notes)
    assert planned.stage_seconds == {"svd": 22.6}


@pytest.mark.parametrize(
    "text", ["", "8", "8x", "80GB", "0x80GB", "8x80", "8x0GB", "8x80GB+", "x80GB", "1x1x1x80GB", "-1x80GB"]
)
def test_gpus_that_cannot_be_read_are_refused_with_examples(text):
    with pytest.raises(UsageError, match="8x80GB"):
        parse_gpus(text)


def test_gpus_are_read_as_nodes():
    assert [len(node.gpus) for node in parse_gpus("2x8x80GB + 4x48gb").nodes] == [8, 8, 4]
    assert parse_gpus("2x8x80GB").gpus == (80.0,) * 16
    assert "16 a GPU" in parse_gpus("1x80GB").notes[0]
    assert this_machine().cpus >= 1


# What a script asks for


def test_the_reference_shot_is_one_piece_of_work_for_every_stage():
    shot = Shot(prompt="a", face_image="f.png", identity="none", lora="l.safetensors", use_hunyuan_style=True)
    assert {stage.name: stage.relative_cost(shot) for stage in STAGES} == dict.fromkeys(STAGE_BY_NAME, 1.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"width": 512, "height": 576}, {"flux": 0.5, "lora": 0.5, "svd": 0.5, "realesrgan": 0.5, "hunyuan": 1}),
        ({"num_frames": 50}, {"svd": 2, "realesrgan": 2, "flux": 1}),
        ({"flux.steps": 7, "svd.steps": 50, "lora.steps": 14}, {"flux": 0.25, "svd": 2, "lora": 0.5, "hunyuan": 1}),
        ({"hunyuan.steps": 15}, {"hunyuan": 0.5}),
        ({"lora_strength": 0.3, "style_strength": 1}, {"lora": 0.5, "hunyuan": 2, "flux": 1}),
        ({"negative_prompt": "b"}, {"flux": 2, "lora": 2}),
        ({"face_image": "f.png"}, {"flux": 1.25, "lora": 1.25, "instantid": 1}),
        ({"face_image": "f.png", "identity_end": 0.4, "negative_prompt": "b"}, {"flux": 2.1}),
        ({"face_image": "f.png", "identity": "instantid-sdxl", "refine_strength": 0.7}, {"instantid_sdxl": 1, "refine": 2}),
        ({"guidance.hunyuan": 1}, {"hunyuan": 0.5}),
        ({"scale": 2}, {"realesrgan": 1}),
        ({"upscaler": "x4plus"}, {"realesrgan": 23}),
    ],
)  # fmt: skip
def test_work_follows_what_a_shot_asks_for(fields, expected):
    shot = Shot(prompt="a", lora="l.safetensors", use_hunyuan_style=True, **fields)
    assert {name: STAGE_BY_NAME[name].relative_cost(shot) for name in expected} == pytest.approx(expected)


def test_a_demand_sums_over_any_number_of_shots():
    def shots():
        for n in range(300):
            yield Shot(prompt="a", lora=f"l{n % 3}.safetensors", upscale_video=n % 2 == 0, generate_video=n % 4 != 3)

    asked = demand_of(shots())
    assert (asked.shots, asked.upscaled, asked.loras) == (300, 150, 3)
    assert asked.relative_cost == pytest.approx({"flux": 300, "lora": 300, "svd": 225, "realesrgan": 150})
    clip = 1024 * 576 * 25 / 1e6
    assert asked.encoded_mpx == pytest.approx(clip * (225 + 16 * 150))


# Encoders, cost, time


def test_there_are_encoders_enough_for_the_clips():
    fast = gpu_profile({"svd": (20, {"svd": 1.0})})
    asked = demand(100, ["svd"], encoded_mpx=100 * 240)
    encoders = plan(fast, asked, parse_gpus("8x80GB")).layout.encoders
    # 8 shots a second with 240 megapixels each, at 0.02 s of a core.
    assert encoders == pytest.approx(8 * 240 * 0.02 / 0.8)


def test_the_window_keeps_every_gpu_busy_and_is_no_more_than_the_shots():
    assert plan(gpu_profile(B6), demand(400), parse_gpus("8x80GB")).layout.window == 24
    assert plan(gpu_profile(B6), demand(400), parse_gpus("1x48GB")).layout.window == 2 * TURN_SHOTS
    assert plan(gpu_profile(B6), demand(5), parse_gpus("8x80GB")).layout.window == 5


def test_no_more_gpus_are_taken_than_there_are_shots():
    assert len(plan(gpu_profile(B6), demand(3), parse_gpus("8x80GB")).layout.slots) == 3


def test_a_plan_that_costs_too_much_has_an_exit_code_of_its_own():
    planned = plan(gpu_profile(B6), demand(1000), parse_gpus("8x80GB"), price=2)
    assert planned.cost == pytest.approx(planned.gpu_hours * 2)
    planned.check_cost(planned.cost)
    with pytest.raises(TooExpensive, match=r"--max-cost allows 1.00") as refused:
        planned.check_cost(1)
    assert refused.value.exit_code == 5


def test_the_price_is_the_commands_then_the_profiles_then_a_tables():
    profile = gpu_profile(B6, price_per_gpu_hour=3)
    for given, own, rate in ((None, profile, 3), (7, profile, 7), (None, gpu_profile(B6), 2.5)):
        planned = plan(own, demand(1000), parse_gpus("8x80GB"), price=given)
        assert planned.cost == pytest.approx(planned.gpu_hours * rate)
        assert any("price" in note for note in planned.notes) == (rate == 2.5)
    unknown = plan(gpu_profile(B6), demand(1000), parse_gpus("8x288GB"))
    assert unknown.cost is None
    with pytest.raises(UsageError, match="--price"):
        unknown.check_cost(1)


def test_the_range_holds_what_is_expected():
    planned = plan(gpu_profile(B6), demand(1000), parse_gpus("8x80GB"))
    bound = 1000 * sum(planned.stage_seconds.values()) / 8
    assert planned.seconds_low < bound < planned.seconds < planned.seconds_high


# Measured seconds


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path))
    return tmp_path


def test_measured_seconds_override_the_profiles(cache_folder):
    save_calibration("p", "H100", {"svd": [(5.0, 0.5), (10.0, 1.0), (11.0, 1.0), (9.0, 1.0), (900.0, 1.0)], "flux": [(1, 0)]})
    ((name, found),) = load_calibration("p", "H100").items()
    assert (name, found.seconds_of_reference, found.shots) == ("svd", 10.0, 5)
    assert found.spread == pytest.approx(0.148, abs=0.001)
    planned = plan(gpu_profile(B6), demand(1, ["svd"]), parse_gpus("1x80GB"), measured=load_calibration("p", "H100"))
    assert planned.stage_seconds == {"svd": 10.0}
    assert load_calibration("p", "L40S") == load_calibration("q", "H100") == {}


def test_a_run_of_few_shots_does_not_replace_what_many_have_shown(cache_folder):
    save_calibration("p", "c", {"svd": [(10.0, 1.0)] * 5})
    save_calibration("p", "c", {"svd": [(99.0, 1.0)], "flux": [(3.0, 1.0)]})
    assert {stage: found.seconds_of_reference for stage, found in load_calibration("p", "c").items()} == {
        "svd": 10.0,
        "flux": 3.0,
    }
    save_calibration("p", "c", {"svd": [(20.0, 1.0)] * 3})
    assert load_calibration("p", "c")["svd"].seconds_of_reference == 20.0


def test_a_damaged_memory_is_an_empty_one(cache_folder):
    (cache_folder / "measured.json").write_text('{"p": {"c": {"svd": {"seconds_of_reference": -1}}}}')
    assert load_calibration("p", "c") == {}
    save_calibration("p", "c", {"svd": [(10.0, 1.0)]})
    assert load_calibration("p", "c")["svd"].shots == 1


# The command


def test_the_command_prints_what_the_plan_promises(capsys):
    plan_command(gpu_profile(B6), WITHOUT_STYLE, parse_gpus("2x48GB"), counts=Counts(410, 7, 3, 12))
    said = capsys.readouterr().out
    for words in (
        "2 x 48 GB, 32 CPUs on 1 node",
        "400 to render; 7 of 410 already done, 3 rejected, 12 cached stages",
        "hybrid: 2 workers on 2 GPUs",
        "swapping flux 13%, lora 6% | svd 69%",
        "limited by svd",
        "GPU-hours",
        "cost",
        "hybrid with turns",
        "the stages need 61.6 GB together, the largest of 2 GPUs has 48 GB",
    ):
        assert words in said


def test_the_command_in_json_is_one_object_and_the_cost_is_checked_after_it(capsys):
    with pytest.raises(TooExpensive):
        plan_command(gpu_profile(B6), WITHOUT_STYLE, parse_gpus("8x80GB"), max_cost=0.01, as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["layout"]["kind"] == "fused"
    assert len(said["layout"]["slots"]) == len(said["nodes"]) == len(said["shares"]) == 8
    assert said["efficiency"] == pytest.approx(1)


def test_the_command_with_nothing_to_do_says_so(tiny, capsys):
    plan_command(tiny, demand(0, []), this_machine(), counts=Counts(7, 7, 0, 0))
    assert "nothing to render: 7 of 7 already done" in capsys.readouterr().out
    plan_command(tiny, demand(0, []), this_machine(), counts=Counts(7, 7, 0, 0), as_json=True)
    assert json.loads(capsys.readouterr().out)["shots"] == 0


# Random profiles and clusters


def random_case(rng, *, most_gpus=4, most_actors=5):
    """A profile, a demand and a cluster, each now and then scarce in something."""
    names = sorted(rng.sample(list(B6), rng.randint(1, most_actors)))
    on_cpu = rng.random() < 0.1
    actors = {}
    for name in names:
        cpu = on_cpu or (name == "instantid" and rng.random() < 0.5)
        actors[name] = ActorProfile(
            weights="w",
            device="cpu" if cpu else "cuda",
            cpus=rng.choice([0.25, 0.5, 1, 1, 1, 2, 4]),
            memory_gb=round(rng.choice([rng.uniform(0.5, 8), rng.uniform(4, 40), rng.uniform(20, 60)]) / (10 if cpu else 1), 1),
            seconds={stage: round(10 ** rng.uniform(-2, 2), 3) for stage in STAGES_OF[name]},
        )
    layout = rng.choice(["auto"] * 4 + ["fused", "colocated", "staged"])
    profile = Profile(name="r", about="r", actors=actors, layout=layout, cpu_workers=rng.choice([None, None, 1, 3]))
    shots = rng.choice([1, 2, 5, 50, 1000])
    relative_cost = {stage: shots * rng.choice([1.0, 1.0, rng.uniform(0.05, 3)]) for name in names for stage in STAGES_OF[name]}
    asked = Demand(shots, relative_cost, shots, shots * rng.choice([0.0, 10.0, 300.0]), 1e6, 1e6, 0)
    nodes, left = [], most_gpus
    for _ in range(rng.randint(1, 3)):
        gpus = tuple(rng.choice([16.0, 24.0, 48.0, 80.0]) for _ in range(rng.randint(0, min(left, 4))))
        left -= len(gpus)
        cpus = rng.choice([rng.randint(1, 6), 4 + 8 * len(gpus), 64])
        nodes.append(Node(gpus, cpus, rng.choice([None, None, 512.0, rng.uniform(4, 100)])))
    return profile, asked, Cluster(tuple(nodes))


def process_needs(profile, stages, turns):
    """GPU memory, CPUs and host memory of one process, worked out anew."""
    actors = {STAGE_BY_NAME[stage].actor for stage in stages}
    groups = [{STAGE_BY_NAME[stage].actor for stage in group} for group in turns]
    gpu = {name: profile.actors[name].memory_gb for name in actors if profile.actors[name].device == "cuda"}
    host = sum(profile.actors[name].memory_gb for name in actors if name not in gpu)
    waiting = sum(gpu[name] for group in groups for name in group)
    largest = max((sum(gpu[name] for name in group) for group in groups), default=0)
    gpu_gb = CONTEXT_GB + sum(gpu.values()) - waiting + largest if gpu else 0
    cpus = max(profile.actors[name].cpus for name in actors)
    return gpu_gb, cpus, host + waiting + (0 if gpu else PROCESS_HOST_GB)


def the_rest_fits(free_cpus, encoders):
    """Whether encoders, the director and Ray's own tasks find places on nodes with so many CPUs left."""
    if min(free_cpus) < -ROOM:
        return False

    def places(free):
        return sum(int((cpus + ROOM) / 0.5) for cpus in free)

    options = (
        [cpus - (1.0 if n == director else 0) for n, cpus in enumerate(free_cpus)]
        for director, its in enumerate(free_cpus)
        if its >= 1 - ROOM
    )
    return any(places(free) >= encoders for free in options)


def assert_it_packs(planned, profile, asked, cluster):
    layout = planned.layout
    cpus = [node.cpus for node in cluster.nodes]
    host = [node.memory_gb if node.memory_gb is not None else float("inf") for node in cluster.nodes]
    sizes = defaultdict(list)
    for slot, node in zip(layout.slots, planned.nodes, strict=True):
        needs = [process_needs(profile, worker.stages, worker.turns) for worker in slot.workers]
        assert [worker.cpus for worker in slot.workers] == [needed for _, needed, _ in needs]
        assert sum(gb for gb, _, _ in needs) == pytest.approx(slot.memory_gb, abs=2e-3)
        assert sum(worker.gpus for worker in slot.workers) <= 1
        assert all((worker.gpus > 0) == (gb > 0) for worker, (gb, _, _) in zip(slot.workers, needs, strict=True))
        assert all(set().union(*worker.turns) <= set(worker.stages) for worker in slot.workers)
        cpus[node] -= slot.cpus
        host[node] -= sum(gb for _, _, gb in needs)
        if slot.has_gpu:
            sizes[node].append(slot.memory_gb)
    for node, wanted in sizes.items():
        gpus = sorted(cluster.nodes[node].gpus, reverse=True)
        assert len(wanted) <= len(gpus)
        assert all(gb <= memory + 2e-3 for gb, memory in zip(sorted(wanted, reverse=True), gpus, strict=False))
    assert the_rest_fits(cpus, layout.encoders)
    assert min(host) >= -ROOM
    assert {stage for worker in layout.workers for stage in worker.stages} == set(asked.relative_cost)
    assert 1 <= layout.window <= asked.shots
    assert 0 < planned.efficiency <= 1 + ROOM
    for slot, shares in zip(layout.slots, planned.shares, strict=True):
        assert set(shares) == {stage for worker in slot.workers for stage in worker.stages}
        assert sum(shares.values()) <= 1 + 1e-4


def can_be_packed(profile, asked, cluster):
    """Brute force: every way to fill every GPU, within what the profile's layout allows."""
    used = [name for name in profile.actors if set(STAGES_OF[name]) & set(asked.relative_cost)]
    on_gpu = [name for name in used if profile.actors[name].device == "cuda"]
    if not on_gpu:
        return _some_cpu_slot_fits(profile, used, cluster)
    gpus = [(node, memory) for node, each in enumerate(cluster.nodes) for memory in each.gpus]

    @cache
    def ways(memory):
        """(actors, CPUs, host memory) of what fits, without those that take no less and hold no more than another."""
        found = {(frozenset(), 0, 0)}
        for held, processes in _contents(profile.layout, tuple(used), tuple(on_gpu)):
            needs = [
                process_needs(profile, _stages(actors), [_stages(group) for group in turns]) for actors, turns in processes
            ]
            gpu_gb, cpus, host = map(sum, zip(*needs, strict=True))
            if gpu_gb <= memory + ROOM:
                found.add((held, cpus, host))
        return [
            way for way in found if not any(o != way and o[0] >= way[0] and o[1] <= way[1] and o[2] <= way[2] for o in found)
        ]

    for choice in product(*(ways(memory) for _, memory in gpus)):
        if frozenset().union(*(held for held, _, _ in choice)) != set(used):
            continue
        cpus, host = [node.cpus for node in cluster.nodes], [node.memory_gb for node in cluster.nodes]
        for (node, _), (_, needed, gb) in zip(gpus, choice, strict=True):
            cpus[node] -= needed
            host[node] = None if host[node] is None else host[node] - gb
        if the_rest_fits(cpus, 1) and all(gb is None or gb >= -ROOM for gb in host):
            return True
    return False


def _stages(actors):
    return [stage for name in actors for stage in STAGES_OF[name]]


@cache
def _contents(layout, used, on_gpu):
    """(actors, processes) of a slot: a process is its actors and its groups that take turns."""
    found = []
    homes = {name: [] for name in on_gpu}
    for name in used:
        later = [other for other in on_gpu if list(B6).index(other) >= list(B6).index(name)]
        homes[min(later, key=list(B6).index) if later else max(on_gpu, key=list(B6).index)].append(name)
    apart = [tuple(held) for held in homes.values()]
    if layout in ("auto", "fused"):
        found.append((frozenset(used), [(used, ())]))
    if layout in ("auto", "colocated"):
        found.append((frozenset(used), [(held, ()) for held in apart]))
    if layout in ("auto", "staged"):
        for chosen in product([False, True], repeat=len(apart)):
            some = [held for held, wanted in zip(apart, chosen, strict=True) if wanted]
            if some:
                found.append((frozenset(name for held in some for name in held), [(held, ()) for held in some]))
    if layout == "auto":
        # Each actor is absent, stays, or takes turns in one of as many groups.
        for places in product(range(-2, len(used)), repeat=len(used)):
            held = tuple(name for name, place in zip(used, places, strict=True) if place != -2)
            turning = [name for name, place in zip(used, places, strict=True) if place >= 0]
            if not held or any(name not in on_gpu or name == "instantid" for name in turning):
                continue
            groups = [tuple(n for n, p in zip(used, places, strict=True) if p == group) for group in range(len(used))]
            found.append((frozenset(held), [(held, tuple(group for group in groups if group))]))
    return found


def _some_cpu_slot_fits(profile, used, cluster):
    apart = [[name] for name in used]
    processes = apart if profile.layout in ("staged", "colocated") else [used]
    needs = [process_needs(profile, _stages(actors), ()) for actors in processes]
    for n, node in enumerate(cluster.nodes):
        cpus = [each.cpus - (sum(c for _, c, _ in needs) if n == m else 0) for m, each in enumerate(cluster.nodes)]
        if (node.memory_gb is None or sum(gb for _, _, gb in needs) <= node.memory_gb + ROOM) and the_rest_fits(cpus, 1):
            return True
    return False


def test_a_thousand_accepted_plans_pack():
    rng = random.Random(3)
    accepted = Counter()
    for _ in range(1000):
        profile, asked, cluster = random_case(rng, most_gpus=7)
        try:
            planned = plan(profile, asked, cluster)
        except (SetupError, ProfileError):
            accepted["refused"] += 1
            continue
        assert_it_packs(planned, profile, asked, cluster)
        accepted[planned.layout.kind] += 1
        accepted["turns"] += any(worker.turns for worker in planned.layout.workers)
    assert min(accepted[kind] for kind in ("refused", "fused", "colocated", "staged", "hybrid", "turns")) >= 10, accepted


def test_what_is_refused_has_no_packing_and_what_has_none_is_refused():
    rng = random.Random(4)
    outcomes = Counter()
    for _ in range(300):
        profile, asked, cluster = random_case(rng, most_gpus=3, most_actors=3)
        try:
            plan(profile, asked, cluster)
            accepted = True
        except (SetupError, ProfileError):
            accepted = False
        assert accepted == can_be_packed(profile, asked, cluster), (profile, asked, cluster)
        outcomes[accepted] += 1
    assert min(outcomes.values()) > 50, outcomes


def best_rate(profile, seconds, gpus):
    """Shots a second of the best choice of actors for each GPU, without turns, by trying them all.

    A rate is possible where no set of actors asks for more time than the GPUs have that hold any of it (Hall's theorem).
    """
    names = list(seconds)
    sets = [
        frozenset(n for n, wanted in zip(names, bits, strict=True) if wanted) for bits in product([0, 1], repeat=len(names))
    ]
    sets.remove(frozenset())
    fitting = {
        memory: [held for held in sets if CONTEXT_GB + sum(profile.actors[n].memory_gb for n in held) <= memory + ROOM]
        for memory in gpus
    }
    choices = product(*(fitting[memory] or [frozenset()] for memory in gpus))
    return max(
        min(sum(bool(held & some) for held in choice) / sum(seconds[name] for name in some) for some in sets)
        for choice in choices
    )


def test_no_choice_of_stages_for_each_gpu_is_faster_than_the_plan():
    rng = random.Random(6)
    compared = Counter()
    while compared.total() < 60:
        profile, asked, cluster = random_case(rng, most_gpus=4, most_actors=4)
        if profile.layout != "auto" or any(actor.device == "cpu" for actor in profile.actors.values()) or asked.shots < 9:
            continue
        cluster = Cluster((Node(cluster.gpus, 640, None),))
        try:
            planned = plan(profile, asked, cluster)
        except SetupError:
            continue
        seconds = {name: sum(planned.stage_seconds[stage] for stage in STAGES_OF[name]) for name in profile.actors}
        best, found = best_rate(profile, seconds, cluster.gpus) * 3600, planned.shots_per_hour
        turns = any(worker.turns for worker in planned.layout.workers)
        assert found >= best * 0.989
        assert turns or found <= best * 1.001
        compared[turns] += 1
    assert min(compared.values()) > 5, compared


def planned_seconds(profile, asked, cluster):
    try:
        return plan(profile, asked, cluster).seconds
    except (SetupError, ProfileError):
        return float("inf")


def test_more_gpus_and_faster_stages_never_plan_slower():
    rng = random.Random(5)
    for _ in range(100):
        profile, asked, cluster = random_case(rng)
        before = planned_seconds(profile, asked, cluster)
        n = rng.randrange(len(cluster.nodes))
        node = cluster.nodes[n]
        more = replace(node, gpus=(*node.gpus, rng.choice([16.0, 48.0, 80.0])))
        nodes = (*cluster.nodes[:n], more, *cluster.nodes[n + 1 :])
        # A simpler layout is taken where it is slower by less than a hundredth.
        assert planned_seconds(profile, asked, Cluster(nodes)) <= before * 1.011
        name = rng.choice(list(profile.actors))
        actor = profile.actors[name]
        faster = actor.model_copy(update={"seconds": {stage: s * rng.uniform(0.2, 1) for stage, s in actor.seconds.items()}})
        quicker = profile.model_copy(update={"actors": {**profile.actors, name: faster}})
        assert planned_seconds(quicker, asked, cluster) <= before * 1.011


# A run, played through


def shots_an_hour(planned, profile, shots=400):
    """Of a run in which a free worker takes what its slot is most behind with, by the shares of the plan.

    Time is that of events; moving weights takes its time, too.
    """
    actors = [name for name in B6 if set(STAGES_OF[name]) & set(planned.stage_seconds)]
    seconds = {name: sum(planned.stage_seconds[stage] for stage in STAGES_OF[name]) for name in actors}
    gb = {name: profile.actors[name].memory_gb for name in actors}
    slots = [_Slot(slot, shares, seconds, gb) for slot, shares in zip(planned.layout.slots, planned.shares, strict=True)]
    waiting = {name: [] for name in actors}
    ended, entered, ticket = [], 0, count()
    running = []

    def enter():
        nonlocal entered
        while entered < shots and entered - len(ended) < planned.layout.window:
            waiting[actors[0]].append(entered)
            entered += 1

    enter()
    now = 0.0
    while len(ended) < shots:
        given = True
        while given:
            given = False
            for slot in slots:
                name = slot.choice(waiting) if not slot.busy else None
                if name is not None:
                    shot = waiting[name].pop(0)
                    heapq.heappush(running, (now + slot.begin(name), next(ticket), slot, name, shot))
                    given = True
        now, _, slot, name, shot = heapq.heappop(running)
        slot.busy = False
        following = actors.index(name) + 1
        if following < len(actors):
            waiting[actors[following]].append(shot)
        else:
            ended.append(now)
            enter()
    first, last = shots // 5, shots * 4 // 5
    return 3600 * (last - first) / (ended[last] - ended[first]), 3600 * shots / now


class _Slot:
    """One GPU at work; its processes compute one at a time."""

    def __init__(self, slot, shares, seconds, gb):
        self.seconds, self.gb = seconds, gb
        self.shares = {
            name: sum(shares[stage] for stage in STAGES_OF[name]) for name in seconds if set(STAGES_OF[name]) <= set(shares)
        }
        turns = [group for worker in slot.workers for group in worker.turns]
        self.groups = [[name for name in seconds if STAGES_OF[name][0] in group] for group in turns]
        self.group, self.turn, self.busy = None, 0, False
        self.worked = dict.fromkeys(self.shares, 0.0)

    def choice(self, waiting):
        ready = [name for name in self.shares if waiting[name]]
        turning = {name for group in self.groups for name in group}
        here = [name for name in ready if name in (self.group or ())]
        elsewhere = [name for name in ready if name in turning and name not in here and self.shares[name] > 0]
        staying = [name for name in ready if name not in turning and (self.shares[name] > 0 or not (here or elsewhere))]
        if here and (self.turn < TURN_SHOTS or not elsewhere):
            return max(here + staying, key=self._behind)
        return max(staying or elsewhere or here, key=self._behind, default=None)

    def _behind(self, name):
        """Shots of this that are missing to the plan."""
        return (self.shares[name] * sum(self.worked.values()) - self.worked[name]) / self.seconds[name]

    def begin(self, name):
        took = self.seconds[name]
        self.busy = True
        self.worked[name] += took
        group = next((group for group in self.groups if name in group), None)
        if group is None:
            return took
        if group != self.group:
            took += (
                sum(self.gb[other] for other in [*group, *(self.group or ())]) / Profile.model_fields["swap_gb_per_s"].default
            )
            self.group, self.turn = group, 0
        self.turn += 1
        return took


@pytest.mark.parametrize(
    "gpus", ["1x80GB", "8x80GB", "8x48GB", "4x48GB", "3x48GB", "2x48GB", "1x48GB", "8x40GB", "5x40GB", "4x48GB+4x80GB"]
)
@pytest.mark.parametrize("asked", [WITHOUT_STYLE, demand(400)])
def test_a_simple_scheduler_that_keeps_the_shares_reaches_the_predicted_rate(gpus, asked):
    profile = gpu_profile(B6)
    planned = plan(profile, asked, parse_gpus(gpus))
    steady, whole = shots_an_hour(planned, profile)
    assert steady == pytest.approx(planned.shots_per_hour, rel=0.05)
    assert whole >= planned.shots_per_hour * 0.95


@pytest.mark.parametrize("kind", ["colocated", "staged"])
def test_the_same_with_processes_that_share_gpus(kind):
    profile = gpu_profile(B6, layout=kind)
    planned = plan(profile, WITHOUT_STYLE, parse_gpus("8x80GB"))
    steady, _ = shots_an_hour(planned, profile)
    assert steady == pytest.approx(planned.shots_per_hour, rel=0.05)


def test_a_card_has_one_name_whoever_tells_its_memory():
    for told_by_torch, told_by_the_driver, sold_as in (
        (79.1, 79.6, 80),
        (44.4, 45.0, 48),
        (23.7, 24.0, 24),
        (139.8, 140.4, 141),
    ):
        names = {Cluster((Node((gb,), 8, None),)).card for gb in (told_by_torch, told_by_the_driver, float(sold_as))}
        assert names == {f"{sold_as} GB"}
    assert Cluster((Node((21.4,), 8, None),)).card == "21.4 GB"
