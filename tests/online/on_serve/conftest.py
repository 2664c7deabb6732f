"""Server of the tiny models for the tests of this folder, as `vidgen serve` runs it."""

import socket
from collections.abc import Iterator
from dataclasses import replace
from threading import Event

import pytest
import yaml

from tests.conftest import LocalRay
from tests.online.on_serve.applications import Running
from vidgen_ray.online.auth import hash_key
from vidgen_ray.online.server import Server, serving
from vidgen_ray.online.server_plan import APP, server_plan
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.store.store import open_store
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.cluster import this_machine

KEYS = {name: f"vg-{name}-key" for name in ("ada", "amy")}
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
def address(server) -> str:
    """URL of the server."""
    return server[0].url
