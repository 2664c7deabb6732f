"""Render a script: plan its lines, skip finished shots, render the rest, record every result."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from vidgen_ray.batch.director import Director, Remaining
from vidgen_ray.batch.line_planner import (
    FIRST_LOOK_LINES,
    LaterLines,
    LinePlanner,
    count_pending,
    first_lines,
    recorded_options,
)
from vidgen_ray.batch.progress import GuardedListener, RunListener, RunRecorder
from vidgen_ray.batch.results import RunResults
from vidgen_ray.batch.run_options import RecordedOptions, RenderOptions
from vidgen_ray.engine.ray_cluster import connected, live_cluster
from vidgen_ray.engine.ray_internals import submission_id
from vidgen_ray.engine.trials import run_trials
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import check_profile, server_problems
from vidgen_ray.outputs.folder import OutputFolder, software_versions
from vidgen_ray.outputs.lease import Lease
from vidgen_ray.outputs.manifest import ManifestRow, new_name
from vidgen_ray.outputs.manifest_writer import FAILURES_FILE, script_name
from vidgen_ray.outputs.run_log import RunLabels
from vidgen_ray.planner.choose_layout import Plan
from vidgen_ray.planner.cluster import Cluster, this_machine
from vidgen_ray.planner.demand import (
    ENCODING,
    MIN_SHOTS,
    Demand,
    calibrations,
    demand_of,
    demand_seconds,
    peak_shares,
    save_calibration,
)
from vidgen_ray.planner.solver import encoders_needed
from vidgen_ray.planner.speed_trials import open_trials, settled
from vidgen_ray.profile import Profile
from vidgen_ray.provenance.signing import check_signing
from vidgen_ray.script.check import LineChecker
from vidgen_ray.script.formats import ScriptVersion
from vidgen_ray.script.lines import Line, ScriptSettings
from vidgen_ray.script.read import iter_script

TRIAL_FROM_S = 3600.0
"""Planned GPU-seconds of the first lines from which untried speed options are tried first, which takes 10 to 20 minutes."""


def cluster_at(address: str | None) -> Cluster:
    """Return the machines of the Ray cluster at an address, or this machine. Raises SetupError if there is no cluster."""
    if address is None:
        return this_machine()
    with connected(address, 0):
        return live_cluster().total


@dataclass(frozen=True, slots=True)
class RunReport:
    """Summary of a run."""

    run: str
    done: int
    failed: int
    skipped: int
    rejected: int
    """Rejected lines. They are part of `failed`."""
    left: int
    """Lines read but not started, or interrupted, because the run was stopped."""
    complete: bool
    """The script was read to its end. False if the run was stopped before."""
    seconds: float
    gpu_seconds: float
    """GPU seconds of the finished shots, without failed shots and attempts with too low a likeness."""
    cost: float | None
    """Cost of the GPUs that the run held: on this machine, all that it was planned for. `None` without GPUs."""
    currency: str | None
    """Currency of a default price. `None` if the price is the user's."""
    lora_loads: int
    """LoRA files loaded into a model."""
    peak_share: Mapping[str, float]
    """Stage -> fraction of the GPU's peak in 16 bits that it has reached, as measured. Only stages of known work on GPUs."""
    layout: str | None
    """Kind of the last layout. `None` if there was nothing to render."""
    quarantined: tuple[str, ...]
    """Workers and encoders that were quarantined, with their nodes and the reasons."""
    without_face: int = 0
    """Finished shots with a face photo in whose image no face was found. Part of `done` and `skipped`."""


def render_shots(
    script: ScriptSettings,
    profile: Profile,
    outputs: OutputFolder,
    options: RenderOptions,
    *,
    listener: RunListener,
    stop: threading.Event | None = None,
    lease: Lease | None = None,
) -> RunReport:
    """Render all shots of a script into `outputs`. A shot that is finished with the same content key is skipped.

    `lease`: that of the folder, if the caller holds it.

    When `stop` is set, no more shots start, and those in progress have `options.grace_s` seconds to finish; then raises
    KeyboardInterrupt. A run also stops before its cost exceeds `options.max_cost`, and raises TooExpensive if lines are left.
    A failed line does not raise. Raises ScriptError if the script cannot be read, SetupError or ProfileError if weights are
    missing, no layout fits the cluster, nothing healthy is left or another run is using the folder.
    """
    before_run = GuardedListener(listener)
    checker, first, version = checked_start(script, profile)
    profile = profile.with_commits()
    for problem in server_problems(profile):
        before_run.on_message(problem)
    # Trials use the GPUs, and their results are kept: only after another run in the folder was found.
    with held_lease(outputs, options, lease) as held:
        profile = _with_settled_options(profile, outputs, options, script, before_run, is_long=version is not None)
        planner = LinePlanner(checker, profile, outputs, options)
        later = None if version is None else LaterLines(script, version, planner)
        demand: Demand | None = None
        if options.max_cost is not None and version is not None:
            demand, _ = count_pending(script, profile, outputs)
        return render_lines(
            planner,
            first,
            None if later is None else later.rest,
            script.path.name,
            profile,
            options,
            finished=None if later is None else later.finished,
            listener=listener,
            stop=stop,
            demand=demand,
            script=script.path,
            lease=held,
        )


