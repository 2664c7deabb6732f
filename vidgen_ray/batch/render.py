"""Render a script: plan its lines, skip finished shots, render the rest and record the result of every line."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import ray

from vidgen_ray.batch.lora_order import in_lora_order
from vidgen_ray.batch.pending_shots import pending_shots
from vidgen_ray.engine.engine_config import RunConfig
from vidgen_ray.batch.run_monitor import monitor_run
from vidgen_ray.batch.run_progress import ProgressListener
from vidgen_ray.batch.run_results import RunResults
from vidgen_ray.engine.fleet import labels_of, start_actors
from vidgen_ray.batch.task_files import ShotTask, TaskFiles
from vidgen_ray.engine.chunks import chunk_frames_of
from vidgen_ray.engine.ray_cluster import connected, expect_gpus, live_cluster
from vidgen_ray.engine.retries import ATTEMPTS
from vidgen_ray.graph import STAGE_BY_NAME, check_profile
from vidgen_ray.outputs.folder import OutputFolder, software_versions
from vidgen_ray.planner import (
    Cluster,
    Demand,
    Plan,
    cpus_needed,
    demand_of,
    load_calibration,
    plan,
    save_calibration,
    this_machine,
)
from vidgen_ray.planner.cluster import Label
from vidgen_ray.profile import Profile
from vidgen_ray.script.reader import CheckedLine, RejectedLine
from vidgen_ray.stages.base import Stage

GRACE_S = 60.0
"""Seconds that shots in progress may take to finish after a stop request."""


@dataclass(frozen=True, slots=True)
class RunReport:
    """Summary of a run."""

    run: str
    done: int
    failed: int
    skipped: int
    refused: int
    """Rejected lines. They are part of `failed`."""
    left: int
    """Lines read but not started, because the run was stopped."""
    seconds: float
    gpu_seconds: float
    """GPU seconds of the finished shots, without failed shots and attempts with too low a likeness."""
    lora_loads: int
    """LoRA files loaded into a model."""
    layout: str | None
    """Kind of the layout. `None` if there was nothing to render."""


def render(
    lines: Iterable[CheckedLine | RejectedLine],
    profile: Profile,
    outputs: OutputFolder,
    *,
    source: str,
    listener: ProgressListener,
    address: str | None = None,
    cluster: Cluster | None = None,
    price: float | None = None,
    before_start: Callable[[Plan], None] = lambda _: None,
    fresh: bool = False,
    use_cache: bool = True,
    keep_stages: bool = False,
    attempts: int = ATTEMPTS,
    stop: threading.Event | None = None,
    grace_s: float = GRACE_S,
    stages: Mapping[str, type[Stage[Any]]] = STAGE_BY_NAME,
) -> RunReport:
    """Render all shots of a script into `outputs`, on the cluster at `address` or on a new local Ray.

    `cluster`: GPUs to plan for. Default: detect. `before_start` is called with the plan and may raise. A shot that is finished
    with the same content key is skipped unless `fresh`. When `stop` is set, no more shots start, and those in progress have
    `grace_s` seconds to finish. `stages`: stage name -> class that implements it.
    A failed line does not raise. Raises SetupError or ProfileError if weights are missing or no layout fits the cluster.
    """
    check_profile(profile)
    started = time.monotonic()
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    outputs.prepare()
    with outputs.lease(run), RunResults(outputs, run, source, listener) as results:
        task_files, chosen, left = TaskFiles(outputs, run), None, 0
        try:
            tasks = pending_shots(lines, profile, outputs, results, fresh=fresh, keep_stages=keep_stages)
            if fresh:
                tasks = _drop_cached(tasks, outputs)
            ordered = in_lora_order(tasks, lambda task: task.plan)
            stop = stop or threading.Event()
            demand = demand_of(task.plan.shot for task in task_files.write(_until(stop, ordered)))
            if stop.is_set():
                left = demand.shots
            else:
                results.whole_script_read(demand.shots)
            if demand.shots and not left:
                own_ray = address is None and not ray.is_initialized()
                if own_ray:
                    cluster = cluster or this_machine()
                    chosen = _planned(profile, demand, cluster, price, before_start)
                with connected(address, cpus_needed(chosen.layout) if chosen else 0):
                    if own_ray and chosen:
                        expect_gpus(sum(slot.has_gpu for slot in chosen.layout.slots))
                    cluster = cluster or live_cluster()
                    chosen = chosen or _planned(profile, demand, cluster, price, before_start)
                    config = RunConfig(
                        run=run,
                        profile=profile.pinned(demand.stages),
                        outputs=outputs,
                        layout=chosen.layout,
                        stages=stages,
                        chunk_frames=chunk_frames_of(profile, [stages[stage.name] for stage in demand.stages]),
                        use_cache=use_cache or keep_stages,
                        keep_stages=keep_stages,
                        fresh=fresh,
                        attempts=attempts,
                    )
                    left = _run(task_files.parts, config, labels_of(chosen, cluster), results, listener, stop, grace_s)
                save_calibration(profile.name, cluster.card, results.durations)
        finally:
            task_files.drop()
            # Remove temporary files of processes that were killed on this machine.
            outputs.sweep()
    report = RunReport(
        run=run,
        done=results.counts["done"],
        failed=results.counts["failed"],
        skipped=results.counts["skipped"],
        refused=results.refusals,
        left=left,
        seconds=round(time.monotonic() - started, 2),
        gpu_seconds=round(results.gpu_seconds, 2),
        lora_loads=results.lora_loads,
        layout=chosen.layout.kind if chosen else None,
    )
    _write_run(outputs, report, source, profile, chosen, results)
    return report


def _planned(
    profile: Profile, demand: Demand, cluster: Cluster, price: float | None, before_start: Callable[[Plan], None]
) -> Plan:
    chosen = plan(profile, demand, cluster, calibration=load_calibration(profile.name, cluster.card), price=price)
    before_start(chosen)
    return chosen


def _run(
    parts: list[str],
    config: RunConfig,
    labels: Sequence[Label | None],
    results: RunResults,
    listener: ProgressListener,
    stop: threading.Event,
    grace_s: float,
) -> int:
    """Render the parts. Return how many lines were not started because the run was stopped."""
    left = 0
    with start_actors(config, labels) as run_state, monitor_run(run_state, listener, stop, grace_s):
        # Import Ray Data (about one second) while the actors start.
        from vidgen_ray.batch.ray_data import stream

        for item in stream(parts, config, run_state):
            if item is None:
                left += 1
            else:
                task, result = item
                results.finished(task, result.result)
    return left


def _until(stop: threading.Event, tasks: Iterable[ShotTask]) -> Iterator[ShotTask]:
    for task in tasks:
        yield task
        if stop.is_set():
            return


def _drop_cached(tasks: Iterable[ShotTask], outputs: OutputFolder) -> Iterator[ShotTask]:
    for task in tasks:
        for attempt in (task.plan, *task.plan.again):
            outputs.stage_cache.drop(step.key for step in attempt.steps)
        yield task


def _write_run(
    outputs: OutputFolder, report: RunReport, source: str, profile: Profile, chosen: Plan | None, results: RunResults
) -> None:
    """Write `run.json`, which describes the last run in this folder."""
    outputs.write_run(
        {
            **asdict(report),
            "script": source,
            "profile": profile.model_dump(mode="json"),
            "layout": asdict(chosen.layout) if chosen else None,
            "weights": {stage: sorted(digests) for stage, digests in sorted(results.weights.items())},
            "software": software_versions(),
        }
    )
