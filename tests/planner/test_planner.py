"""Planner: layouts, costs and errors, comparison with brute force, and the rate that the scheduler reaches."""

import json
import math
import random
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import product

import pytest

from benchmarks.simulated_scheduling import SECONDS, Simulation
from vidgen_ray.batch.render_script import Counts
from vidgen_ray.cli.plan import print_plan
from vidgen_ray.errors import ProfileError, SetupError, TooExpensive, UsageError
from vidgen_ray.graph import STAGE_BY_NAME, STAGES, RelativeCost, relative_costs
from vidgen_ray.planner import (
    SHOTS_PER_SWAP,
    Cluster,
    Demand,
    Measurement,
    Node,
    calibrations,
    cpus_needed,
    demand_of,
    load_calibration,
    parse_gpus,
    plan,
    save_calibration,
    save_measurements,
    this_machine,
)
from vidgen_ray.planner.cards import H100
from vidgen_ray.planner.demand import ENCODE_SECONDS, ENCODING
from vidgen_ray.planner.layout import CONTEXT_GB, GPU_PROCESS_HOST_GB, PROCESS_HOST_GB
from vidgen_ray.profile import ActorProfile, Profile, load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage

TOLERANCE = 1e-6
B6 = {
    "instantid": (1, {"instantid": 0.1}),
    "flux": (34, {"flux": 4.3, "lora": 2.0}),
    "hunyuan": (13, {"hunyuan": 6.0}),
    "svd": (20, {"svd": 22.6}),
    "realesrgan": (6, {"realesrgan": 3.0}),
}
"""Actor -> (GB of GPU memory, stage -> seconds). Published values for an H100."""
STAGES_OF = {actor: list(seconds) for actor, (_, seconds) in B6.items()}
CHAIN = tuple(stage.name for stage in STAGES if stage.name in STAGES_OF.get(stage.actor, ()))
"""Stages of a shot that uses everything with FLUX, without the likeness checks, which take almost no time."""


def gpu_profile(actors, **fields):
    """Return a profile. `actors`: actor -> (GB of GPU memory, stage -> seconds)."""
    sections = {
        name: ActorProfile(weights="w", device="cuda", memory_gb=gb, seconds=seconds) for name, (gb, seconds) in actors.items()
    }
    return Profile(name="test", about="for tests", actors=sections, **fields)


def make_demand(shots, stages=CHAIN, *, encoded_mpx=0.0):
    """Return the demand of reference shots that use these stages."""
    return Demand(shots, dict.fromkeys(stages, RelativeCost(shots, shots)), shots, encoded_mpx, 1e6, 1e6, 1e6, 0)


WITHOUT_STYLE = make_demand(400, [name for name in CHAIN if name != "hunyuan"])


# Layouts for the published values


def test_fused_layout_if_all_stages_fit_on_one_gpu_otherwise_an_efficient_hybrid():
    for gpus, kind, efficiency in (
        ("1x80GB", "fused", 0.999),
        ("8x80GB", "fused", 0.999),
        ("16x8x80GB", "fused", 0.999),
        ("8x48GB", "hybrid", 0.96),
        ("4x48GB", "hybrid", 0.96),
        ("2x48GB", "hybrid", 0.9),
        ("1x48GB", "hybrid", 0.9),
    ):
        for demand in (WITHOUT_STYLE, make_demand(400)):
            planned = plan(gpu_profile(B6), demand, parse_gpus(gpus))
            assert (planned.layout.kind, planned.efficiency > efficiency) == (kind, True), gpus
            assert all(slot.workers[0].gpus == 1 and len(slot.workers) == 1 for slot in planned.layout.slots), gpus


def test_mixed_gpus_get_the_stages_that_fit():
    planned = plan(gpu_profile(B6), WITHOUT_STYLE, parse_gpus("2x24GB+2x48GB+1x80GB+1x8GB"))
    stages_by_memory = {memory: set() for memory in (8, 24, 48, 80)}
    for slot, node in zip(planned.layout.slots, planned.nodes, strict=True):
        stages_by_memory[(24, 48, 80, 8)[node]].update(slot.workers[0].stages)
    assert "flux" not in stages_by_memory[24]
    assert "svd" in stages_by_memory[24]
    assert {"flux", "svd"} <= stages_by_memory[80]
    assert stages_by_memory[8] <= {"instantid", "realesrgan"}


def test_gpus_that_are_too_small_are_reported_as_idle():
    planned = plan(gpu_profile({"svd": (20, {"svd": 1})}), make_demand(9, ["svd"]), parse_gpus("2x16GB+2x24GB"))
    assert planned.nodes == (1, 1)
    assert any("2 of 4 GPUs are idle" in note for note in planned.notes)


@pytest.mark.parametrize(("profile", "gpus"), [("gpu-80gb", "2x8x80GB"), ("gpu-48gb", "8x48GB"), ("gpu-24gb", "8x24GB")])
def test_one_cluster_runs_three_video_models(profile, gpus):
    models = {"svd": {}, "wan": {"num_frames": "auto"}, "ltx": {"num_frames": "auto"}}
    shots = [Shot(prompt="a", image="start.png", video_model=name, **fields) for name, fields in models.items()] * 200
    planned = plan(load_profile(profile), demand_of(shots), parse_gpus(gpus))
    held = {stage for worker in planned.layout.workers for stage in worker.stages}
    assert held == {"svd", "wan", "ltx", "realesrgan"}
    # 81 frames with 40 steps of a model of 14 billion parameters take most of the time.
    assert max(planned.stage_seconds, key=lambda stage: planned.stage_seconds[stage]) == "wan"


