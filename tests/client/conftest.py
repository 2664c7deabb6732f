"""A server in this process, and its URL, for the tests of the client and of the MCP server."""

import pytest

from tests.online.directors import listening_on_a_port, local_server
from vidgen_ray.online.server_settings import OnlineSettings


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    settings = OnlineSettings(profile="tiny", data=str(tmp_path_factory.mktemp("out")))
    with local_server(tiny, settings, step_s=0.02) as running:
        yield running


@pytest.fixture(scope="module")
def url(server):
    with listening_on_a_port(server.app) as url:
        yield url
