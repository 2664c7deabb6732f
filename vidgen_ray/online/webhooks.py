"""Background maintenance of a server: deliver webhooks in the Standard Webhooks format, delete old jobs and unused uploads."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import threading
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr
from sqlalchemy.exc import SQLAlchemyError
from standardwebhooks import Webhook as Signer

from vidgen_ray.online.http_fetch import BlockedUrl, PublicHttpClient, UnreachableUrl, check_host, parse_url
from vidgen_ray.online.server_settings import OnlineSettings, Webhook, Webhooks
from vidgen_ray.online.store.database import read_secret, webhook_secret
from vidgen_ray.online.store.jobs import Message, shot_id_of
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.online.uploads import upload_folder
from vidgen_ray.outputs.folder import OutputFolder

DELIVERY_TIMEOUT_S = 10.0
"""Seconds for one delivery."""
MAX_TRIES = 8
"""Attempts to deliver a message before it is dropped."""
_GONE = 410
"""Status with which a receiver rejects a message for good."""
MAX_RESPONSE_BYTES = 65_536
FIRST_BACKOFF_S = 5.0
"""Seconds before the second attempt, plus jitter."""
MAX_BACKOFF_S = 3600.0
BACKOFF_JITTER_S = 5.0
"""Largest number of random seconds added to a backoff, so that retries to a receiver that was down do not coincide."""


class WebhookSender:
    """Delivers the messages in the outbox. Calls block until the receivers have answered."""

    def __init__(self, webhooks: Webhooks, store: JobStore) -> None:
        self._webhooks = webhooks
        self._outbox = store.outbox
        self._engine = store.engine
        self._client = PublicHttpClient(DELIVERY_TIMEOUT_S)
        self._private_client = PublicHttpClient(DELIVERY_TIMEOUT_S, allow_private=webhooks.allow_private)
        """For the receivers that the settings name."""
        self._lock = threading.Lock()
        self._busy: set[str] = set()
        """Tenants of the messages that are being sent to receivers of requests."""

    def deliver_due(self, only: str | None = None, exclude: Collection[str] = ()) -> int:
        """Attempt each due message once, only those to the target `only`, if given, and none to targets in `exclude`.

        Return how many were delivered. May be called in several threads: one at a time sends to receivers that requests of a
        tenant name. A message whose sender crashes is sent again later, so a receiver may get it twice, with the same id.
        """
        if not self._webhooks.targets and not self._webhooks.allow_hosts:
            return 0
        delivered, failed = 0, set(exclude)
        while (message := self._claim(only, failed)) is not None:
            try:
                if self._deliver(message):
                    delivered += 1
                else:
                    # Leave the other messages of this target for the next call, so that its timeout delays others only once.
                    failed.add(message.target)
            finally:
                if message.is_of_request:
                    self._busy.discard(message.tenant)
        return delivered

    def _claim(self, only: str | None, exclude: Collection[str]) -> Message | None:
        with self._lock:
            message = self._outbox.claim_due(2 * DELIVERY_TIMEOUT_S, only, exclude, self._busy)
            if message is not None and message.is_of_request:
                self._busy.add(message.tenant)
            return message

    def _deliver(self, message: Message) -> bool:
        target = self._target(message)
        status = _GONE if target is None else self._post(target, message)
        if 200 <= status < 300 or status == _GONE or message.tries + 1 >= MAX_TRIES:
            self._outbox.delete(message.id)
        else:
            self._outbox.postpone(message.id, backoff_s(message.tries + 1))
        return 200 <= status < 300

    def _target(self, message: Message) -> Webhook | None:
        """Return the receiver of a message, or `None` if the settings do not name it any more."""
        if not message.is_of_request:
            return self._webhooks.target(message.target)
        try:
            check_webhook(message.target, self._webhooks)
        except BlockedUrl:
            return None
        secret = webhook_secret(read_secret(self._engine), message.tenant)
        return Webhook(name="request", url=message.target, secret=SecretStr(secret))

    def _post(self, target: Webhook, message: Message) -> int:
        """Return the status of the response; 0 if there was none or the URL is blocked."""
        body, now = event_json(message), datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "vidgen-ray",
            "webhook-id": message.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Signer(target.secret.get_secret_value()).sign(message.id, now, body),
        }
        # A wildcard in `allow_hosts` must not lead to private addresses.
        is_named = not message.is_of_request or urlsplit(target.url).hostname in self._webhooks.allow_hosts
        client = self._private_client if is_named else self._client
        try:
            response = client.request("POST", target.url, headers=headers, body=body.encode(), max_bytes=MAX_RESPONSE_BYTES)
        except (BlockedUrl, UnreachableUrl):
            return 0
        return response.status


def check_webhook(url: str, webhooks: Webhooks) -> None:
    """Raise BlockedUrl for a receiver that requests may not name."""
    check_host(parse_url(url), webhooks.allow_hosts, "webhooks")


def event_json(message: Message) -> str:
    """Return the event as JSON, in the shape that OpenAI's clients parse."""
    event = {
        "id": message.id,
        "object": "event",
        "type": message.event,
        "created_at": int(message.created_at),
        "data": {"id": message.job, **({"usage": message.usage} if message.usage else {})},
    }
    return json.dumps(event, separators=(",", ":"))


