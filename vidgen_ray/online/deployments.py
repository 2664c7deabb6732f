"""Ray Serve deployments of a layout: groups of equal replicas, their number and their GPU share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ray import serve
from ray.serve import Application

from vidgen_ray.errors import SetupError
from vidgen_ray.graph import STAGE_BY_NAME, is_chunked
from vidgen_ray.online.director import JobDirector
from vidgen_ray.online.encoder_replica import EncoderReplica
from vidgen_ray.online.replica_config import ReplicaConfig
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.stage_replica import StageReplica
from vidgen_ray.planner import Cluster
from vidgen_ray.planner.gpu_assignment import CONTEXT_GB, EPSILON
from vidgen_ray.planner.layout import Layout, WorkerSpec
from vidgen_ray.planner.solver import DIRECTOR_CPUS, ENCODER_CPUS
from vidgen_ray.profile import Profile

DIRECTOR, ENCODER = "Director", "Encoder"
MAX_STAGE_CALLS = 2
"""Calls per stage replica: one runs while the inputs of the next are fetched."""
MAX_DIRECTOR_CALLS = 1_000
"""Concurrent calls of the director, all short."""
HEALTH: dict[str, Any] = {"health_check_period_s": 2.0, "health_check_timeout_s": 30.0, "graceful_shutdown_wait_loop_s": 0.5}
ALL_STAGES = "stages"
"""Name of the group whose replicas hold all served stages."""


@dataclass(frozen=True, slots=True)
class Group:
    """Replicas that hold the same stages. Each group is one deployment."""

    name: str
    spec: WorkerSpec
    """Its `gpus` is a share of GPU memory: any replicas that Ray puts on one GPU fit into its memory."""
    replicas: int


def graph(config: ReplicaConfig, groups: Sequence[Group], settings: OnlineSettings, in_progress: int) -> Application:
    """Return the application of the director and the deployments that it calls.

    `in_progress`: maximum number of running jobs.
    """
    bound = {group.name: _stage_deployment(config, group) for group in groups}
    specs = {group.name: (group.spec, group.replicas) for group in groups}
    chunked = {name: spec for name, spec in specs.items() if any(map(is_chunked, spec[0].stages))}
    encoders = config.layout.encoders
    encoder = serve.deployment(
        EncoderReplica,
        name=ENCODER,
        num_replicas=encoders,
        ray_actor_options={"num_cpus": ENCODER_CPUS},
        # Most of the time, a call waits for frames.
        max_ongoing_requests=max(2, math.ceil(in_progress / encoders)),
        **HEALTH,
    ).bind(config, {name: bound[name] for name in chunked}, chunked)
    return serve.deployment(
        JobDirector,
        name=DIRECTOR,
        num_replicas=1,
        ray_actor_options={"num_cpus": DIRECTOR_CPUS},
        max_ongoing_requests=MAX_DIRECTOR_CALLS,
        **HEALTH,
    ).bind(config, settings, in_progress, bound, specs, encoder)


def _stage_deployment(config: ReplicaConfig, group: Group) -> Application:
    return serve.deployment(
        StageReplica,
        name=group.name,
        num_replicas=group.replicas,
        ray_actor_options={"num_cpus": group.spec.cpus, "num_gpus": group.spec.gpus},
        max_ongoing_requests=MAX_STAGE_CALLS,
        **HEALTH,
    ).bind(config, group.spec)


def groups_of(layout: Layout, profile: Profile, cluster: Cluster) -> tuple[Group, ...]:
    """Return the groups of a layout, in its order. Raises SetupError if a group does not fit on the smallest GPU."""
    counts = Counter((spec.stages, spec.swap_groups) for spec in layout.workers)
    all_stages = {stage for spec in layout.workers for stage in spec.stages}
    groups: list[Group] = []
    for (stages, swap_groups), replicas in counts.items():
        specs = [spec for spec in layout.workers if (spec.stages, spec.swap_groups) == (stages, swap_groups)]
        whole = all(spec.gpus == 1 for spec in specs)
        share = 1.0 if whole else _gpu_share(specs[0], profile, cluster)
        name = ALL_STAGES if set(stages) == all_stages else _name(specs[0], profile)
        groups.append(Group(_unique(name, groups), replace(specs[0], gpus=share), replicas))
    return tuple(groups)


def _gpu_share(spec: WorkerSpec, profile: Profile, cluster: Cluster) -> float:
    """Return the GPU share of a replica by memory, rounded up to Ray's resolution of 1/10,000. 0 without a GPU.

    Ray schedules shares, not gigabytes, so the share refers to the smallest GPU.
    """
    if not spec.gpus:
        return 0.0
    needed_gb, smallest_gb = CONTEXT_GB + _gpu_gb(spec, profile), min(cluster.gpus)
    if needed_gb > smallest_gb + EPSILON:
        raise SetupError(
            f"{', '.join(spec.stages)}: need {needed_gb:.3g} GB of GPU memory, the smallest GPU has {smallest_gb:.3g} GB. "
            "Serve on GPUs of one size, or set `layout: fused` in the profile."
        )
    return min(1.0, math.ceil(10_000 * needed_gb / smallest_gb - EPSILON) / 10_000)


def _gpu_gb(spec: WorkerSpec, profile: Profile) -> float:
    """Return the GPU memory of the actors that stay on the GPU and of the largest group that is swapped."""

    def memory_of(stages: tuple[str, ...]) -> float:
        actors = dict.fromkeys(STAGE_BY_NAME[stage].actor for stage in stages)
        return sum(profile.actors[actor].memory_gb for actor in actors if profile.actors[actor].device != "cpu")

    swapped = {stage for group in spec.swap_groups for stage in group}
    resident_gb = memory_of(tuple(stage for stage in spec.stages if stage not in swapped))
    return resident_gb + max((memory_of(group) for group in spec.swap_groups), default=0.0)


def _name(spec: WorkerSpec, profile: Profile) -> str:
    """Return a name made of the actors on the GPU, or of all actors if none is: `flux`, `svd-realesrgan`."""
    actors = dict.fromkeys(STAGE_BY_NAME[stage].actor for stage in spec.stages)
    on_gpu = [actor for actor in actors if profile.actors[actor].device != "cpu"]
    return "-".join(on_gpu or actors)


def _unique(name: str, groups: list[Group]) -> str:
    names = {group.name for group in groups}
    number = 2
    while (candidate := name if name not in names else f"{name}-{number}") in names:
        number += 1
    return candidate
