"""Planner: layouts, costs and errors, comparison with brute force, and the rate that the scheduler reaches."""

import json
import math
import random
from collections import Counter, defaultdict
from itertools import product

import pytest

from benchmarks.simulated_scheduling import SECONDS, Simulation
from vidgen_ray.batch.line_planner import ScriptCounts
from vidgen_ray.cli.plan import print_plan
from vidgen_ray.errors import ProfileError, SetupError, TooExpensive, UsageError
from vidgen_ray.graph import STAGE_BY_NAME, STAGES, RelativeCost, relative_costs
from vidgen_ray.planner import choose_layout
from vidgen_ray.planner.choose_layout import cpus_needed, plan_run
from vidgen_ray.planner.cluster import H100, Cluster, Node, parse_gpus, profile_for, this_machine
from vidgen_ray.planner.demand import (
    ENCODE_SECONDS,
    ENCODING,
    Demand,
    Measurement,
    calibrations,
    demand_of,
    load_calibration,
    save_calibration,
    save_measurements,
)
from vidgen_ray.planner.layout import (
    CONTEXT_GB,
    GPU_PROCESS_HOST_GB,
    GROUP_GB,
    PROCESS_HOST_GB,
    SHOTS_PER_SWAP,
    Slot,
    WorkerSpec,
)
from vidgen_ray.planner.solver import _PackingModel, more_slots
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


def test_fused_layout_if_all_stages_fit_on_one_gpu_otherwise_an_efficient_hybrid():
    for gpus, kind, efficiency in (
        ("1x80GB", "fused", 0.999),
        ("16x8x80GB", "fused", 0.999),
        ("8x48GB", "hybrid", 0.96),
        ("1x48GB", "hybrid", 0.9),
    ):
        for demand in (WITHOUT_STYLE, make_demand(400)):
            planned = plan_run(gpu_profile(B6), demand, parse_gpus(gpus))
            assert (planned.layout.kind, planned.efficiency > efficiency) == (kind, True), gpus
            assert all(slot.workers[0].gpus == 1 and len(slot.workers) == 1 for slot in planned.layout.slots), gpus


@pytest.mark.parametrize(("name", "gpus"), [("demo", None), ("tiny", None), ("gpu-80gb", "1x80GB"), ("gpu-80gb", "2x8x80GB")])
def test_plan_without_a_choice_needs_no_solver(name, gpus, monkeypatch):
    cluster = Cluster((Node((), 2, 8.0), Node((), 5, 8.0))) if gpus is None else parse_gpus(gpus)
    arguments = load_profile(name), demand_of([Shot(prompt="a", use_hunyuan_style=True)] * 30), cluster
    with monkeypatch.context() as patched:
        patched.setattr(_PackingModel, "_best_values", None)
        direct = plan_run(*arguments)
    monkeypatch.setattr(_PackingModel, "_values_of_one_option", lambda model: None)
    solved = plan_run(*arguments)
    assert direct.layout == solved.layout
    assert direct.shots_per_hour == pytest.approx(solved.shots_per_hour)


def test_one_cluster_runs_three_video_models():
    models = {"svd": {}, "wan": {"num_frames": "auto"}, "ltx": {"num_frames": "auto"}}
    shots = [Shot(prompt="a", image="start.png", video_model=name, **fields) for name, fields in models.items()] * 200
    planned = plan_run(load_profile("gpu-48gb"), demand_of(shots), parse_gpus("8x48GB"))
    assert {stage for worker in planned.layout.workers for stage in worker.stages} == {"svd", "wan", "ltx", "realesrgan"}
    # 81 frames with 40 steps of a model of 14 billion parameters take most of the time.
    assert max(planned.stage_seconds, key=planned.stage_seconds.get) == "wan"


WAN_CLIP = Shot(prompt="a", image="start.png", video_model="wan", num_frames=81, upscale_video=False)


def gpus_of_slots(planned):
    return [slot.gpus for slot in planned.layout.slots]


