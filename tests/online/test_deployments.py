"""The plan of a server: stages, deployments and GPU shares. Nothing is started."""

from pathlib import Path

import pytest

from vidgen_ray.engine.step_groups import OUTPUT
from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.graph import STAGES
from vidgen_ray.online.deployments import EVERYTHING, groups_of
from vidgen_ray.online.inference_thread import Progress
from vidgen_ray.online.metrics import ERRORS_NAMED, METRICS, OTHER, TENANTS_NAMED, _Names
from vidgen_ray.online.progress_estimate import ProgressEstimator
from vidgen_ray.online.serving_profile import ServingProfile, serving_profile
from vidgen_ray.planner import parse_gpus, plan, this_machine
from vidgen_ray.planner.gpu_assignment import CONTEXT_GB
from vidgen_ray.profile import load_profile
from vidgen_ray.shot import Shot

DOCS = Path(__file__).parent.parent.parent / "docs"


def groups(profile, gpus):
    all_stages = ServingProfile(profile, dict.fromkeys(stage.name for stage in STAGES), {})
    cluster = parse_gpus(gpus) if gpus else this_machine()
    layout = plan(profile, all_stages.demand(), cluster).layout
    return layout, groups_of(layout, profile, cluster)


@pytest.mark.parametrize("placement", ["auto", "staged"])
@pytest.mark.parametrize(
    ("name", "gpus", "gpu_gb"), [("gpu-80gb", "8x80GB", 80), ("gpu-80gb", "2x4x80GB", 80), ("gpu-48gb", "4x48GB", 48)]
)
def test_replicas_on_one_gpu_fit_into_its_memory(name, gpus, gpu_gb, placement):
    profile = load_profile(name).model_copy(update={"layout": placement})
    layout, deployments = groups(profile, gpus)
    assert sum(group.replicas for group in deployments) == len(layout.workers)
    assert len({group.name for group in deployments}) == len(deployments)
    # The GPU shares of all replicas fit into the cluster.
    assert sum(group.replicas * group.spec.gpus for group in deployments) <= len(parse_gpus(gpus).gpus) + 1e-9
    for group in deployments:
        swapped = {stage for turn in group.spec.turns for stage in turn}
        actors = {stage.actor for stage in STAGES if stage.name in set(group.spec.stages) - swapped}
        held_gb = CONTEXT_GB + sum(profile.actors[a].memory_gb for a in actors if profile.actors[a].device != "cpu")
        assert group.spec.gpus * gpu_gb >= held_gb - 1e-6


def test_deployment_names():
    profile = load_profile("gpu-80gb")
    _, deployments = groups(profile.model_copy(update={"layout": "staged"}), "8x80GB")
    assert {"flux", "svd", "hunyuan", "realesrgan"} < {group.name for group in deployments}
    _, deployments = groups(profile, "1x80GB")
    assert [(group.name, group.replicas, group.spec.gpus) for group in deployments] == [(EVERYTHING, 1, 1.0)]


def test_replicas_use_the_cpus_of_the_profile_without_gpus(tiny):
    _, (group,) = groups(tiny, None)
    assert (group.name, group.spec.gpus, group.spec.cpus) == (EVERYTHING, 0.0, 0.25)


def test_mixed_gpus_that_are_too_small_are_rejected():
    profile = load_profile("gpu-80gb").model_copy(update={"layout": "staged"})
    with pytest.raises(SetupError, match=r"need 41.6 GB of a GPU, and a card of this cluster has 24"):
        groups(profile, "4x24GB+8x80GB")


def test_stages_without_weights_are_unavailable_with_a_reason(tiny):
    actors = {**tiny.actors, "hunyuan": tiny.actors["hunyuan"].model_copy(update={"weights": "gone"})}
    del actors["instantid_sdxl"]
    served = serving_profile(tiny.model_copy(update={"actors": actors}))
    assert set(served.unavailable) == {"hunyuan", "instantid_sdxl"}
    assert {stage.name for stage in served.demand().stages} == {stage.name for stage in STAGES} - {
        "hunyuan",
        "instantid_sdxl",
        "refine",
    }
    plain = Shot(**tiny.defaults, id="s", prompt="p", seed=1)
    assert [step.stage for step in served.plan(plain).steps] == ["flux", "svd", "realesrgan"]
    with pytest.raises(ProfileError, match=r"hunyuan is not served here: .*gone"):
        served.plan(plain.model_copy(update={"use_hunyuan_style": True}))


def test_profile_without_an_image_stage_cannot_be_served(tiny):
    actors = {name: tiny.actors[name] for name in ("svd", "realesrgan")}
    with pytest.raises(SetupError, match=r"nothing to serve.*flux: profile tiny has no entry actors\.flux"):
        serving_profile(tiny.model_copy(update={"actors": actors}))


def test_percent_follows_the_expected_seconds_and_never_decreases(tiny, make_shot):
    seconds = {"flux": {"flux": 10.0}, "svd": {"svd": 30.0}, "realesrgan": {"realesrgan": 60.0}}
    actors = {name: tiny.actors[name].model_copy(update={"seconds": expected}) for name, expected in seconds.items()}
    profile = tiny.model_copy(update={"actors": actors})
    shot = make_shot(width=1024, height=576, num_frames=25, steps={"flux": 28, "svd": 25})
    estimator = ProgressEstimator(serving_profile(profile).plan(shot), profile)
    reports = [
        ("flux", 0, 0),
        ("flux", 14, 28),
        ("svd", 0, 0),
        ("svd", 5, 25),
        ("flux", 1, 28),
        ("realesrgan", 5, 25),
        (OUTPUT, 0, 0),
    ]
    # Encoding is estimated at some tenths of a second.
    assert [estimator.percent(Progress(*progress)) for progress in reports] == [0, 4, 9, 15, 15, 51, 99]


def test_metric_labels_are_bounded_and_metrics_are_documented():
    names = _Names(2)
    assert [names(name) for name in ("a", "b", "c", "a", "d")] == ["a", "b", OTHER, "a", OTHER]
    assert TENANTS_NAMED * len(STAGES) + ERRORS_NAMED * len(STAGES) < 2_000
    text = (DOCS / "online.md").read_text()
    for name, spec in METRICS.items():
        assert f"{name}_total`" in text if spec.kind == "counter" else f"`{name}`" in text
