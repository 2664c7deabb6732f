"""The Serve application: the API, the director, an encoder, and a deployment for each group of replicas that hold stages.

`vidgen_ray.online.application:build` is what a Serve config names as its import path.
"""

# Not `from __future__ import annotations`: Serve reads the annotation of `build` to make settings of a config's args.

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException

from vidgen_ray.engine.ray_cluster import live_cluster
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.online.asgi_app import make_app
from vidgen_ray.online.auth import ApiKeys, load_keys
from vidgen_ray.online.deployments import HEALTH, Group, graph, groups_of
from vidgen_ray.online.replica_config import ReplicaConfig
from vidgen_ray.online.serving_profile import ServingProfile, serving_profile
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.store.store import open_store
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner import Cluster, load_calibration, parse_gpus, plan
from vidgen_ray.planner.layout import Layout
from vidgen_ray.planner.solver import DIRECTOR_CPUS, ENCODER_CPUS
from vidgen_ray.profile import load_profile
from vidgen_ray.stages.base import Stage

APP = "vidgen"
API = "Api"
API_CPUS = 0.25
API_REQUESTS = 1_000
"""Of a replica at once: those who watch a job's events stay for as long as it takes."""


@dataclass(frozen=True)
class ServerPlan:
    """What a server consists of on a certain cluster, before anything is started."""

    settings: OnlineSettings
    serving_profile: ServingProfile
    layout: Layout
    groups: tuple[Group, ...]

    @property
    def cpus(self) -> float:
        """CPUs of all replicas, as they start."""
        stages = sum(group.replicas * group.spec.cpus for group in self.groups)
        return stages + self.layout.encoders * ENCODER_CPUS + DIRECTOR_CPUS + API_CPUS

    @property
    def in_progress(self) -> int:
        """Jobs that are led at once, at most."""
        return self.settings.in_progress or self.layout.window


def server_plan(settings: OnlineSettings, look: Callable[[], Cluster]) -> ServerPlan:
    """Lay a server out, for the GPUs that the settings name, or those that `look` finds.

    Raises ProfileError and SetupError as the planner does, and where nothing can be served.
    """
    told = load_profile(settings.profile)
    found = serving_profile(told if settings.layout is None else told.model_copy(update={"layout": settings.layout}))
    profile = found.profile
    cluster = parse_gpus(settings.gpus) if settings.gpus else look()
    layout = plan(profile, found.demand(), cluster, calibration=load_calibration(profile.name, cluster.card)).layout
    return ServerPlan(settings, found, layout, groups_of(layout, profile, cluster))


def build(args: OnlineSettings) -> Application:
    """For `serve deploy` and `serve run`, laid out for the cluster that this runs on."""
    return application(server_plan(args, live_cluster))


def application(of: ServerPlan, stages: Mapping[str, type[Stage[Any]]] = STAGE_BY_NAME) -> Application:
    """`stages`: what runs under each stage's name."""
    settings = of.settings
    outputs = OutputFolder(settings.data)
    outputs.prepare()
    service = ReplicaConfig(
        profile=of.serving_profile.profile,
        outputs=outputs,
        layout=of.layout,
        stages={stage.name: stages[stage.name] for stage in of.serving_profile.stages if stage.name in stages},
    )
    director = graph(service, of.groups, settings, of.in_progress)
    # Handed over, since a replica's environment and files may be another machine's: without them it would ask for no key.
    keys = load_keys(settings.keys_file, settings.limits)
    return serve.deployment(
        serve.ingress()(Api),
        name=API,
        num_replicas=1,
        ray_actor_options={"num_cpus": API_CPUS},
        max_ongoing_requests=API_REQUESTS,
        **HEALTH,
    ).bind(settings, of.serving_profile, outputs, keys, director)


class Api:
    """The HTTP side. It tells the director when there is something new; the store has it already."""

    def __init__(
        self, settings: OnlineSettings, of: ServingProfile, outputs: OutputFolder, keys: ApiKeys, director: Any
    ) -> None:
        self._settings = settings
        self._served = of
        self._outputs = outputs
        self._keys = keys
        self._director = director

    def __serve_build_asgi_app__(self) -> Any:
        store = open_store(self._settings)
        return make_app(
            self._settings, store, self._outputs, self._served, self._keys, accepted=DirectorNotifier(self._director).notify
        )


class DirectorNotifier:
    """Wakes the director, by one call at a time however much there is to tell: one that is gone is not asked thousands of
    times when it comes back. Rung inside of an event loop."""

    def __init__(self, director: Any) -> None:
        self._director = director
        self._rung = False
        self._ringing: asyncio.Task[None] | None = None

    def notify(self) -> None:
        self._rung = True
        if self._ringing is None or self._ringing.done():
            self._ringing = asyncio.ensure_future(self._wake())

    async def _wake(self) -> None:
        while self._rung:
            self._rung = False
            # One that dies of it looks into the store when it comes again.
            with suppress(ray.exceptions.RayError, RayServeException):
                await self._director.wake.remote()