def test_fewer_clips_than_gpus_have_several_gpus_each():
    profile, cluster = load_profile("gpu-80gb"), parse_gpus("8xH100")
    for shots, gpus in ((1, 8), (3, 2), (5, 1)):
        demand = demand_of([WAN_CLIP] * shots)
        planned = plan_run(profile, demand, cluster)
        assert [worker.gpus for worker in planned.layout.workers] == [gpus] * min(shots, 8 // gpus) == gpus_of_slots(planned)
        assert any("divide the work of each shot" in note for note in planned.notes) == (gpus > 1)
        one_each = plan_run(profile.model_copy(update={"layout": "fused"}), demand, cluster)
        assert set(gpus_of_slots(one_each)) == {1}
        assert (planned.seconds < one_each.seconds) == (gpus > 1)
        # Each doubling makes the steps 1.65 times as fast. The autoencoder is divided evenly, text encoding is not.
        work = WanStage.work(profile.options_of(WanStage), WAN_CLIP)
        fixed, shared = (H100.seconds(each, WanStage.compute_share) for each in (work.fixed, work.shared))
        steps = (one_each.stage_seconds["wan"] - fixed) / 1.65 ** math.log2(gpus)
        assert planned.stage_seconds["wan"] == pytest.approx(fixed - shared + shared / gpus + steps)
        assert 0 < fixed - shared < 0.01 * fixed
        assert planned.efficiency <= 1
        # The first GPU of a group has the context of a second process, and all have communicators.
        more_gb = CONTEXT_GB + GROUP_GB if gpus > 1 else 0
        memory_gb, alone_gb = (max(slot.memory_gb for slot in each.layout.slots) for each in (planned, one_each))
        assert memory_gb == pytest.approx(alone_gb + more_gb)
    # A server with fewer clips at once than GPUs.
    for shots_at_once, gpus in ((1, 8), (3, 2), (8, 1)):
        planned = plan_run(profile, demand_of([WAN_CLIP] * 100), cluster, shots_at_once=shots_at_once)
        assert set(gpus_of_slots(planned)) == {gpus}
    # Each GPU of a slot needs host memory of its own.
    for host_gb, gpus in ((90, 1), (180, 2)):
        planned = plan_run(profile, demand_of([WAN_CLIP]), Cluster((Node((80.0,) * 8, 64, host_gb),)))
        assert gpus_of_slots(planned) == [gpus]


def test_two_gpus_compute_the_two_passes_of_svd():
    cluster = parse_gpus("8xH100")
    profile = profile_for("auto", lambda: cluster)
    demand = demand_of([Shot(prompt="a", image="start.png", upscale_video=False)])
    planned, alone = (plan_run(profile, demand, each) for each in (cluster, parse_gpus("1xH100")))
    # More than two gain nothing.
    assert gpus_of_slots(planned) == [2]
    assert 1.7 < alone.stage_seconds["svd"] / planned.stage_seconds["svd"] < 1.9
    assert any("2 GPUs divide the work of each shot in svd (1.9 times as fast)" in note for note in planned.notes)


@pytest.mark.parametrize("kind", ["auto", "staged"])
def test_cpu_actor_works_beside_the_gpu_process_where_cpus_suffice(kind):
    profile = gpu_profile(B6)
    face = ActorProfile(weights="w", cpus=2, memory_gb=0.7, seconds={"instantid": 2.0})
    mixed = profile.model_copy(update={"actors": {**profile.actors, "instantid": face}, "layout": kind})
    planned = plan_run(mixed, WITHOUT_STYLE, parse_gpus("2x80GB"))
    beside = [worker for worker in planned.layout.workers if "instantid" in worker.stages]
    assert {(worker.stages, worker.cpus, worker.gpus) for worker in beside} == {(("instantid",), 2, 0)}
    # Its seconds are not those of a GPU.
    on_gpu = sum(planned.stage_seconds.values()) - 2.0
    assert planned.shots_per_hour == pytest.approx(2 * 3600 / on_gpu, rel=0.25 if kind == "staged" else 1e-3)
    few_cpus = plan_run(mixed, WITHOUT_STYLE, Cluster((Node((80.0,), 3.5 if kind == "auto" else 5.5, None),)))
    (joined,) = (worker for worker in few_cpus.layout.workers if "instantid" in worker.stages)
    assert {"instantid", "flux"} <= set(joined.stages)
    assert (joined.cpus, joined.gpus > 0) == (2, True)


def test_cpu_workers_are_limited_by_cores_shots_profile_and_host_memory(tiny, make_shot):
    for name, cpus, shots, slots in (("demo", 2, 9, 2), ("demo", 16, 1, 1), ("tiny", 2, 9, 1)):
        planned = plan_run(load_profile(name), make_demand(shots), Cluster((Node((), cpus, 8),)))
        assert (planned.layout.kind, len(planned.layout.slots)) == ("fused", slots), (name, cpus, shots)
        assert all(worker.gpus == 0 for worker in planned.layout.workers)
        assert (planned.gpu_hours, planned.cost) == (0, None)
        assert cpus_needed(planned.layout) <= cpus
    unlimited = tiny.model_copy(update={"cpu_workers": None})
    sizes = [len(plan_run(unlimited, make_demand(99), Cluster((Node((), 16, gb),))).layout.slots) for gb in (1.5, 3, 6, 100)]
    assert sizes == [1, 2, 5, 16]
    staged = plan_run(tiny.model_copy(update={"layout": "staged"}), make_demand(9), Cluster((Node((), 8, None),)))
    (slot,) = staged.layout.slots
    stages = [worker.stages for worker in slot.workers]
    assert stages == [("instantid",), ("flux", "lora"), ("hunyuan",), ("svd",), ("realesrgan",)]
    # Shots without stages.
    planned = plan_run(tiny, demand_of([make_shot(image="a.png", generate_video=False)]), Cluster((Node((), 1, 4),)))
    assert (planned.layout.slots, planned.layout.encoders, planned.layout.window) == ((), 1, 1)


def test_staged_layout():
    planned = plan_run(gpu_profile(B6, layout="staged"), make_demand(50), parse_gpus("1x80GB"))
    (slot,) = planned.layout.slots
    assert len(slot.workers) == 5
    assert 0.99 < sum(worker.gpus for worker in slot.workers) <= 1
    assert slot.memory_gb == pytest.approx(74 + 5 * CONTEXT_GB)
    planned = plan_run(gpu_profile(B6, layout="staged"), WITHOUT_STYLE, parse_gpus("8x48GB"))
    workers = Counter(worker.stages for worker in planned.layout.workers)
    assert workers["svd",] > workers["flux", "lora"] >= 1
    assert planned.efficiency > 0.9
    planned = plan_run(gpu_profile({"svd": (20, {"svd": 1})}), make_demand(9, ["svd"]), parse_gpus("2x16GB+2x24GB"))
    assert planned.nodes == (1, 1)
    assert any("2 of 4 GPUs are idle" in note for note in planned.notes)


def test_infeasible_plan_names_the_missing_resource():
    profile = gpu_profile(B6)
    host = r"host memory: 75 GB are needed on one node \(6 GB .* largest weights.*the nodes have 32 GB"
    for cluster, message in (
        (Cluster((Node((), 8, 64),)), r"stage instantid needs 1.6 GB.*there is no GPU"),
        (parse_gpus("8x24GB"), r"stages flux and lora need 34.6 GB.*the largest GPU has 24 GB"),
        (Cluster((Node((48,), 8, 32),)), host),
        (Cluster((Node((80,), 2, None),)), r"a worker needs up to 1 CPUs.*the nodes have 2"),
    ):
        with pytest.raises(SetupError, match=message):
            plan_run(profile, make_demand(9), cluster)
    with pytest.raises(ProfileError, match=r"layout: fused.*74.6 GB.*8 GPUs has 48 GB"):
        plan_run(gpu_profile(B6, layout="fused"), make_demand(9), parse_gpus("8x48GB"))


def test_as_many_workers_load_at_once_as_host_memory_allows():
    for memory_gb, loads in ((None, 1), (60, 1), (16 + 3 * 34, 3), (2048, 8)):
        cluster = Cluster((Node((80,) * 8, 128, memory_gb),))
        assert plan_run(gpu_profile(B6), make_demand(400), cluster).layout.parallel_loads == loads


def test_seconds_of_the_profile():
    profile = gpu_profile({"svd": (20, {"flux": 1.0})})
    with pytest.raises(ProfileError, match=r"actors.svd.seconds: got 'flux', must be one of svd"):
        plan_run(profile, make_demand(1, ["svd"]), parse_gpus("1x80GB"))
    planned = plan_run(gpu_profile({"svd": (20, {})}), make_demand(1, ["svd"]), parse_gpus("1x80GB"))
    assert not any("no seconds" in note for note in planned.notes)
    work = SVDStage.work(SVDStage.Params(weights="w"), Shot(prompt="a"))
    assert planned.stage_seconds["svd"] == pytest.approx(1.3 * H100.seconds(work.total, 0.5))
    planned = plan_run(gpu_profile({"instantid": (20, {})}), make_demand(1, ["instantid"]), parse_gpus("1x80GB"))
    assert any("no seconds of instantid" in note for note in planned.notes)


def test_parse_gpus():
    for text in ("", "8", "8x", "80GB", "0x80GB", "8x80", "8x0GB", "8x80GB+", "x80GB", "1x1x1x80GB", "-1x80GB"):
        with pytest.raises(UsageError, match="8x80GB"):
            parse_gpus(text)
    assert [len(node.gpus) for node in parse_gpus("2x8x80GB + 4x48gb").nodes] == [8, 8, 4]
    assert parse_gpus("2x8x80GB").gpus == (80.0,) * 16
    assert "16 per GPU" in parse_gpus("1x80GB").notes[0]
    assert this_machine().cpus >= 1


def test_reference_shot_has_relative_cost_one_for_every_stage():
    shot = Shot(prompt="a", face_image="f.png", identity="none", lora="l.safetensors", use_hunyuan_style=True, interpolation=2)
    assert {stage.name: stage.relative_cost(shot) for stage in STAGES} == dict.fromkeys(STAGE_BY_NAME, 1.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"width": 512, "height": 576}, {"flux": 0.56, "lora": 0.56, "svd": 0.47, "realesrgan": 0.5, "hunyuan": 1.08}),
        ({"num_frames": 50}, {"svd": 2.0, "realesrgan": 2, "flux": 1}),
        ({"extend": 2, "interpolation": 2}, {"svd": 3, "realesrgan": 73 / 25, "rife": 73 / 25, "flux": 1}),
        ({"flux.steps": 7, "svd.steps": 50, "lora.steps": 14}, {"flux": 0.25, "svd": 2, "lora": 0.5, "hunyuan": 1}),
        ({"lora_strength": 0.3, "style_strength": 1}, {"lora": 0.5, "hunyuan": 2, "flux": 1}),
        ({"negative_prompt": "b"}, {"flux": 2, "lora": 2}),
        ({"face_image": "f.png", "identity_end": 0.4, "negative_prompt": "b"}, {"flux": 2.1}),
        ({"face_image": "f.png", "identity": "instantid-sdxl", "refine_strength": 0.7}, {"instantid_sdxl": 1, "refine": 2}),
        ({"upscaler": "x4plus"}, {"realesrgan": 34}),
        ({"video_model": "wan", "num_frames": 49, "wan.steps": 4, "guidance.wan": 1}, {"wan": 2.28 / 20}),
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

    cropped = Shot(prompt="a", upscale_video=False, crop_width=512, crop_height=288)
    assert demand_of([cropped]).encoded_mpx == pytest.approx(clip / 4)