def checked_start(script: ScriptSettings, profile: Profile) -> tuple[LineChecker, list[Line], ScriptVersion | None]:
    """Return what `first_lines` returns. Raises ScriptError, SetupError or ProfileError if nothing can be rendered."""
    check_profile(profile)
    check_signing(profile.provenance)
    return first_lines(script)


def held_lease(outputs: OutputFolder, options: RenderOptions, lease: Lease | None = None) -> AbstractContextManager[Lease]:
    """Hold the lease of the folder for a run. `lease`: if it is held already. Raises SetupError if another run holds it."""
    return outputs.lease(new_name(options.name)) if lease is None else nullcontext(lease)


def _with_settled_options(
    profile: Profile,
    outputs: OutputFolder,
    options: RenderOptions,
    script: ScriptSettings,
    listener: RunListener,
    *,
    is_long: bool,
) -> Profile:
    """Return the profile with the speed options for this folder and the GPUs. Those that were not tried are, in a long run.

    `is_long`: the script has more than its first lines.
    """
    if (recorded := recorded_options(profile, outputs)) is not profile:
        return recorded
    if not any(profile.tried_options(actor) for actor in profile.actors):
        return profile
    cluster = options.cluster or cluster_at(options.address)
    # The lines are checked once more for this: only if there is something to try.
    if not any(True for actor in profile.actors for _ in open_trials(profile, actor, cluster.kinds)):
        return settled(profile, cluster.kinds)
    shots = [shot for line in islice(iter_script(script), FIRST_LOOK_LINES) for shot in line.shots]
    demand = demand_of(shots)
    card = cluster.assumed_cards[0] if cluster.gpus else None
    stages = [stage for stage in demand.stages if stage.actor in profile.actors]
    seconds = sum(demand_seconds(profile, stage, demand, {}, card) for stage in stages)
    if not is_long and seconds < TRIAL_FROM_S:
        return profile
    return run_trials(profile, shots, options.address, cluster, listener.on_message)


def render_lines(
    planner: LinePlanner,
    first: Sequence[Line],
    remaining: Remaining | None,
    source: str,
    profile: Profile,
    options: RenderOptions,
    *,
    finished: Callable[[], Iterator[list[Line] | None]] | None = None,
    listener: RunListener,
    stop: threading.Event | None = None,
    demand: Demand | None = None,
    on_row: Callable[[ManifestRow], None] | None = None,
    script: Path | None = None,
    lease: Lease | None = None,
) -> RunReport:
    """Render lines. `first`: the first ones. `remaining` starts to read and plan the rest, if there is any.

    `finished`: called before that if no first line is pending, as `LaterLines.finished`. Ray is not needed for these lines.
    `source`: name of the script. `demand` of the whole script, if it is known. `on_row` gets the manifest row of every line.
    `script`: path of the script. Its earlier rows whose lines it no longer has become `replaced`.
    Otherwise as `render_shots`.
    """
    started, outputs, stop = time.monotonic(), planner.outputs, stop or threading.Event()
    with held_lease(outputs, options, lease) as lease, ExitStack() as stack:
        outputs = outputs.fenced(lease)
        outputs.sweep()
        if script is not None:
            source = planner.checker.script = script_name(outputs.storage, script, record=options.command)
        planner.load_finished()
        planned = planner.plan(first)
        labels = RunLabels(
            run=lease.run,
            name=options.name,
            profile=profile.name,
            script=source,
            team=options.team,
            submission_id=submission_id(),
        )
        recorder = stack.enter_context(RunRecorder(outputs.storage, lease, labels, listener))
        recorded = RecordedOptions.of(profile, options, planner.checker.run_seed, planner.checker.changes)
        # `vidgen retry` renders a part of the failed lines at a time.
        is_script = script is not None and source != FAILURES_FILE
        results = RunResults(outputs, labels, lease, recorder, on_row, recorded, is_script=is_script)
        # Of shots that are found before there is a plan.
        results.price = profile.price_per_gpu_hour if options.price is None else options.price
        director = Director(
            profile,
            outputs,
            options,
            results,
            recorder,
            stop,
            planner,
            demand,
            lease,
        )
        write_run = partial(_write_run, outputs, labels, profile, recorded, director, results)

        def save_without_ray(reason: str) -> None:
            """Leave the blocks below in another thread: the calls of Ray in this one wait forever."""
            if not lease.is_sure:
                return
            error = SetupError(reason)
            with ExitStack() as last:  # in reverse order, also if one fails
                last.push(recorder)
                last.callback(lambda: write_run(_report(labels.run, profile, started, director, results), error))
                last.push(results)
                raise error

        try:
            with results:
                director.accept(planned)
                for block in finished() if finished is not None and planner.found_all else ():
                    if block is None:
                        remaining = None
                        break
                    director.accept(block)
                    results.lines_read(complete=False)
                    if stop.is_set():
                        break
                results.lines_read(complete=remaining is None)
                if remaining is None:
                    planner.take_finished()
                if director.queue or remaining is not None:
                    with director.connected(complete=remaining is None, on_lost=save_without_ray):
                        asyncio.run(director.render(remaining))
                with suppress(OSError):
                    lease.refresh()
                lease.check()
        except BaseException as error:
            if lease.is_sure:
                with suppress(OSError):
                    write_run(_report(labels.run, profile, started, director, results), error)
            raise
        report = _report(labels.run, profile, started, director, results)
        too_expensive = director.cost_error()
        write_run(report, too_expensive)
        # Remove temporary files of processes that were killed on this machine.
        outputs.sweep()
    if director.plan is not None and director.cluster is not None:
        save_calibration(profile.name, director.cluster.card, results.durations)
        if note := _encoding_note(director.plan, results):
            recorder.on_message(note)
    if too_expensive is not None:
        raise too_expensive
    return report


