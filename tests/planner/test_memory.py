"""Memory plan: the table against other traced sizes, settings that follow from the size of a shot, and what is refused."""

import re
from contextlib import nullcontext
from dataclasses import replace

import pytest

from benchmarks.trace_memory import TOLERANCE, differences, traces
from vidgen_ray.errors import ProfileError, SetupError, StageError
from vidgen_ray.graph import STAGE_BY_NAME, stages_of
from vidgen_ray.planner.choose_layout import plan_run
from vidgen_ray.planner.cluster import GB, OTHER_PROCESSES_GB, Cluster, Node, parse_gpus, profile_for
from vidgen_ray.planner.demand import demand_of
from vidgen_ray.planner.gpu_memory import MAX_SIZES, SizeCheck, actor_memory, fitting_params, fitting_sizes, swap_groups
from vidgen_ray.planner.layout import CONTEXT_GB, GPU_PROCESS_HOST_GB, PROCESS_HOST_GB, Actor, WorkerProcess
from vidgen_ray.profile import ActorProfile, Profile, load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.memory_table import FP8, load_table
from vidgen_ray.stages.svd import SVDStage

FACE = {"face_image": ("face.png",), "prompt": "a"}
LARGEST = Shot(**FACE, width=2048, height=2048, num_frames=256, scale=4)
VARIANTS = ("tile256", "flux/decode:tile512", "hunyuan/decode:tile512", ":0.5", ":0.25", ":chunked", f":{FP8}")
"""Ends of the names of curves of networks that another curve traces, too. FLUX and HunyuanDiT have the autoencoder of SDXL."""
FAST_CURVES = ("flux/decode", "svd/decode", "svd/clip", "realesrgan/animevideov3", "realesrgan/x4plus-anime")


def gpu_shot(profile, **fields):
    return Shot.model_validate({"prompt": "a", **profile.defaults, **fields})


def test_table_agrees_with_other_traced_sizes():
    table = load_table()
    for name, size, planned, traced in differences(table, FAST_CURVES, max_sizes=2):
        assert planned == pytest.approx(traced, rel=TOLERANCE), (name, size)
    curves = {name: [(pixels, int(size * 1.3)) for pixels, size in points] for name, points in table.curves.items()}
    wrong = differences(replace(table, curves=curves), ["svd/decode"], max_sizes=1)
    assert all(abs(planned / traced - 1) > TOLERANCE for _, _, planned, traced in wrong)


@pytest.mark.very_slow
def test_table_agrees_with_another_traced_size_of_all_networks():
    names = [name for name in traces() if name not in (*FAST_CURVES, "flux/step") and not name.endswith(VARIANTS)]
    assert [
        (name, size)
        for name, size, planned, traced in differences(load_table(), names, max_sizes=1)
        if planned != pytest.approx(traced, rel=TOLERANCE)
    ] == []


def test_weights_of_the_table_have_the_published_sizes():
    parameters = {
        "flux/transformer": 11_901.4e6,
        "flux/text_encoder_2": 4_762e6,
        "infusenet/net": 2_952.7e6,
        "svd/unet": 1_524.6e6,
        "klein/transformer": 3_876e6,
        "qwen_edit/transformer": 20_430e6,
        "wan/transformer": 14_289e6,
        "ltx/transformer": 1_923e6,
    }
    weights = load_table().weights
    assert {name: weights[name] / 2 for name in parameters} == pytest.approx(parameters, rel=0.002)


def test_profiles_run_the_whole_chain_on_one_gpu():
    # What torch reports for RTX 4090, L40S, H100.
    for name, gpu_gb, fields in (
        ("gpu-24gb", 23.6, FACE),
        ("gpu-24gb-schnell", 23.6, {}),
        ("gpu-48gb", 44.4, {**FACE, "use_hunyuan_style": True}),
        ("gpu-80gb", 79.1, {**FACE, "identity": "instantid-sdxl", "use_hunyuan_style": True}),
    ):
        profile = load_profile(name)
        shot = gpu_shot(profile, lora="l.safetensors", **fields)
        planned = plan_run(profile, demand_of([shot] * 100), Cluster((Node((gpu_gb,), 16, 256),)))
        worker, *beside = planned.layout.workers
        assert set(planned.layout.stages) == {stage.name for stage in stages_of(shot)}
        assert [other.gpus for other in beside] == [0] * bool(shot.face_image)
        assert bool(worker.swap_groups) == (name != "gpu-80gb")
        assert not [note for note in planned.notes if "lower-memory" in note]