@pytest.mark.parametrize(("shots", "gpus"), [(1, 8), (2, 4), (3, 2), (4, 2), (5, 1), (100, 1)])
def test_fewer_clips_than_gpus_have_several_gpus_each(shots, gpus):
    clips = [Shot(prompt="a", image="start.png", video_model="wan", num_frames=81, upscale_video=False)] * shots
    profile, cluster = load_profile("gpu-80gb"), parse_gpus("8xH100")
    planned = plan(profile, demand_of(clips), cluster)
    assert {slot.gpus for slot in planned.layout.slots} == {gpus}
    assert [worker.gpus for worker in planned.layout.workers] == [gpus] * min(shots, 8 // gpus)
    assert any("divide the work of each shot" in note for note in planned.notes) == (gpus > 1)
    one_each = plan(profile.model_copy(update={"layout": "fused"}), demand_of(clips), cluster)
    assert {slot.gpus for slot in one_each.layout.slots} == {1}
    assert (planned.seconds < one_each.seconds) == (gpus > 1)
    # Each doubling is assumed to make the steps 1.7 times as fast.
    gain = 1.7 ** math.log2(gpus)
    share = WanStage.fixed_share + (1 - WanStage.fixed_share) / gain
    assert planned.stage_seconds["wan"] == pytest.approx(one_each.stage_seconds["wan"] * share)
    assert planned.efficiency <= 1


@pytest.mark.parametrize(("shots_at_once", "gpus"), [(1, 8), (3, 2), (8, 1), (None, 1)])
def test_server_divides_clips_if_fewer_run_at_once_than_it_has_gpus(shots_at_once, gpus):
    clip = Shot(prompt="a", image="start.png", video_model="wan", num_frames=81, upscale_video=False)
    profile, demand = load_profile("gpu-80gb"), demand_of([clip] * 100)
    planned = plan(profile, demand, parse_gpus("8xH100"), shots_at_once=shots_at_once)
    assert {slot.gpus for slot in planned.layout.slots} == {gpus}


def test_each_of_several_gpus_needs_host_memory_of_its_own():
    clip = Shot(prompt="a", image="start.png", video_model="wan", num_frames=81, upscale_video=False)
    plans = [
        plan(load_profile("gpu-80gb"), demand_of([clip]), Cluster((Node((80.0,) * 8, 64, host_gb),)))
        for host_gb in (90, 180, 360)
    ]
    assert [[slot.gpus for slot in planned.layout.slots] for planned in plans] == [[1], [2], [4]]


def test_flux_and_lora_share_a_process_in_every_layout():
    for kind in ("auto", "fused", "colocated", "staged"):
        planned = plan(gpu_profile(B6, layout=kind), make_demand(50), parse_gpus("5x80GB"))
        assert all(("flux" in worker.stages) == ("lora" in worker.stages) for worker in planned.layout.workers)
        assert planned.layout.kind == ("fused" if kind == "auto" else kind)


def test_colocated_processes_share_a_gpu_in_proportion_to_memory():
    planned = plan(gpu_profile(B6, layout="colocated"), make_demand(50), parse_gpus("2x80GB"))
    for slot in planned.layout.slots:
        assert len(slot.workers) == 5
        assert 0.99 < sum(worker.gpus for worker in slot.workers) <= 1
        assert slot.memory_gb == pytest.approx(74 + 5 * CONTEXT_GB)


def test_staged_layout_gives_slow_stages_more_processes_and_small_ones_share_gpus():
    planned = plan(gpu_profile(B6, layout="staged"), WITHOUT_STYLE, parse_gpus("8x48GB"))
    workers = Counter(worker.stages for worker in planned.layout.workers)
    assert workers["svd",] > workers["flux", "lora"] >= 1
    assert all(len({worker.stages for worker in slot.workers}) == len(slot.workers) for slot in planned.layout.slots)
    assert planned.efficiency > 0.9


@pytest.mark.parametrize("kind", ["auto", "colocated", "staged"])
def test_cpu_actor_works_beside_the_gpu_process_where_cpus_suffice(kind):
    profile = gpu_profile(B6)
    face = ActorProfile(weights="w", cpus=2, memory_gb=0.7, seconds={"instantid": 2.0})
    mixed = profile.model_copy(update={"actors": {**profile.actors, "instantid": face}, "layout": kind})
    planned = plan(mixed, WITHOUT_STYLE, parse_gpus("2x80GB"))
    beside = [worker for worker in planned.layout.workers if "instantid" in worker.stages]
    assert {(worker.stages, worker.cpus, worker.gpus) for worker in beside} == {(("instantid",), 2, 0)}
    # Its seconds are not those of a GPU.
    on_gpu = sum(planned.stage_seconds.values()) - 2.0
    assert planned.shots_per_hour == pytest.approx(2 * 3600 / on_gpu, rel=0.25 if kind == "staged" else 1e-3)
    few_cpus = plan(mixed, WITHOUT_STYLE, Cluster((Node((80.0,), 3.5 if kind == "auto" else 5.5, None),)))
    (joined,) = (worker for worker in few_cpus.layout.workers if "instantid" in worker.stages)
    assert {"instantid", "flux"} <= set(joined.stages)
    assert joined.cpus == 2
    assert joined.gpus > 0


PLANNED = """
from dataclasses import asdict
from vidgen_ray.planner import demand_of, parse_gpus, plan
from vidgen_ray.profile import load_profile
from vidgen_ray.shot import Shot
shot = Shot(prompt="a", face_image=("f.png",), lora="l.safetensors", use_hunyuan_style=True)
print(asdict(plan(load_profile("gpu-48gb"), demand_of([shot] * 400), parse_gpus("3x48GB+2x24GB"))))
"""


def test_plan_does_not_depend_on_the_hash_seed(capsys):
    """This process has another seed."""
    exec(PLANNED, {})
    done = subprocess.run(
        [sys.executable, "-c", PLANNED], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    )
    assert capsys.readouterr().out == done.stdout


# Profiles without GPUs


def test_cpu_workers_are_limited_by_cores_shots_and_profile():
    for name, cpus, shots, slots in (("demo", 2, 9, 2), ("demo", 16, 9, 2), ("demo", 16, 1, 1), ("tiny", 2, 9, 1)):
        planned = plan(load_profile(name), make_demand(shots), Cluster((Node((), cpus, 8),)))
        assert (planned.layout.kind, len(planned.layout.slots)) == ("fused", slots), (name, cpus, shots)
        assert all(worker.gpus == 0 for worker in planned.layout.workers)
        assert (planned.gpu_hours, planned.cost) == (0, None)
        assert cpus_needed(planned.layout) <= cpus


def test_cpu_workers_are_limited_by_host_memory(tiny):
    unlimited = tiny.model_copy(update={"cpu_workers": None})
    sizes = [len(plan(unlimited, make_demand(99), Cluster((Node((), 16, gb),))).layout.slots) for gb in (1.5, 3, 6, 100)]
    assert sizes == [1, 2, 5, 16]


def test_staged_layout_on_cpus_has_one_process_per_actor_in_one_slot(tiny):
    staged = tiny.model_copy(update={"layout": "staged"})
    planned = plan(staged, make_demand(9), Cluster((Node((), 8, None),)))
    assert [worker.stages for slot in planned.layout.slots for worker in slot.workers] == [
        ("instantid",),
        ("flux", "lora"),
        ("hunyuan",),
        ("svd",),
        ("realesrgan",),
    ]
    assert len(planned.layout.slots) == 1


def test_shots_without_stages_need_no_worker(tiny, make_shot):
    planned = plan(tiny, demand_of([make_shot(image="a.png", generate_video=False)]), Cluster((Node((), 1, 4),)))
    assert planned.layout.slots == ()
    assert planned.layout.encoders == 1
    assert planned.layout.window == 1


# Errors


@pytest.mark.parametrize(
    ("profile", "cluster", "error", "message"),
    [
        (gpu_profile(B6), Cluster((Node((), 8, 64),)), SetupError, r"stage instantid needs 1.6 GB.*there is no GPU"),
        (gpu_profile(B6), parse_gpus("8x24GB"), SetupError, r"stages flux and lora need 34.6 GB.*the largest GPU has 24 GB"),
        (gpu_profile(B6, layout="fused"), parse_gpus("8x48GB"), ProfileError, r"layout: fused.*74.6 GB.*8 GPUs has 48 GB"),
        (
            gpu_profile(B6),
            Cluster((Node((48,), 8, 32),)),
            SetupError,
            r"host memory: 75 GB are needed on one node \(6 GB .* largest weights.*the nodes have 32 GB",
        ),
        (gpu_profile(B6), Cluster((Node((80,), 2, None),)), SetupError, r"a worker needs up to 1 CPUs.*the nodes have 2"),
        (load_profile("demo"), Cluster((Node((), 1, 8),)), SetupError, r"needs up to 0.25 CPUs.*the nodes have 1"),
        (load_profile("gpu-80gb"), parse_gpus("8x24GB"), SetupError, r"stage flux: 1024x576 needs 29.7 GB of GPU memory"),
    ],
)
def test_infeasible_plan_names_the_missing_resource(profile, cluster, error, message):
    with pytest.raises(error, match=message):
        plan(profile, make_demand(9), cluster)


def test_as_many_workers_load_at_once_as_host_memory_allows():
    for memory_gb, loads in ((None, 1), (60, 1), (16 + 3 * 34, 3), (2048, 8)):
        cluster = Cluster((Node((80,) * 8, 128, memory_gb),))
        assert plan(gpu_profile(B6), make_demand(400), cluster).layout.parallel_loads == loads


def test_gpu_profiles_fit_on_their_gpus():
    # Other models of a slot, which no shot passes together with the default ones.
    others = {"klein", "qwen_edit", "wan", "ltx", "remote", "remote_image"}
    stages = [stage.name for stage in STAGES if stage.actor not in others]
    for name in ("gpu-80gb", "gpu-48gb", "gpu-24gb"):
        planned = plan(load_profile(name), make_demand(100, stages), parse_gpus(f"4x{name[4:6]}GB"))
        assert planned.efficiency > 0.95, name
        assert not any("no seconds" in note for note in planned.notes), name


def test_seconds_of_a_stage_of_another_actor_are_rejected():
    profile = gpu_profile({"svd": (20, {"flux": 1.0})})
    with pytest.raises(ProfileError, match=r"actors.svd.seconds: got 'flux', must be one of svd"):
        plan(profile, make_demand(1, ["svd"]), parse_gpus("1x80GB"))


def test_assumed_seconds_are_noted():
    planned = plan(gpu_profile({"svd": (20, {})}), make_demand(1, ["svd"]), parse_gpus("1x80GB"))
    assert not any("no seconds" in note for note in planned.notes)
    assert planned.stage_seconds["svd"] == pytest.approx(H100.seconds(SVDStage.work(SVDStage.Params(weights="w")), 0.5))
    planned = plan(gpu_profile({"instantid": (20, {})}), make_demand(1, ["instantid"]), parse_gpus("1x80GB"))
    assert any("no seconds of instantid" in note for note in planned.notes)


def test_parse_gpus_rejects_invalid_text_with_examples():
    for text in ("", "8", "8x", "80GB", "0x80GB", "8x80", "8x0GB", "8x80GB+", "x80GB", "1x1x1x80GB", "-1x80GB"):
        with pytest.raises(UsageError, match="8x80GB"):
            parse_gpus(text)


def test_parse_gpus_returns_nodes():
    assert [len(node.gpus) for node in parse_gpus("2x8x80GB + 4x48gb").nodes] == [8, 8, 4]
    assert parse_gpus("2x8x80GB").gpus == (80.0,) * 16
    assert "16 per GPU" in parse_gpus("1x80GB").notes[0]
    assert this_machine().cpus >= 1


# Demand


def test_reference_shot_has_relative_cost_one_for_every_stage():
    shot = Shot(prompt="a", face_image="f.png", identity="none", lora="l.safetensors", use_hunyuan_style=True, interpolation=2)
    assert {stage.name: stage.relative_cost(shot) for stage in STAGES} == dict.fromkeys(STAGE_BY_NAME, 1.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"width": 512, "height": 576}, {"flux": 0.56, "lora": 0.56, "svd": 0.5, "realesrgan": 0.5, "hunyuan": 1}),
        ({"num_frames": 50}, {"svd": 2.0, "realesrgan": 2, "flux": 1}),
        ({"extend": 2, "interpolation": 2}, {"svd": 3, "realesrgan": 73 / 25, "rife": 73 / 25, "flux": 1}),
        ({"flux.steps": 7, "svd.steps": 50, "lora.steps": 14}, {"flux": 0.25, "svd": 2, "lora": 0.5, "hunyuan": 1}),
        ({"hunyuan.steps": 15}, {"hunyuan": 0.5}),
        ({"lora_strength": 0.3, "style_strength": 1}, {"lora": 0.5, "hunyuan": 2, "flux": 1}),
        ({"negative_prompt": "b"}, {"flux": 2, "lora": 2}),
        ({"face_image": "f.png"}, {"flux": 1.25, "lora": 1.25, "instantid": 1}),
        ({"face_image": "f.png", "identity_end": 0.4, "negative_prompt": "b"}, {"flux": 2.1}),
        ({"face_image": "f.png", "identity": "instantid-sdxl", "refine_strength": 0.7}, {"instantid_sdxl": 1, "refine": 2}),
        ({"guidance.hunyuan": 1}, {"hunyuan": 0.5}),
        ({"scale": 2}, {"realesrgan": 1}),
        ({"upscaler": "x4plus"}, {"realesrgan": 29}),
        ({"video_model": "wan", "num_frames": 49, "wan.steps": 4, "guidance.wan": 1}, {"wan": 2.38 / 20}),
        ({"video_model": "ltx", "num_frames": 25, "ltx.steps": 100}, {"ltx": 2}),
        ({"video_model": "ltx", "num_frames": 25, "extend": 1}, {"ltx": 2}),
        ({"image_model": "klein", "klein.steps": 8}, {"klein": 2}),
        ({"style_model": "qwen-edit", "qwen_edit.steps": 20, "guidance.qwen_edit": 1}, {"qwen_edit": 0.25}),
    ],
)  # fmt: skip
def test_relative_cost_depends_on_the_shot(fields, expected):
    shot = Shot(prompt="a", lora="l.safetensors", use_hunyuan_style=True, **fields)
    assert {name: STAGE_BY_NAME[name].relative_cost(shot) for name in expected} == pytest.approx(expected, rel=0.03)


