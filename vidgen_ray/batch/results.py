"""Results of a run: count every line once, report it to the listener, and write it to the manifest and to the metrics."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from functools import cached_property
from types import TracebackType
from typing import Any, Self

from vidgen_ray.batch.progress import RunListener
from vidgen_ray.batch.run_options import RecordedOptions
from vidgen_ray.engine.engine_metrics import ENGINE_METRICS, EngineMetrics, MetricSpec
from vidgen_ray.engine.status import Attempt
from vidgen_ray.errors import ScriptError
from vidgen_ray.graph import RelativeCost, relative_costs
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.lease import Lease
from vidgen_ray.outputs.manifest import REJECTED, Finished, LastRun, ManifestRow, Status
from vidgen_ray.outputs.manifest_writer import ManifestWriter, fields_of
from vidgen_ray.outputs.records import Failure, ShotRecord
from vidgen_ray.outputs.run_log import RunLabels
from vidgen_ray.planner.demand import ENCODING, encoded_mpx
from vidgen_ray.script.lines import Line
from vidgen_ray.shot import Shot

METRICS = {"vidgen_shots": MetricSpec("counter", ("status",), "Finished shots: done or failed."), **ENGINE_METRICS}


class RunMetrics(EngineMetrics):
    """Metrics of one run."""

    definitions = METRICS

    def __init__(
        self, labels: RunLabels, on_quarantined: Callable[[str, str], None], on_attempt: Callable[[Attempt], None]
    ) -> None:
        """`on_quarantined` gets the name and node of each quarantined process, and the reason."""
        super().__init__(labels.profile, **labels.of_metrics())
        self._on_quarantined = on_quarantined
        self._on_attempt = on_attempt

    def attempt_ended(self, attempt: Attempt) -> None:
        self._on_attempt(attempt)

    def shot_ended(self, status: Status) -> None:
        self._count("vidgen_shots", 1, status=status)

    def quarantined(self, process: str, reason: str) -> None:
        super().quarantined(process, reason)
        self._on_quarantined(process, reason)


CALIBRATION_SHOTS = 1000
"""Last shots per stage whose durations are kept for calibration."""


class RunResults:
    """Results of one run. A context manager: the manifest is written even if the block raises."""

    def __init__(
        self,
        outputs: OutputFolder,
        labels: RunLabels,
        lease: Lease,
        listener: RunListener,
        on_row: Callable[[ManifestRow], None] | None,
        recorded: RecordedOptions,
        *,
        is_script: bool,
    ) -> None:
        """`is_script`: the run has a script, not one of several data sets with this name, or a part of the failed lines."""
        self._is_script = is_script
        self._lease = lease
        self._labels = labels
        self._listener = listener
        self._on_row = on_row
        self._manifest = ManifestWriter(
            outputs, labels.run, labels.script, recorded.model_dump(mode="json", exclude_defaults=True)
        )
        self._whole_script = False
        self.counts: Counter[str] = Counter(done=0, failed=0, skipped=0)
        self.rejected_lines = 0
        """Lines that failed before rendering. They are part of the failed ones."""
        self._unread_lines = 0
        """Rejected lines without a shot. Each may stand for shots of an earlier run, with any ids."""
        self.to_render = 0
        self.gpu_seconds = 0.0
        self.prices = 0.0
        """Charges of servers for the stages of finished shots."""
        self.price: float | None = None
        """Price of a GPU-hour. `None` if it is unknown, or without GPUs."""
        self.currency: str | None = None
        """Currency of the price. `None` if it is the user's."""
        self.lora_loads = 0
        self.without_face = 0
        """Finished shots with a face photo in whose image no face was found."""
        self._measured: dict[str, deque[tuple[float, Shot]]] = defaultdict(lambda: deque(maxlen=CALIBRATION_SHOTS))
        """Stage, or ENCODING -> seconds of the last shots that were not taken from the cache."""
        self.weights: dict[str, set[str]] = defaultdict(set)
        """Stage -> digests of the weights that its results were made with."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._lease.is_sure:
            self._manifest.discard()
        else:
            results = self.counts["done"] + self.counts["failed"] - self.rejected_lines
            # The error of the run, if there is one, says why nothing can be written.
            with nullcontext() if kind is None else suppress(OSError):
                damaged = self._manifest.close(
                    whole_script=self._whole_script,
                    every_line_has_a_row=self._is_script
                    and self._whole_script
                    and not self._unread_lines
                    and results == self.to_render,
                    every_shot_has_a_row=kind is None,
                )
                for path in damaged:
                    self._listener.on_message(
                        f"{path}: was damaged and is no longer part of the manifest. Rendering its script again restores its "
                        "rows and skips finished shots"
                    )

    def rejected(self, line: Line) -> None:
        self.rejected_lines += 1
        self._unread_lines += 1
        failure = Failure.of(REJECTED, ScriptError(line.errors))
        row = ManifestRow.of_rejected_line(
            self._labels.run, line.script, line.id, line.script_line, line.fields.get("prompt"), failure
        )
        self._enter(row, line.fields)
        self._listener.on_rejected(row)

    def unplannable(self, line: Line, failure: Failure) -> None:
        self.rejected_lines += 1
        self._listener.on_rejected(self._failed(line, failure))

    def skipped(self, line: Line, finished: Finished) -> None:
        self._enter(self._row(line, finished, "reused"), None, line.replaces)

    def pending(self) -> None:
        """A shot is to be rendered."""
        self.to_render += 1

    def lines_read(self, *, complete: bool) -> None:
        """Report the lines read so far. `complete`: the script was read to its end."""
        self._whole_script = complete
        self._listener.on_lines(
            self.to_render + self.counts["skipped"] + self.rejected_lines, self.counts["skipped"], self.rejected_lines, complete
        )

    def failed(self, line: Line, failure: Failure) -> None:
        """A pending shot has failed."""
        self._listener.on_finished(self._failed(line, failure))

    def found(self, line: Line, finished: Finished) -> None:
        """A pending shot turned out to be finished."""
        self.to_render -= 1
        self.skipped(line, finished)
        self.lines_read(complete=self._whole_script)

    def finished(self, line: Line, record: ShotRecord) -> None:
        """The shot was rendered."""
        self.gpu_seconds += sum(step.gpu_seconds for step in record.stages)
        self.prices += sum(step.price or 0.0 for step in record.stages)
        self.lora_loads += sum(step.adapter_loads for step in record.stages)
        for step in record.stages:
            self.weights[step.stage].update(step.weights)
            # Seconds on several GPUs are no measure of one.
            if not step.cached and step.gpu_seconds <= step.seconds:
                self._measured[step.stage].append((step.seconds, record.shot))
        if record.encode_s is not None:
            self._measured[ENCODING].append((record.encode_s, record.shot))
        row = self._row(line, record, "rendered")
        self._enter(row, None, line.replaces)
        self._listener.on_finished(row)

    @cached_property
    def durations(self) -> dict[str, list[tuple[float, RelativeCost]]]:
        """Stage, or ENCODING -> (seconds, relative cost) of the last shots that were not taken from the cache.

        Read it after the last shot.
        """

        def cost(name: str, shot: Shot) -> RelativeCost:
            return RelativeCost(mpx := encoded_mpx(shot), mpx) if name == ENCODING else relative_costs(shot, (name,))[name]

        return {name: [(seconds, cost(name, shot)) for seconds, shot in last] for name, last in self._measured.items()}

    def _row(self, line: Line, result: Finished | Failure, last_run: LastRun) -> ManifestRow:
        """Return the row of a shot, with its cost. One that was found by its row in an earlier run has that already."""
        row = ManifestRow.of_shot(self._labels.run, line.script, line.shot, line.script_line, result, last_run)
        if not isinstance(result, ShotRecord):
            return row
        costs = [step.price for step in result.stages if step.price is not None]
        costs += [] if self.price is None else [sum(step.gpu_seconds for step in result.stages) * self.price / 3600]
        return row.model_copy(update={"cost": round(sum(costs), 6), "currency": self.currency}) if costs else row

    def _failed(self, line: Line, failure: Failure) -> ManifestRow:
        row = self._row(line, failure, "failed")
        self._enter(row, fields_of(line.shot), line.replaces)
        return row

    def _enter(self, row: ManifestRow, fields: Mapping[str, Any] | None, replaces: str | None = None) -> None:
        """Record the row of a line. `fields`: of a failed line."""
        self.without_face += row.shows_no_face
        if self._labels.team is not None or self._labels.submission_id is not None:
            row = row.model_copy(update={"team": self._labels.team, "submission_id": self._labels.submission_id})
        self._manifest.add(row, fields=fields, replaces=replaces)
        # After the row, for another thread that ends the run.
        self.counts["skipped" if row.last_run == "reused" else row.status] += 1
        if self._on_row is not None:
            self._on_row(row)