def backoff_s(attempts: int) -> float:
    """Return the seconds to wait after this many failed attempts: 5 s doubled for each further one, plus up to 5 s of
    jitter, at most one hour."""
    # The exponent is capped because the power of a large one does not fit into a float.
    backoff = FIRST_BACKOFF_S * 2.0 ** min(attempts - 1, 30)
    return min(MAX_BACKOFF_S, backoff + random.uniform(0, BACKOFF_JITTER_S))


LOOP_INTERVAL_S = 1.0
REQUEST_SENDERS = 4
"""Threads that send to the receivers that requests name."""
PURGE_INTERVAL_S = 60.0
UPLOAD_CLEANUP_INTERVAL_S = 3600.0
PURGE_BATCH = 8
"""Jobs purged in one transaction. It blocks all other writes while files are deleted, about a second on an object store."""

log = logging.getLogger("ray.serve")


async def run_maintenance(store: JobStore, settings: OnlineSettings, outputs: OutputFolder) -> None:
    """Deliver webhooks, purge jobs and delete uploads until cancelled, in one process of a server."""
    sender = WebhookSender(settings.webhooks, store)
    uploads = upload_folder(outputs, store.uploads, settings.uploads)
    targets = [target.name for target in settings.webhooks.targets]
    await asyncio.gather(
        # A slow target delays no other one, and slow receivers of a tenant no other tenant.
        *(_repeat(LOOP_INTERVAL_S, sender.deliver_due, target) for target in targets),
        *(_repeat(LOOP_INTERVAL_S, sender.deliver_due, None, targets) for _ in range(REQUEST_SENDERS)),
        _repeat(PURGE_INTERVAL_S, purge_jobs, store, outputs),
        _repeat(UPLOAD_CLEANUP_INTERVAL_S, uploads.expire, settings.retention_s),
        _repeat(UPLOAD_CLEANUP_INTERVAL_S, uploads.remove_unreferenced, UPLOAD_CLEANUP_INTERVAL_S),
    )


async def _repeat(interval_s: float, work: Callable[..., object], *args: Any) -> None:
    """Do work at regular intervals. Errors of the storage or the database are logged, and the work is repeated."""
    while True:
        try:
            await asyncio.to_thread(work, *args)
        except (OSError, SQLAlchemyError):
            log.exception("Maintenance failed. Retrying in %g s.", interval_s)
        await asyncio.sleep(interval_s)


def purge_jobs(store: JobStore, outputs: OutputFolder) -> None:
    """Delete old jobs with their files. Files made by a batch run are kept."""
    while store.purge(lambda key: outputs.delete_shot(shot_id_of(key)), PURGE_BATCH) == PURGE_BATCH:
        pass
