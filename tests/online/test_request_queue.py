"""Middlewares of the HTTP proxy: requests that start at a time, health checks, and request ids."""

import asyncio
from pathlib import Path

from vidgen_ray.online.request_queue import ENVIRONMENT, RequestQueue, middlewares

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 20


class App:
    """Responds to each request when `respond` is set."""

    def __init__(self):
        self.begun: list[str] = []
        self.respond = asyncio.Event()

    async def __call__(self, scope, receive, send):
        self.begun.append(scope["path"])
        if scope["path"] != "/healthz":
            await self.respond.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/events":
            await asyncio.Event().wait()


async def send(message):
    pass


def request(queue, path):
    return asyncio.create_task(queue({"type": "http", "path": path}, None, send))


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, TIMEOUT_S))


def test_few_requests_start_at_a_time_but_health_checks_do_not_wait():
    async def scenario():
        app = App()
        queue = RequestQueue(app, starting=2, max_start_s=3600)
        requests = [request(queue, f"/{number}") for number in range(5)]
        await settle()
        assert app.begun == ["/0", "/1"]
        await request(queue, "/healthz")
        requests[3].cancel()
        app.respond.set()
        await asyncio.gather(*requests[:3], requests[4])
        assert app.begun == ["/0", "/1", "/healthz", "/2", "/4"]

    run(scenario())


def test_open_stream_and_slow_request_occupy_no_slot():
    async def scenario():
        app = App()
        queue = RequestQueue(app, starting=1, max_start_s=0.01)
        slow = [request(queue, f"/{number}") for number in range(3)]
        while len(app.begun) < 3:
            await asyncio.sleep(0.01)
        app.respond.set()
        await asyncio.gather(*slow)
        queue = RequestQueue(app, starting=1, max_start_s=3600)
        streams = [request(queue, "/events") for _ in range(3)]
        await request(queue, "/last")
        for stream in streams:
            stream.cancel()

    run(scenario())


def test_response_has_one_request_id():
    from ray.serve._private.http_util import _apply_middlewares

    async def sync_video(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-request-id", b"video_1")]})

    async def scenario():
        started = []

        async def keep(message):
            started.append(message)

        app = _apply_middlewares(sync_video, middlewares())
        await app({"type": "http", "path": "/v1/videos/sync", "headers": []}, None, keep)
        assert [value for name, value in started[0]["headers"] if name.lower() == b"x-request-id"] == [b"video_1"]

    run(scenario())


def test_every_documented_start_uses_the_middleware():
    ((variable, path),) = ENVIRONMENT.items()
    for file in ("Dockerfile", "docs/online.md"):
        assert f"{variable}={path}" in (ROOT / file).read_text()


def test_ray_serve_accepts_the_middleware():
    from ray.serve._private import constants
    from ray.serve._private.http_util import _apply_middlewares, call_function_from_import_path

    ((variable, path),) = ENVIRONMENT.items()
    assert hasattr(constants, variable)
    assert isinstance(_apply_middlewares(App(), call_function_from_import_path(path)), RequestQueue)
