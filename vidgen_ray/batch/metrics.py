"""What a run tells Prometheus, through Ray: every metric's name, kind, labels and meaning, and one object that feeds them.

Ray puts `ray_` before each name, and after it `_total` for a counter, `_bucket`, `_count` and `_sum` for a histogram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ray.util.metrics import Counter, Gauge, Histogram

from vidgen_ray.batch.run_progress import Snapshot
from vidgen_ray.outputs.manifest import Status

Kind = Literal["counter", "histogram", "gauge"]
SUFFIXES: dict[Kind, tuple[str, ...]] = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}

STEP_SECONDS = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 1800.0]
"""Bounds of the histogram's buckets: quantiles of real stages, which take seconds to minutes, come out to a third or so."""
ERRORS_NAMED = 20
"""Classes of errors that get a label of their own; further ones are `other`, so that the series stay few."""


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric. `labels` beside `profile`, which all have."""

    kind: Kind
    labels: tuple[str, ...]
    about: str


METRICS = {
    "vidgen_shots": MetricSpec("counter", ("status",), "Shots that ended: done or failed."),
    "vidgen_step_seconds": MetricSpec("histogram", ("stage",), "Seconds of a stage's run on one shot, cache hits left out."),
    "vidgen_step_failures": MetricSpec("counter", ("stage", "error"), "Attempts of a stage that failed, by class of error."),
    "vidgen_retries": MetricSpec("counter", ("stage",), "Attempts of a stage after the first."),
    "vidgen_cache_hits": MetricSpec("counter", ("stage",), "Results of a stage taken from the cache."),
    "vidgen_adapter_loads": MetricSpec("counter", (), "LoRA files loaded into a model."),
    "vidgen_frames_upscaled": MetricSpec("counter", (), "Frames that came out of the upscaler."),
    "vidgen_queued": MetricSpec("gauge", ("stage",), "Shots that wait for a worker of the stage."),
    "vidgen_running": MetricSpec("gauge", ("stage",), "Shots that a worker of the stage has."),
    "vidgen_workers": MetricSpec("gauge", ("stage",), "Workers that hold the stage."),
    "vidgen_busy_share": MetricSpec("gauge", ("stage",), "Share of those workers' time spent on work, last 30 seconds."),
    "vidgen_shots_in_progress": MetricSpec("gauge", (), "Shots that have begun and not ended."),
    "vidgen_gpus_busy_share": MetricSpec("gauge", (), "Share of the GPUs' time spent on work, last 30 seconds."),
}


def exported_names(name: str) -> tuple[str, ...]:
    """The series of a metric as Prometheus sees them."""
    return tuple(f"ray_{name}{suffix}" for suffix in SUFFIXES[METRICS[name].kind])


class RunMetrics:
    """Feeds the metrics of one run. Lives in one process of the run, which must be a worker of Ray's."""

    def __init__(self, profile: str) -> None:
        self._tags = {"profile": profile}
        self._counters = {name: Counter(name, *_described(spec)) for name, spec in _of_kind("counter")}
        self._gauges = {name: Gauge(name, *_described(spec)) for name, spec in _of_kind("gauge")}
        spec = METRICS["vidgen_step_seconds"]
        self._seconds = Histogram("vidgen_step_seconds", spec.about, STEP_SECONDS, _labels(spec))
        self._errors: set[str] = set()

    def shot_ended(self, status: Status) -> None:
        self._count("vidgen_shots", 1, status=status)

    def step_ended(self, stage: str, seconds: float, cached: bool) -> None:
        if cached:
            self._count("vidgen_cache_hits", 1, stage=stage)
        else:
            self._seconds.observe(seconds, tags={**self._tags, "stage": stage})

    def step_failed(self, stage: str, error_class: str) -> None:
        """Of each attempt that failed, the last one, too."""
        if error_class not in self._errors and len(self._errors) >= ERRORS_NAMED:
            error_class = "other"
        self._errors.add(error_class)
        self._count("vidgen_step_failures", 1, stage=stage, error=error_class)

    def retried(self, stage: str) -> None:
        self._count("vidgen_retries", 1, stage=stage)

    def adapter_loads(self, n: int) -> None:
        self._count("vidgen_adapter_loads", n)

    def frames_upscaled(self, n: int) -> None:
        self._count("vidgen_frames_upscaled", n)

    def snapshot(self, snapshot: Snapshot) -> None:
        for stage, status in snapshot.stages.items():
            self._show("vidgen_queued", status.queued, stage=stage)
            self._show("vidgen_running", status.running, stage=stage)
            self._show("vidgen_workers", status.workers, stage=stage)
            self._show("vidgen_busy_share", status.busy, stage=stage)
        self._show("vidgen_shots_in_progress", snapshot.in_progress)
        if snapshot.gpus_busy is not None:
            self._show("vidgen_gpus_busy_share", snapshot.gpus_busy)

    def _count(self, name: str, n: int, **labels: str) -> None:
        if n:  # Ray's counters refuse to be increased by nothing
            self._counters[name].inc(n, tags={**self._tags, **labels})

    def _show(self, name: str, value: float, **labels: str) -> None:
        self._gauges[name].set(value, tags={**self._tags, **labels})


def _of_kind(kind: Kind) -> list[tuple[str, MetricSpec]]:
    return [(name, spec) for name, spec in METRICS.items() if spec.kind == kind]


def _described(spec: MetricSpec) -> tuple[str, tuple[str, ...]]:
    return spec.about, _labels(spec)


def _labels(spec: MetricSpec) -> tuple[str, ...]:
    return ("profile", *spec.labels)
