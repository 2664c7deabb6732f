"""A whole script on Ray Data: plan, skip what is done, stream the rest, write down what became of every line."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from vidgen_ray.batch.operators import Job
from vidgen_ray.batch.stream import stream
from vidgen_ray.graph import ShotPlan, params_of, plan_shot, stages_used
from vidgen_ray.outputs.atomic import write_atomically
from vidgen_ray.outputs.folder import OutputFolder, software_versions
from vidgen_ray.outputs.manifest import ManifestRow, write_failures, write_manifest
from vidgen_ray.outputs.records import Failure, ShotRecord
from vidgen_ray.profile import Profile
from vidgen_ray.script import Script
from vidgen_ray.stages.base import Stage

class Watcher(Protocol):
    """Is told how a run goes."""

    def planned(self, total: int, done_before: int, refused: int) -> None: ...

    def ended(self, row: ManifestRow) -> None: ...


@dataclass(frozen=True, slots=True)
class RunReport:
    """How many lines ended how."""

    run: str
    done: int
    failed: int
    skipped: int
    seconds: float

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0


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
    begun = time.monotonic()
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
    outputs = OutputFolder(out.absolute())
    outputs.sweep()
    stages = stages_used(script.shots)
    params = params_of(profile, stages)
    plans = [plan_shot(shot, params, profile.encode) for shot in script.shots]
    before = {} if fresh else {plan.key: record for plan in plans if (record := outputs.done(plan, keep_stages))}
    todo = [plan for plan in plans if plan.key not in before]
    if fresh:
        outputs.stage_cache.drop(step.key for plan in todo for step in plan.steps)
    watcher.planned(len(plans) + len(script.rejected), len(before), len(script.rejected))

    rows: list[ManifestRow] = []
    failures: list[tuple[dict[str, Any], Failure]] = []

    def ended(row: ManifestRow) -> None:
        rows.append(row)
        watcher.ended(row)

    for line in script.rejected:
        reason = Failure(
            stage="script", error="ScriptError", message="; ".join(map(str, line.errors)), attempts=0, worker="driver"
        )
        failures.append((line.raw, reason))
        ended(ManifestRow.of_refused_line(run, line.id, line.line, line.raw.get("prompt"), reason))
    for plan in plans:
        if record := before.get(plan.key):
            ended(ManifestRow.of_shot(run, plan.shot, _line(script, plan), record, "skipped"))
    job = Job(run, profile, outputs.root, use_cache=use_cache or keep_stages, keep_stages=keep_stages)
    for plan, result in stream(todo, job, stages, address):
        failed = isinstance(result, Failure)
        if isinstance(result, Failure):
            failures.append((plan.shot.model_dump(mode="json", exclude_defaults=True), result))
        ended(ManifestRow.of_shot(run, plan.shot, _line(script, plan), result, "failed" if failed else "done"))

    write_manifest(outputs.root, run, rows)
    write_failures(outputs.root, failures)
    count = {status: sum(row.status == status for row in rows) for status in ("done", "failed", "skipped")}
    report = RunReport(run=run, seconds=round(time.monotonic() - begun, 2), **count)
    _write_run(outputs.root, report, script, profile, stages, plans)
    return report


def _line(script: Script, plan: ShotPlan) -> int:
    assert plan.shot.id is not None
    return script.lines[plan.shot.id]


def _write_run(
    root: Path, report: RunReport, script: Script, profile: Profile, stages: Sequence[type[Stage[Any]]], plans: Sequence[ShotPlan]
) -> None:
    """`run.json`: what ran last in this folder."""
    weights = {step.stage: step.weights for plan in plans for step in plan.steps}
    content = {
        **asdict(report),
        "script": script.source,
        "profile": profile.model_dump(mode="json"),
        "layout": {stage.actor: profile.actor_of(stage).model_dump(include={"actors", "gpus", "cpus"}) for stage in stages},
        "weights": weights,
        "software": software_versions(),
    }
    write_atomically(root / "run.json", json.dumps(content, indent=1))