def smaller(shot, message):
    """Return the shot with the last size that the message of an error names."""
    size, _, frames = re.split(" or |at most ", message)[-1].removesuffix(" fits").partition(" with ")
    width, height = map(int, size.split("x"))
    return shot.model_copy(update={"width": width, "height": height, "num_frames": int(frames.split()[0])})


def test_size_check_names_the_stage_and_a_size_that_fits():
    for gpu_gb, model, frames in ((24, "svd", 256), (48, "wan", 253), (48, "ltx", 249), (80, "svd", 256)):
        profile, cluster = load_profile(f"gpu-{gpu_gb}gb"), parse_gpus(f"1x{gpu_gb}GB")
        shot = Shot(prompt="a", width=2048, height=2048, video_model=model, num_frames=frames, upscale_video=False)
        refused_by, message = SizeCheck(profile, gpu_gb).refused_by(shot)
        assert refused_by == model
        fits = rf"(2048x2048 with \d+ frames or )?\d+x\d+ with {frames} frames fits"
        assert re.search(f"the largest GPU has {gpu_gb}; at most {fits}", message), message
        assert SizeCheck(profile, gpu_gb).refused_by(smaller(shot, message)) is None
        with pytest.raises(SetupError, match=f"stage {model}: 2048x2048 with {frames} frames needs"):
            plan_run(profile, demand_of([shot]), cluster)
    stated = {**profile.actors, "svd": profile.actors["svd"].model_copy(update={"memory_gb": 40})}
    assert SizeCheck(profile.model_copy(update={"actors": stated}), 80).refused_by(shot) is None, "the profile knows better"


