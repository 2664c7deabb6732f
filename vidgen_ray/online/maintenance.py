"""What a server does beside its jobs: messages go out, and what was deleted or has expired goes from the disk."""

from __future__ import annotations

import asyncio
import logging
import time

from sqlalchemy.exc import SQLAlchemyError

from vidgen_ray.online.inputs.uploads import upload_folder
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.store.jobs import shot_id_of
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.online.webhooks import WebhookSender
from vidgen_ray.outputs.folder import OutputFolder

EVERY_S = 1.0
PURGE_EVERY_S = 60.0
SWEEP_EVERY_S = 3600.0
PURGED_AT_ONCE = 8
"""Nobody else changes the store while their files are removed, which takes an object store a second."""

log = logging.getLogger(__name__)


async def run_maintenance(store: JobStore, settings: OnlineSettings, outputs: OutputFolder) -> None:
    """Runs for ever, in one process of a server; a storage or database that fails is asked again."""
    courier = WebhookSender(settings.webhooks, store.outbox)
    uploads = upload_folder(outputs, store.uploads, settings.uploads)
    purged_at = swept_at = 0.0
    while True:
        try:
            await asyncio.to_thread(courier.deliver_due)
            if time.monotonic() - purged_at > PURGE_EVERY_S:
                await asyncio.to_thread(purge_jobs, store, outputs)
                purged_at = time.monotonic()
            if time.monotonic() - swept_at > SWEEP_EVERY_S:
                await asyncio.to_thread(uploads.remove_unreferenced, SWEEP_EVERY_S)
                swept_at = time.monotonic()
        except (OSError, SQLAlchemyError):
            log.exception("housekeeping is tried again")
        await asyncio.sleep(EVERY_S)


def purge_jobs(store: JobStore, outputs: OutputFolder) -> None:
    """Forget jobs that are gone, with their files, unless a batch run made them."""
    while store.purge(lambda key: outputs.delete_shot(shot_id_of(key)), PURGED_AT_ONCE) == PURGED_AT_ONCE:
        pass
