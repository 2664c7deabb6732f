"""Outbox: webhook messages that wait for delivery."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from pydantic import BaseModel, ConfigDict
from sqlalchemy import delete, func, insert, select, update

from vidgen_ray.online.store.database import Database, Transaction
from vidgen_ray.online.store.jobs import Job, new_id
from vidgen_ray.online.store.schema import OUTBOX


class Message(BaseModel):
    """Message to one webhook that a job has ended."""

    model_config = ConfigDict(frozen=True)

    id: str
    """The same in every attempt, so that receivers can recognise a message they already have."""
    tenant: str
    target: str
    event: str
    """For example `video.completed` or `shot.failed`."""
    job: str
    created_at: float
    tries: int
    """Failed attempts to deliver it."""


class Outbox:
    """Webhook messages of the store."""

    def __init__(self, database: Database, now: Callable[[], float]) -> None:
        self._database = database
        self._now = now

    def add(self, transaction: Transaction, target: str, job: Job) -> None:
        """Add a message in the transaction that ends the job, so that both are stored or neither."""
        now = self._now()
        transaction.connection.execute(
            insert(OUTBOX).values(
                id=new_id("evt"),
                seq=transaction.version,
                tenant=job.tenant,
                target=target,
                event=f"{job.kind}.{job.state}",
                job=job.id,
                created_at=now,
                next_try_at=now,
                tries=0,
            )
        )

    def claim_due(self, lease_s: float, exclude: Collection[str] = ()) -> Sequence[Message]:
        """Return the oldest due message of each target that is not in `exclude`.

        The messages are not due again for `lease_s` seconds.
        """
        with self._database.read_connection() as connection:
            if connection.execute(select(OUTBOX.c.id).where(OUTBOX.c.next_try_at <= self._now()).limit(1)).first() is None:
                return []
        with self._database.transaction() as transaction:
            now = self._now()
            due = [OUTBOX.c.next_try_at <= now, OUTBOX.c.target.not_in(exclude)]
            position = func.row_number().over(partition_by=OUTBOX.c.target, order_by=OUTBOX.c.seq).label("position")
            first = select(OUTBOX.c.id, position).where(*due).subquery()
            query = select(OUTBOX).join(first, OUTBOX.c.id == first.c.id).where(first.c.position == 1).order_by(OUTBOX.c.seq)
            rows = transaction.connection.execute(query).all()
            leased = update(OUTBOX).where(OUTBOX.c.id.in_([row.id for row in rows])).values(next_try_at=now + lease_s)
            transaction.connection.execute(leased)
        return [Message.model_validate({name: getattr(row, name) for name in Message.model_fields}) for row in rows]

    def delete(self, message_id: str) -> None:
        """Delete a message that was delivered or dropped."""
        with self._database.transaction() as transaction:
            transaction.connection.execute(delete(OUTBOX).where(OUTBOX.c.id == message_id))

    def postpone(self, message_id: str, seconds: float) -> None:
        """Count a failed attempt and make the message due again after `seconds`."""
        with self._database.transaction() as transaction:
            later = {"tries": OUTBOX.c.tries + 1, "next_try_at": self._now() + seconds}
            transaction.connection.execute(update(OUTBOX).where(OUTBOX.c.id == message_id).values(**later))
