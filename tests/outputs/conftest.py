"""Fixtures of the output folder's tests: planned shots and a local S3 server (moto)."""

import re
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer

from tests import fake_stages
from vidgen_ray.content_keys import ShotPlan


@pytest.fixture(scope="module")
def endpoint():
    """Start an S3 server with an empty bucket `clips` and return its URL."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
            patched.delenv(name, raising=False)
        patched.setenv("AWS_ACCESS_KEY_ID", "KEY")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        urlopen(Request(f"http://{host}:{port}/clips", method="PUT")).close()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def url(endpoint, request):
    return f"s3://clips/{re.sub('[^a-z0-9_]', '-', request.node.name)}?endpoint={endpoint}"


@pytest.fixture
def plan_of(tiny, make_shot):
    def make(shot_id: str, **fields) -> ShotPlan:
        return fake_stages.plan_of(tiny, make_shot(id=shot_id, **{"upscale_video": False, **fields}))

    return make
