"""Memory plan: the table against other traced sizes, settings that follow from the size of a shot, and what is refused."""

import re
from dataclasses import replace

import pytest

from benchmarks.trace_memory import TOLERANCE, differences, traces
from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.graph import STAGE_BY_NAME, stages_of
from vidgen_ray.planner import Cluster, Node, demand_of, parse_gpus, plan, swap_groups
from vidgen_ray.planner.cluster import GB
from vidgen_ray.planner.gpu_memory import MAX_SIZES, SizeCheck, actor_memory, fitting_params, too_large
from vidgen_ray.planner.layout import CONTEXT_GB, Actor, WorkerProcess
from vidgen_ray.profile import ActorProfile, Profile, load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.memory_table import FP8, MemoryTable, load_table
from vidgen_ray.stages.svd import SVDStage

FACE = {"face_image": ("face.png",), "prompt": "a"}
LARGEST = Shot(**FACE, width=2048, height=2048, num_frames=256, scale=4)
VARIANTS = ("tile256", "flux/decode:tile512", "hunyuan/decode:tile512", ":0.5", ":0.25", ":chunked", f":{FP8}")
"""Ends of the names of curves of networks that another curve traces, too. FLUX and HunyuanDiT have the autoencoder of SDXL."""
FAST_CURVES = ("flux/decode", "svd/decode", "svd/clip", "realesrgan/animevideov3", "realesrgan/x4plus-anime")


def gpu_shot(profile, **fields):
    return Shot.model_validate({"prompt": "a", **profile.defaults, **fields})


# The table


@pytest.mark.parametrize("name", FAST_CURVES)
def test_table_agrees_with_other_traced_sizes(name):
    for _, size, planned, traced in differences(load_table(), [name]):
        assert planned == pytest.approx(traced, rel=TOLERANCE), size


@pytest.mark.very_slow
def test_table_agrees_with_another_traced_size_of_all_networks():
    names = [name for name in traces() if name not in (*FAST_CURVES, "flux/step") and not name.endswith(VARIANTS)]
    assert [
        (name, size)
        for name, size, planned, traced in differences(load_table(), names, max_sizes=1)
        if planned != pytest.approx(traced, rel=TOLERANCE)
    ] == []


def test_wrong_table_does_not_agree():
    table = load_table()
    curves = {name: [(pixels, int(size * 1.3)) for pixels, size in points] for name, points in table.curves.items()}
    wrong = replace(table, curves=curves)
    assert all(abs(planned / traced - 1) > TOLERANCE for _, _, planned, traced in differences(wrong, ["svd/decode"]))


def test_weights_of_the_table_have_the_published_sizes():
    parameters = {
        "flux/transformer": 11_901.4e6,
        "flux/text_encoder_2": 4_762e6,
        "infusenet/net": 2_952.7e6,
        "infusenet/resampler": 84.6e6,
        "svd/unet": 1_524.6e6,
        "sdxl/unet": 2_567.5e6,
        "realesrgan/x4plus": 16.7e6,
        "klein/transformer": 3_876e6,
        "klein/text_encoder": 4_022e6,
        "qwen_edit/transformer": 20_430e6,
        "qwen_edit/text_encoder": 8_292e6,
        "wan/transformer": 14_289e6,
        "wan/text_encoder": 5_681e6,
        "wan-ti2v/transformer": 5_000e6,
        "ltx/transformer": 1_923e6,
    }
    weights = load_table().weights
    assert {name: weights[name] / 2 for name in parameters} == pytest.approx(parameters, rel=0.002)


def test_curve_is_linear_between_points_and_beyond_them():
    table = MemoryTable({}, {}, {"line": [(100, 10), (200, 30), (300, 40)], "constant": [(0, 7)]}, {})
    assert [table.curve("line", pixels) for pixels in (150, 200, 400, 50, 10)] == [20, 30, 50, 0, 0]
    assert table.curve("constant", 10**9) == 7


# Profiles


