"""Changes of jobs as server-sent events, and requests that wait for the end of a job.

All of a process share one query of the store; each key may open a limited number.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

from sqlalchemy import Row
from sqlalchemy.exc import SQLAlchemyError
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from vidgen_ray.online.api_error import too_many_requests
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.store.jobs import Job, job_of
from vidgen_ray.online.store.store import Changes, DeletedJob, JobStore

log = logging.getLogger("ray.serve")


class Mailbox:
    """Changes that a stream has not taken yet. A slow stream gets only the latest state of each job."""

    def __init__(self, *, only_end: bool = False, may_close: bool = False) -> None:
        """`only_end`: take no changes but the end or the deletion of a job. `may_close`: see `JobFeed.close_streams`."""
        self.only_end = only_end
        self.may_close = may_close
        self._is_closed = False
        self._pending: dict[str, Job | DeletedJob] = {}
        self._cursor = 0
        self._filled = asyncio.Event()

    def put(self, job: Job | DeletedJob, cursor: int) -> None:
        # Removed first: the dict keeps the order of the last changes.
        self._pending.pop(job.id, None)
        self._pending[job.id] = job
        self._cursor = cursor
        self._filled.set()

    def close(self) -> None:
        self._is_closed = True
        self._filled.set()

    async def take(self) -> Changes | None:
        """Wait for changes and return them. `None` if the stream is closed."""
        await self._filled.wait()
        if self._is_closed:
            return None
        self._filled.clear()
        pending, self._pending = self._pending.values(), {}
        jobs = [job for job in pending if isinstance(job, Job)]
        return Changes(jobs, [job for job in pending if isinstance(job, DeletedJob)], self._cursor)


class JobFeed:
    """Reads the changes of jobs from the store while at least one stream is open, or one request waits."""

    def __init__(self, store: JobStore, changed: Callable[[], Awaitable[None]]) -> None:
        """`changed` waits until there may be changes."""
        self._store = store
        self._wait_for_change = changed
        self._mailboxes: dict[str, set[Mailbox]] = {}
        """Tenant, or id of a job -> mailboxes for its changes."""
        self._cursor = 0
        """Version of the last change that was read."""
        self._polling: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    async def follow(self, job: Job, *, only_end: bool = False, may_close: bool = False) -> AsyncGenerator[Job | None, None]:
        """Yield the job now and after each change, until it has ended. `None` if it was deleted, which also ends the stream.

        `only_end`: yield it now and when it has ended. `may_close`: `close_streams` ends the stream, too.
        """
        with self._subscribed(job.id, Mailbox(only_end=only_end, may_close=may_close)) as mailbox:
            await self._start_polling()
            # The mailbox gets all later changes.
            current = job if job.version >= self._cursor else await asyncio.to_thread(self._store.get, job.id, job.tenant)
            yield current
            while current is not None and not current.state.is_final:
                changes = await mailbox.take()
                if changes is None:
                    return
                changed = None if changes.deleted else changes.jobs[0]
                if changed is None or changed.version > current.version:
                    current = changed
                    yield current

    async def ended(self, job: Job) -> Job | None:
        """Wait for the end of the job and return it, or `None` if it was deleted."""
        last: Job | None = job
        async with aclosing(self.follow(job, only_end=True)) as states:
            async for current in states:
                last = current
        return last

    async def _start_polling(self) -> None:
        async with self._starting:
            if self._polling is None or self._polling.done():
                self._cursor = await asyncio.to_thread(self._store.latest_version)
                self._polling = asyncio.create_task(self._poll())

    async def follow_tenant(self, tenant: str, cursor: int, idle_s: float | None = None) -> AsyncGenerator[Changes, None]:
        """Yield the changes of a tenant's jobs after `cursor`, until `close_streams`.

        Yields empty changes after `idle_s` seconds without any, so that the caller can check if it should stop.
        """
        with self._subscribed(tenant, Mailbox(may_close=True)) as mailbox:
            await self._start_polling()
            # Read after the subscription: later changes arrive in the mailbox.
            while (missed := await asyncio.to_thread(self._store.changed_since, cursor, tenant=tenant)).cursor > cursor:
                cursor = missed.cursor
                if missed.jobs or missed.deleted:
                    yield missed
            while True:
                try:
                    async with asyncio.timeout(idle_s):
                        changes = await mailbox.take()
                except TimeoutError:
                    changes = Changes([], [], cursor)
                if changes is None:
                    return
                # The mailbox may also hold changes that were just read from the store.
                new = [job for job in changes.jobs if job.version > cursor]
                cursor = max(cursor, changes.cursor)
                yield Changes(new, changes.deleted, cursor)

    def close_streams(self) -> None:
        """End the open streams of clients that open others without losing anything."""
        for mailboxes in self._mailboxes.values():
            for mailbox in mailboxes:
                if mailbox.may_close:
                    mailbox.close()

    @contextmanager
    def _subscribed(self, to: str, mailbox: Mailbox) -> Iterator[Mailbox]:
        """Use a mailbox for the changes of a tenant's jobs, or of one job."""
        self._mailboxes.setdefault(to, set()).add(mailbox)
        try:
            yield mailbox
        finally:
            self._mailboxes[to].remove(mailbox)
            if not self._mailboxes[to]:
                del self._mailboxes[to]

    async def _poll(self) -> None:
        while self._mailboxes:
            await self._wait_for_change()
            try:
                rows = await asyncio.to_thread(self._store.changed_rows, self._cursor)
                for row in rows:
                    self._deliver(row)
                self._cursor = rows[-1].version if rows else self._cursor
            except SQLAlchemyError as error:
                log.error("the database does not respond: %s", type(error).__name__)
            # All streams depend on this task, so it must survive any error, such as a row of another version.
            except Exception:
                log.exception("the changes of jobs cannot be read")

    def _deliver(self, row: Row[Any]) -> None:
        has_ended = row.completed_at is not None or row.deleted_at is not None
        subscribed = (*self._mailboxes.get(row.tenant, ()), *self._mailboxes.get(row.id, ()))
        if mailboxes := [mailbox for mailbox in subscribed if has_ended or not mailbox.only_end]:
            job = job_of(row) if row.deleted_at is None else DeletedJob(row.id, row.tenant)
            for mailbox in mailboxes:
                mailbox.put(job, row.version)