def test_demand_of_sums_over_shots():
    def shots():
        for n in range(300):
            yield Shot(prompt="a", lora=f"l{n % 3}.safetensors", upscale_video=n % 2 == 0, generate_video=n % 4 != 3)

    demand = demand_of(shots())
    assert (demand.shots, demand.upscaled, demand.loras) == (300, 150, 3)
    costs = {name: cost.steps for name, cost in demand.relative_cost.items()}
    assert costs == pytest.approx({"flux": 300, "lora": 300, "svd": 225, "realesrgan": 150})
    clip = 1024 * 576 * 25 / 1e6
    assert demand.encoded_mpx == pytest.approx(clip * (225 + 16 * 150))


# Encoders, cost, duration


def test_number_of_encoders_follows_the_encoded_pixels():
    fast = gpu_profile({"svd": (20, {"svd": 1.0})})
    planned = plan(fast, make_demand(100, ["svd"], encoded_mpx=100 * 24), parse_gpus("8x80GB"))
    # 8 shots per second of 24 megapixels each.
    encode_s = 24 * ENCODE_SECONDS["medium"][1]
    assert (planned.layout.encoders, planned.encode_s) == (math.ceil(8 * encode_s / 0.5), pytest.approx(encode_s))


def test_measured_seconds_of_encoding_replace_those_of_the_table():
    fast = gpu_profile({"svd": (20, {"svd": 1.0})})
    demand = make_demand(100, ["svd"], encoded_mpx=100 * 240)
    save_calibration("p", "H100", {ENCODING: [(240 * 0.025, RelativeCost(240, 240))] * 3})
    planned = plan(fast, demand, parse_gpus("8x80GB"), calibration=load_calibration("p", "H100"))
    assert (planned.layout.encoders, planned.encode_s) == (8 * 6 / 0.5, pytest.approx(6.0))


