"""Batches on the page: one row for each, in place of a card for each of its lines, and the files of its lines as one ZIP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.batches import Batch, Counts
from vidgen_ray.online.store.jobs import Job, JobState
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.system.quantities import duration

SHOWN_BATCHES = 5
"""Batches shown, at most: those that run, and those that ended in the last day."""
_READ, _RECENT_S = 50, 86_400
_PAGE_LENGTH = 500
_ENDED = {"completed": "Completed", "failed": "Failed", "expired": "Expired", "cancelled": "Cancelled"}


@dataclass(frozen=True, slots=True)
class BatchRow:
    """Values of the row of one batch."""

    batch: Batch
    title: str
    status: str
    percent: int
    can_be_cancelled: bool
    has_results: bool
    """A line is completed."""
    created: datetime

    @property
    def state(self) -> str:
        """Text that changes when the row must be drawn anew. In between, only its status and progress change."""
        return f"{self.batch.status} {self.title} {self.has_results}"


def recent_batches(server: ServerContext, tenant: str, now: float) -> list[BatchRow]:
    """Return the rows of the newest batches of the tenant that run or ended in the last day, at most `SHOWN_BATCHES`."""
    batches = server.store.batches
    shown = [each for each in batches.list(tenant, None, _READ) if each.ended_at is None or each.ended_at > now - _RECENT_S]
    return [_row_of(batch, batches.counts(batch), now) for batch in shown[:SHOWN_BATCHES]]


def completed_lines(store: JobStore, batch: Batch) -> Iterator[Job]:
    """Yield the completed jobs of a batch in the order of its lines."""
    after = None
    while True:
        states = (JobState.COMPLETED,)
        page = store.list(batch.tenant, states=states, batch=batch.id, after=after, limit=_PAGE_LENGTH, order="asc")
        yield from page.jobs
        if not page.has_more:
            return
        after = page.jobs[-1].id


def _row_of(batch: Batch, counts: Counts, now: float) -> BatchRow:
    ended = counts.completed + counts.failed
    name = batch.metadata.get("name", "").strip()
    title = f"Batch of {batch.total}" if batch.total else "Batch"
    return BatchRow(
        batch=batch,
        title=f"{name} ({title.lower()})" if name else title,
        status=_status(batch, counts, now),
        percent=round(100 * ended / batch.total) if batch.total else 0,
        can_be_cancelled=batch.status in ("validating", "in_progress"),
        has_results=counts.completed > 0,
        created=datetime.fromtimestamp(batch.created_at, UTC),
    )


def _status(batch: Batch, counts: Counts, now: float) -> str:
    if batch.status == "validating":
        return "Reading the lines"
    if batch.status == "failed":
        return f"Failed. {(batch.error or {}).get('message', '')}".strip()
    if batch.ended_at is not None:
        return f"{_ENDED.get(batch.status, batch.status)}. {counts.completed} done, {counts.failed} failed"
    if batch.status == "cancelling":
        return f"Cancelling, {counts.completed} done"
    parts = [f"{counts.completed} of {batch.total} done"]
    if counts.failed:
        parts.append(f"{counts.failed} failed")
    left_s = _seconds_left(batch, counts, now)
    if left_s is not None:
        parts.append(f"about {duration(max(1, round(left_s)))} left")
    return ", ".join(parts)


def _seconds_left(batch: Batch, counts: Counts, now: float) -> float | None:
    """Return the seconds that the other lines take at the speed of those that have ended. `None` if none has."""
    ended = counts.completed + counts.failed
    if not ended or batch.in_progress_at is None:
        return None
    return (batch.total - ended) * (now - batch.in_progress_at) / ended
