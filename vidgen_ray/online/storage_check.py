"""Check that a server can write its files and its database, and erase what is stored of a character."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy.exc import SQLAlchemyError

from vidgen_ray.errors import VidgenError
from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.job_service import JobService, plan_job
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.store.inputs import Character
from vidgen_ray.online.store.jobs import Job, JobState
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.storage import is_disk_full, low_space

RESULT_VALID_S = 2.0
"""Seconds for which a result is reused, because anyone may ask for it."""
TEST_FILE = "write-test"
TEST_BYTES = 4096


class StorageCheck:
    """Writes to the output folder and to the store. Thread-safe."""

    def __init__(self, store: JobStore, outputs: OutputFolder) -> None:
        self._store = store
        self._outputs = outputs
        self._lock = threading.Lock()
        self._problem: str | None = None
        self._checked_at: float | None = None

    def problem(self) -> str | None:
        """Return a sentence that tells why jobs cannot be stored or finished, without paths. `None` if they can be. Blocks."""
        with self._lock:
            if self._checked_at is None or time.monotonic() - self._checked_at > RESULT_VALID_S:
                self._problem = self._output_problem() or self._store_problem()
                self._checked_at = time.monotonic()
            return self._problem

    def _output_problem(self) -> str | None:
        storage = self._outputs.storage
        try:
            if storage.local is not None and (free := low_space(storage.local)):
                return f"The disk of the output folder is almost full: {free}. Delete files, or set retention_s."
            storage.write(TEST_FILE, bytes(TEST_BYTES))
            storage.delete(TEST_FILE)
        except OSError as error:
            return f"The output folder cannot be written: {error.strerror or type(error).__name__}."
        return None

    def _store_problem(self) -> str | None:
        try:
            folder = self._store.folder
            if folder is not None and (free := low_space(folder)):
                return f"The disk of the database is almost full: {free}."
            self._store.write_nothing()
        except (SQLAlchemyError, OSError) as error:
            return f"The database {'is full' if is_disk_full(str(error)) else 'does not respond'}."
        return None


RETRY_S = 2


class Erased(NamedTuple):
    """Erased data of a character, and the jobs that were made with it."""

    characters: list[str]
    """Ids of this character and of others that share a photo with it."""
    photos: list[str]
    """Ids of the deleted uploads."""
    videos: list[str]
    """Ids of the jobs that used one of the photos."""
    cached_steps: int
    """Deleted entries of the stage cache."""


class CharacterEraser:
    """Erases characters of a server."""

    def __init__(self, settings: OnlineSettings, store: JobStore, outputs: OutputFolder, job_service: JobService) -> None:
        self._settings = settings
        self._store = store
        self._outputs = outputs
        self._jobs = job_service

    async def erase(self, tenant: Tenant, character: Character, *, with_videos: bool) -> Erased:
        """Erase a character. Files of other tenants with the same photo are kept.

        Running jobs with its photos are cancelled first: then raises ApiError 409, and the call must be repeated.
        """
        characters = [
            each
            for each in await asyncio.to_thread(self._store.characters.list, tenant.name)
            if not set(each.photos).isdisjoint(character.photos)
        ]
        photos = sorted({photo for each in characters for photo in each.photos})
        jobs = await asyncio.to_thread(self._store.with_files, tenant.name, [photo.removeprefix("file-") for photo in photos])
        for job in jobs:
            if not job.state.is_final:
                await self._jobs.cancel(tenant, job.id)
        # A running stage would store features after they were deleted.
        if running := [job.id for job in jobs if job.state == JobState.IN_PROGRESS]:
            message = (
                f"Jobs with this face are running and were cancelled: {', '.join(running[:10])}. Repeat when they have ended."
            )
            headers = {"Retry-After": str(RETRY_S), "retry-after-ms": str(RETRY_S * 1000)}
            raise ApiError(409, message, code="jobs_running", headers=headers)
        cached_steps = await asyncio.to_thread(self._drop_cached, jobs)
        for each in characters:
            await asyncio.to_thread(self._store.characters.delete, each.id, tenant.name)
        deleted = [photo for photo in photos if await asyncio.to_thread(self._jobs.uploads.delete, tenant.name, photo)]
        if with_videos:
            for job in jobs:
                await self._jobs.delete(tenant, job.id)
        return Erased([each.id for each in characters], deleted, [job.id for job in jobs], cached_steps)

    def _drop_cached(self, jobs: Sequence[Job]) -> int:
        """Delete the cached results of these jobs, and return their number."""
        keys = {key for job in jobs for key in self._step_keys(job)}
        stored = [key for key in keys if self._outputs.stage_cache.has(key)]
        self._outputs.stage_cache.drop(stored)
        return len(stored)

    def _step_keys(self, job: Job) -> set[str]:
        keys = set[str]()
        if (finished := self._outputs.find_by_id(job.shot_id or "")) is not None:
            keys |= {step.key for step in finished.record().stages}
        try:
            plan = plan_job(job, self._jobs.serving_profile, self._settings)
        except (VidgenError, OSError):
            # The weights or a file of the job are gone, and with them the key.
            return keys
        return keys | {step.key for attempt in (plan, *plan.again) for step in attempt.steps}