def test_number_of_encoders_follows_the_encoded_pixels_and_limits_the_rate(cache_folder):
    fast = gpu_profile({"svd": (20, {"svd": 1.0})})
    planned = plan_run(fast, make_demand(100, ["svd"], encoded_mpx=100 * 24), parse_gpus("8x80GB"))
    # 8 shots per second of 24 megapixels each.
    encode_s = 24 * ENCODE_SECONDS["medium"][1]
    assert (planned.layout.encoders, planned.encode_s) == (math.ceil(8 * encode_s / 0.5), pytest.approx(encode_s))
    # Measured seconds replace those of the table.
    save_calibration("p", "H100", {ENCODING: [(240 * 0.025, RelativeCost(240, 240))] * 3})
    calibration = load_calibration("p", "H100")
    demand = make_demand(100, ["svd"], encoded_mpx=100 * 240)
    planned = plan_run(fast, demand, parse_gpus("8x80GB"), calibration=calibration)
    assert (planned.layout.encoders, planned.encode_s) == (8 * 6 / 0.5, pytest.approx(6.0))
    planned = plan_run(fast, demand, Cluster((Node((80.0,), 4, None),)), calibration=calibration)
    # One CPU for the worker and one for the director leave four encoders of half a CPU.
    assert (planned.layout.encoders, planned.shots_per_hour) == (4, pytest.approx(4 * 0.5 / 6 * 3600, rel=1e-3))
    assert planned.bottleneck == ENCODING