def test_svd_sizes_beyond_the_batch_of_the_attention_kernels_are_refused():
    """Attention between frames has a row for each 8x8 pixels of both passes, and 65,535 rows at most."""
    params = load_profile("gpu-80gb").options_of(SVDStage)
    sides = [(width, height) for width in range(64, 2049, 64) for height in range(64, 2049, 64)]
    for width, height in sides:
        rows = 2 * (width // 8) * (height // 8)
        with pytest.raises(StageError, match=f"svd: got {width}x{height}") if rows > 65_535 else nullcontext():
            SVDStage.check_shot(params, Shot(prompt="a", width=width, height=height))
    large = Shot(prompt="a", width=2048, height=2048, num_frames=14)
    with pytest.raises(StageError, match=r"must be at most 2,097,088 pixels on a GPU, such as 1920x1088"):
        SVDStage.check_shot(params, large)
    SVDStage.check_shot(params.model_copy(update={"device": "cpu"}), large)
    SVDStage.check_shot(params, Shot(prompt="a", width=2048, height=1024, guidance={"svd": 1.0}))
    assert not any(size.startswith("2048x2048") for size in fitting_sizes(SVDStage, params, large, 80))


def test_host_memory_of_a_clip_is_planned():
    profile = load_profile("gpu-80gb")
    memory = [actor_memory(profile, [SVDStage], [Shot(prompt="a", num_frames=frames)], 80).host_gb for frames in (25, 100)]
    assert memory[1] == pytest.approx(4 * memory[0])
    extended = actor_memory(profile, [SVDStage], [Shot(prompt="a", num_frames=25, extend=3)], 80)
    assert memory[0] < extended.host_gb < memory[1]
    assert extended.peak_gb == actor_memory(profile, [SVDStage], [Shot(prompt="a", num_frames=25)], 80).peak_gb


def test_one_line_that_is_too_large_does_not_stop_the_others():
    planned = plan_run(load_profile("gpu-80gb"), demand_of([Shot(**FACE)] * 9 + [LARGEST]), parse_gpus("1x80GB"))
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
    planned = plan_run(profile, demand_of([from_image]), parse_gpus("1x24GB"))
    assert any("lower-memory settings: svd: decode_chunk_frames=" in note for note in planned.notes)


def test_memory_gb_of_the_profile():
    actors = {
        "svd": ActorProfile(weights="w", device="cuda", memory_gb=20),
        "instantid": ActorProfile(weights="w", device="cuda"),
    }
    profile = Profile(name="own", about="x", actors=actors)
    memory = actor_memory(profile, [SVDStage], [LARGEST], 24)
    assert (memory.weights_gb, memory.peak_gb) == (20, 0)
    with pytest.raises(ProfileError, match=r"profile own, actors.instantid: device cuda requires memory_gb"):
        actor_memory(profile, [STAGE_BY_NAME["instantid"]], [Shot(**FACE)], 24)


def with_flux_options(**options):
    actors = {"flux": ActorProfile(weights="w", device="cuda", dtype="bfloat16", options=options)}
    draft = Shot(prompt="a", mode="fast")
    return actor_memory(Profile(name="own", about="x", actors=actors), [STAGE_BY_NAME["flux"]], [draft], 80)


def test_what_a_shot_uses_is_planned():
    profile, table = load_profile("gpu-80gb"), load_table().weights
    flux, klein, rife = (STAGE_BY_NAME[name] for name in ("flux", "klein", "rife"))
    with_face, without = (actor_memory(profile, [flux], [Shot(**fields)], 80) for fields in (FACE, {"prompt": "a"}))
    infusenet_gb = (table["infusenet/net"] + table["infusenet/resampler"]) / GB
    assert with_face.weights_gb - without.weights_gb == pytest.approx(infusenet_gb)
    # Photos are tokens.
    params = load_profile("open").options_of(klein)
    peaks = [
        klein.memory(params, Shot(prompt="a", identity="reference", face_image=("a.png",) * n, width=1536, height=1536)).peak
        for n in (1, 30)
    ]
    assert peaks[0] < peaks[1]
    # RIFE pads frames to larger multiples when it estimates motion at a lower resolution. Such steps are left out.
    for width, height, scales in ((2048, 1024, [1, 0.5, 0.25]), (1024, 576, [1, 0.5]), (640, 384, [1])):
        shot = Shot(prompt="a", interpolation=2, width=width, height=height)
        assert [lower.flow_scale for lower in rife.lower_memory_steps(profile.options_of(rife), shot)] == scales


def test_options_of_flux_are_planned():
    plain, stored, computed = (with_flux_options(quantize=name) for name in ("none", "fp8_storage", "fp8"))
    assert stored.weights_gb == computed.weights_gb < plain.weights_gb - 10


def test_demand_keeps_one_shot_of_each_size():
    sizes = [(512, 512, 25), (1024, 576, 25), (1024, 576, 14), (1024, 576, 25), (512, 512, 50)]
    demand = demand_of(Shot(prompt="a", width=w, height=h, num_frames=n) for w, h, n in sizes)
    assert sorted((shot.width, shot.num_frames) for shot in demand.sizes) == [(512, 25), (512, 50), (1024, 14), (1024, 25)]
    assert len(demand_of([Shot(prompt="a"), Shot(**FACE)]).sizes) == 2
    assert len(demand_of(Shot(prompt="a", extend=extend) for extend in (0, 3, 3)).sizes) == 2

    # Of many sizes, the largest are kept.
    demand = demand_of(Shot(prompt="a", width=64 * n, height=576, num_frames=f) for n in range(1, 17) for f in range(2, 26))
    assert len(demand.sizes) <= MAX_SIZES
    assert (1024, 25) in [(shot.width, shot.num_frames) for shot in demand.sizes]


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
    planned = plan_run(profile, demand_of([shot.model_copy(update={"image": "start.png"})]), parse_gpus("1x48GB"))
    assert planned.layout.slots[0].has_gpu
    assert planned.layout.slots[0].memory_gb == pytest.approx(CONTEXT_GB + offloaded.peak / GB, rel=0.2)
    with pytest.raises(SetupError, match="the largest GPU has 24"):
        plan_run(profile, demand_of([shot]), parse_gpus("1x24GB"))


@pytest.mark.parametrize(("name", "transformers"), [("wan", 2), ("qwen_edit", 1)])
def test_fp8_halves_the_transformers(name, transformers):
    stage, shot = STAGE_BY_NAME[name], Shot(**WAN_SHOT)
    weights = load_table().weights
    saved = transformers * (weights[f"{name}/transformer"] - weights[f"{name}/transformer:fp8_storage"])
    assert saved > 0.95 * transformers * weights[f"{name}/transformer"] / 2
    for offload, attribute in ((True, "host"), (False, "total")):
        options = {"weights": "w", "dtype": "bfloat16", "cpu_offload": offload}
        plain, fp8 = (stage.memory(stage.Params(**options, quantize=name), shot) for name in ("none", "fp8"))
        assert getattr(plain, attribute) - getattr(fp8, attribute) == saved
    plain, fp8 = (stage.work(stage.Params(weights="w", cpu_offload=True, quantize=q), shot).fixed for q in ("none", "fp8"))
    assert plain.linked_bytes - fp8.linked_bytes >= saved


def test_wan_weights_decide_about_the_model(tmp_path):
    stage, shot = STAGE_BY_NAME["wan"], Shot(**WAN_SHOT)
    params = load_profile("gpu-24gb").options_of(stage)
    small = stage.memory(params, shot)
    (tmp_path / "model_index.json").write_text("{}")
    assert stage.memory(params.model_copy(update={"weights": tmp_path}), shot) == small
    (tmp_path / "transformer_2").mkdir()
    assert stage.memory(params.model_copy(update={"weights": tmp_path}), shot).host > 1.5 * small.host


def actor(name, weights_gb, peak_gb):
    return Actor(name, (name,), 0, 1.0, weights_gb, 0.0, 1.0, True, peak_gb)


def test_process_needs_all_weights_and_the_largest_activations():
    flux, svd, upscaler = actor("flux", 30, 2), actor("svd", 4, 9), actor("realesrgan", 0.1, 10)
    groups = (flux,), (svd,)
    assert WorkerProcess((flux, svd)).gpu_gb == pytest.approx(CONTEXT_GB + 34 + 9)
    assert WorkerProcess((flux, svd), groups).gpu_gb == pytest.approx(CONTEXT_GB + 32)
    # An actor without a group always stays on the GPU.
    assert WorkerProcess((flux, svd, upscaler), groups).gpu_gb == pytest.approx(CONTEXT_GB + 30.1 + 10)


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


def unified(pool_gb):
    """Return a simulated GB10 whose workers may take this memory, and the profile for it."""
    cluster = Cluster((Node.of_gpus([("NVIDIA GB10", None)], 20, pool_gb + OTHER_PROCESSES_GB),))
    return cluster, profile_for("gpu", lambda: cluster)


def test_gpu_and_host_have_one_memory_on_a_gb10():
    cluster, profile = unified(80)
    demand = demand_of([gpu_shot(profile, **FACE, lora="l.safetensors")] * 100)
    planned = plan_run(profile, demand, cluster)
    (note,) = [note for note in planned.notes if "share their memory" in note]
    needed_gb = float(re.search(r"up to ([\d.]+) GB", note)[1])
    (slot,) = planned.layout.slots
    # FLUX passes through the host when it is loaded, but is there only once.
    assert slot.memory_gb + GPU_PROCESS_HOST_GB + PROCESS_HOST_GB < needed_gb < slot.memory_gb + 5
    assert planned.layout.kind == "fused"
    assert plan_run(profile, demand, unified(needed_gb + 0.01)[0]).layout.kind == "fused"
    with pytest.raises(SetupError, match=r"GPU and host share: [\d.]+ GB are needed on one node; the nodes have .*docs/gpu.md"):
        plan_run(profile, demand, unified(needed_gb - 1)[0])


def test_weights_are_swapped_on_a_gh200_but_not_in_the_one_memory_of_a_gb10():
    cluster, profile = unified(80)
    both = gpu_shot(profile, video_model="wan", num_frames=81)
    demand = demand_of([both] * 10)
    assert not [actor for actor in profile.actors.values() if {"cpu_offload", "text_encoder"} & set(actor.options)]
    with pytest.raises(SetupError, match=r"the stages need [\d.]+ GB together, the largest of 1 GPUs has 80 GB"):
        plan_run(profile, demand, cluster)
    # One machine has the images, the other one the clips.
    assert len(plan_run(profile, demand, parse_gpus("2xGB10")).layout.slots) == 2
    gh200, h100_nvl = (plan_run(profile, demand, parse_gpus(f"1x{name}")) for name in ("GH200", "H100-NVL"))
    assert gh200.layout.workers[0].swap_groups == h100_nvl.layout.workers[0].swap_groups != ()


def test_library_swaps_no_weights_in_unified_memory():
    for pool_gb, message in (
        (80, r"the stages need [\d.]+ GB of GPU memory, the GPU has 80"),
        (110, r"needs [\d.]+ GB of memory for GPU and host, this machine has 110"),
        (120, ""),
    ):
        cluster, profile = unified(pool_gb)
        both = gpu_shot(profile, video_model="wan", num_frames=81)
        with pytest.raises(SetupError, match=message) if message else nullcontext():
            assert swap_groups(profile, stages_of(both), [both], cluster.nodes[0]) == ()
