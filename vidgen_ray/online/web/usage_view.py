"""Usage on the page: what the clips of the last days have used, and what is left of the budgets of the key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.server_context import ServerContext
from vidgen_ray.online.store.budgets import WINDOWS, BudgetState
from vidgen_ray.system.quantities import amount_text, duration

USAGE_DAYS = 31


@dataclass(frozen=True, slots=True)
class BudgetView:
    """One budget in words. `percent`: of it that is spent or reserved."""

    left: str
    spent: str
    percent: int
    resets: datetime | None


@dataclass(frozen=True, slots=True)
class DayView:
    """Usage of one model on one day."""

    day: str
    model: str
    jobs: int
    gpu_time: str
    cost: str


def budget_views(server: ServerContext, tenant: Tenant) -> list[BudgetView]:
    """Return the budgets of the key of a browser or request."""
    return [_budget_view(state) for state in server.store.usage.states(tenant.key_id, tenant.limits.budgets)]


def budget_text(budgets: Sequence[BudgetView]) -> str:
    """Return the budget with the least left, in words. Empty without budgets."""
    return max(budgets, key=lambda budget: budget.percent).left if budgets else ""


def usage_days(server: ServerContext, tenant: Tenant, today: date) -> list[DayView]:
    """Return what all keys of the tenant have used in the last `USAGE_DAYS` days, newest first."""
    rows = server.store.usage.rows(tenant.name, str(today - timedelta(days=USAGE_DAYS)), str(date.max))
    sums: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        total = sums.setdefault((row.day, row.model), [0, 0.0, 0.0])
        for place, amount in enumerate((row.jobs, row.gpu_seconds, row.cost)):
            total[place] += amount
    return [
        DayView(day, model, int(jobs), duration(gpu_seconds), amount_text(cost))
        for (day, model), (jobs, gpu_seconds, cost) in sorted(sums.items(), reverse=True)
    ]


def _budget_view(state: BudgetState) -> BudgetView:
    budget = state.budget
    used = budget.amount - state.left
    spent, reserved = _amount(budget.unit, state.spent), _amount(budget.unit, state.reserved)
    window = {"day": "today", "month": "this month", "total": "in total"}[budget.window]
    return BudgetView(
        left=f"{_amount(budget.unit, state.left)} of {_amount(budget.unit, budget.amount)} left {window}",
        spent=f"{spent} spent, {reserved} reserved, of a budget for {WINDOWS[budget.window]}",
        percent=min(100, round(100 * used / budget.amount)) if budget.amount else 100,
        resets=None if state.resets_at is None else datetime.fromtimestamp(state.resets_at, UTC),
    )


def _amount(unit: str, amount: float) -> str:
    return _time(amount) if unit == "gpu_seconds" else amount_text(amount)


def _time(gpu_seconds: float) -> str:
    return f"{duration(gpu_seconds)} of GPU time"