def test_encoders_limit_the_rate_where_cpus_are_few():
    fast = gpu_profile({"svd": (20, {"svd": 1.0})})
    demand = make_demand(100, ["svd"], encoded_mpx=100 * 240)
    calibration = calibrations({ENCODING: [(240 * 0.025, RelativeCost(240, 240))]})
    planned = plan(fast, demand, Cluster((Node((80.0,), 4, None),)), calibration=calibration)
    # One CPU for the worker and one for the director leave four encoders of half a CPU.
    assert (planned.layout.encoders, planned.shots_per_hour) == (4, pytest.approx(4 * 0.5 / 6 * 3600, rel=1e-3))
    assert planned.bottleneck == ENCODING


def test_window_depends_on_slots_and_swaps_and_is_limited_by_shots():
    assert plan(gpu_profile(B6), make_demand(400), parse_gpus("8x80GB")).layout.window == 24
    assert plan(gpu_profile(B6), make_demand(400), parse_gpus("1x48GB")).layout.window == 2 * SHOTS_PER_SWAP
    few = plan(gpu_profile(B6), make_demand(5), parse_gpus("8x80GB")).layout
    assert (few.window, len(few.slots)) == (5, 5)


def test_max_cost_exits_with_code_5():
    planned = plan(gpu_profile(B6), make_demand(1000), parse_gpus("8x80GB"), price=2)
    assert planned.cost == pytest.approx(planned.gpu_hours * 2)
    planned.check_cost(planned.cost)
    with pytest.raises(TooExpensive, match=r"--max-cost allows 1.00") as error:
        planned.check_cost(1)
    assert error.value.exit_code == 5
    without_gpus = plan(load_profile("demo"), make_demand(1000), Cluster((Node((), 2, 8),)))
    without_gpus.check_cost(0)


