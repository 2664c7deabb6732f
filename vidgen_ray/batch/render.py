"""Render a script: plan its lines, skip finished shots, render the rest and record the result of every line.

Lines stream: shots are rendered while later lines are still being checked.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from vidgen_ray.batch.director import Director, Remaining
from vidgen_ray.batch.estimate import pending_demand
from vidgen_ray.batch.line_planner import LinePlanner, NumberedLine
from vidgen_ray.batch.line_stream import first_lines, remaining_lines
from vidgen_ray.batch.options import GRACE_S, RenderOptions, RepeatedOptions
from vidgen_ray.batch.run_progress import ProgressListener
from vidgen_ray.batch.run_results import RunResults
from vidgen_ray.graph import check_profile
from vidgen_ray.outputs.folder import OutputFolder, software_versions
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.open_markers import new_writer
from vidgen_ray.planner import Demand, Plan, save_calibration
from vidgen_ray.profile import Profile
from vidgen_ray.provenance.c2pa_signing import check_signing
from vidgen_ray.script.lines import ScriptSettings

__all__ = ["GRACE_S", "RenderOptions", "RunReport", "render", "render_lines"]


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
    """Lines read but not started, because the run was stopped."""
    seconds: float
    gpu_seconds: float
    """GPU seconds of the finished shots, without failed shots and attempts with too low a likeness."""
    lora_loads: int
    """LoRA files loaded into a model."""
    layout: str | None
    """Kind of the last layout. `None` if there was nothing to render."""
    quarantined: tuple[str, ...]
    """Workers and encoders that were quarantined, with their nodes and the reasons."""


def render(
    script: ScriptSettings,
    profile: Profile,
    outputs: OutputFolder,
    options: RenderOptions,
    *,
    listener: ProgressListener,
    stop: threading.Event | None = None,
) -> RunReport:
    """Render all shots of a script into `outputs`. A shot that is finished with the same content key is skipped.

    When `stop` is set, no more shots start, and those in progress have `options.grace_s` seconds to finish; then raises
    KeyboardInterrupt. A failed line does not raise. Raises ScriptError if the script cannot be read, SetupError or ProfileError
    if weights are missing, no layout fits the cluster or nothing healthy is left.
    """
    check_profile(profile)
    check_signing(profile.provenance)
    profile = profile.with_commits()
    checker, first, whole = first_lines(script)
    planner = LinePlanner(
        checker,
        profile,
        outputs,
        fresh=options.fresh,
        replace=options.replace,
        keep_stages=options.keep_stages,
    )
    remaining = None if whole else partial(remaining_lines, script, planner)
    demand = None
    if options.max_cost is not None and not whole:
        demand = pending_demand(script, profile, outputs)
    return render_lines(
        planner,
        first,
        remaining,
        script.path.name,
        profile,
        options,
        listener=listener,
        stop=stop,
        demand=demand,
        is_script=True,
    )


def render_lines(
    planner: LinePlanner,
    first: Sequence[NumberedLine],
    remaining: Remaining | None,
    source: str,
    profile: Profile,
    options: RenderOptions,
    *,
    listener: ProgressListener,
    stop: threading.Event | None = None,
    demand: Demand | None = None,
    on_row: Callable[[ManifestRow], None] | None = None,
    is_script: bool = False,
) -> RunReport:
    """Render lines. `first`: the first ones. `remaining` starts to read and plan the rest, if there is any.

    `source`: name of the script. `demand` of the whole script, if it is known. `on_row` gets the manifest row of every line.
    `is_script`: earlier rows of `source` whose lines it no longer has become `replaced`.
    Otherwise as `render`.
    """
    started, outputs = time.monotonic(), planner.outputs
    run = new_writer()
    outputs.prepare()
    with outputs.lease(run) as lease:
        outputs.sweep()
        # The tasks that plan the remaining lines read the whole manifest.
        planned = planner.plan_first(first)
        with RunResults(outputs, run, source, lease, listener, on_row, is_script=is_script) as results:
            director = Director(
                run,
                profile,
                outputs,
                options,
                results,
                listener,
                stop or threading.Event(),
                planner,
                demand,
                lease,
            )
            director.accept(planned)
            results.lines_read(complete=remaining is None)
            if director.queue or remaining is not None:
                with director.connected(complete=remaining is None):
                    asyncio.run(director.render(remaining))
            lease.check()
        # Remove temporary files of processes that were killed on this machine.
        outputs.sweep()
    chosen = director.plan
    if chosen is not None and director.cluster is not None:
        save_calibration(profile.name, director.cluster.card, results.durations)
    report = RunReport(
        run=run,
        done=results.counts["done"],
        failed=results.counts["failed"],
        skipped=results.counts["skipped"],
        rejected=results.rejected_lines,
        left=director.left,
        seconds=round(time.monotonic() - started, 2),
        gpu_seconds=round(results.gpu_seconds, 2),
        lora_loads=results.lora_loads,
        layout=chosen.layout.kind if chosen else None,
        quarantined=tuple(director.quarantined),
    )
    repeated = RepeatedOptions.of(options, planner.checker.run_seed, planner.checker.changes)
    _write_run(outputs, report, source, profile, repeated, chosen, results)
    return report


def _write_run(
    outputs: OutputFolder,
    report: RunReport,
    source: str,
    profile: Profile,
    repeated: RepeatedOptions,
    chosen: Plan | None,
    results: RunResults,
) -> None:
    """Write `run.json`, which describes the last run in this folder."""
    outputs.write_run(
        {
            **asdict(report),
            "script": source,
            "profile": profile.model_dump(mode="json"),
            "profile_source": str(profile.source) if profile.source else None,
            "options": repeated.model_dump(mode="json"),
            "layout": asdict(chosen.layout) if chosen else None,
            "weights": {stage: sorted(digests) for stage, digests in sorted(results.weights.items())},
            "software": software_versions(),
        }
    )
