"""`vidgen plan`: print the layout, duration and cost of a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.table import Table

from vidgen_ray.cli.commands import interruptible
from vidgen_ray.cli.file_options import JsonOption
from vidgen_ray.cli.options import (
    AddressOption,
    GpusOption,
    LineOptions,
    MaxCostOption,
    OutOption,
    PriceOption,
    ProfileOption,
    RequireLicenceOption,
    ScriptsArgument,
    SeedOption,
    TrainerOption,
    UntilOption,
)
from vidgen_ray.cli.run_script import detected, keep_pandas_out, script_licences
from vidgen_ray.graph import STAGE_BY_NAME, clip_length, file_sizes, server_problems
from vidgen_ray.licences import UsedWeights, require_licence
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.choose_layout import Plan, cpus_needed, plan_run
from vidgen_ray.planner.cluster import Cluster, profile_for
from vidgen_ray.planner.demand import Calibration, Demand, load_calibration
from vidgen_ray.planner.layout import WorkerSpec
from vidgen_ray.planner.solver import ENCODER_CPUS
from vidgen_ray.planner.speed_trials import accepted_losses, open_trials
from vidgen_ray.profile import AUTO, Profile
from vidgen_ray.render.cache_writer import DEFAULT_CACHE
from vidgen_ray.script.lines import Line
from vidgen_ray.script.read import iter_script
from vidgen_ray.system.console import Console, stdout_console, table_of
from vidgen_ray.system.quantities import count, duration, money, size
from vidgen_ray.trainers import SourceClip, TrainerTarget, parse_target, use_text
from vidgen_ray.video_models import fields_for

if TYPE_CHECKING:
    from vidgen_ray.batch.line_planner import ScriptCounts


def plan(
    scripts: ScriptsArgument,
    lines: LineOptions,
    out: OutOption = "out",
    profile: ProfileOption = AUTO,
    address: AddressOption = None,
    gpus: GpusOption = None,
    until: UntilOption = None,
    seed: SeedOption = 0,
    max_cost: MaxCostOption = None,
    price: PriceOption = None,
    require: RequireLicenceOption = None,
    trainer: TrainerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate the duration and cost of a script.

    Nothing is rendered. Also prints the layout of the GPUs and the licences of the weights.
    With --for, also prints which clips the trainer would use, cut or drop, and with which fields it uses them as a whole.
    """
    from vidgen_ray.batch.line_planner import estimate_run, recorded_options

    keep_pandas_out()
    cluster_of_run = detected(address, gpus)
    # A long script takes a minute.
    with interruptible(), Console(stderr=True).status(f"Planning {', '.join(map(str, scripts))}"):
        chosen = recorded_options(profile_for(profile, cluster_of_run), OutputFolder(out))
        settings = lines.settings(scripts, chosen, seed, until)
        demand, counts = estimate_run(settings, chosen, OutputFolder(out))
        cluster = cluster_of_run()
        measured = load_calibration(chosen.name, cluster.card)
        licences = script_licences(iter_script(settings), chosen, OutputFolder(out))
        uses = trainer_uses(iter_script(settings), parse_target(trainer)) if trainer else []
    shown = partial(print_plan, licences=licences, uses=uses, as_json=as_json)
    shown(chosen, demand, cluster, counts, measured, price=price, max_cost=max_cost)
    require_licence(require, licences)


def print_plan(
    profile: Profile,
    demand: Demand,
    cluster: Cluster,
    counts: ScriptCounts,
    measured: Mapping[str, Calibration] | None = None,
    *,
    price: float | None = None,
    max_cost: float | None = None,
    licences: Sequence[UsedWeights] = (),
    uses: Sequence[Mapping[str, Any]] = (),
    as_json: bool = False,
) -> None:
    """Print the plan on standard output. `licences`: weights behind the script. `uses`: result of `trainer_uses`.

    Raises the errors of `make_plan`, and TooExpensive after printing if the cost exceeds `max_cost`.
    """
    if not demand.shots:
        nothing = {"shots": 0, "counts": asdict(counts), "uses": uses}
        typer.echo(json.dumps(nothing) if as_json else f"nothing to render: {_line_counts(counts)}")
        _print_uses(() if as_json else uses)
        return
    planned = plan_run(profile, demand, cluster, calibration=measured, price=price)
    if as_json:
        about = {"profile": profile.name, "cluster": str(cluster), "cpus_needed": cpus_needed(planned.layout)}
        about["unusable_servers"] = server_problems(profile)
        used = [each.model_dump() for each in licences]
        typer.echo(json.dumps({**about, **asdict(planned), "counts": asdict(counts), "licences": used, "uses": uses}))
    else:
        _print(planned, profile, demand, cluster, counts)
        _print_uses(uses)
        _print_licences(licences)
    planned.check_cost(max_cost)


