"""Event streams: shared polling of job changes, tenants, the page's stream, and limits over HTTP."""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing
from functools import partial
from types import SimpleNamespace

import httpx
import pytest
from sqlalchemy import Row
from sqlalchemy.exc import OperationalError

from tests.online.directors import SMALL, listening_on_a_port, local_server, settings_with_keys
from tests.online.test_store import new_job
from vidgen_ray.online import event_streams
from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.api_process import DirectorClient
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.event_streams import EventStreams, JobFeed
from vidgen_ray.online.server_settings import Limits
from vidgen_ray.online.store.jobs import Job, JobState
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.online.web import pages

POLL_S = 0.01
STREAMS = 3
TIMEOUT_S = 120


class CountingStore(JobStore):
    polls = 0
    """Queries for the changes of all tenants."""
    fails = False

    def changed_rows(self, cursor: int, *, tenant: str | None = None, **options) -> Sequence[Row]:
        if tenant is None:
            self.polls += 1
            if self.fails:
                raise OperationalError("SELECT", {}, Exception("down"))
        return super().changed_rows(cursor, tenant=tenant, **options)


@pytest.fixture
def store(tmp_path) -> Iterator[CountingStore]:
    store = CountingStore(f"sqlite:///{tmp_path}/jobs.db")
    yield store
    store.close()


@pytest.fixture
def feed(store) -> JobFeed:
    return JobFeed(store, lambda: asyncio.sleep(0.01))


def stored_job(store, tenant="ada") -> Job:
    return store.create(new_job(tenant))[0]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


def test_follow_yields_each_state_until_the_job_has_ended_or_is_deleted(store, feed):
    async def states() -> list[str | None]:
        seen = []
        for is_deleted in (False, True):
            async for job in feed.follow(stored_job(store)):
                seen.append(job and job.state.value)
                if job is not None and job.state == "queued":
                    store.queue.claim("d", 30, 1)
                elif job is not None and is_deleted:
                    store.delete(job.id, "ada")
                elif job is not None and job.state == "in_progress":
                    store.queue.end(job.id, "d", JobState.COMPLETED, shot_id="s", stage_seconds={})
        return seen

    assert run(states()) == ["queued", "in_progress", "completed", "queued", "in_progress", None]


def test_ended_returns_the_last_state(store, feed):
    async def ends() -> list[Job | None]:
        jobs = [stored_job(store) for _ in range(3)]
        waiting = [asyncio.ensure_future(feed.ended(job)) for job in jobs]
        async for job in feed.follow(jobs[0]):
            if job.state == "queued":
                store.queue.claim("d", 30, 1)
            elif job.state == "in_progress":
                store.queue.end(job.id, "d", JobState.COMPLETED, shot_id="s", stage_seconds={})
        assert not any(each.done() for each in waiting[1:])
        store.request_cancel(jobs[1].id, "ada")
        store.delete(jobs[2].id, "ada")
        return await asyncio.gather(*waiting)

    assert [job and job.state for job in run(ends())] == ["completed", "cancelled", None]


def test_streams_share_one_poll_which_continues_after_a_database_error(store, feed):
    async def follow() -> None:
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(aclosing(feed.follow_tenant("ada", 0, 60))) for _ in range(20)]
            job = stored_job(store)
            for stream in streams:
                assert [changed.id for changed in (await anext(stream)).jobs] == [job.id]
            store.fails = True
            polls, began = store.polls, time.monotonic()
            while store.polls < polls + 2:
                await asyncio.sleep(POLL_S)
            store.fails = False
            store.request_cancel(job.id, "ada")
            for stream in streams:
                assert [changed.state for changed in (await anext(stream)).jobs] == ["cancelled"]
            # One more may have begun before the first of these.
            assert store.polls - polls <= (time.monotonic() - began) / POLL_S + 2

    run(follow())