def test_price_comes_from_the_command_the_profile_or_the_default_table():
    profile = gpu_profile(B6, price_per_gpu_hour=3)
    for price, priced, rate in ((None, profile, 3), (7, profile, 7), (None, gpu_profile(B6), 2.5)):
        planned = plan(priced, make_demand(1000), parse_gpus("8x80GB"), price=price)
        assert planned.cost == pytest.approx(planned.gpu_hours * rate)
        assert any("price" in note for note in planned.notes) == (rate == 2.5)
    named = plan(gpu_profile(B6), make_demand(1000), parse_gpus("8xL40S+8xH200"))
    assert named.cost == pytest.approx(named.gpu_hours * (1.0 + 3.6) / 2)


def test_expected_seconds_are_within_the_range():
    planned = plan(gpu_profile(B6), make_demand(1000), parse_gpus("8x80GB"))
    bound = 1000 * sum(planned.stage_seconds.values()) / 8
    assert planned.seconds_low < bound < planned.seconds < planned.seconds_high


# Calibration


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path))
    return tmp_path


def measured(**samples):
    """Return the samples of each stage. `samples`: stage -> pairs of seconds and relative cost."""
    return {stage: [(seconds, RelativeCost(cost, cost)) for seconds, cost in pairs] for stage, pairs in samples.items()}


def test_calibration_overrides_the_seconds_of_the_profile(cache_folder):
    svd = [(5.0, 0.5), (10.0, 1.0), (11.0, 1.0), (9.0, 1.0), (900.0, 1.0)]
    save_calibration("p", "H100", measured(svd=svd, flux=[(1, 0)]))
    ((name, calibration),) = load_calibration("p", "H100").items()
    assert (name, calibration.seconds_of_reference, calibration.shots) == ("svd", 10.0, 5)
    assert calibration.spread == pytest.approx(0.148, abs=0.001)
    planned = plan(gpu_profile(B6), make_demand(1, ["svd"]), parse_gpus("1x80GB"), calibration=load_calibration("p", "H100"))
    assert planned.stage_seconds == {"svd": 10.0}
    assert load_calibration("p", "L40S") == load_calibration("q", "H100") == {}


def test_calibration_of_few_shots_does_not_replace_one_of_many(cache_folder):
    save_calibration("p", "c", measured(svd=[(10.0, 1.0)] * 5))
    save_calibration("p", "c", measured(svd=[(99.0, 1.0)], flux=[(3.0, 1.0)]))
    assert {stage: calibration.seconds_of_reference for stage, calibration in load_calibration("p", "c").items()} == {
        "svd": 10.0,
        "flux": 3.0,
    }
    save_calibration("p", "c", measured(svd=[(20.0, 1.0)] * 3))
    assert load_calibration("p", "c")["svd"].seconds_of_reference == 20.0


def wan_shots(steps, frames=25):
    return [
        Shot(prompt="a", image="start.png", video_model="wan", num_frames=frames, steps={"wan": steps}, upscale_video=False)
    ] * 20


def test_calibration_measures_fixed_seconds_and_seconds_per_step(cache_folder):
    """Shots of 4 and 40 steps that take 10 s for encoding and decoding, and 2 s per step, at 25 frames."""
    costs = [relative_costs(wan_shots(*shot)[0])["wan"] for shot in ((4, 25), (40, 25), (40, 49), (4, 81))]
    samples = [(10 * cost.fixed + 80 * cost.steps, cost) for cost in costs]
    save_calibration("p", "c", {"wan": samples})
    calibration = load_calibration("p", "c")
    assert calibration["wan"].seconds_of_reference == pytest.approx(90)
    assert calibration["wan"].fixed_share == pytest.approx(10 / 90)
    assert calibration["wan"].spread == pytest.approx(0, abs=1e-6)
    profile = gpu_profile({"wan": (20, {})})
    for steps, seconds in ((4, 18), (8, 26), (40, 90)):
        planned = plan(profile, demand_of(wan_shots(steps)), parse_gpus("1x80GB"), calibration=calibration)
        assert planned.stage_seconds["wan"] == pytest.approx(seconds)


def test_shots_with_the_same_steps_keep_the_assumed_fixed_share(cache_folder):
    cost = relative_costs(wan_shots(4)[0])["wan"]
    save_calibration("p", "c", {"wan": [(20.0, cost)] * 3})
    calibration = load_calibration("p", "c")["wan"]
    assert calibration.fixed_share == STAGE_BY_NAME["wan"].fixed_share
    assert calibration.seconds_of_reference * cost.mixed(calibration.fixed_share) == pytest.approx(20)


