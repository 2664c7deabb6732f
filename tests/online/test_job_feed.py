"""Job changes for event streams: shared polling, tenants, and the page's event stream."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, aclosing
from types import SimpleNamespace

import pytest
from sqlalchemy.exc import OperationalError

from tests.online.test_store import new_job
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.event_streams import JobFeed
from vidgen_ray.online.server_settings import Limits
from vidgen_ray.online.store.jobs import Job, JobState
from vidgen_ray.online.store.store import Changes, JobStore
from vidgen_ray.online.web import pages

POLL_S = 0.01
TIMEOUT_S = 120


class CountingStore(JobStore):
    polls = 0
    """Queries for the changes of all tenants."""
    fails = False

    def changed_since(self, cursor: int, *, tenant: str | None = None, **options) -> Changes:
        if tenant is None:
            self.polls += 1
            if self.fails:
                raise OperationalError("SELECT", {}, Exception("down"))
        return super().changed_since(cursor, tenant=tenant, **options)


@pytest.fixture
def store(tmp_path) -> Iterator[CountingStore]:
    store = CountingStore(f"sqlite:///{tmp_path}/jobs.db")
    yield store
    store.close()


@pytest.fixture
def feed(store) -> JobFeed:
    return JobFeed(store)


def stored_job(store, tenant="ada") -> Job:
    return store.create(new_job(tenant))[0]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


def test_follow_yields_each_state_until_the_end(store, feed):
    async def states() -> list[str]:
        seen = []
        async for job in feed.follow(stored_job(store)):
            seen.append(job.state.value)
            if job.state == "queued":
                store.queue.claim("d", 30, 1)
            elif job.state == "in_progress":
                store.queue.end(job.id, "d", JobState.COMPLETED, shot_id="s", stage_seconds={})
        return seen

    assert run(states()) == ["queued", "in_progress", "completed"]


def test_follow_ends_with_none_when_the_job_is_deleted(store, feed):
    async def last() -> Job | None:
        job = stored_job(store)
        ended = asyncio.create_task(feed.ended(job))
        await asyncio.sleep(5 * POLL_S)
        store.delete(job.id, "ada")
        return await ended

    assert run(last()) is None


def test_streams_share_one_poll(store, feed):
    async def polls() -> tuple[int, int]:
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(aclosing(feed.follow_tenant("ada", 0, 60))) for _ in range(20)]
            job = stored_job(store)
            for stream in streams:
                assert [changed.id for changed in (await anext(stream)).jobs] == [job.id]
            before, began = store.polls, time.monotonic()
            await asyncio.sleep(20 * POLL_S)
            return store.polls - before, int((time.monotonic() - began) / POLL_S)

    polls_made, intervals = run(polls())
    assert 1 <= polls_made <= intervals + 1


def test_tenant_stream_starts_at_its_cursor_and_sees_no_other_tenant(store, feed):
    stored_job(store)
    cursor = store.latest_version()
    missed, other = stored_job(store), stored_job(store, "bob")

    async def seen() -> tuple[list[str], list[str]]:
        jobs, deleted = [], []
        async with aclosing(feed.follow_tenant("ada", cursor, 60)) as stream:
            jobs += [job.id for job in (await anext(stream)).jobs]
            store.delete(other.id, "bob")
            store.delete(missed.id, "ada")
            while not deleted:
                changes = await anext(stream)
                jobs += [job.id for job in changes.jobs]
                deleted += [job.id for job in changes.deleted]
        return jobs, deleted

    assert run(seen()) == ([missed.id], [missed.id])


def test_polling_continues_after_a_database_error(store, feed):
    async def changed() -> list[str]:
        async with aclosing(feed.follow_tenant("ada", 0, 60)) as stream:
            job = stored_job(store)
            await anext(stream)
            store.fails = True
            polls = store.polls
            while store.polls < polls + 2:
                await asyncio.sleep(POLL_S)
            store.fails = False
            store.request_cancel(job.id, "ada")
            return [job.state.value for job in (await anext(stream)).jobs]

    assert run(changed()) == ["cancelled"]


def test_page_stream_ends_when_the_session_ends(store, feed, monkeypatch):
    monkeypatch.setattr(pages, "SESSION_CHECK_S", 2 * POLL_S)
    tenant = Tenant(name="ada", key_id="k", limits=Limits())
    sessions = [tenant, None]
    auth = SimpleNamespace(session_tenant=lambda request: sessions.pop(0))
    site = SimpleNamespace(
        server=SimpleNamespace(job_feed=feed, auth=auth), job_update=lambda job, base, with_card: [job.id, with_card]
    )
    request = SimpleNamespace(scope={})

    async def events() -> list:
        job = stored_job(store)
        first = store.latest_version()
        seen = []
        async for event in pages._events(site, request, tenant, 0):
            seen.append((event.event, event.id, event.data and json.loads(event.data)))
            if len(seen) == 2:
                store.queue.claim("d", 30, 1)
        assert seen[1] == ("changes", str(first), {"jobs": [[job.id, True]], "deleted": []})
        return [name for name, _, _ in seen]

    assert run(events()) in ([None, "changes", "signed-out"], [None, "changes", "changes", "signed-out"])
