"""Messages to webhooks, from the moment a job ends until somebody has taken them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from pydantic import BaseModel, ConfigDict
from sqlalchemy import delete, func, insert, select, update

from vidgen_ray.online.store.database import Database, Transaction
from vidgen_ray.online.store.jobs import Job, new_id
from vidgen_ray.online.store.schema import OUTBOX


class Message(BaseModel):
    """That a job has ended, for one target."""

    model_config = ConfigDict(frozen=True)

    id: str
    """The same at every try, so that whoever takes it twice can know."""
    tenant: str
    target: str
    event: str
    """`video.completed`, `shot.failed`, ..."""
    job: str
    created_at: float
    tries: int


class Outbox:
    """Part of the store."""

    def __init__(self, database: Database, now: Callable[[], float]) -> None:
        self._database = database
        self._now = now

    def add(self, change: Transaction, target: str, job: Job) -> None:
        """In the transaction that ends the job: neither is seen without the other."""
        now = self._now()
        change.connection.execute(
            insert(OUTBOX).values(
                id=new_id("evt"),
                seq=change.version,
                tenant=job.tenant,
                target=target,
                event=f"{job.kind}.{job.state}",
                job=job.id,
                created_at=now,
                next_try_at=now,
                tries=0,
            )
        )

    def claim_due(self, hold_s: float, besides: Collection[str] = ()) -> Sequence[Message]:
        """Of each target, without some, the oldest message whose time has come; nobody else is given it for `hold_s`."""
        with self._database.transaction() as change:
            now = self._now()
            ready = [OUTBOX.c.next_try_at <= now, OUTBOX.c.target.not_in(besides)]
            place = func.row_number().over(partition_by=OUTBOX.c.target, order_by=OUTBOX.c.seq).label("place")
            first = select(OUTBOX.c.id, place).where(*ready).subquery()
            query = select(OUTBOX).join(first, OUTBOX.c.id == first.c.id).where(first.c.place == 1).order_by(OUTBOX.c.seq)
            rows = change.connection.execute(query).all()
            held = update(OUTBOX).where(OUTBOX.c.id.in_([row.id for row in rows])).values(next_try_at=now + hold_s)
            change.connection.execute(held)
        return [Message.model_validate({name: getattr(row, name) for name in Message.model_fields}) for row in rows]

    def delete(self, message_id: str) -> None:
        """Forget a message that was taken, or that nobody will ever take."""
        with self._database.transaction() as change:
            change.connection.execute(delete(OUTBOX).where(OUTBOX.c.id == message_id))

    def postpone(self, message_id: str, seconds: float) -> None:
        """Try a message again after some time."""
        with self._database.transaction() as change:
            later = {"tries": OUTBOX.c.tries + 1, "next_try_at": self._now() + seconds}
            change.connection.execute(update(OUTBOX).where(OUTBOX.c.id == message_id).values(**later))
