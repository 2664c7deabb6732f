"""Prometheus metrics of an engine, exported through Ray. Runs and servers add their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ray.util.metrics import Counter, Gauge, Histogram

from vidgen_ray.engine.status import Attempt, Snapshot

_Kind = Literal["counter", "histogram", "gauge"]

SECONDS = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 1800.0]
"""Bucket bounds of histograms in seconds. Quantiles of real stages (seconds to minutes) are accurate to about a third."""
OTHER = "other"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """Definition of one metric."""

    kind: _Kind
    labels: tuple[str, ...]
    description: str


def of_kind(metrics: Mapping[str, MetricSpec], kind: _Kind) -> list[tuple[str, MetricSpec]]:
    """Return name and definition of the metrics of one kind."""
    return [(name, spec) for name, spec in metrics.items() if spec.kind == kind]


class LabelLimit:
    """Limit on the values of a label: the first `limit` values are kept, further ones become `other`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        if name in self._known:
            return name
        if len(self._known) >= self._limit:
            return OTHER
        self._known.add(name)
        return name


SUFFIXES: dict[_Kind, tuple[str, ...]] = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}

MAX_ERROR_LABELS = 20
"""Error classes with a label value of their own. Further ones are counted as `other`, to limit the number of series."""

ENGINE_METRICS = {
    "vidgen_step_seconds": MetricSpec(
        "histogram", ("stage",), "Duration of a stage for one shot in seconds, without cache hits."
    ),
    "vidgen_step_failures": MetricSpec("counter", ("stage", "error"), "Failed attempts of a stage, by error class."),
    "vidgen_retries": MetricSpec("counter", ("stage",), "Attempts of a stage after the first."),
    "vidgen_cache_hits": MetricSpec("counter", ("stage",), "Stage results taken from the cache."),
    "vidgen_adapter_loads": MetricSpec("counter", (), "LoRA files loaded into a model."),
    "vidgen_frames_upscaled": MetricSpec("counter", (), "Upscaled frames."),
    "vidgen_quarantines": MetricSpec("counter", (), "Workers and encoders that were quarantined."),
    "vidgen_queued": MetricSpec("gauge", ("stage",), "Shots waiting for a worker of the stage."),
    "vidgen_running": MetricSpec("gauge", ("stage",), "Shots running on a worker of the stage."),
    "vidgen_workers": MetricSpec("gauge", ("stage",), "Workers that hold the stage."),
    "vidgen_busy_share": MetricSpec("gauge", ("stage",), "Utilization of these workers over the last 30 seconds, 0 to 1."),
    "vidgen_quarantined": MetricSpec("gauge", (), "Workers and encoders that are in quarantine or given up."),
    "vidgen_shots_in_progress": MetricSpec("gauge", (), "Shots that have started and not finished."),
    "vidgen_gpus_busy_share": MetricSpec("gauge", (), "GPU utilization over the last 30 seconds, 0 to 1."),
}
"""Labels are in addition to `profile` and those of the run, which all metrics have."""


class EngineMetrics:
    """Metrics of one engine, in one process that is connected to Ray. Observer of the engine.

    Subclasses with metrics of their own extend `definitions`.
    """

    definitions: ClassVar[Mapping[str, MetricSpec]] = ENGINE_METRICS

    def __init__(self, profile: str, **labels: str) -> None:
        """`labels`: further labels of all metrics."""
        self._tags = _in_ascii({"profile": profile, **labels})
        all_of = {name: (spec.description, (*self._tags, *spec.labels)) for name, spec in self.definitions.items()}
        self._counters = {n: Counter(n, *all_of[n]) for n, _ in of_kind(self.definitions, "counter")}
        self._gauges = {n: Gauge(n, *all_of[n]) for n, _ in of_kind(self.definitions, "gauge")}
        self._histograms = {
            n: Histogram(n, all_of[n][0], SECONDS, all_of[n][1]) for n, _ in of_kind(self.definitions, "histogram")
        }
        self._errors = LabelLimit(MAX_ERROR_LABELS)

    def attempt_ended(self, attempt: Attempt) -> None:
        """Do nothing: the other events have what is counted."""

    def step_ended(self, stage: str, seconds: float, cached: bool) -> None:
        if cached:
            self._count("vidgen_cache_hits", 1, stage=stage)
        else:
            self._observe("vidgen_step_seconds", seconds, stage=stage)

    def step_failed(self, stage: str, error_class: str) -> None:
        """Count one failed attempt. The last attempt counts too."""
        self._count("vidgen_step_failures", 1, stage=stage, error=self._errors(error_class))

    def retried(self, stage: str) -> None:
        self._count("vidgen_retries", 1, stage=stage)

    def adapter_loads(self, n: int) -> None:
        self._count("vidgen_adapter_loads", n)

    def frames_upscaled(self, n: int) -> None:
        self._count("vidgen_frames_upscaled", n)

    def quarantined(self, process: str, reason: str) -> None:
        self._count("vidgen_quarantines", 1)

    def snapshot(self, snapshot: Snapshot) -> None:
        """Set the gauges."""
        self._set("vidgen_quarantined", len(snapshot.quarantined))
        for stage, status in snapshot.stages.items():
            self._set("vidgen_queued", status.queued, stage=stage)
            self._set("vidgen_running", status.running, stage=stage)
            self._set("vidgen_workers", status.workers, stage=stage)
            self._set("vidgen_busy_share", status.busy, stage=stage)
        self._set("vidgen_shots_in_progress", snapshot.in_progress)
        if snapshot.gpus_busy is not None:
            self._set("vidgen_gpus_busy_share", snapshot.gpus_busy)

    def _count(self, name: str, amount: float, **labels: str) -> None:
        if amount > 0:  # Ray's counters reject an increment of 0
            self._counters[name].inc(amount, tags=self._labelled(labels))

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._gauges[name].set(value, tags=self._labelled(labels))

    def _observe(self, name: str, seconds: float, **labels: str) -> None:
        self._histograms[name].observe(max(0.0, seconds), tags=self._labelled(labels))

    def _labelled(self, labels: Mapping[str, str]) -> dict[str, str]:
        return {**self._tags, **_in_ascii(labels)} if labels else self._tags


def _in_ascii(labels: Mapping[str, str]) -> dict[str, str]:
    """Return the labels with other letters, such as those of a script's name, escaped: Ray takes ASCII only."""
    return {name: value.encode("ascii", "backslashreplace").decode() for name, value in labels.items()}


def exported_names(name: str, spec: MetricSpec) -> tuple[str, ...]:
    """Return the names of the Prometheus series of a metric."""
    return tuple(f"ray_{name}{suffix}" for suffix in SUFFIXES[spec.kind])
