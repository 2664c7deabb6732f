"""Plan of a server on a cluster, and what its processes are made of: the API, the director, and the owner of the workers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.fleet import labels_of
from vidgen_ray.engine.ray_cluster import requires_token
from vidgen_ray.engine.trials import run_trials
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.online.auth import ApiKeys, check_bind_host, check_token_required, load_keys
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.serving_profile import ServingProfile, serving_profile
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.choose_layout import Plan, cpus_needed, plan_run
from vidgen_ray.planner.cluster import Cluster, Label, parse_gpus, profile_for
from vidgen_ray.planner.demand import load_calibration
from vidgen_ray.planner.layout import Layout
from vidgen_ray.provenance.signing import check_signing
from vidgen_ray.render.cache_writer import CacheSettings
from vidgen_ray.stages.base import Stage
from vidgen_ray.system.files import private_folder

log = logging.getLogger(__name__)

APP = "vidgen"
API, DIRECTOR, WORKERS = "Api", "Director", "Workers"
"""Names of the processes of a server, and of its deployments."""


@dataclass(frozen=True)
class ServerPlan:
    """Plan of a server on a cluster, before it is started."""

    settings: OnlineSettings
    serving_profile: ServingProfile
    layout: Layout
    labels: tuple[Label | None, ...]
    """Label of the node of each slot; see `fleet.labels_of`."""
    reference_s: Mapping[str, float]
    """Stage -> planned seconds of the reference shot."""
    stage_seconds: Mapping[str, float] | None
    """Stage -> mean seconds per shot, to use GPUs that become free later. `None` if the settings name all GPUs."""

    @property
    def cpus(self) -> float:
        """CPUs of all processes at start. The spare CPUs of a layout are enough for the API and the owner of the workers."""
        return cpus_needed(self.layout)


def server_plan(settings: OnlineSettings, detect: Callable[[], Cluster]) -> ServerPlan:
    """Plan a server for the GPUs in the settings, or for those that `detect` returns.

    Raises ProfileError and SetupError as the planner does, and SetupError if nothing can be served, or if Ray cannot
    distinguish GPUs of different sizes.
    """
    cluster = parse_gpus(settings.gpus) if settings.gpus else detect()
    configured = profile_for(settings.profile, lambda: cluster).with_provenance(settings.provenance)
    check_signing(configured.provenance)
    served = serving_profile(configured, settings.require_licence)
    # LoRAs of the examples do not exist.
    examples = [shot for shot in served.example_shots() if not shot.all_loras]
    if (fast := run_trials(configured, examples, None, cluster, log.warning)) != configured:
        served = serving_profile(fast, settings.require_licence)
    served = replace(served, gpu_gb=max(cluster.gpus, default=None))
    chosen = plan_for(served, cluster, settings.shots_at_once)
    served = replace(served, profile=served.profile.with_options(chosen.options))
    stage_seconds = None if settings.gpus else chosen.stage_seconds
    return ServerPlan(settings, served, chosen.layout, tuple(labels_of(chosen, cluster)), chosen.reference_s, stage_seconds)


def plan_for(served: ServingProfile, cluster: Cluster, shots_at_once: int | None = None) -> Plan:
    """Plan the layout of a server. `shots_at_once`: `None` for as many as GPUs. Raises ProfileError and SetupError as the
    planner does."""
    profile, shots = served.profile, shots_at_once or max(1, len(cluster.gpus))
    return plan_run(
        profile, served.demand(), cluster, calibration=load_calibration(profile.name, cluster.card), shots_at_once=shots
    )


def check_exposure(settings: OnlineSettings, other_hosts: Iterable[str] = ()) -> None:
    """Raise SetupError if the server listens beyond this machine without API keys, or on a Ray that requires no token.

    Call it when connected to Ray. `other_hosts`: on which it listens, too.
    """
    keys = load_keys(settings.keys_file, settings.limits)
    token_is_required = requires_token()
    if not token_is_required:
        log.warning("Ray requires no token: anyone who reaches one of its ports can run code. Set RAY_AUTH_MODE=token.")
    for host in {settings.host, *other_hosts}:
        check_bind_host(host, keys)
        check_token_required(host, token_is_required)


class Parts(NamedTuple):
    """Arguments with which the processes of a server are made. Each also gets the handle of the next one."""

    api: tuple[Any, ...]
    """Of `make_api`."""
    director: tuple[Any, ...]
    """Of `JobDirector`."""
    workers: tuple[Any, ...]
    """Of `Workers`."""


def parts_of(server: ServerPlan, stages: Mapping[str, type[Stage[Any]]] = STAGE_BY_NAME) -> Parts:
    """Prepare the output folder, and return the parts of a server. `stages`: stage name -> class that implements it."""
    settings, served = server.settings, server.serving_profile
    outputs = OutputFolder(settings.data)
    if outputs.storage.local is not None:
        # Prompts and photos of clients. Files of shots keep the modes of a batch run: the folder shuts other users out.
        private_folder(outputs.storage.local)
    outputs.prepare()
    config = EngineConfig(
        name=APP,
        profile=served.profile,
        planned_s=server.reference_s,
        outputs=outputs,
        stages={stage.name: stages[stage.name] for stage in served.stages if stage.name in stages},
        # Streamed images are read from the cache while a job runs, and lost artefacts are taken from it.
        cache=CacheSettings("all", wait=True),
    )
    make_plan = partial(plan_for, served, shots_at_once=settings.shots_at_once)
    # Passed to the processes, which may run on another machine without the keys file. Without keys they would require none.
    keys: ApiKeys = load_keys(settings.keys_file, settings.limits)
    return Parts(
        (settings, served, outputs, keys),
        (config, settings, server.layout, keys),
        (config, server.layout, server.labels, server.stage_seconds, make_plan),
    )