def test_damaged_calibration_file_counts_as_empty(cache_folder):
    (cache_folder / "measured.json").write_text('{"p": {"c": {"svd": {"seconds_of_reference": -1}}}}')
    assert load_calibration("p", "c") == {}
    save_calibration("p", "c", measured(svd=[(10.0, 1.0)]))
    assert load_calibration("p", "c")["svd"].shots == 1


def test_bench_gives_the_share_that_does_not_grow_with_the_steps(cache_folder):
    save_measurements("p", "c", {"svd": [Measurement(size="1024x576x25", seconds_of_reference=22.0, fixed_share=2 / 22)]})
    calibration = load_calibration("p", "c")

    def seconds(steps):
        demand = demand_of([Shot(prompt="a", upscale_video=False, steps={"svd": steps})] * 3)
        return plan(gpu_profile(B6), demand, parse_gpus("1x80GB"), calibration=calibration).stage_seconds["svd"]

    assert (seconds(25), seconds(50)) == (pytest.approx(22.0), pytest.approx(42.0))


def test_run_keeps_what_only_a_bench_measures(cache_folder):
    measured = [Measurement(size="1024x576x25", variant=name, seconds_of_reference=s) for name, s in (("a", 1.0), ("b", 4.0))]
    save_measurements("p", "c", {"realesrgan": measured})
    save_calibration("p", "c", {"realesrgan": [(2.0, RelativeCost(1.0, 1.0))] * 3})
    calibration = load_calibration("p", "c")["realesrgan"]
    assert (calibration.seconds_of_reference, calibration.variants) == (2.0, {"a": 1.0, "b": 4.0})
    save_measurements("p", "c", {"realesrgan": [Measurement(size="1024x576x25", variant="b", seconds_of_reference=3.0)]})
    kept = load_calibration("p", "c")["realesrgan"]
    assert (kept.variants, len(kept.measurements)) == ({"a": 1.0, "b": 3.0}, 2)


def test_seconds_of_measured_upscalers_apply_to_their_shots_only(cache_folder):
    shots = [Shot(prompt="a", upscaler=name) for name in ("animevideov3", "x4plus")]
    measured = [
        Measurement(size="1024x576x25", variant=name, seconds_of_reference=s) for name, s in (("x4plus", 0.1), ("other", 3.0))
    ]
    save_measurements("p", "c", {"realesrgan": measured})
    calibration = load_calibration("p", "c")
    planned = plan(gpu_profile(B6), demand_of(shots), parse_gpus("1x80GB"), calibration=calibration)
    x4plus = 0.1 * relative_costs(shots[1])["realesrgan"].steps
    assert planned.stage_seconds["realesrgan"] == pytest.approx((3.0 + x4plus) / 2)


def test_plan_uses_the_bench_of_the_nearest_size_until_a_run_has_measured_the_stage(cache_folder):
    sizes = {"512x512x25": 5.0, "1024x576x25": 22.0, "1024x576x100": 90.0, "2048x1152x25": 120.0}
    save_measurements("p", "c", {"svd": [Measurement(size=size, seconds_of_reference=s) for size, s in sizes.items()]})

    def seconds(width, height, frames):
        demand = demand_of([Shot(prompt="a", width=width, height=height, num_frames=frames)] * 3)
        calibration = load_calibration("p", "c")
        planned = plan(gpu_profile(B6), demand, parse_gpus("1x80GB"), calibration=calibration).stage_seconds["svd"]
        return planned / relative_costs(Shot(prompt="a", width=width, height=height, num_frames=frames))["svd"].steps

    assert seconds(1024, 640, 20) == pytest.approx(22.0)
    assert seconds(512, 448, 25) == pytest.approx(5.0)
    assert seconds(1024, 576, 81) == pytest.approx(90.0)
    save_calibration("p", "c", {"svd": [(30.0, RelativeCost(1.0, 1.0))] * 3})
    assert seconds(512, 448, 25) == pytest.approx(30.0)


# The plan command


def test_print_plan_prints_the_plan(capsys):
    print_plan(gpu_profile(B6), WITHOUT_STYLE, parse_gpus("2x48GB"), counts=Counts(410, 7, 3, 12))
    output = capsys.readouterr().out
    for words in (
        "2 x 48 GB, 32 CPUs on 1 node",
        "400 to render; 7 of 410 already done, 3 rejected, 12 cached stages",
        "hybrid: 2 workers on 2 GPUs",
        "swapping flux 27%, lora 12% | svd 41%",
        "limited by svd",
        "GPU-hours",
        "cost",
        "hybrid with swapping",
        "the stages need 61.6 GB together, the largest of 2 GPUs has 48 GB",
    ):
        assert words in output


