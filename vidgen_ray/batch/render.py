"""A whole script: check and plan each line, skip what is done, stream the rest, write down what became of every line."""

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
from vidgen_ray.batch.run_config import RunConfig
from vidgen_ray.batch.run_monitor import monitor_run
from vidgen_ray.batch.run_progress import ProgressListener
from vidgen_ray.batch.run_results import RunResults
from vidgen_ray.batch.start_actors import labels_of, start_actors
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


@dataclass(frozen=True, slots=True)
class RunReport:
    """How many lines ended how, and what it took."""

    run: str
    done: int
    failed: int
    skipped: int
    refused: int
    """Of the failed lines those that were wrong in the script."""
    left: int
    """Lines that a run which was stopped did not begin, of those that it had looked at."""
    seconds: float
    gpu_seconds: float
    """Of what came out: neither of failed shots nor of tries that were too unlike."""
    lora_loads: int
    """How often a LoRA was laid on the weights."""
    layout: str | None
    """None where there was nothing to do."""


def render(
    lines: Iterable[CheckedLine | RejectedLine],
    profile: Profile,
    outputs: OutputFolder,
    *,
    source: str,
    watcher: ProgressListener,
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
    """Render every shot of the script into `outputs`, on the cluster at `address` or on a Ray of its own.

    `cluster` says what GPUs to plan for; without it the run looks. `before_start` is shown the plan, and may raise. A shot
    that is done with the same content key is skipped, unless `fresh`. When `stop` is set no more lines are begun; those in
    progress have `grace_s` seconds. `stages` are what runs under each stage's name.
    Raises SetupError or ProfileError where the weights that the script needs are not there, or nothing holds the layout; a
    line that fails does not raise.
    """
    check_profile(profile)
    begun = time.monotonic()
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    outputs.prepare()
    with outputs.lease(run), RunResults(outputs, run, source, watcher) as ledger:
        spool, chosen, left = TaskFiles(outputs, run), None, 0
        try:
            errands = pending_shots(lines, profile, outputs, ledger, fresh=fresh, keep_stages=keep_stages)
            if fresh:
                errands = _without_cache(errands, outputs)
            ordered_window = in_lora_order(errands, lambda errand: errand.plan)
            stop = stop or threading.Event()
            demand = demand_of(errand.plan.shot for errand in spool.write(_until(stop, ordered_window)))
            if stop.is_set():
                left = demand.shots
            else:
                ledger.whole_script_read(demand.shots)
            if demand.shots and not left:
                on_our_own = address is None and not ray.is_initialized()
                if on_our_own:
                    cluster = cluster or this_machine()
                    chosen = _planned(profile, demand, cluster, price, before_start)
                with connected(address, cpus_needed(chosen.layout) if chosen else 0):
                    if on_our_own and chosen:
                        expect_gpus(sum(slot.has_gpu for slot in chosen.layout.slots))
                    cluster = cluster or live_cluster()
                    chosen = chosen or _planned(profile, demand, cluster, price, before_start)
                    job = RunConfig(
                        run=run,
                        profile=profile.pinned(demand.stages),
                        outputs=outputs,
                        layout=chosen.layout,
                        stages=stages,
                        chunk_frames=chunk_frames_of(profile, demand.stages),
                        use_cache=use_cache or keep_stages,
                        keep_stages=keep_stages,
                        fresh=fresh,
                        attempts=attempts,
                    )
                    left = _run(spool.parts, job, labels_of(chosen, cluster), ledger, watcher, stop, grace_s)
                save_calibration(profile.name, cluster.card, ledger.took)
        finally:
            spool.drop()
            # What this machine's processes left half made, where any was killed.
            outputs.sweep()
    report = RunReport(
        run=run,
        done=ledger.counts["done"],
        failed=ledger.counts["failed"],
        skipped=ledger.counts["skipped"],
        refused=ledger.refusals,
        left=left,
        seconds=round(time.monotonic() - begun, 2),
        gpu_seconds=round(ledger.gpu_seconds, 2),
        lora_loads=ledger.lora_loads,
        layout=chosen.layout.kind if chosen else None,
    )
    _write_run(outputs, report, source, profile, chosen, ledger)
    return report


def _planned(
    profile: Profile, demand: Demand, cluster: Cluster, price: float | None, before_start: Callable[[Plan], None]
) -> Plan:
    chosen = plan(profile, demand, cluster, calibration=load_calibration(profile.name, cluster.card), price=price)
    before_start(chosen)
    return chosen


def _run(
    parts: list[str],
    job: RunConfig,
    labels: Sequence[Label | None],
    ledger: RunResults,
    watcher: ProgressListener,
    stop: threading.Event,
    grace_s: float,
) -> int:
    """Have the parts rendered; how many lines were not begun, since the run was stopped."""
    left = 0
    with start_actors(job, labels) as board, monitor_run(board, watcher, stop, grace_s):
        # Ray Data takes a second to import, in which the actors start.
        from vidgen_ray.batch.ray_data import stream

        for ended in stream(parts, job, board):
            if ended is None:
                left += 1
            else:
                errand, outcome = ended
                ledger.ended(errand, outcome.result)
    return left


def _until(stop: threading.Event, errands: Iterable[ShotTask]) -> Iterator[ShotTask]:
    for errand in errands:
        yield errand
        if stop.is_set():
            return


def _without_cache(errands: Iterable[ShotTask], outputs: OutputFolder) -> Iterator[ShotTask]:
    for errand in errands:
        for attempt in (errand.plan, *errand.plan.again):
            outputs.stage_cache.drop(step.key for step in attempt.steps)
        yield errand


def _write_run(
    outputs: OutputFolder, report: RunReport, source: str, profile: Profile, chosen: Plan | None, ledger: RunResults
) -> None:
    """`run.json`: what ran last in this folder."""
    outputs.write_run(
        {
            **asdict(report),
            "script": source,
            "profile": profile.model_dump(mode="json"),
            "layout": asdict(chosen.layout) if chosen else None,
            "weights": {stage: sorted(digests) for stage, digests in sorted(ledger.weights.items())},
            "software": software_versions(),
        }
    )
