"""What became of every line: each is entered exactly once, counted, told to the watcher and written down."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from types import TracebackType
from typing import Self

from vidgen_ray.batch.run_progress import ProgressListener
from vidgen_ray.batch.task_files import ShotTask
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import ScriptError
from vidgen_ray.graph import relative_costs
from vidgen_ray.outputs.failures import FailedLine
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import REJECTED, ManifestRow
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.records import DoneShot, Failure, ShotRecord
from vidgen_ray.script.reader import CheckedLine, RejectedLine

SHOTS_MEASURED = 1000


class RunResults:
    """A context manager: what was entered is kept, whatever ends the block."""

    def __init__(self, outputs: OutputFolder, run: str, source: str, watcher: ProgressListener) -> None:
        self._run = run
        self._source = source
        self._watcher = watcher
        self._manifest = ManifestWriter(outputs, run, source)
        self._whole_script = False
        self.counts: Counter[str] = Counter(done=0, failed=0, skipped=0)
        self.refusals = 0
        self.gpu_seconds = 0.0
        self.lora_loads = 0
        self.took: dict[str, deque[tuple[float, float]]] = defaultdict(lambda: deque(maxlen=SHOTS_MEASURED))
        """Stage -> seconds and work of the last shots that it computed."""
        self.weights: dict[str, set[str]] = defaultdict(set)
        """Stage -> digests of what its results were made with."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manifest.close(whole_script=self._whole_script)

    def refused(self, line: RejectedLine) -> None:
        self.refusals += 1
        failure = StepFailed(REJECTED, ScriptError(line.errors)).failure()
        row = ManifestRow.of_rejected_line(self._run, line.script, line.id, line.line, line.fields.get("prompt"), failure)
        self._enter(row, FailedLine(line.id, line.script, line.fields, failure), None)
        self._watcher.on_rejected(row)

    def unplanned(self, line: CheckedLine, failure: Failure) -> None:
        self._watcher.on_rejected(self._failed(line, failure))

    def skipped(self, errand: ShotTask, done: DoneShot) -> None:
        row = ManifestRow.of_shot(self._run, self._source, errand.plan.shot, errand.line, done, "skipped")
        self._enter(row, None, errand.replaces)

    def whole_script_read(self, pending_shots: int) -> None:
        """Every line is checked; so many are to be rendered."""
        self._whole_script = True
        before = self.counts
        self._watcher.on_planned(pending_shots + before.total(), before["skipped"], before["failed"])

    def ended(self, errand: ShotTask, result: ShotRecord | Failure) -> None:
        """A line that was rendered, or tried."""
        if isinstance(result, Failure):
            row = self._failed(CheckedLine(errand.plan.shot, errand.line, errand.replaces), result)
            self._watcher.on_finished(row)
            return
        self.gpu_seconds += sum(step.gpu_seconds for step in result.stages)
        self.lora_loads += sum(step.adapter_loads for step in result.stages)
        costs = relative_costs(result.shot)
        for step in result.stages:
            self.weights[step.stage].update(step.weights)
            if not step.cached:
                self.took[step.stage].append((step.seconds, costs[step.stage]))
        row = ManifestRow.of_shot(self._run, self._source, errand.plan.shot, errand.line, result, "done")
        self._enter(row, None, errand.replaces)
        self._watcher.on_finished(row)

    def _failed(self, line: CheckedLine, failure: Failure) -> ManifestRow:
        again = FailedLine(line.shot.id or "", self._source, line.shot.model_dump(mode="json"), failure)
        row = ManifestRow.of_shot(self._run, self._source, line.shot, line.line, failure, "failed")
        self._enter(row, again, line.replaces)
        return row

    def _enter(self, row: ManifestRow, failed: FailedLine | None, replaces: str | None) -> None:
        self.counts[row.status] += 1
        self._manifest.add(row, failed=failed, replaces=replaces)
