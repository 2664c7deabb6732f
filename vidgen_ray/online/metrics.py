"""Prometheus metrics of a server, exported through Ray.

Ray prefixes each name with `ray_`, and appends `_total` to counters and `_bucket`, `_count` and `_sum` to histograms.
"""

from __future__ import annotations

from collections.abc import Iterable

from ray.util.metrics import Counter, Gauge, Histogram

from vidgen_ray.engine.metrics import SECONDS, LabelLimit, MetricSpec, of_kind
from vidgen_ray.outputs.records import StepRecord

MAX_TENANT_LABELS, MAX_ERROR_LABELS = 100, 20
"""Tenants and error classes with a label value of their own. Further ones are `other`, to limit the number of series."""


METRICS = {
    "vidgen_online_jobs": MetricSpec("counter", ("tenant", "status"), "Finished jobs: completed, failed or cancelled."),
    "vidgen_online_job_seconds": MetricSpec("histogram", ("tenant",), "Seconds from the creation of a job to its completion."),
    "vidgen_online_wait_seconds": MetricSpec("histogram", ("tenant",), "Seconds from the creation of a job to its start."),
    "vidgen_online_stage_seconds": MetricSpec(
        "counter", ("stage", "tenant"), "Seconds of stage execution per tenant, without cache hits."
    ),
    "vidgen_online_gpu_seconds": MetricSpec("counter", ("tenant",), "GPU-seconds per tenant."),
    "vidgen_online_step_seconds": MetricSpec(
        "histogram", ("stage",), "Duration of a stage for one job in seconds, without cache hits."
    ),
    "vidgen_online_cache_hits": MetricSpec("counter", ("stage",), "Stage results taken from the cache."),
    "vidgen_online_attempts_failed": MetricSpec("counter", ("stage", "error"), "Failed attempts, by error class."),
    "vidgen_online_queued": MetricSpec("gauge", (), "Queued jobs."),
    "vidgen_online_in_progress": MetricSpec("gauge", (), "Jobs that have started and not finished."),
}


class ServerMetrics:
    """Metrics of a server. Create it in the director replica only."""

    def __init__(self) -> None:
        self._counters = {name: Counter(name, spec.description, spec.labels) for name, spec in of_kind(METRICS, "counter")}
        self._gauges = {name: Gauge(name, spec.description, spec.labels) for name, spec in of_kind(METRICS, "gauge")}
        self._histograms = {
            name: Histogram(name, s.description, SECONDS, s.labels) for name, s in of_kind(METRICS, "histogram")
        }
        self._tenants, self._errors = LabelLimit(MAX_TENANT_LABELS), LabelLimit(MAX_ERROR_LABELS)

    def job_started(self, tenant: str, waited_s: float) -> None:
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
        if amount > 0:  # Ray's counters reject an increment of 0
            self._counters[name].inc(amount, tags=labels)

    def _observe(self, name: str, seconds: float, **labels: str) -> None:
        self._histograms[name].observe(max(0.0, seconds), tags=labels)