def trainer_uses(lines: Iterable[Line], target: TrainerTarget) -> list[dict[str, Any]]:
    """Return what a trainer does with each group of equal clips of a script, the largest group first."""
    groups = Counter[tuple[SourceClip, tuple[tuple[str, Any], ...]]]()
    for line in lines:
        if not line.errors and (shot := line.shot).generate_video:
            *_, size = file_sizes(shot).values()
            given = tuple((name, getattr(shot, name)) for name in ("video_model", "fps", "extend", "num_frames", "fps_out"))
            groups[SourceClip(*clip_length(shot), *size), given] += 1
    found = []
    for (clip, given), clips in groups.most_common():
        fields, use = dict(given), target.use(clip)
        about = {"clips": clips, **clip._asdict(), "status": use.status, "is_resampled": clip.fps != target.model.fps}
        try:
            is_best = use.status == "used" and not about["is_resampled"]
            best: Mapping[str, Any] = {} if is_best else fields_for(target, dict(given[:3]))
        except ValueError as error:
            best = {"problem": str(error)}
        fits_with = {name: value for name, value in best.items() if fields.get(name) != value}
        found.append({**about, "result": use_text(clip, target), "fits_with": fits_with})
    return found


def _print_uses(uses: Sequence[Mapping[str, Any]]) -> None:
    totals = Counter[str]()
    for each in uses:
        fields = ", ".join(f"{name}: {value}" for name, value in each["fits_with"].items())
        clips, clip = count(each["clips"], "clip"), SourceClip(*(each[name] for name in SourceClip._fields))
        typer.echo(f"{clips} of {clip}: {each['result']}{f'; as a whole with {fields}' if fields else ''}")
        totals.update({each["status"]: each["clips"], "resampled": each["clips"] * each["is_resampled"]})
    if uses:
        typer.echo(f"clips: {', '.join(f'{totals[name]:,} {name}' for name in ('used', 'cut', 'dropped', 'resampled'))}\n")


def _print(planned: Plan, profile: Profile, demand: Demand, cluster: Cluster, counts: ScriptCounts) -> None:
    console = stdout_console()
    facts = Table.grid(padding=(0, 2))
    for name, text in _facts(planned, profile, demand, cluster, counts):
        facts.add_row(f"[bold]{name}[/]" if console.is_terminal else name, escape(text))
    for table in (facts, _stages(planned, profile), _slots(planned), _considered(planned)):
        console.print(table)
        console.print()
    actors = dict.fromkeys(STAGE_BY_NAME[stage].actor for stage in planned.stage_seconds)
    trials = {actor: dict.fromkeys(trial.option for trial, _ in open_trials(profile, actor, cluster.kinds)) for actor in actors}
    untried = "; ".join(f"{actor} {', '.join(options)}" for actor, options in trials.items() if options)
    lossy = (f"lossy option in use, {each}" for each in accepted_losses(profile, cluster.kinds))
    notes = [*planned.notes, *server_problems(profile), *lossy]
    for note in (*notes, *([f"speed options that were not tried on these GPUs: {untried}"] if untried else [])):
        console.print(f"note: {escape(note)}", soft_wrap=True)


def _print_licences(licences: Sequence[UsedWeights]) -> None:
    console, table = stdout_console(), table_of("weights", "licence", "commercial use")
    for used in licences:
        table.add_row(*map(escape, (used.weights, used.licence or "unknown", used.commercial_use)))
    console.print()
    console.print(table)
    for used in licences:
        if used.condition:
            console.print(f"{escape(used.weights)}: {escape(used.condition)}", soft_wrap=True)


