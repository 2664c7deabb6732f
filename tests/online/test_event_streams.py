"""Limits of event streams, over HTTP."""

import asyncio
import threading
from contextlib import ExitStack

import httpx
import pytest
import yaml
from ray.exceptions import TaskCancelledError

from tests.online.directors import listening_on_a_port, local_server
from tests.online.test_api_videos import SMALL
from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.application import DisconnectedClients
from vidgen_ray.online.auth import Tenant, hash_key
from vidgen_ray.online.event_streams import EventStreams
from vidgen_ray.online.server_settings import Limits, OnlineSettings

STREAMS = 3


@pytest.fixture
def server(tiny, tmp_path):
    keys = [{"tenant": name, "sha256": hash_key(f"vg-{name}")} for name in ("ada", "bob")]
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    settings = OnlineSettings(
        profile="tiny", data=str(tmp_path / "out"), keys_file=tmp_path / "keys.yaml", limits={"streams": STREAMS}
    )
    with local_server(tiny, settings) as running:
        running.director.held.set()
        yield running


def client_of(url, tenant):
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer vg-{tenant}"}, timeout=60)


def test_streams_are_capped_per_key(server):
    with listening_on_a_port(server.app) as url, client_of(url, "ada") as ada, client_of(url, "bob") as bob:
        video, other = (client.post("/v1/videos", json=SMALL).json()["id"] for client in (ada, bob))
        # httpx closes a stream whose iterator is garbage.
        iterators = []
        with ExitStack() as stack:
            for _ in range(STREAMS):
                stream = stack.enter_context(ada.stream("GET", f"/v1/videos/{video}/events"))
                assert stream.status_code == 200
                # The first event has been sent.
                iterators.append(stream.iter_lines())
                assert next(iterators[-1]).startswith("id: ")
            refused = ada.get(f"/v1/videos/{video}/events")
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_streams")
            assert refused.json()["error"]["message"].startswith(f"At most {STREAMS} event streams may be open at once")
            assert "Retry-After" in refused.headers
            jobs = len(server.store.list("ada").jobs)
            image = ada.post("/v1/images/generations", json={"prompt": "a", "size": "64x64", "stream": True})
            assert image.status_code == 429
            # The refused request has stored no job.
            assert len(server.store.list("ada").jobs) == jobs
            # Other keys and other requests are not affected.
            with bob.stream("GET", f"/v1/videos/{other}/events") as stream:
                assert stream.status_code == 200
            assert ada.get(f"/v1/videos/{video}").status_code == 200
        assert _opens_again(ada, video)


def _opens_again(client, video):
    """Return whether a stream opens once the server has noticed that the others are closed."""
    for _ in range(600):
        with client.stream("GET", f"/v1/videos/{video}/events") as stream:
            if stream.status_code == 200:
                return True
        threading.Event().wait(0.05)
    return False


def test_requests_that_wait_for_one_job_are_capped_per_key():
    streams, limits = EventStreams(), Limits(streams=1, open_jobs=2)
    ada, bob = (Tenant(name=name, key_id=name, limits=limits) for name in ("ada", "bob"))
    with streams.waiting(ada), streams.waiting(ada):
        with pytest.raises(ApiError) as refused, streams.waiting(ada):
            pass
        assert (refused.value.status, refused.value.code) == (429, "too_many_waiting")
        with streams.waiting(bob):
            pass
    with streams.waiting(ada), streams.waiting(ada):
        pass


def test_cancelled_receive_of_ray_serve_is_a_disconnect():
    messages = []

    async def app(scope, receive, send):
        messages.append(await receive())

    async def receive():
        raise TaskCancelledError

    asyncio.run(DisconnectedClients(app)({"type": "http"}, receive, None))
    assert messages == [{"type": "http.disconnect"}]