def test_director_limits_the_rate_of_tiny_shots():
    images = gpu_profile({"flux": (20, {"flux": 0.2})})
    few, many = (plan_run(images, make_demand(100_000, ["flux"]), parse_gpus(f"{nodes}x8x80GB")) for nodes in (2, 32))
    assert (few.bottleneck, few.shots_per_hour) == ("flux", pytest.approx(16 * 5 * 3600, rel=1e-3))
    assert (many.bottleneck, many.shots_per_hour) == ("director", pytest.approx(3600 / choose_layout.DIRECTOR_S))
    assert [any("split the script" in note for note in each.notes) for each in (few, many)] == [False, True]


def test_window_depends_on_slots_and_swaps_and_is_limited_by_shots():
    assert plan_run(gpu_profile(B6), make_demand(400), parse_gpus("8x80GB")).layout.window == 24
    assert plan_run(gpu_profile(B6), make_demand(400), parse_gpus("1x48GB")).layout.window == 2 * SHOTS_PER_SWAP
    few = plan_run(gpu_profile(B6), make_demand(5), parse_gpus("8x80GB")).layout
    assert (few.window, len(few.slots)) == (5, 5)


def test_price_and_max_cost():
    profile, demand, cluster = gpu_profile(B6, price_per_gpu_hour=3), make_demand(1000), parse_gpus("8x80GB")
    for price, priced, rate in ((None, profile, 3), (7, profile, 7), (None, gpu_profile(B6), 2.5)):
        planned = plan_run(priced, demand, cluster, price=price)
        assert planned.cost == pytest.approx(planned.gpu_hours * rate)
        assert any("price" in note for note in planned.notes) == (rate == 2.5)
    planned.check_cost(planned.cost)
    with pytest.raises(TooExpensive, match=r"--max-cost allows ") as error:
        planned.check_cost(0.99 * planned.cost)
    assert error.value.exit_code == 5
    bound = 1000 * sum(planned.stage_seconds.values()) / 8
    assert planned.seconds_low < bound < planned.seconds < planned.seconds_high
    named = plan_run(gpu_profile(B6), demand, parse_gpus("8xL40S+8xH200"))
    assert named.cost == pytest.approx(named.gpu_hours * (1.0 + 3.6) / 2)
    plan_run(load_profile("demo"), demand, Cluster((Node((), 2, 8),))).check_cost(0)


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
    planned = plan_run(
        gpu_profile(B6), make_demand(1, ["svd"]), parse_gpus("1x80GB"), calibration=load_calibration("p", "H100")
    )
    assert planned.stage_seconds == {"svd": 10.0}
    assert load_calibration("p", "L40S") == load_calibration("q", "H100") == {}