def test_only_streams_that_clients_open_again_are_closed(store, feed):
    async def follow() -> None:
        job = stored_job(store)
        waiting, kept = asyncio.ensure_future(feed.ended(job)), feed.follow(job)
        async with aclosing(feed.follow_tenant("ada", 0)) as of_page, aclosing(feed.follow(job, may_close=True)) as of_job:
            await anext(kept)
            assert (len((await anext(of_page)).jobs), (await anext(of_job)).id) == (1, job.id)
            feed.close_streams()
            assert [state async for state in of_job] == [changes async for changes in of_page] == []
        store.request_cancel(job.id, "ada")
        assert ((await anext(kept)).state, (await waiting).state) == ("cancelled", "cancelled")

    run(follow())


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
        assert seen[1] == ("changes", str(first), {"jobs": [[job.id, True]], "deleted": [], "has_lines": False})
        return [name for name, _, _ in seen]

    assert run(events()) in ([None, "changes", "signed-out"], [None, "changes", "changes", "signed-out"])


def test_streams_are_capped_per_key_and_process(tiny, tmp_path, monkeypatch):
    settings = settings_with_keys(tmp_path, {"ada": {}, "bob": {}}, limits={"streams": STREAMS})
    with local_server(tiny, settings) as server, listening_on_a_port(server.app) as url, ExitStack() as stack:
        server.director.held.set()
        ada, bob = (
            stack.enter_context(httpx.Client(base_url=url, headers={"Authorization": f"Bearer vg-{name}"}, timeout=60))
            for name in ("ada", "bob")
        )
        video, other = (client.post("/v1/videos", json=SMALL).json()["id"] for client in (ada, bob))
        # httpx closes a stream whose iterator is garbage.
        iterators = []
        with ExitStack() as streams:
            for _ in range(STREAMS):
                stream = streams.enter_context(ada.stream("GET", f"/v1/videos/{video}/events"))
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
            with monkeypatch.context() as limit:
                limit.setattr(event_streams, "MAX_STREAMS", STREAMS)
                refused = bob.get(f"/v1/videos/{other}/events")
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_streams")
                assert refused.json()["error"]["message"].startswith("The server has too many open event streams")
            # Other keys and other requests are not affected.
            with bob.stream("GET", f"/v1/videos/{other}/events") as stream:
                assert stream.status_code == 200
            assert ada.get(f"/v1/videos/{video}").status_code == 200
        # The server notices soon that these are closed.
        for _ in range(600):
            with ada.stream("GET", f"/v1/videos/{video}/events") as stream:
                if stream.status_code == 200:
                    break
            time.sleep(0.05)
        else:
            pytest.fail("no stream opens again")


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


class RecordingDirector:
    """Records the calls of its handle. Calls that wait return at the next `change`."""

    def __init__(self):
        self.calls, self.changes, self._change = [], 0, asyncio.Event()

    def __getattr__(self, method):
        return SimpleNamespace(remote=partial(self._call, method))

    def change(self):
        self.changes += 1
        self._change.set()
        self._change = asyncio.Event()

    async def _call(self, method, *arguments):
        self.calls.append((method, *arguments))
        if method != "wake" and arguments[-1] == self.changes:
            await self._change.wait()
        return self.changes


def test_one_call_wakes_the_director_and_waits_for_changes():
    async def calls():
        director = RecordingDirector()
        client = DirectorClient(director)
        client.wake()
        changed = asyncio.ensure_future(client.changed())
        await asyncio.sleep(0)
        client.wake()
        client.wake(has_cancels=True)
        await asyncio.sleep(0)
        director.change()
        await changed
        # Without a call that waits for it.
        director.change()
        client.wake()
        await client.changed()
        changed = asyncio.ensure_future(client.changed())
        while len(director.calls) < 4:
            await asyncio.sleep(0)
        director.change()
        await changed
        return director.calls

    together = "wake_until_changed"
    assert run(calls()) == [(together, False, 0), ("wake", True), (together, False, 1), ("changed", 2)]