@pytest.mark.parametrize(
    ("name", "fields", "swapped"),
    [
        ("gpu-24gb", FACE, True),
        ("gpu-24gb-schnell", {}, True),
        ("gpu-48gb", FACE, True),
        ("gpu-48gb", {**FACE, "use_hunyuan_style": True}, True),
        ("gpu-80gb", {**FACE, "use_hunyuan_style": True}, False),
        ("gpu-80gb", {**FACE, "identity": "instantid-sdxl", "use_hunyuan_style": True}, False),
    ],
)
def test_profiles_run_the_whole_chain_on_one_gpu(name, fields, swapped):
    profile = load_profile(name)
    shot = gpu_shot(profile, lora="l.safetensors", **fields)
    # What torch reports for such cards: RTX 4090, L40S, H100.
    gpu_gb = {"24": 23.6, "48": 44.4, "80": 79.1}[name[4:6]]
    planned = plan(profile, demand_of([shot] * 100), Cluster((Node((gpu_gb,), 16, 256),)))
    worker, *beside = planned.layout.workers
    assert set(planned.layout.stages) == {stage.name for stage in stages_of(shot)}
    assert [other.gpus for other in beside] == [0] * bool(shot.face_image)
    assert bool(worker.swap_groups) == swapped
    assert not [note for note in planned.notes if "lower-memory" in note]


# Sizes of shots


def test_infusenet_counts_only_for_shots_with_a_face():
    profile = load_profile("gpu-80gb")
    with_face, without = (
        actor_memory(profile, [STAGE_BY_NAME["flux"]], [Shot(**fields)], 80) for fields in (FACE, {"prompt": "a"})
    )
    table = load_table().weights
    assert with_face.weights_gb - without.weights_gb == pytest.approx(
        (table["infusenet/net"] + table["infusenet/resampler"]) / GB
    )


def test_clip_of_256_large_frames_is_refused_with_a_size_that_fits():
    for gpus in ("1x24GB", "1x48GB", "8x80GB"):
        profile, cluster = load_profile(f"gpu-{gpus[2:4]}gb"), parse_gpus(gpus)
        with pytest.raises(
            SetupError,
            match=r"stage svd: 2048x2048 with 256 frames needs \d+ GB .*; at most (2048x2048 with \d+ frames or )?\d+x\d+ with",
        ) as error:
            plan(profile, demand_of([LARGEST]), cluster)
        plan(profile, demand_of([smaller(LARGEST, str(error.value))]), cluster)


def smaller(shot, message):
    """Return the shot with the last size that the message of an error names."""
    size, _, frames = re.split(" or |at most ", message)[-1].removesuffix(" fits").partition(" with ")
    width, height = map(int, size.split("x"))
    return shot.model_copy(update={"width": width, "height": height, "num_frames": int(frames.split()[0])})


@pytest.mark.parametrize(
    ("fields", "stage", "fits"),
    [
        ({"num_frames": 256}, "svd", r"2048x2048 with \d+ frames or \d+x\d+ with 256 frames"),
        ({"video_model": "wan", "num_frames": 253}, "wan", r"2048x2048 with \d+ frames or \d+x\d+ with 253 frames"),
        ({"video_model": "ltx", "num_frames": 249}, "ltx", r"2048x2048 with \d+ frames or \d+x\d+ with 249 frames"),
    ],
)
def test_size_check_names_the_stage_and_a_size_that_fits(fields, stage, fits):
    profile = load_profile("gpu-48gb")
    check = SizeCheck(profile, 48)
    shot = Shot(prompt="a", width=2048, height=2048, **fields)
    refused_by, message = check.refused_by(shot)
    assert refused_by == stage
    assert re.search(f"the largest GPU has 48; at most ({fits}) fits", message), message
    assert check.refused_by(smaller(shot, message)) is None
    stated = {**profile.actors, stage: profile.actors[stage].model_copy(update={"memory_gb": 40})}
    assert SizeCheck(profile.model_copy(update={"actors": stated}), 48).refused_by(shot) is None, "the profile knows better"


def test_host_memory_of_a_clip_is_planned():
    profile = load_profile("gpu-80gb")
    memory = [actor_memory(profile, [SVDStage], [Shot(prompt="a", num_frames=frames)], 80).host_gb for frames in (25, 100)]
    assert memory[1] == pytest.approx(4 * memory[0])
    extended = actor_memory(profile, [SVDStage], [Shot(prompt="a", num_frames=25, extend=3)], 80)
    assert memory[0] < extended.host_gb < memory[1]
    assert extended.peak_gb == actor_memory(profile, [SVDStage], [Shot(prompt="a", num_frames=25)], 80).peak_gb


