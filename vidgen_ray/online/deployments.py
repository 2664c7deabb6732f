"""A layout as deployments of Serve: groups of like replicas, how many of each, and on which share of a GPU."""

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
CALLS_AT_ONCE = 2
"""Of a replica with stages: one is worked on, and the inputs of the next are fetched meanwhile."""
ERRANDS_AT_ONCE = 1_000
"""Of the director, that take no time."""
HEALTH: dict[str, Any] = {"health_check_period_s": 2.0, "health_check_timeout_s": 30.0, "graceful_shutdown_wait_loop_s": 0.5}
EVERYTHING = "stages"
"""Name of the group whose replicas hold all that is served."""


@dataclass(frozen=True, slots=True)
class Group:
    """Replicas that hold the same: a deployment."""

    name: str
    spec: WorkerSpec
    """Its `gpus` is a share by which Ray may pack replicas as it likes: they fit in the card's memory in any case."""
    replicas: int


def graph(service: ReplicaConfig, groups: Sequence[Group], settings: OnlineSettings, in_progress: int) -> Application:
    """The director with all that it calls. `in_progress`: jobs that are led at once, at most."""
    bound = {group.name: _stages(service, group) for group in groups}
    specs = {group.name: (group.spec, group.replicas) for group in groups}
    chunked = {name: spec for name, spec in specs.items() if any(map(is_chunked, spec[0].stages))}
    encoders = service.layout.encoders
    encoder = serve.deployment(
        EncoderReplica,
        name=ENCODER,
        num_replicas=encoders,
        ray_actor_options={"num_cpus": ENCODER_CPUS},
        # A call waits for frames for most of its time.
        max_ongoing_requests=max(2, math.ceil(in_progress / encoders)),
        **HEALTH,
    ).bind(service, {name: bound[name] for name in chunked}, chunked)
    return serve.deployment(
        JobDirector,
        name=DIRECTOR,
        num_replicas=1,
        ray_actor_options={"num_cpus": DIRECTOR_CPUS},
        max_ongoing_requests=ERRANDS_AT_ONCE,
        **HEALTH,
    ).bind(service, settings, in_progress, bound, specs, encoder)


def _stages(service: ReplicaConfig, group: Group) -> Application:
    return serve.deployment(
        StageReplica,
        name=group.name,
        num_replicas=group.replicas,
        ray_actor_options={"num_cpus": group.spec.cpus, "num_gpus": group.spec.gpus},
        max_ongoing_requests=CALLS_AT_ONCE,
        **HEALTH,
    ).bind(service, group.spec)


def groups_of(layout: Layout, profile: Profile, cluster: Cluster) -> tuple[Group, ...]:
    """In the order of the layout. Raises SetupError where some card is too small for what Ray might put there."""
    held = Counter((spec.stages, spec.turns) for spec in layout.workers)
    all_stages = {stage for spec in layout.workers for stage in spec.stages}
    groups: list[Group] = []
    for (stages, turns), replicas in held.items():
        specs = [spec for spec in layout.workers if (spec.stages, spec.turns) == (stages, turns)]
        whole = all(spec.gpus == 1 for spec in specs)
        share = 1.0 if whole else _share(specs[0], profile, cluster)
        name = EVERYTHING if set(stages) == all_stages else _name(specs[0], profile)
        groups.append(Group(_unused(name, groups), replace(specs[0], gpus=share), replicas))
    return tuple(groups)


def _share(spec: WorkerSpec, profile: Profile, cluster: Cluster) -> float:
    """Of a GPU, by memory, in ten-thousandths, which is as fine as Ray counts; 0 for what needs no GPU.

    Ray knows shares and no gigabytes, so the share is that of the smallest card.
    """
    if not spec.gpus:
        return 0.0
    needed_gb, smallest_gb = CONTEXT_GB + _gpu_gb(spec, profile), min(cluster.gpus)
    if needed_gb > smallest_gb + EPSILON:
        raise SetupError(
            f"{', '.join(spec.stages)} need {needed_gb:.3g} GB of a GPU, and a card of this cluster has {smallest_gb:.3g}; "
            "serve on cards of one size, or write `layout: fused` into the profile"
        )
    return min(1.0, math.ceil(10_000 * needed_gb / smallest_gb - EPSILON) / 10_000)


def _gpu_gb(spec: WorkerSpec, profile: Profile) -> float:
    """Of the weights and activations of all actors that stay, and of the largest group of those that take turns."""

    def together(stages: tuple[str, ...]) -> float:
        actors = dict.fromkeys(STAGE_BY_NAME[stage].actor for stage in stages)
        return sum(profile.actors[actor].memory_gb for actor in actors if profile.actors[actor].device != "cpu")

    waiting = {stage for group in spec.turns for stage in group}
    stays = together(tuple(stage for stage in spec.stages if stage not in waiting))
    return stays + max((together(group) for group in spec.turns), default=0.0)


def _name(spec: WorkerSpec, profile: Profile) -> str:
    """After the actors on the GPU, or all of them where none is: `flux`, `svd-realesrgan`."""
    actors = dict.fromkeys(STAGE_BY_NAME[stage].actor for stage in spec.stages)
    on_gpu = [actor for actor in actors if profile.actors[actor].device != "cpu"]
    return "-".join(on_gpu or actors)


def _unused(name: str, groups: list[Group]) -> str:
    names = {group.name for group in groups}
    number = 2
    while (candidate := name if name not in names else f"{name}-{number}") in names:
        number += 1
    return candidate
