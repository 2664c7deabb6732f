"""`vidgen plan`: what a run would do, how long it would take and what it would cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vidgen_ray.batch.estimate import Counts
from vidgen_ray.planner import Calibration, Cluster, Demand, Plan, cpus_needed, plan
from vidgen_ray.planner.layout import Slot, WorkerSpec
from vidgen_ray.profile import Profile

PLAIN_WIDTH = 10_000
"""Columns of an output that is no terminal: lines are never broken."""


def plan_command(
    profile: Profile,
    demand: Demand,
    cluster: Cluster,
    *,
    counts: Counts | None = None,
    measured: Mapping[str, Calibration] | None = None,
    price: float | None = None,
    max_cost: float | None = None,
    as_json: bool = False,
) -> None:
    """Print the plan on standard output. Raises what `plan` raises, and TooExpensive after the plan was printed."""
    if not demand.shots:
        _print_nothing_to_do(counts, as_json)
        return
    planned = plan(profile, demand, cluster, calibration=measured, price=price)
    if as_json:
        typer.echo(json.dumps(_as_json(planned, profile, cluster, counts)))
    else:
        _print(planned, profile, demand, cluster, counts)
    planned.check_cost(max_cost)


def _print_nothing_to_do(counts: Counts | None, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"shots": 0, **({"counts": asdict(counts)} if counts else {})}))
    else:
        typer.echo(f"nothing to render: {_counted(counts)}" if counts else "nothing to render")


def _as_json(planned: Plan, profile: Profile, cluster: Cluster, counts: Counts | None) -> dict[str, Any]:
    about = {"profile": profile.name, "cluster": str(cluster), "cpus_needed": cpus_needed(planned.layout)}
    return {**about, **asdict(planned), **({"counts": asdict(counts)} if counts else {})}


def _print(planned: Plan, profile: Profile, demand: Demand, cluster: Cluster, counts: Counts | None) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    facts = Table.grid(padding=(0, 2))
    for name, text in _facts(planned, profile, demand, cluster, counts):
        facts.add_row(f"[bold]{name}[/]" if console.is_terminal else name, escape(text))
    for table in (facts, _slots(planned), _considered(planned)):
        console.print(table)
        console.print()
    for note in planned.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _facts(
    planned: Plan, profile: Profile, demand: Demand, cluster: Cluster, counts: Counts | None
) -> Iterator[tuple[str, str]]:
    on_gpus = planned.gpu_hours > 0
    yield "profile", f"{profile.name} on {cluster}"
    yield "shots", f"{planned.shots:,} to render" + (f"; {_counted(counts)}" if counts else "")
    seconds = ", ".join(f"{stage} {_short(value)}" for stage, value in planned.stage_seconds.items())
    yield "a mean shot", f"{seconds} s; {_count(demand.upscaled, 'shot')} upscaled, {_count(demand.loras, 'LoRA')}"
    layout = planned.layout
    workers = f"{_count(len(layout.workers), 'worker')} on {_count(len(layout.slots), 'GPU' if on_gpus else 'slot')}"
    yield "layout", f"{layout.kind}: {workers}, {_count(layout.encoders, 'encoder')}, at most {layout.window} shots at once"
    yield (
        "rate",
        f"{planned.shots_per_hour:,.1f} shots an hour, {planned.efficiency:.0%} efficient"
        + (f", bound by {planned.bottleneck}" if planned.bottleneck else ""),
    )
    yield "time", f"{_time(planned.seconds)} (from {_time(planned.seconds_low)} to {_time(planned.seconds_high)})"
    if on_gpus:
        cost = "unknown: say a --price" if planned.cost is None else f"{planned.cost:,.2f}"
        yield "GPU-hours", f"{planned.gpu_hours:,.2f}"
        yield "cost", cost
    yield "disk", f"about {_size(planned.disk_bytes)} with the cache of the stages"


def _slots(planned: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    for name in ("slots", "memory", "process", "CPUs", "GPU", "stages and their time"):
        table.add_column(name, justify="right" if name in ("slots", "memory", "CPUs", "GPU") else "left")
    alike = Counter((slot, tuple(shares.items())) for slot, shares in zip(planned.layout.slots, planned.shares, strict=True))
    for (slot, shares), number in alike.items():
        for n, worker in enumerate(slot.workers):
            first = (str(number), f"{slot.memory_gb:.1f} GB" if slot.has_gpu else "-") if n == 0 else ("", "")
            share = f"{worker.gpus:.2f}" if slot.has_gpu else "-"
            table.add_row(*first, _process(slot, n), f"{worker.cpus:g}", share, _held(worker, dict(shares)))
    return table


def _process(slot: Slot, n: int) -> str:
    return "worker" if len(slot.workers) == 1 else f"worker {n + 1} of {len(slot.workers)}"


def _held(worker: WorkerSpec, shares: Mapping[str, float]) -> str:
    """`flux 80%, realesrgan 20%`, or with turns `realesrgan 10%; in turns flux 20% | svd 70%`: of the slot's time."""

    def named(stages: Iterable[str]) -> str:
        return ", ".join(f"{stage} {shares[stage]:.0%}" for stage in stages)

    turning = {stage for group in worker.turns for stage in group}
    staying = named(stage for stage in worker.stages if stage not in turning)
    groups = " | ".join(named(group) for group in worker.turns)
    return "; ".join(part for part in (staying, f"in turns {groups}" if groups else "") if part)


def _considered(planned: Plan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("considered")
    table.add_column("shots an hour", justify="right")
    table.add_column("")
    for entry in planned.considered:
        rate = "-" if entry.shots_per_hour is None else f"{entry.shots_per_hour:,.1f}"
        table.add_row(entry.kind, rate, escape(entry.reason or ""))
    return table


def _counted(counts: Counts) -> str:
    if counts.done is None:
        return f"{counts.refused:,} of {counts.lines:,} refused; the weights are not here to tell what is done before"
    return (
        f"{counts.done:,} of {counts.lines:,} done before, {counts.refused:,} refused, "
        f"{counts.cached_steps:,} stages in the cache"
    )


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _short(seconds: float) -> str:
    return f"{seconds:.3g}"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _size(n_bytes: float) -> str:
    """Decimal units, as disks are sold in."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if n_bytes < 1000 or unit == "TB":
            break
        n_bytes /= 1000
    return f"{n_bytes:,.3g} {unit}" if n_bytes < 1000 else f"{n_bytes:,.0f} {unit}"