def test_one_line_that_is_too_large_does_not_stop_the_others():
    planned = plan(load_profile("gpu-80gb"), demand_of([Shot(**FACE)] * 9 + [LARGEST]), parse_gpus("1x80GB"))
    (note,) = [note for note in planned.notes if note.startswith("shots will fail")]
    assert "2048x2048 with 256 frames" in note


def test_large_clip_gets_lower_memory_settings():
    profile = load_profile("gpu-80gb")
    shot = Shot(prompt="a", width=1024, height=1024, num_frames=50)
    params = profile.options_of(SVDStage)
    fitting = fitting_params(SVDStage, params, shot, 24)
    assert fitting.forward_chunking
    assert fitting.decode_chunk_frames < params.decode_chunk_frames
    from_image = shot.model_copy(update={"image": "start.png"})
    planned = plan(profile, demand_of([from_image]), parse_gpus("1x24GB"))
    assert any("lower-memory settings: svd: decode_chunk_frames=" in note for note in planned.notes)


def test_lower_memory_settings_that_need_more_are_left_out():
    """RIFE pads frames to larger multiples when it estimates motion at a lower resolution."""
    stage = STAGE_BY_NAME["rife"]
    params = load_profile("gpu-80gb").options_of(stage)

    def steps(width, height):
        shot = Shot(prompt="a", interpolation=2, width=width, height=height)
        return [lower.flow_scale for lower in stage.lower_memory_steps(params, shot)]

    assert steps(2048, 1024) == [1, 0.5, 0.25]
    assert steps(1024, 576) == [1, 0.5]
    assert steps(640, 384) == [1]


def test_weights_that_are_too_large_are_named():
    flux = STAGE_BY_NAME["flux"]
    params = load_profile("gpu-80gb").options_of(flux)
    assert "its weights alone need" in too_large(flux, params, Shot(prompt="a"), 16)


def test_memory_gb_of_the_profile_replaces_the_table():
    actors = {"svd": ActorProfile(weights="w", device="cuda", memory_gb=20)}
    memory = actor_memory(Profile(name="own", about="x", actors=actors), [SVDStage], [LARGEST], 24)
    assert (memory.weights_gb, memory.peak_gb) == (20, 0)


def test_stage_without_known_memory_requires_memory_gb():
    actors = {"instantid": ActorProfile(weights="w", device="cuda")}
    with pytest.raises(ProfileError, match=r"profile own, actors.instantid: device cuda requires memory_gb"):
        actor_memory(Profile(name="own", about="x", actors=actors), [STAGE_BY_NAME["instantid"]], [Shot(**FACE)], 24)


def with_flux_options(**options):
    actors = {"flux": ActorProfile(weights="w", device="cuda", dtype="bfloat16", options=options)}
    draft = Shot(prompt="a", mode="fast")
    return actor_memory(Profile(name="own", about="x", actors=actors), [STAGE_BY_NAME["flux"]], [draft], 80)


def test_step_cache_is_planned():
    plain, cache = with_flux_options(), with_flux_options(step_cache_threshold=0.06)
    assert plain.peak_gb < cache.peak_gb < plain.peak_gb + 0.1


def test_both_kinds_of_fp8_take_half_of_the_weights():
    plain, stored, computed = (with_flux_options(quantize=name) for name in ("none", "fp8_storage", "fp8"))
    assert stored.weights_gb == computed.weights_gb < plain.weights_gb - 10


def test_demand_keeps_one_shot_of_each_size():
    sizes = [(512, 512, 25), (1024, 576, 25), (1024, 576, 14), (1024, 576, 25), (512, 512, 50)]
    demand = demand_of(Shot(prompt="a", width=w, height=h, num_frames=n) for w, h, n in sizes)
    assert sorted((shot.width, shot.num_frames) for shot in demand.sizes) == [(512, 25), (512, 50), (1024, 14), (1024, 25)]
    assert len(demand_of([Shot(prompt="a"), Shot(**FACE)]).sizes) == 2
    assert len(demand_of(Shot(prompt="a", extend=extend) for extend in (0, 3, 3)).sizes) == 2


def test_demand_with_many_sizes_keeps_the_largest():
    demand = demand_of(Shot(prompt="a", width=64 * n, height=576, num_frames=f) for n in range(1, 17) for f in range(2, 26))
    assert len(demand.sizes) <= MAX_SIZES
    assert (1024, 25) in [(shot.width, shot.num_frames) for shot in demand.sizes]


