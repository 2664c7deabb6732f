"""Responses of server-sent events, limited per API key and per process.

An open stream occupies a request of the replica for as long as its jobs run, so unlimited streams would leave none for others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from vidgen_ray.online.api_error import too_many_requests
from vidgen_ray.online.auth import Tenant

MAX_STREAMS = 4_000
"""Open streams of a process. Its replica accepts as many requests in addition to all others."""
PING_S = 15
"""Seconds between pings, which keep proxies from closing an idle stream."""
RETRY_S = 5


class EventStreams:
    """Open event streams of this process. Use it inside an event loop."""

    def __init__(self, max_streams: int = MAX_STREAMS) -> None:
        self._max_streams = max_streams
        self._open: Counter[str] = Counter()

    def respond(
        self, tenant: Tenant, events: AsyncIterator[ServerSentEvent], headers: Mapping[str, str] | None = None
    ) -> EventSourceResponse:
        """Return a response that streams the events. Raises ApiError 429; see `check_room`."""
        self.check_room(tenant)
        return _CountedStream(self._open, tenant.key_id, events, headers)

    def check_room(self, tenant: Tenant) -> None:
        """Raise ApiError 429 if the key or the process has too many open streams."""
        allowed = tenant.limits.streams
        if self._open[tenant.key_id] >= allowed:
            message = f"At most {allowed} event streams may be open at once with this key. Close one, or poll instead"
            raise too_many_requests(message, "too_many_streams", RETRY_S)
        if self._open.total() >= self._max_streams:
            raise too_many_requests("The server has too many open event streams. Poll instead", "too_many_streams", RETRY_S)


class _CountedStream(EventSourceResponse):
    """Event stream that is counted from its creation to its end."""

    def __init__(
        self, open_streams: Counter[str], key_id: str, events: AsyncIterator[ServerSentEvent], headers: Mapping[str, str] | None
    ) -> None:
        super().__init__(events, headers=headers, ping=PING_S)
        self._open, self._key_id = open_streams, key_id
        self._open[key_id] += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._open[self._key_id] -= 1
            if not self._open[self._key_id]:
                del self._open[self._key_id]