def test_calibration_of_few_shots_does_not_replace_one_of_many(cache_folder):
    save_calibration("p", "c", measured(svd=[(10.0, 1.0)] * 5))
    save_calibration("p", "c", measured(svd=[(99.0, 1.0)], flux=[(3.0, 1.0)]))
    found = load_calibration("p", "c")
    assert {stage: each.seconds_of_reference for stage, each in found.items()} == {"svd": 10.0, "flux": 3.0}
    save_calibration("p", "c", measured(svd=[(20.0, 1.0)] * 3))
    assert load_calibration("p", "c")["svd"].seconds_of_reference == 20.0
    # A damaged file counts as empty.
    (cache_folder / "measured.json").write_text('{"p": {"c": {"svd": {"seconds_of_reference": -1}}}}')
    assert load_calibration("p", "c") == {}


def wan_shots(steps, frames=25):
    return [WAN_CLIP.model_copy(update={"num_frames": frames, "steps": WAN_CLIP.steps.model_copy(update={"wan": steps})})] * 20


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
        planned = plan_run(profile, demand_of(wan_shots(steps)), parse_gpus("1x80GB"), calibration=calibration)
        assert planned.stage_seconds["wan"] == pytest.approx(seconds)


def test_fixed_share_of_shots_with_the_same_steps_and_of_a_bench(cache_folder):
    cost = relative_costs(wan_shots(4)[0])["wan"]
    calibration = calibrations({"wan": [(20.0, cost)] * 3})["wan"]
    assert calibration.fixed_share == STAGE_BY_NAME["wan"].fixed_share()
    assert calibration.seconds_of_reference * cost.mixed(calibration.fixed_share) == pytest.approx(20)
    save_measurements("p", "c", {"svd": [Measurement(size="1024x576x25", seconds_of_reference=22.0, fixed_share=2 / 22)]})
    for steps, seconds in ((25, 22.0), (50, 42.0)):
        demand = demand_of([Shot(prompt="a", upscale_video=False, steps={"svd": steps})] * 3)
        planned = plan_run(gpu_profile(B6), demand, parse_gpus("1x80GB"), calibration=load_calibration("p", "c"))
        assert planned.stage_seconds["svd"] == pytest.approx(seconds)