# Models whose parts can take turns


WAN_SHOT = {"prompt": "a", "video_model": "wan", "width": 1280, "height": 704, "num_frames": 81}


def test_cpu_offload_needs_the_largest_part_and_host_memory_for_all():
    profile = load_profile("gpu-48gb")
    stage, shot = STAGE_BY_NAME["wan"], Shot(**WAN_SHOT)
    params = profile.options_of(stage)
    offloaded, resident = (stage.memory(params.model_copy(update={"cpu_offload": offload}), shot) for offload in (True, False))
    weights = load_table().weights
    assert offloaded.weights == {}
    assert weights["wan/transformer"] < offloaded.peak < 1.4 * weights["wan/transformer"]
    assert offloaded.host - resident.host == sum(resident.weights.values()) > 2 * weights["wan/transformer"]
    # It is an actor on the GPU all the same.
    planned = plan(profile, demand_of([shot.model_copy(update={"image": "start.png"})]), parse_gpus("1x48GB"))
    assert planned.layout.slots[0].has_gpu
    assert planned.layout.slots[0].memory_gb == pytest.approx(CONTEXT_GB + offloaded.peak / GB, rel=0.2)
    with pytest.raises(SetupError, match="the largest GPU has 24"):
        plan(profile, demand_of([shot]), parse_gpus("1x24GB"))


def test_wan_weights_decide_about_the_model(tmp_path):
    stage, shot = STAGE_BY_NAME["wan"], Shot(**WAN_SHOT)
    params = load_profile("gpu-24gb").options_of(stage)
    small = stage.memory(params, shot)
    (tmp_path / "model_index.json").write_text("{}")
    assert stage.memory(params.model_copy(update={"weights": tmp_path}), shot) == small
    (tmp_path / "transformer_2").mkdir()
    assert stage.memory(params.model_copy(update={"weights": tmp_path}), shot).host > 1.5 * small.host


def test_photos_count_as_tokens():
    stage, params = STAGE_BY_NAME["klein"], load_profile("open").options_of(STAGE_BY_NAME["klein"])
    one, three = (
        stage.memory(params, Shot(prompt="a", identity="reference", face_image=("face.png",) * n, width=1536, height=1536))
        for n in (1, 30)
    )
    assert three.peak > one.peak


# Processes


def actor(name, weights_gb, peak_gb):
    return Actor(name, (name,), 0, 1.0, weights_gb, 0.0, 1.0, True, peak_gb)


def test_process_needs_all_weights_and_the_largest_activations():
    flux, svd = actor("flux", 30, 2), actor("svd", 4, 9)
    assert WorkerProcess((flux, svd)).gpu_gb == pytest.approx(CONTEXT_GB + 34 + 9)
    assert WorkerProcess((flux, svd), ((flux,), (svd,))).gpu_gb == pytest.approx(CONTEXT_GB + 32)


def test_permanent_actor_runs_while_a_group_is_on_the_gpu():
    flux, svd, upscaler = actor("flux", 30, 2), actor("svd", 4, 9), actor("realesrgan", 0.1, 10)
    assert WorkerProcess((flux, svd, upscaler), ((flux,), (svd,))).gpu_gb == pytest.approx(CONTEXT_GB + 30.1 + 10)


def test_library_swaps_what_does_not_fit_together():
    profile = load_profile("gpu-80gb")
    shot = gpu_shot(profile, **FACE, use_hunyuan_style=True)
    stages = stages_of(shot)
    machine = Node((80.0,), 16, 256)
    assert swap_groups(profile, stages, [shot], machine) == ()
    groups = swap_groups(profile, stages, [shot], replace(machine, gpus=(48.0,)))
    assert {"flux", "svd"} <= {stage for group in groups for stage in group}
    assert swap_groups(profile, stages, [shot], replace(machine, gpus=())) == ()
    with pytest.raises(SetupError, match=r"needs \d+.* GB of host memory, this machine has 32"):
        swap_groups(profile, stages, [shot], Node((48.0,), 16, 32))
    with pytest.raises(SetupError, match=r"at most .* fits"):
        swap_groups(profile, stages, [gpu_shot(profile, **FACE, width=2048, height=2048, num_frames=256)], machine)