MAX_STREAMS = 2_000
"""Open streams of a process, with which it still responds at once. Its replica accepts as many requests besides others."""
_PING_S = 15
"""Seconds between pings, which keep proxies from closing an idle stream."""
_RETRY_S = 5


class EventStreams:
    """Open event streams of this process. Use it inside an event loop."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        """Requests that wait for their results."""

    @contextmanager
    def waiting(self, tenant: Tenant) -> Iterator[None]:
        """Count a request that waits for its results during the block. Raises ApiError 429 if the key has too many."""
        allowed = max(tenant.limits.streams, tenant.limits.open_jobs)
        if self._waiting[tenant.key_id] >= allowed:
            message = f"At most {allowed} requests may wait at once with this key. Create videos and poll instead"
            raise too_many_requests(message, "too_many_waiting", _RETRY_S)
        self._waiting[tenant.key_id] += 1
        try:
            yield
        finally:
            _decrement(self._waiting, tenant.key_id)

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
            raise too_many_requests(message, "too_many_streams", _RETRY_S)
        if self._open.total() >= MAX_STREAMS:
            raise too_many_requests("The server has too many open event streams. Poll instead", "too_many_streams", _RETRY_S)


class _CountedStream(EventSourceResponse):
    """Event stream that is counted from its creation to its end."""

    def __init__(
        self, open_streams: Counter[str], key_id: str, events: AsyncIterator[ServerSentEvent], headers: Mapping[str, str] | None
    ) -> None:
        super().__init__(events, headers=headers, ping=_PING_S)
        self._open, self._key_id = open_streams, key_id
        self._open[key_id] += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _decrement(self._open, self._key_id)


def _decrement(counts: Counter[str], key_id: str) -> None:
    """Count one less. Keys without any are dropped."""
    counts[key_id] -= 1
    if not counts[key_id]:
        del counts[key_id]
