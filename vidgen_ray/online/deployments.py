"""Ray Serve deployments that render jobs: the director, and the owner of workers and encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve import Application

from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.online.director import JobDirector
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.workers import Workers
from vidgen_ray.planner import Cluster, Plan
from vidgen_ray.planner.cluster import Label
from vidgen_ray.planner.layout import Layout
from vidgen_ray.planner.solver import DIRECTOR_CPUS

DIRECTOR, WORKERS = "Director", "Workers"
WORKERS_CPUS = 0.1
MAX_DIRECTOR_CALLS = 1_000
"""Concurrent calls of the director, all short."""
HEALTH: dict[str, Any] = {"health_check_period_s": 2.0, "health_check_timeout_s": 30.0, "graceful_shutdown_wait_loop_s": 0.5}


def director_application(
    config: EngineConfig,
    settings: OnlineSettings,
    layout: Layout,
    labels: Sequence[Label | None],
    stage_seconds: Mapping[str, float] | None = None,
    make_plan: Callable[[Cluster], Plan] | None = None,
) -> Application:
    """Return the application of the director and the deployment that it calls.

    `labels`, `stage_seconds`, `make_plan`: see `Workers`.
    """
    workers = serve.deployment(
        Workers, name=WORKERS, num_replicas=1, ray_actor_options={"num_cpus": WORKERS_CPUS}, **HEALTH
    ).bind(config, layout, labels, stage_seconds, make_plan)
    return serve.deployment(
        JobDirector,
        name=DIRECTOR,
        num_replicas=1,
        ray_actor_options={"num_cpus": DIRECTOR_CPUS},
        max_ongoing_requests=MAX_DIRECTOR_CALLS,
        **HEALTH,
    ).bind(config, settings, layout, workers)