def test_bench_of_upscalers_is_kept_by_a_run_and_applies_to_their_shots_only(cache_folder):
    size = "1024x576x25"
    seconds = {"x4plus": 0.1, "other": 3.0}
    save_measurements(
        "p", "c", {"realesrgan": [Measurement(size=size, variant=name, seconds_of_reference=s) for name, s in seconds.items()]}
    )
    save_calibration("p", "c", {"realesrgan": [(2.0, RelativeCost(1.0, 1.0))] * 3})
    calibration = load_calibration("p", "c")
    assert (calibration["realesrgan"].seconds_of_reference, calibration["realesrgan"].variants) == (2.0, seconds)
    shots = [Shot(prompt="a", upscaler=name) for name in ("animevideov3", "x4plus")]
    planned = plan_run(gpu_profile(B6), demand_of(shots), parse_gpus("1x80GB"), calibration=calibration)
    x4plus = 0.1 * relative_costs(shots[1])["realesrgan"].steps
    assert planned.stage_seconds["realesrgan"] == pytest.approx((2.0 + x4plus) / 2)
    save_measurements("p", "c", {"realesrgan": [Measurement(size=size, variant="other", seconds_of_reference=1.0)]})
    assert load_calibration("p", "c")["realesrgan"].variants == {"x4plus": 0.1, "other": 1.0}


def test_plan_uses_the_bench_of_the_nearest_size_until_a_run_has_measured_the_stage(cache_folder):
    sizes = {"512x512x25": 5.0, "1024x576x25": 22.0, "1024x576x100": 90.0, "2048x1152x25": 120.0}
    save_measurements("p", "c", {"svd": [Measurement(size=size, seconds_of_reference=s) for size, s in sizes.items()]})

    def seconds(width, height, frames):
        shot = Shot(prompt="a", width=width, height=height, num_frames=frames)
        calibration = load_calibration("p", "c")
        planned = plan_run(gpu_profile(B6), demand_of([shot] * 3), parse_gpus("1x80GB"), calibration=calibration)
        return planned.stage_seconds["svd"] / relative_costs(shot)["svd"].mixed(calibration["svd"].fixed_share)

    assert [seconds(1024, 640, 20), seconds(512, 448, 25), seconds(1024, 576, 81)] == pytest.approx([22.0, 5.0, 90.0])
    save_calibration("p", "c", {"svd": [(30.0, RelativeCost(1.0, 1.0))] * 3})
    assert seconds(512, 448, 25) == pytest.approx(30.0)


def test_print_plan(capsys):
    print_plan(gpu_profile(B6), WITHOUT_STYLE, parse_gpus("2x48GB"), counts=ScriptCounts(410, 7, 3, 12))
    output = capsys.readouterr().out
    for words in (
        "400 to render; 7 of 410 already done, 3 rejected (vidgen validate prints the errors), 12 cached stages",
        "hybrid: 2 workers on 2 GPUs",
        "swapping flux 27%, lora 12% | svd 41%",
        "the stages need 61.6 GB together, the largest of 2 GPUs has 48 GB",
    ):
        assert words in output
    # JSON is printed before the cost check.
    with pytest.raises(TooExpensive):
        print_plan(gpu_profile(B6), WITHOUT_STYLE, parse_gpus("8x80GB"), ScriptCounts(1, 0, 0, 0), max_cost=0.01, as_json=True)
    assert len(json.loads(capsys.readouterr().out)["layout"]["slots"]) == 8
    print_plan(gpu_profile(B6), make_demand(0, []), this_machine(), counts=ScriptCounts(7, 7, 0, 0))
    assert "nothing to render: 7 of 7 already done" in capsys.readouterr().out


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
    layout = rng.choice(["auto"] * 4 + ["fused", "staged", "staged"])
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
    for _ in range(60):
        profile, demand, cluster = random_case(rng, max_gpus=7)
        try:
            planned = plan_run(profile, demand, cluster)
        except (SetupError, ProfileError):
            accepted["infeasible"] += 1
            continue
        assert_respects_limits(planned, profile, demand, cluster)
        accepted[planned.layout.kind] += 1
        accepted["turns"] += any(worker.swap_groups for worker in planned.layout.workers)
    kinds = ("infeasible", "fused", "staged", "hybrid", "turns")
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