def test_print_plan_prints_json_before_the_cost_check(capsys):
    with pytest.raises(TooExpensive):
        print_plan(gpu_profile(B6), WITHOUT_STYLE, parse_gpus("8x80GB"), Counts(1, 0, 0, 0), max_cost=0.01, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["layout"]["kind"] == "fused"
    assert len(printed["layout"]["slots"]) == len(printed["nodes"]) == len(printed["shares"]) == 8
    assert printed["efficiency"] == pytest.approx(1)


def test_print_plan_without_pending_shots(tiny, capsys):
    print_plan(tiny, make_demand(0, []), this_machine(), counts=Counts(7, 7, 0, 0))
    assert "nothing to render: 7 of 7 already done" in capsys.readouterr().out
    print_plan(tiny, make_demand(0, []), this_machine(), counts=Counts(7, 7, 0, 0), as_json=True)
    assert json.loads(capsys.readouterr().out)["shots"] == 0


# Random profiles and clusters


def random_case(rng, *, max_gpus=4, max_actors=5):
    """Return a random profile, demand and cluster. Some of them are short of a resource."""
    names = sorted(rng.sample(list(B6), rng.randint(1, max_actors)))
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
    costs = {stage: RelativeCost(cost, cost) for stage, cost in relative_cost.items()}
    demand = Demand(shots, costs, shots, shots * rng.choice([0.0, 10.0, 300.0]), 1e6, 1e6, 1e6, 0)
    nodes, gpus_left = [], max_gpus
    for _ in range(rng.randint(1, 3)):
        gpus = tuple(rng.choice([16.0, 24.0, 48.0, 80.0]) for _ in range(rng.randint(0, min(gpus_left, 4))))
        gpus_left -= len(gpus)
        cpus = rng.choice([rng.randint(1, 6), 4 + 8 * len(gpus), 64])
        nodes.append(Node(gpus, cpus, rng.choice([None, None, 512.0, rng.uniform(4, 100)])))
    return profile, demand, Cluster(tuple(nodes))


def process_needs(profile, stages, swap_groups):
    """Return GPU memory, CPUs, host memory and more host memory while loading of a process, independently of the planner."""
    actors = {STAGE_BY_NAME[stage].actor for stage in stages}
    groups = [{STAGE_BY_NAME[stage].actor for stage in group} for group in swap_groups]
    gpu = {name: profile.actors[name].memory_gb for name in actors if profile.actors[name].device == "cuda"}
    host = sum(profile.actors[name].memory_gb for name in actors if name not in gpu)
    waiting = sum(gpu[name] for group in groups for name in group)
    largest = max((sum(gpu[name] for name in group) for group in groups), default=0)
    gpu_gb = CONTEXT_GB + sum(gpu.values()) - waiting + largest if gpu else 0
    cpus = max(profile.actors[name].cpus for name in actors)
    load = max((gb for name, gb in gpu.items() if not any(name in group for group in groups)), default=0)
    return gpu_gb, cpus, host + waiting + (GPU_PROCESS_HOST_GB if gpu else PROCESS_HOST_GB), load


def other_processes_fit(free_cpus, encoders):
    """Return whether encoders, director and Ray's own tasks fit on nodes with these free CPUs."""
    if min(free_cpus) < -TOLERANCE:
        return False

    def encoder_places(free):
        return sum(int((cpus + TOLERANCE) / 0.5) for cpus in free)

    options = (
        [cpus - (1.0 if n == director else 0) for n, cpus in enumerate(free_cpus)]
        for director, free in enumerate(free_cpus)
        if free >= 1 - TOLERANCE
    )
    return any(encoder_places(free) >= encoders for free in options)


def assert_respects_limits(planned, profile, demand, cluster):
    layout = planned.layout
    cpus = [node.cpus for node in cluster.nodes]
    host = [node.memory_gb if node.memory_gb is not None else float("inf") for node in cluster.nodes]
    load = [0 for _ in cluster.nodes]
    sizes = defaultdict(list)
    for slot, node in zip(layout.slots, planned.nodes, strict=True):
        needs = [process_needs(profile, worker.stages, worker.swap_groups) for worker in slot.workers]
        assert [worker.cpus for worker in slot.workers] == [needed for _, needed, _, _ in needs]
        assert sum(gb for gb, _, _, _ in needs) == pytest.approx(slot.memory_gb, abs=2e-3)
        assert sum(worker.gpus for worker in slot.workers) <= 1
        assert all((worker.gpus > 0) == (gb > 0) for worker, (gb, _, _, _) in zip(slot.workers, needs, strict=True))
        assert all(set().union(*worker.swap_groups) <= set(worker.stages) for worker in slot.workers)
        cpus[node] -= slot.cpus
        host[node] -= sum(gb for _, _, gb, _ in needs)
        load[node] = max(load[node], *(gb for _, _, _, gb in needs))
        if slot.has_gpu:
            sizes[node].append(slot.memory_gb)
    for node, slot_sizes in sizes.items():
        gpus = sorted(cluster.nodes[node].gpus, reverse=True)
        assert len(slot_sizes) <= len(gpus)
        assert all(gb <= memory + 2e-3 for gb, memory in zip(sorted(slot_sizes, reverse=True), gpus, strict=False))
    assert other_processes_fit(cpus, layout.encoders)
    assert all(gb >= loading - TOLERANCE for gb, loading in zip(host, load, strict=True))
    assert {stage for worker in layout.workers for stage in worker.stages} == set(demand.relative_cost)
    assert 1 <= layout.window <= demand.shots
    assert 0 < planned.efficiency <= 1 + TOLERANCE
    for slot, shares in zip(layout.slots, planned.shares, strict=True):
        assert set(shares) == {stage for worker in slot.workers for stage in worker.stages}
        beside = {stage for worker in slot.workers if slot.has_gpu and not worker.gpus for stage in worker.stages}
        assert sum(share for stage, share in shares.items() if stage not in beside) <= 1 + 1e-4
        assert all(sum(shares[stage] for stage in worker.stages) <= 1 + 1e-4 for worker in slot.workers)


def test_random_plans_respect_all_limits():
    rng = random.Random(3)
    accepted = Counter()
    for _ in range(100):
        profile, demand, cluster = random_case(rng, max_gpus=7)
        try:
            planned = plan(profile, demand, cluster)
        except (SetupError, ProfileError):
            accepted["infeasible"] += 1
            continue
        assert_respects_limits(planned, profile, demand, cluster)
        accepted[planned.layout.kind] += 1
        accepted["turns"] += any(worker.swap_groups for worker in planned.layout.workers)
    kinds = ("infeasible", "fused", "colocated", "staged", "hybrid", "turns")
    assert min(accepted[kind] for kind in kinds) >= 1, accepted


def brute_force_rate(profile, seconds, gpus):
    """Return the highest rate in shots per second over all assignments of actors to GPUs without turns.

    By Hall's theorem, a rate is feasible if every set of actors needs at most the time of the GPUs that hold any of them.
    """
    names = list(seconds)
    sets = [frozenset(n for n, bit in zip(names, bits, strict=True) if bit) for bits in product([0, 1], repeat=len(names))]
    sets.remove(frozenset())
    fitting = {
        memory: [some for some in sets if CONTEXT_GB + sum(profile.actors[n].memory_gb for n in some) <= memory + TOLERANCE]
        for memory in gpus
    }
    choices = product(*(fitting[memory] or [frozenset()] for memory in gpus))
    return max(
        min(sum(bool(actors & some) for actors in choice) / sum(seconds[name] for name in some) for some in sets)
        for choice in choices
    )


def test_plan_is_as_fast_as_the_best_brute_force_assignment():
    """A plan is refused only if brute force finds none."""
    rng, compared, refused = random.Random(6), Counter(), 0
    while compared.total() < 30:
        profile, demand, cluster = random_case(rng, max_gpus=4, max_actors=4)
        if profile.layout != "auto" or any(actor.device == "cpu" for actor in profile.actors.values()) or demand.shots < 9:
            continue
        cluster = Cluster((Node(cluster.gpus, 640_000, None),))
        try:
            planned = plan(profile, demand, cluster)
        except SetupError:
            assert brute_force_rate(profile, dict.fromkeys(profile.actors, 1.0), cluster.gpus) == 0, (profile, cluster)
            refused += 1
            continue
        seconds = {name: sum(planned.stage_seconds[stage] for stage in STAGES_OF[name]) for name in profile.actors}
        best, planned_rate = brute_force_rate(profile, seconds, cluster.gpus) * 3600, planned.shots_per_hour
        swap_groups = any(worker.swap_groups for worker in planned.layout.workers)
        assert planned_rate >= best * 0.989
        assert swap_groups or planned_rate <= best * 1.001
        compared[swap_groups] += 1
    assert min(*compared.values(), refused) > 2, (compared, refused)


# Simulated runs


@pytest.mark.parametrize("gpus", ["8x80GB", "8x48GB", "3x48GB", "2x48GB", "1x48GB", "8x40GB", "5x40GB", "4x48GB+4x80GB"])
def test_scheduler_reaches_the_planned_rate(gpus):
    """With the engine's scheduler in simulated time. Workers swap weights in some of these layouts."""
    actors = {
        name: (gb, {stage: SECONDS[stage] for stage in seconds}) for name, (gb, seconds) in B6.items() if name != "hunyuan"
    }
    planned = plan(gpu_profile(actors), WITHOUT_STYLE, parse_gpus(gpus))
    simulated = Simulation(planned.layout.workers, WITHOUT_STYLE.shots, loras=1).run()
    assert bool(simulated.swaps) == any(worker.swap_groups for worker in planned.layout.workers)
    rate = 3600 * WITHOUT_STYLE.shots / simulated.makespan_s
    assert 0.95 * planned.shots_per_hour < rate < 1.01 * planned.shots_per_hour


def test_gpu_is_busy_while_a_cpu_actor_works(monkeypatch):
    """A GPU that waited for the CPU actor would be busy 90% of the time."""
    monkeypatch.setitem(SECONDS, "instantid", 3.0)
    actors = {
        name: (gb, {stage: SECONDS[stage] for stage in seconds}) for name, (gb, seconds) in B6.items() if name != "hunyuan"
    }
    profile = gpu_profile(actors)
    face = ActorProfile(weights="w", memory_gb=0.7, seconds={"instantid": 3.0})
    profile = profile.model_copy(update={"actors": {**profile.actors, "instantid": face}})
    planned = plan(profile, WITHOUT_STYLE, parse_gpus("2x80GB"))
    simulated = Simulation(planned.layout.workers, WITHOUT_STYLE.shots, loras=1).run()
    busy_s = WITHOUT_STYLE.shots * (sum(SECONDS.values()) - 3.0)
    assert busy_s / (2 * simulated.makespan_s) > 0.97


def test_card_name_is_the_nominal_memory():
    for from_torch, from_driver, nominal in (
        (79.1, 79.6, 80),
        (44.4, 45.0, 48),
        (23.7, 24.0, 24),
        (139.8, 140.4, 141),
    ):
        names = {Cluster((Node((gb,), 8, None),)).card for gb in (from_torch, from_driver, float(nominal))}
        assert names == {f"{nominal} GB"}
    assert Cluster((Node((21.4,), 8, None),)).card == "21.4 GB"


def planned_seconds(profile, demand, cluster):
    try:
        return plan(profile, demand, cluster).seconds
    except (SetupError, ProfileError):
        return float("inf")


def test_more_gpus_or_faster_stages_are_never_slower():
    rng = random.Random(5)
    for _ in range(20):
        profile, demand, cluster = random_case(rng)
        before = planned_seconds(profile, demand, cluster)
        n = rng.randrange(len(cluster.nodes))
        node = cluster.nodes[n]
        more = replace(node, gpus=(*node.gpus, rng.choice([16.0, 48.0, 80.0])))
        nodes = (*cluster.nodes[:n], more, *cluster.nodes[n + 1 :])
        # A simpler layout is chosen if it is at most 1% slower.
        assert planned_seconds(profile, demand, Cluster(nodes)) <= before * 1.011
        name = rng.choice(list(profile.actors))
        actor = profile.actors[name]
        faster = actor.model_copy(update={"seconds": {stage: s * rng.uniform(0.2, 1) for stage, s in actor.seconds.items()}})
        quicker = profile.model_copy(update={"actors": {**profile.actors, name: faster}})
        assert planned_seconds(quicker, demand, cluster) <= before * 1.011
