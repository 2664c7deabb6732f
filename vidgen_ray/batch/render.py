"""A whole script on Ray Data: plan, skip what is done, stream the rest, write down what became of every line."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from vidgen_ray.atomic import write_atomically
from vidgen_ray.batch.layout import Layout, layout_of
from vidgen_ray.batch.operators import Job
from vidgen_ray.batch.stream import stream
from vidgen_ray.batch.watcher import Watcher
from vidgen_ray.errors import ScriptError, VidgenError
from vidgen_ray.graph import ShotPlan, ShotPlanner, check_profile, params_of, stages_used
from vidgen_ray.outputs.folder import OutputFolder, software_versions
from vidgen_ray.outputs.manifest import REFUSED, FailedLine, ManifestRow, Status, Superseded, write_failures, write_manifest
from vidgen_ray.outputs.records import Failure, ShotRecord
from vidgen_ray.profile import Profile
from vidgen_ray.script import RejectedLine, Script
from vidgen_ray.shot import Shot
from vidgen_ray.stages.realesrgan import RealESRGANParams, RealESRGANStage
from vidgen_ray.steps import StepFailed


@dataclass(frozen=True, slots=True)
class RunReport:
    """How many lines ended how."""

    run: str
    done: int
    failed: int
    skipped: int
    seconds: float


def render(
    script: Script,
    profile: Profile,
    out: Path,
    *,
    watcher: Watcher,
    address: str | None = None,
    fresh: bool = False,
    use_cache: bool = True,
    keep_stages: bool = False,
) -> RunReport:
    """Render every shot of the script into `out`, on the cluster at `address` or on a Ray of its own.

    A shot that is done with the same content key is skipped, unless `fresh`. Raises SetupError or ProfileError where the
    weights that the script needs are not there; a line that fails does not raise.
    """
    check_profile(profile)
    begun = time.monotonic()
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    outputs = OutputFolder(out.absolute())
    outputs.prepare()
    ledger = _Ledger(run, script, watcher)
    stages = stages_used(script.shots)
    params = params_of(profile, stages)
    profile = profile.pinned(stages)
    plans, unplanned = _planned(script, ShotPlanner(params, profile.encode))
    before = {} if fresh else {plan.shot.id: done for plan in plans if (done := outputs.done(plan, keep_stages))}
    todo = [plan for plan in plans if plan.shot.id not in before]
    layout = layout_of(profile, stages_used(plan.shot for plan in todo))
    if fresh:
        outputs.stage_cache.drop(step.key for plan in todo for step in plan.steps)
    watcher.planned(len(script.shots) + len(script.rejected), len(before), len(script.rejected))
    try:
        for line in script.rejected:
            ledger.refused(line)
        for shot, failure in unplanned:
            ledger.ended(shot, failure)
        for plan in plans:
            if plan.shot.id in before:
                ledger.skipped(plan.shot, before[plan.shot.id])
        job = Job(run, profile, outputs.root, use_cache=use_cache or keep_stages, keep_stages=keep_stages)
        upscaler = params.get(RealESRGANStage.name)
        frames_per_call = upscaler.frames_per_call if isinstance(upscaler, RealESRGANParams) else 1
        for plan, result in stream(todo, job, layout, frames_per_call, address):
            ledger.ended(plan.shot, result)
    finally:
        # A run that is interrupted by Ctrl-C, too, leaves a true account of what ended.
        ledger.write(outputs.root)
        outputs.sweep()
    report = RunReport(run=run, seconds=round(time.monotonic() - begun, 2), **ledger.counts())
    _write_run(outputs.root, report, script, profile, layout, plans)
    return report


def _planned(script: Script, planner: ShotPlanner) -> tuple[list[ShotPlan], list[tuple[Shot, Failure]]]:
    """The plans of the shots, and the shots that name something which is not there."""
    plans, unplanned = [], []
    for shot in script.shots:
        try:
            plans.append(planner(shot))
        except (VidgenError, OSError) as error:
            unplanned.append((shot, StepFailed("plan", error).failure()))
    return plans, unplanned


class _Ledger:
    """What became of every line: each is entered exactly once."""

    def __init__(self, run: str, script: Script, watcher: Watcher) -> None:
        self._run = run
        self._script = script
        self._watcher = watcher
        self._rows: list[ManifestRow] = []
        self._failed: list[FailedLine] = []

    def refused(self, line: RejectedLine) -> None:
        failure = StepFailed(REFUSED, ScriptError(line.errors)).failure()
        self._failed.append(FailedLine(line.id, line.script, line.fields, failure))
        prompt = line.fields.get("prompt")
        self._enter(ManifestRow.of_refused_line(self._run, line.script, line.id, line.line, prompt, failure))

    def skipped(self, shot: Shot, record: ShotRecord) -> None:
        self._enter(ManifestRow.of_shot(self._run, self._script.source, shot, self._line(shot), record, "skipped"))

    def ended(self, shot: Shot, result: ShotRecord | Failure) -> None:
        if isinstance(result, Failure):
            line = shot.model_dump(mode="json")
            self._failed.append(FailedLine(shot.id or "", self._script.source, line, result))
        status: Status = "failed" if isinstance(result, Failure) else "done"
        self._enter(ManifestRow.of_shot(self._run, self._script.source, shot, self._line(shot), result, status))

    def counts(self) -> dict[str, int]:
        return {status: sum(row.status == status for row in self._rows) for status in ("done", "failed", "skipped")}

    def write(self, out: Path) -> None:
        ended = {row.id for row in self._rows}
        before = {self._script.replaces[shot_id] for shot_id in ended if shot_id in self._script.replaces}
        superseded = Superseded(ended | before, self._script.source)
        write_manifest(out, self._run, self._rows, superseded)
        write_failures(out, superseded, self._failed)

    def _line(self, shot: Shot) -> int:
        assert shot.id is not None
        return self._script.lines[shot.id]

    def _enter(self, row: ManifestRow) -> None:
        self._rows.append(row)
        self._watcher.ended(row)


def _write_run(
    root: Path, report: RunReport, script: Script, profile: Profile, layout: Layout, plans: Sequence[ShotPlan]
) -> None:
    """`run.json`: what ran last in this folder."""
    weights: dict[str, set[str]] = {}
    for step in (step for plan in plans for step in plan.steps):
        weights.setdefault(step.stage, set()).update(step.weights)
    content = {
        **asdict(report),
        "script": script.source,
        "profile": profile.model_dump(mode="json"),
        "layout": [{**asdict(pool), "stages": [stage.name for stage in pool.stages]} for pool in layout.pools],
        "weights": {stage: sorted(digests) for stage, digests in weights.items()},
        "software": software_versions(),
    }
    write_atomically(root / "run.json", json.dumps(content, indent=1))