def _encoding_note(plan: Plan, results: RunResults) -> str | None:
    """Return a note if the encoders were too few for the planned rate. The next plan is made with the measured seconds."""
    seconds = [seconds for seconds, _ in results.durations.get(ENCODING, ())]
    if len(seconds) < MIN_SHOTS or not plan.encode_s:
        return None
    needed = encoders_needed(plan.shots_per_hour / 3600, sum(seconds) / len(seconds))
    if needed <= plan.layout.encoders:
        return None
    return (
        f"encoding may have limited the rate: it took {sum(seconds) / len(seconds):.3g} CPU seconds a clip, "
        f"{plan.encode_s:.3g} were planned; {plan.layout.encoders} encoders ran, the planned rate needs {needed}. The next run "
        "uses the measured seconds"
    )


def _report(run: str, profile: Profile, started: float, director: Director, results: RunResults) -> RunReport:
    """Return the summary of a run that started at `started`, by `time.monotonic`."""
    plan, seconds = director.plan, time.monotonic() - started
    return RunReport(
        run=run,
        done=results.counts["done"],
        failed=results.counts["failed"],
        skipped=results.counts["skipped"],
        rejected=results.rejected_lines,
        left=director.left,
        complete=director.complete,
        seconds=round(seconds, 2),
        gpu_seconds=round(results.gpu_seconds, 2),
        cost=None if director.cost is None else round(director.cost, 6),
        currency=None if plan is None else plan.currency,
        lora_loads=results.lora_loads,
        peak_share=_peak_share(profile, director, results),
        layout=plan.layout.kind if plan else None,
        quarantined=tuple(director.quarantined),
        without_face=results.without_face,
    )


def _peak_share(profile: Profile, director: Director, results: RunResults) -> dict[str, float]:
    cards = director.cluster.assumed_cards if director.cluster else ()
    if len(cards) != 1:
        return {}
    measured = {stage: known.seconds_of_reference for stage, known in calibrations(results.durations).items()}
    measured.pop(ENCODING, None)
    return peak_shares(profile, measured, cards[0])


def _write_run(
    outputs: OutputFolder,
    labels: RunLabels,
    profile: Profile,
    recorded: RecordedOptions,
    director: Director,
    results: RunResults,
    report: RunReport,
    error: BaseException | None,
) -> None:
    """Write `run.json`, which describes the last run in this folder. `error`: what ended it."""
    outputs.write_run(
        {
            **asdict(report),
            "error": None if error is None else f"{type(error).__name__}: {error}",
            "name": labels.name,
            "script": labels.script,
            "team": labels.team,
            "submission_id": labels.submission_id,
            "profile": profile.model_dump(mode="json"),
            "options": recorded.model_dump(mode="json"),
            "layout": asdict(director.plan.layout) if director.plan else None,
            "weights": {stage: sorted(digests) for stage, digests in sorted(results.weights.items())},
            "software": software_versions(),
        }
    )
