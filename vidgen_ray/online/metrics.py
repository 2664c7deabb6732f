"""What a server tells Prometheus, through Ray: every metric's name, kind, labels and meaning, and one object that feeds them.

Ray puts `ray_` before each name, and after it `_total` for a counter, `_bucket`, `_count` and `_sum` for a histogram.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ray.util.metrics import Counter, Gauge, Histogram

from vidgen_ray.outputs.records import StepRecord

Kind = Literal["counter", "histogram", "gauge"]

SECONDS = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 1800.0]
"""Bounds of the histograms' buckets."""
TENANTS_NAMED, ERRORS_NAMED = 100, 20
"""So many get a label of their own; further ones are `other`, so that the series stay few."""
OTHER = "other"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric."""

    kind: Kind
    labels: tuple[str, ...]
    about: str


METRICS = {
    "vidgen_online_jobs": MetricSpec("counter", ("tenant", "status"), "Jobs that ended: completed, failed or cancelled."),
    "vidgen_online_job_seconds": MetricSpec("histogram", ("tenant",), "Seconds from a job's creation to its completion."),
    "vidgen_online_wait_seconds": MetricSpec("histogram", ("tenant",), "Seconds from a job's creation to its first step."),
    "vidgen_online_stage_seconds": MetricSpec(
        "counter", ("stage", "tenant"), "Seconds that stages worked for a tenant's jobs, cache hits left out."
    ),
    "vidgen_online_gpu_seconds": MetricSpec("counter", ("tenant",), "GPU-seconds of a tenant's jobs."),
    "vidgen_online_step_seconds": MetricSpec(
        "histogram", ("stage",), "Seconds of a stage's run on one job, without cache hits."
    ),
    "vidgen_online_cache_hits": MetricSpec("counter", ("stage",), "Results of a stage taken from the cache."),
    "vidgen_online_attempts_failed": MetricSpec("counter", ("stage", "error"), "Attempts that failed, by class of error."),
    "vidgen_online_queued": MetricSpec("gauge", (), "Jobs that wait."),
    "vidgen_online_in_progress": MetricSpec("gauge", (), "Jobs that have begun and not ended."),
}


class ServerMetrics:
    """Feeds the metrics. Lives in one replica, the director's."""

    def __init__(self) -> None:
        self._counters = {name: Counter(name, spec.about, spec.labels) for name, spec in _of_kind("counter")}
        self._gauges = {name: Gauge(name, spec.about, spec.labels) for name, spec in _of_kind("gauge")}
        self._histograms = {name: Histogram(name, s.about, SECONDS, s.labels) for name, s in _of_kind("histogram")}
        self._tenants, self._errors = _Names(TENANTS_NAMED), _Names(ERRORS_NAMED)

    def job_begun(self, tenant: str, waited_s: float) -> None:
        self._observe("vidgen_online_wait_seconds", waited_s, tenant=self._tenants(tenant))

    def job_ended(self, tenant: str, status: str, seconds: float) -> None:
        tenant = self._tenants(tenant)
        self._count("vidgen_online_jobs", 1, tenant=tenant, status=status)
        if status == "completed":
            self._observe("vidgen_online_job_seconds", seconds, tenant=tenant)

    def steps_ended(self, tenant: str, records: Iterable[StepRecord]) -> None:
        tenant = self._tenants(tenant)
        for record in records:
            if record.cached:
                self._count("vidgen_online_cache_hits", 1, stage=record.stage)
                continue
            self._observe("vidgen_online_step_seconds", record.seconds, stage=record.stage)
            self._count("vidgen_online_stage_seconds", record.seconds, stage=record.stage, tenant=tenant)
            self._count("vidgen_online_gpu_seconds", record.gpu_seconds, tenant=tenant)

    def attempt_failed(self, stage: str, error: str) -> None:
        self._count("vidgen_online_attempts_failed", 1, stage=stage, error=self._errors(error))

    def jobs(self, queued: int, in_progress: int) -> None:
        self._gauges["vidgen_online_queued"].set(queued)
        self._gauges["vidgen_online_in_progress"].set(in_progress)

    def _count(self, name: str, amount: float, **labels: str) -> None:
        if amount > 0:  # Ray's counters refuse to be increased by nothing
            self._counters[name].inc(amount, tags=labels)

    def _observe(self, name: str, seconds: float, **labels: str) -> None:
        self._histograms[name].observe(max(0.0, seconds), tags=labels)


class _Names:
    """The first so many names as they are, all others as one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        if name in self._known:
            return name
        if len(self._known) >= self._most:
            return OTHER
        self._known.add(name)
        return name


def _of_kind(kind: Kind) -> list[tuple[str, MetricSpec]]:
    return [(name, spec) for name, spec in METRICS.items() if spec.kind == kind]
