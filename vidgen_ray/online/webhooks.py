"""Tells webhooks that jobs have ended, as Standard Webhooks has it. The messages are the store's, so none is lost with a
process."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from standardwebhooks import Webhook as Signer
from tenacity import RetryCallState, Retrying, wait_exponential_jitter

from vidgen_ray.online.inputs.http_fetch import BlockedUrl, PublicHttpClient, UnreachableUrl
from vidgen_ray.online.settings import Webhook, Webhooks
from vidgen_ray.online.store.outbox import Message, Outbox

GONE = 410
"""What a receiver says that wants no more of these."""
ANSWER_BYTES = 65_536
BACKOFF = wait_exponential_jitter(initial=5, max=3600, jitter=5)
"""Seconds after the first try, doubled after each further one."""


class WebhookSender:
    """Delivers what waits in the outbox. Calls block for as long as receivers take."""

    def __init__(self, webhooks: Webhooks, outbox: Outbox) -> None:
        self._webhooks = webhooks
        self._outbox = outbox
        self._outside = PublicHttpClient(webhooks.timeout_s, allow_private=webhooks.allow_private)

    def deliver_due(self) -> int:
        """Try each message whose time has come once. Gives how many were taken.

        A message whose courier dies is tried again later, so that a receiver may get it twice, under the same id.
        """
        if not self._webhooks.targets:
            return 0
        taken, failed = 0, set[str]()
        hold_s = 2 * len(self._webhooks.targets) * self._webhooks.timeout_s
        while messages := self._outbox.claim_due(hold_s, besides=failed):
            for message in messages:
                if self._delivered(message):
                    taken += 1
                else:
                    # Its other messages wait for the next time, so that it holds up those of others once only.
                    failed.add(message.target)
        return taken

    def _delivered(self, message: Message) -> bool:
        target = self._webhooks.named(message.target)
        status = GONE if target is None else self._status(target, message)
        if 200 <= status < 300 or status == GONE or message.tries + 1 >= self._webhooks.tries:
            self._outbox.delete(message.id)
        else:
            self._outbox.postpone(message.id, backoff_s(message.tries + 1))
        return 200 <= status < 300

    def _status(self, target: Webhook, message: Message) -> int:
        """What the receiver answered; 0 where it did not, or must not be asked."""
        body = payload(message)
        headers = {"Content-Type": "application/json", "User-Agent": "vidgen-ray", **signed(target, message.id, body)}
        try:
            return self._outside.request("POST", target.url, headers=headers, body=body.encode(), cap_bytes=ANSWER_BYTES).status
        except (BlockedUrl, UnreachableUrl):
            return 0


def payload(message: Message) -> str:
    """The event as OpenAI's clients read it."""
    event = {
        "id": message.id,
        "object": "event",
        "type": message.event,
        "created_at": int(message.created_at),
        "data": {"id": message.job},
    }
    return json.dumps(event, separators=(",", ":"))


def signed(target: Webhook, message_id: str, body: str) -> dict[str, str]:
    """The three headers of Standard Webhooks, as of now."""
    now = datetime.now(UTC)
    signature = Signer(target.secret.get_secret_value()).sign(message_id, now, body)
    return {"webhook-id": message_id, "webhook-timestamp": str(int(now.timestamp())), "webhook-signature": signature}


def backoff_s(tries: int) -> float:
    """How long to wait after so many tries."""
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = tries
    return BACKOFF(state)
