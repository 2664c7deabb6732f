"""Deployments of a server: stages, replicas, GPU shares. Progress estimate and metric labels."""

from pathlib import Path

import pytest

from vidgen_ray.engine.metrics import OTHER, LabelLimit
from vidgen_ray.engine.step_groups import OUTPUT
from vidgen_ray.errors import ProfileError, SetupError
from vidgen_ray.graph import STAGES
from vidgen_ray.online.deployments import ALL_STAGES, groups_of
from vidgen_ray.online.inference_thread import Progress
from vidgen_ray.online.metrics import MAX_ERROR_LABELS, MAX_TENANT_LABELS, METRICS
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


@pytest.mark.parametrize("layout", ["auto", "staged"])
@pytest.mark.parametrize(
    ("name", "gpus", "card_gb"), [("gpu-80gb", "8x80GB", 80), ("gpu-80gb", "2x4x80GB", 80), ("gpu-48gb", "4x48GB", 48)]
)
def test_replicas_on_one_gpu_always_fit_into_its_memory(name, gpus, card_gb, layout):
    profile = load_profile(name).model_copy(update={"layout": layout})
    planned, made = groups(profile, gpus)
    assert sum(group.replicas for group in made) == len(planned.workers)
    assert len({group.name for group in made}) == len(made)
    # The shares of all replicas fit on the GPUs.
    assert sum(group.replicas * group.spec.gpus for group in made) <= len(parse_gpus(gpus).gpus) + 1e-9
    for group in made:
        swapped = {stage for turn in group.spec.swap_groups for stage in turn}
        actors = {stage.actor for stage in STAGES if stage.name in set(group.spec.stages) - swapped}
        resident_gb = CONTEXT_GB + sum(profile.actors[a].memory_gb for a in actors if profile.actors[a].device != "cpu")
        assert group.spec.gpus * card_gb >= resident_gb - 1e-6


def test_deployments_are_named_after_their_models():
    profile = load_profile("gpu-80gb")
    _, made = groups(profile.model_copy(update={"layout": "staged"}), "8x80GB")
    assert {"flux", "svd", "hunyuan", "realesrgan"} < {group.name for group in made}
    _, made = groups(profile, "1x80GB")
    assert [(group.name, group.replicas, group.spec.gpus) for group in made] == [(ALL_STAGES, 1, 1.0)]


def test_replicas_without_gpus_use_the_cpus_of_the_profile(tiny):
    _, (group,) = groups(tiny, None)
    assert (group.name, group.spec.gpus, group.spec.cpus) == (ALL_STAGES, 0.0, 0.25)


def test_group_that_does_not_fit_on_the_smallest_gpu_is_an_error():
    profile = load_profile("gpu-80gb").model_copy(update={"layout": "staged"})
    with pytest.raises(SetupError, match=r"need 41\.6 GB of GPU memory, the smallest GPU has 24 GB"):
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


def test_profile_without_base_image_stage_cannot_be_served(tiny):
    actors = {name: tiny.actors[name] for name in ("svd", "realesrgan")}
    with pytest.raises(SetupError, match=r"nothing to serve.*flux: profile tiny has no entry actors\.flux"):
        serving_profile(tiny.model_copy(update={"actors": actors}))


def test_progress_is_weighted_by_expected_seconds_and_never_decreases(tiny, make_shot):
    seconds = {"flux": {"flux": 10.0}, "svd": {"svd": 30.0}, "realesrgan": {"realesrgan": 60.0}}
    actors = {name: tiny.actors[name].model_copy(update={"seconds": expected}) for name, expected in seconds.items()}
    profile = tiny.model_copy(update={"actors": actors})
    shot = make_shot(width=1024, height=576, num_frames=25, steps={"flux": 28, "svd": 25})
    estimator = ProgressEstimator(serving_profile(profile).plan(shot), profile)
    updates = [
        ("flux", 0, 0),
        ("flux", 14, 28),
        ("svd", 0, 0),
        ("svd", 5, 25),
        ("flux", 1, 28),
        ("realesrgan", 5, 25),
        (OUTPUT, 0, 0),
    ]
    # Encoding takes some tenths of a second.
    assert [estimator.percent(Progress(*update)) for update in updates] == [0, 4, 9, 15, 15, 51, 99]


def test_label_values_are_limited_and_every_metric_is_documented():
    limit = LabelLimit(2)
    assert [limit(name) for name in ("a", "b", "c", "a", "d")] == ["a", "b", OTHER, "a", OTHER]
    assert MAX_TENANT_LABELS * len(STAGES) + MAX_ERROR_LABELS * len(STAGES) < 2_000
    text = (DOCS / "online.md").read_text()
    for name, spec in METRICS.items():
        assert f"{name}_total`" in text if spec.kind == "counter" else f"`{name}`" in text