def test_plan_is_as_fast_as_the_best_brute_force_assignment(monkeypatch):
    """A plan is refused only if brute force finds none."""
    # Brute force knows the GPUs only.
    monkeypatch.setattr(choose_layout, "DIRECTOR_S", 1e-6)
    rng, compared, refused = random.Random(6), Counter(), 0
    while compared.total() < 30:
        profile, demand, cluster = random_case(rng, max_gpus=4, max_actors=4)
        if profile.layout != "auto" or any(actor.device == "cpu" for actor in profile.actors.values()) or demand.shots < 9:
            continue
        cluster = Cluster((Node(cluster.gpus, 640_000, None),))
        try:
            planned = plan_run(profile, demand, cluster)
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


def simulated_profile():
    """Return a profile with the seconds of the simulation."""
    stages = {name: each for name, each in STAGES_OF.items() if name != "hunyuan"}
    return gpu_profile({name: (B6[name][0], {stage: SECONDS[stage] for stage in each}) for name, each in stages.items()})


def test_scheduler_reaches_the_planned_rate():
    """With the engine's scheduler in simulated time. Workers swap weights in some of these layouts."""
    profile = simulated_profile()
    for gpus in ("8x80GB", "1x48GB", "4x48GB+4x80GB"):
        planned = plan_run(profile, WITHOUT_STYLE, parse_gpus(gpus))
        simulated = Simulation(planned.layout.workers, WITHOUT_STYLE.shots, loras=1).run()
        assert bool(simulated.swaps) == any(worker.swap_groups for worker in planned.layout.workers), gpus
        rate = 3600 * WITHOUT_STYLE.shots / simulated.makespan_s
        assert 0.95 * planned.shots_per_hour < rate < 1.01 * planned.shots_per_hour, gpus


def test_gpu_is_busy_while_a_cpu_actor_works(monkeypatch):
    """A GPU that waited for the CPU actor would be busy 90% of the time."""
    monkeypatch.setitem(SECONDS, "instantid", 3.0)
    face = ActorProfile(weights="w", memory_gb=0.7, seconds={"instantid": 3.0})
    profile = simulated_profile()
    profile = profile.model_copy(update={"actors": {**profile.actors, "instantid": face}})
    planned = plan_run(profile, WITHOUT_STYLE, parse_gpus("2x80GB"))
    simulated = Simulation(planned.layout.workers, WITHOUT_STYLE.shots, loras=1).run()
    busy_s = WITHOUT_STYLE.shots * (sum(SECONDS.values()) - 3.0)
    assert busy_s / (2 * simulated.makespan_s) > 0.97


def slot(*stages, memory_gb):
    return Slot((WorkerSpec(stages, 1, 1.0),), memory_gb)


FUSED, FLUX, SVD = slot("flux", "svd", memory_gb=60), slot("flux", memory_gb=35), slot("svd", memory_gb=21)


def test_free_gpus_get_the_kind_of_slot_that_raises_the_rate():
    seconds = {"flux": 6.0, "svd": 22.0}
    for slots, gpus, expected in (
        ([FUSED], (80, 80), {FUSED: 2}),
        ([FUSED], (48,), {}),
        ([FLUX, SVD], (48,), {SVD: 1}),
        ([FLUX, SVD, SVD, SVD, SVD], (48,), {FLUX: 1}),
        ([FLUX, SVD, SVD, SVD, SVD], (24,), {}),
        ([FUSED, SVD], (24, 80), {FUSED: 1, SVD: 1}),
    ):
        added = more_slots(slots, seconds, Cluster((Node((), 9, None), Node(gpus, 64, None))))
        assert Counter(kind for kind, _ in added) == expected, (slots, gpus)
        assert all(node == 1 for _, node in added)
    few_cpus = Cluster((Node((80.0,) * 4, 3.2, None), Node((80.0,), 1.0, None)))
    assert [node for _, node in more_slots([FUSED], seconds, few_cpus)] == [0, 0]
