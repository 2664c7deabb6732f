"""Budgets of keys and usage: GPU-seconds are reserved when a job is stored, and settled with what was measured when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, bindparam, case, func, insert, literal, select, tuple_, update

from vidgen_ray.errors import VidgenError
from vidgen_ray.online.server_settings import Budget
from vidgen_ray.online.store.database import JOBS, USAGE, Database

SECONDS_PER_HOUR = 3600
MAX_CORRECTION = 10.0
"""Largest factor by which estimates are corrected, and the inverse of the smallest."""
_ADD = (
    update(USAGE)
    .where(*(each == bindparam(f"more_{each.name}") for each in USAGE.primary_key))
    .values({each: each + bindparam(f"more_{each.name}") for each in USAGE.c if not each.primary_key})
)
_COMPARED = select(func.sum(USAGE.c.compared), func.sum(USAGE.c.estimate)).where(USAGE.c.model == bindparam("of_model"))

RECENT_CHANGES, _COMPARED_JOBS = 512, 32
"""Last changed jobs among which completed ones are looked for, and how many of these correct an estimate."""
RECENT_QUANTILE = 0.9
_changed = (
    select(JOBS.c.state, JOBS.c.estimate, JOBS.c.gpu_seconds, JOBS.c.request, JOBS.c.version)
    .order_by(JOBS.c.version.desc())
    .limit(RECENT_CHANGES)
    .subquery()
)
_RECENT = (
    select(_changed.c.estimate, _changed.c.gpu_seconds, _changed.c.request)
    .where(_changed.c.state == "completed", _changed.c.gpu_seconds > 0, _changed.c.estimate > 0)
    .order_by(_changed.c.version.desc())
    .limit(_COMPARED_JOBS)
)
USAGE_MODEL = "usage_model"
"""Field of `Job.request` with the model that usage and metrics name: clients may send any name that means it."""

WINDOWS = {"day": "a day", "month": "a month", "total": "in total"}


def usage_model(request: Mapping[str, Any]) -> str:
    """Return the model of a job that usage and metrics name."""
    return str(request.get(USAGE_MODEL) or request.get("model"))


class BudgetState(NamedTuple):
    """Budget of a key in its present window. Amounts are in the unit of the budget."""

    budget: Budget
    spent: float
    """By jobs that have ended, and until now by open ones."""
    reserved: float
    """Rest of the estimates of open jobs."""
    resets_at: float | None
    """End of the window, in seconds since 1970. `None` for the whole time."""

    @property
    def left(self) -> float:
        return max(0.0, self.budget.amount - self.spent - self.reserved)


class BudgetExceeded(VidgenError):
    """The estimate of new jobs is more than what is left of a budget."""

    def __init__(self, state: BudgetState, wanted: float) -> None:
        budget, window = state.budget, WINDOWS[state.budget.window]
        end = None if state.resets_at is None else datetime.fromtimestamp(state.resets_at, UTC)
        reset = "It does not reset" if end is None else f"It resets at {end:%Y-%m-%dT%H:%M:%SZ}"
        super().__init__(
            f"The budget of this key, {budget.unit} {budget.amount:g} {window}, has {state.left:.4g} left, and the request "
            f"needs about {wanted:.4g}. {reset}."
        )
        self.can_pass_later = state.resets_at is not None and wanted <= budget.amount
        """The same request may pass in the next window."""
        self.resets_at = state.resets_at


class Usage:
    """Usage of the keys by model and UTC day, and their budgets."""

    def __init__(self, database: Database, now: Callable[[], float], gpu_hour_price: float | None) -> None:
        self._database = database
        self._now = now
        self.price = (gpu_hour_price or 0.0) / SECONDS_PER_HOUR
        """Of a GPU-second."""

    def settle(self, connection: Connection, ended: Sequence[Any], is_completed: bool) -> None:
        """Count jobs that have ended, or their rows. Only estimates of completed jobs that have computed something count."""
        for row in ended:
            place = {"tenant": row.tenant, "key_id": row.key_id, "model": usage_model(row.request), "day": self._today()}
            added = {
                "jobs": 1,
                "gpu_seconds": row.gpu_seconds,
                "cost": row.gpu_seconds * self.price,
                "compared": row.gpu_seconds if is_completed and row.estimate else 0.0,
                "estimate": row.estimate if is_completed and row.gpu_seconds else 0.0,
            }
            if not connection.execute(_ADD, {f"more_{name}": value for name, value in (place | added).items()}).rowcount:
                connection.execute(insert(USAGE), place | added)

    def correction(self, connection: Connection, model: str, *, is_capped: bool = False) -> float:
        """Return the factor of measured to estimated GPU-seconds of completed jobs. 1 if there are none.

        `is_capped`: the key has a budget. Then recent jobs count if they took longer than the mean: a busy machine is slower.
        """
        measured, estimated = connection.execute(_COMPARED, {"of_model": model}).one()
        if not estimated:
            return 1.0
        factor: float = measured / estimated
        if is_capped:
            factor = max(factor, self._recent_factor(connection, model))
        return min(MAX_CORRECTION, max(1 / MAX_CORRECTION, factor))

    def _recent_factor(self, connection: Connection, model: str) -> float:
        """Return the factor that most recent jobs have not exceeded. 0 if there are none."""
        rows = connection.execute(_RECENT)
        factors: list[float] = sorted(row.gpu_seconds / row.estimate for row in rows if usage_model(row.request) == model)
        return factors[int(RECENT_QUANTILE * (len(factors) - 1))] if factors else 0.0

    def check(self, connection: Connection, key_id: str, budgets: Sequence[Budget], wanted: float) -> None:
        """Raise BudgetExceeded if new jobs would reserve more GPU-seconds than a budget has left."""
        for state in self._states(connection, key_id, budgets) if wanted else ():
            if (amount := self._amount(state.budget, wanted)) > state.left:
                raise BudgetExceeded(state, amount)

    def states(self, key_id: str, budgets: Sequence[Budget]) -> list[BudgetState]:
        """Return the state of each budget of a key."""
        with self._database.read_connection() as connection:
            return self._states(connection, key_id, budgets)

    def over(self, ids: Collection[str], budgets_of: Callable[[str], Sequence[Budget]]) -> set[str]:
        """Return those of these jobs whose key has spent a budget."""
        with self._database.transaction() as transaction:
            rows = transaction.connection.execute(select(JOBS.c.id, JOBS.c.key_id).where(JOBS.c.id.in_(ids))).all()
            keys = {row.key_id: budgets_of(row.key_id) for row in rows}
            spent = {
                key_id
                for key_id, budgets in keys.items()
                if any(state.spent >= state.budget.amount for state in self._states(transaction.connection, key_id, budgets))
            }
        return {row.id for row in rows if row.key_id in spent}

    def rows(
        self, tenant: str, first: str, last: str, *, after: tuple[str, str, str] = ("", "", ""), limit: int | None = None
    ) -> Sequence[Row[Any]]:
        """Return the usage of a tenant from one day to another, oldest first, by key and model.

        At most `limit` rows, those that follow the one with the day, key id and model `after`.
        """
        order = USAGE.c.day, USAGE.c.key_id, USAGE.c.model
        own = USAGE.c.tenant == tenant, USAGE.c.day >= first, USAGE.c.day <= last, tuple_(*order) > tuple_(*map(literal, after))
        return self._database.rows(select(USAGE).where(*own).order_by(*order).limit(limit))

    def totals(self) -> Mapping[tuple[str, str], float]:
        """Return (key, model) -> GPU-seconds of all time."""
        sums = func.sum(USAGE.c.gpu_seconds).label("seconds")
        query = select(USAGE.c.key_id, USAGE.c.model, sums).group_by(USAGE.c.key_id, USAGE.c.model)
        return {(row.key_id, row.model): row.seconds for row in self._database.rows(query)}

    def _states(self, connection: Connection, key_id: str, budgets: Sequence[Budget]) -> list[BudgetState]:
        if not budgets:
            return []
        is_open = JOBS.c.completed_at.is_(None), JOBS.c.key_id == key_id
        rest = case((JOBS.c.reserved > JOBS.c.gpu_seconds, JOBS.c.reserved - JOBS.c.gpu_seconds), else_=0.0)
        spent, reserved = connection.execute(select(func.sum(JOBS.c.gpu_seconds), func.sum(rest)).where(*is_open)).one()
        states = []
        for budget in budgets:
            # Days after a clock was set back count, too.
            first = {"day": self._today(), "month": f"{self._today()[:7]}-01", "total": ""}[budget.window]
            amount = USAGE.c[budget.unit]
            settled = connection.scalar(select(func.sum(amount)).where(USAGE.c.key_id == key_id, USAGE.c.day >= first))
            open_amounts = [self._amount(budget, seconds or 0.0) for seconds in (spent, reserved)]
            states.append(BudgetState(budget, (settled or 0.0) + open_amounts[0], open_amounts[1], self._reset(budget)))
        return states

    def _amount(self, budget: Budget, gpu_seconds: float) -> float:
        return gpu_seconds if budget.gpu_seconds is not None else gpu_seconds * self.price

    def _today(self) -> str:
        return f"{datetime.fromtimestamp(self._now(), UTC):%Y-%m-%d}"

    def _reset(self, budget: Budget) -> float | None:
        today = datetime.fromtimestamp(self._now(), UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        next_month = (today.replace(day=28) + timedelta(days=4)).replace(day=1)
        ends = {"day": today + timedelta(days=1), "month": next_month, "total": None}
        end = ends[budget.window]
        return None if end is None else end.timestamp()
