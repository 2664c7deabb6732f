"""What a server does beside its jobs: messages go out, and what was deleted or has expired goes from the disk."""

from __future__ import annotations

import asyncio
import logging
import time

from sqlalchemy.exc import SQLAlchemyError

from vidgen_ray.online.intake import ID_PREFIX
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.store import JobStore
from vidgen_ray.online.webhooks import Courier
from vidgen_ray.outputs.folder import OutputFolder

EVERY_S = 1.0
PURGE_EVERY_S = 60.0

log = logging.getLogger(__name__)


async def housekeeping(store: JobStore, settings: OnlineSettings, outputs: OutputFolder) -> None:
    """Runs for ever, in one process of a server; a storage or database that fails is asked again."""
    courier = Courier(settings.webhooks, store.outbox)
    purged_at = 0.0
    while True:
        try:
            await asyncio.to_thread(courier.deliver)
            if time.monotonic() - purged_at > PURGE_EVERY_S:
                await asyncio.to_thread(forget_old, store, outputs)
                purged_at = time.monotonic()
        except (OSError, SQLAlchemyError):
            log.exception("housekeeping is tried again")
        await asyncio.sleep(EVERY_S)


def forget_old(store: JobStore, outputs: OutputFolder) -> int:
    """Delete the files of jobs that are gone, unless a batch run made them. Gives of how many shots."""
    folders = [folder for folder in store.purge() if folder.startswith(ID_PREFIX)]
    for folder in folders:
        outputs.storage.delete_folder(f"shots/{folder}")
    return len(folders)
