"""Server of the tiny models for the tests of this folder, as `vidgen serve` runs it."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from threading import Event

import pytest
import yaml

from tests.conftest import LocalRay
from tests.online.on_serve.applications import ACTORS_GB, Running, scripted_profile
from tests.online.on_serve.serve_cluster import ServeCluster
from vidgen_ray.online.auth import hash_key
from vidgen_ray.online.server import Server, serving
from vidgen_ray.online.server_plan import APP, server_plan
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.store.store import open_store
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.cluster import this_machine

KEYS = {name: f"vg-{name}-key" for name in ("ada", "amy")}
POOR_KEY, POOR_GPU_SECONDS = "vg-poor-key", 0.5
"""Key of the server on Ray Serve, and its budget: enough for a few small images."""
ACTORS = ("instantid", "flux", "hunyuan", "svd", "realesrgan")
"""Actors of the server. Each loads models for seconds."""


@pytest.fixture(scope="module", autouse=True)
def local_serve(local_ray):
    """Keep the shared Ray between the tests of this folder."""


@pytest.fixture(scope="package")
def server(tiny, tmp_path_factory) -> Iterator[tuple[Server, Running]]:
    """Start a server of the tiny models in one process. Other directors may run at the same time."""
    LocalRay.start()
    folder = tmp_path_factory.mktemp("server")
    keys = [{"tenant": name, "sha256": hash_key(key)} for name, key in KEYS.items()]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    profile = tiny.model_copy(update={"actors": {name: tiny.actors[name] for name in ACTORS}})
    (folder / "tiny.yaml").write_text(yaml.safe_dump(profile.model_dump(mode="json")))
    settings = OnlineSettings(
        profile=str(folder / "tiny.yaml"), data=str(folder / "out"), keys_file=folder / "keys.yaml", port=port
    )
    # Without the seconds of the stages, it leaves the rest of the cluster to other applications.
    plan = replace(server_plan(settings, this_machine), stage_seconds=None)
    with listening, serving(plan, listening) as server:
        server.wait_until_accepting(Event())
        server.wait_until_ready(Event())
        outputs, store = OutputFolder(settings.data), open_store(settings)
        yield server, Running(APP, plan.serving_profile, outputs, store, server.director, server._workers.handle)


@pytest.fixture(scope="package")
def real(server) -> Running:
    """Application of the server, for tests that use its store."""
    return server[1]


@pytest.fixture(scope="package")
def cluster(tiny, tmp_path_factory) -> Iterator[ServeCluster]:
    """Deploy a server of scripted stages on Ray Serve, with two replicas of its API."""
    LocalRay.start()
    folder = tmp_path_factory.mktemp("cluster")
    keys = [{"tenant": name, "sha256": hash_key(key)} for name, key in KEYS.items()]
    limits = {"open_jobs": 200, "budgets": [{"window": "total", "gpu_seconds": POOR_GPU_SECONDS}]}
    keys.append({"tenant": "poor", "sha256": hash_key(POOR_KEY), "limits": limits})
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    profile = scripted_profile(tiny, {**ACTORS_GB, "hunyuan": 3})
    (folder / "p.yaml").write_text(yaml.safe_dump(profile.model_dump(mode="json")))
    files = {"profile": str(folder / "p.yaml"), "data": str(folder / "out"), "keys_file": str(folder / "keys.yaml")}
    cluster = ServeCluster({**files, "gpus": "2x80GB"})
    try:
        cluster.deploy()
        cluster.wait_until_running()
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="package", params=["server", pytest.param("cluster", marks=pytest.mark.slow)])
def address(request) -> str:
    """URL of the server, also of the one on Ray Serve."""
    found = request.getfixturevalue(request.param)
    return found.url if request.param == "cluster" else found[0].url