def _facts(
    planned: Plan, profile: Profile, demand: Demand, cluster: Cluster, counts: ScriptCounts
) -> Iterator[tuple[str, str]]:
    on_gpus = planned.gpu_hours > 0
    yield "profile", f"{profile.name} on {cluster}"
    yield "shots", f"{planned.shots:,} to render; {_line_counts(counts)}"
    total_s = sum(planned.stage_seconds.values())
    share = f", {planned.clip_peak_share:.0%} of the GPU's peak" if planned.peak_share else ""
    yield (
        "average shot",
        f"{_short(total_s)} s{share}; {count(demand.upscaled, 'shot')} upscaled, {count(demand.loras, 'LoRA')}",
    )
    layout = planned.layout
    workers = f"{count(len(layout.workers), 'worker')} on "
    workers += count(sum(slot.gpus for slot in layout.slots), "GPU") if on_gpus else count(len(layout.slots), "slot")
    yield (
        "layout",
        f"{layout.kind}: {workers}, {count(layout.encoders, 'encoder')}, at most {count(layout.window, 'shot')} at once",
    )
    if planned.encode_s:
        yield "encoding", f"{_short(planned.encode_s)} CPU s a shot, on {layout.encoders * ENCODER_CPUS:g} CPUs"
    yield (
        "rate",
        f"{planned.shots_per_hour:,.1f} shots per hour, {planned.efficiency:.0%} efficient"
        + (f", limited by {planned.bottleneck}" if planned.bottleneck else ""),
    )
    yield "time", f"{duration(planned.seconds)} ({duration(planned.seconds_low)} to {duration(planned.seconds_high)})"
    yield "first clip", f"after {duration(planned.first_clip_s)}, {duration(planned.load_s)} of it to load weights"
    if on_gpus:
        yield "GPU-hours", f"{planned.gpu_hours:,.2f}"
    if planned.cost is not None:
        of_servers = f", {money(planned.server_cost, planned.currency)} of it for servers"
        yield "cost", money(planned.cost, planned.currency) + (of_servers if planned.server_cost and on_gpus else "")
    else:
        yield "cost", "unknown; pass --price" if on_gpus else "none: a run without GPUs and priced servers has no price"
    yield "disk", f"about {size(planned.output_bytes)} of outputs"
    sizes = ", ".join(f"{size(n_bytes)} ({mode})" for mode, n_bytes in planned.cache_bytes.items() if n_bytes)
    yield "cache", f"about {sizes}; --cache {DEFAULT_CACHE} is the default" if sizes else "nothing to keep"


def _stages(planned: Plan, profile: Profile) -> Table:
    right = ("seconds", "of the peak")
    table = table_of("stage", *right, "precision", "options", "because of", right=right)
    for stage, seconds in planned.stage_seconds.items():
        actor = profile.actor_of(STAGE_BY_NAME[stage])
        share = f"{planned.peak_share[stage]:.0%}" if stage in planned.peak_share else "-"
        at_load = planned.options.get(STAGE_BY_NAME[stage].actor, {})
        # The schedule depends on the weights, not on the GPU.
        shown = {name: value for name, value in {**actor.options, **at_load}.items() if name != "schedule"}
        options = ", ".join(f"{name}={value}" for name, value in shown.items())
        because = "; ".join(filter(None, (actor.reason, "GPU memory" if at_load else "")))
        table.add_row(stage, _short(seconds), share, actor.dtype or "", escape(options), because)
    return table


def _slots(planned: Plan) -> Table:
    numbers = ("slots", "memory", "CPUs", "GPU")
    table = table_of("slots", "memory", "process", "CPUs", "GPU", "stages (share of time)", right=numbers)
    identical = Counter(
        (slot, tuple(shares.items())) for slot, shares in zip(planned.layout.slots, planned.shares, strict=True)
    )
    for (slot, shares), alike in identical.items():
        for n, worker in enumerate(slot.workers):
            first = (str(alike), f"{slot.memory_gb:.1f} GB" if slot.has_gpu else "-") if n == 0 else ("", "")
            process = "worker" if len(slot.workers) == 1 else f"worker {n + 1} of {len(slot.workers)}"
            share = f"{worker.gpus:.2f}" if worker.gpus else "-"
            table.add_row(*first, process, f"{worker.cpus:g}", share, _stage_shares(worker, dict(shares)))
    return table


def _stage_shares(worker: WorkerSpec, shares: Mapping[str, float]) -> str:
    """Return the stages and their share of the slot's time.

    `flux 80%, realesrgan 20%`; with weight swapping `realesrgan 10%; swapping flux 20% | svd 70%`.
    """
    if worker.server:
        return f"{', '.join(worker.stages)}: {worker.parallel} at once by {worker.server}"

    def named(stages: Iterable[str]) -> str:
        return ", ".join(f"{stage} {shares[stage]:.0%}" for stage in stages)

    swapped = {stage for group in worker.swap_groups for stage in group}
    resident = named(stage for stage in worker.stages if stage not in swapped)
    groups = " | ".join(named(group) for group in worker.swap_groups)
    return "; ".join(part for part in (resident, f"swapping {groups}" if groups else "") if part)


def _considered(planned: Plan) -> Table:
    table = table_of("considered", "shots per hour", "", right=["shots per hour"])
    for entry in planned.considered:
        rate = "-" if entry.shots_per_hour is None else f"{entry.shots_per_hour:,.1f}"
        table.add_row(entry.kind, rate, escape(entry.reason or ""))
    return table


def _line_counts(counts: ScriptCounts) -> str:
    where = " (vidgen validate prints the errors)" if counts.rejected else ""
    if counts.done is None:
        return f"{counts.rejected:,} of {counts.lines:,} rejected{where}; finished shots are unknown without the weights"
    done = f"{counts.done:,} of {counts.lines:,} already done"
    return f"{done}, {counts.rejected:,} rejected{where}, {counts.cached_steps:,} cached stages"


def _short(seconds: float) -> str:
    return f"{seconds:.3g}"
