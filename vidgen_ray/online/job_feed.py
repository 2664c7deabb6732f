"""Jobs as they change, for everybody who follows one in this process: the store is asked once for all of them."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator

from sqlalchemy.exc import SQLAlchemyError

from vidgen_ray.online.store.jobs import Job
from vidgen_ray.online.store.store import JobStore

log = logging.getLogger(__name__)

News = asyncio.Queue[Job | None]


class JobFeed:
    """Asks for changes every `poll_s` seconds while anybody follows a job."""

    def __init__(self, store: JobStore, poll_s: float) -> None:
        self._store = store
        self._poll_s = poll_s
        self._waiting: defaultdict[str, set[News]] = defaultdict(set)
        self._looking: asyncio.Task[None] | None = None

    async def follow(self, job: Job) -> AsyncIterator[Job | None]:
        """The job as it is now, then whenever it has changed, up to its end; None where it was deleted, which is the end, too.

        Of changes that come faster than they are taken only the last is given.
        """
        news: News = asyncio.Queue()
        self._waiting[job.id].add(news)
        try:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look(await asyncio.to_thread(self._store.latest)))
            # Read after it is waited for: what changed before is in here, what changes later will be told.
            now = await asyncio.to_thread(self._store.get, job.id, job.tenant)
            yield now
            seen = now.version if now else 0
            while now is not None and not now.state.is_final:
                now = await news.get()
                while not news.empty():
                    now = news.get_nowait()
                if now is None or now.version > seen:
                    yield now
                    seen = now.version if now else 0
        finally:
            self._waiting[job.id].discard(news)
            if not self._waiting[job.id]:
                del self._waiting[job.id]

    async def ended(self, job: Job) -> Job | None:
        """The job when it has ended; none where it was deleted."""
        last: Job | None = job
        async for now in self.follow(job):
            last = now
        return last

    async def _look(self, cursor: int) -> None:
        while self._waiting:
            await asyncio.sleep(self._poll_s)
            try:
                changes = await asyncio.to_thread(self._store.changed_since, cursor)
            except SQLAlchemyError as error:
                log.error("the database does not answer: %s", type(error).__name__)
                continue
            cursor = changes.cursor
            for job in changes.jobs:
                self._tell(job.id, job)
            for job_id in changes.deleted:
                self._tell(job_id, None)

    def _tell(self, job_id: str, job: Job | None) -> None:
        for news in self._waiting.get(job_id, ()):
            news.put_nowait(job)
