"""Background maintenance of a server: deliver webhooks, delete old jobs and unused uploads."""

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

LOOP_INTERVAL_S = 1.0
PURGE_INTERVAL_S = 60.0
UPLOAD_CLEANUP_INTERVAL_S = 3600.0
PURGE_BATCH = 8
"""Jobs purged in one transaction. It blocks all other writes while files are deleted, about a second on an object store."""

log = logging.getLogger(__name__)


async def run_maintenance(store: JobStore, settings: OnlineSettings, outputs: OutputFolder) -> None:
    """Run maintenance until cancelled, in one process of a server. Errors of the storage or database are logged and retried."""
    webhook_sender = WebhookSender(settings.webhooks, store.outbox)
    uploads = upload_folder(outputs, store.uploads, settings.uploads)
    purged_at = uploads_cleaned_at = 0.0
    while True:
        try:
            await asyncio.to_thread(webhook_sender.deliver_due)
            if time.monotonic() - purged_at > PURGE_INTERVAL_S:
                await asyncio.to_thread(purge_jobs, store, outputs)
                purged_at = time.monotonic()
            if time.monotonic() - uploads_cleaned_at > UPLOAD_CLEANUP_INTERVAL_S:
                await asyncio.to_thread(uploads.expire, settings.retention_s)
                await asyncio.to_thread(uploads.remove_unreferenced, UPLOAD_CLEANUP_INTERVAL_S)
                uploads_cleaned_at = time.monotonic()
        except (OSError, SQLAlchemyError):
            log.exception("Maintenance failed. Retrying in %g s.", LOOP_INTERVAL_S)
        await asyncio.sleep(LOOP_INTERVAL_S)


def purge_jobs(store: JobStore, outputs: OutputFolder) -> None:
    """Delete old jobs with their files. Files made by a batch run are kept."""
    while store.purge(lambda key: outputs.delete_shot(shot_id_of(key)), PURGE_BATCH) == PURGE_BATCH:
        pass
