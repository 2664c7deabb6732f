"""Prometheus metrics of a server, exported through Ray.

Ray prefixes each name with `ray_`, and appends `_total` to counters and `_bucket`, `_count` and `_sum` to histograms.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ray.util.metrics import Counter, Gauge, Histogram

from vidgen_ray.engine.metrics import SECONDS, LabelLimit, MetricSpec, of_kind
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.outputs.records import StepRecord

log = logging.getLogger("ray.serve")

MAX_TENANT_LABELS, MAX_ERROR_LABELS = 100, 20
"""Tenants and error classes with a label value of their own. Further ones are `other`, to limit the number of series."""


METRICS = {
    "vidgen_online_jobs": MetricSpec("counter", ("tenant", "status"), "Finished jobs: completed, failed or cancelled."),
    "vidgen_online_job_seconds": MetricSpec("histogram", ("tenant",), "Seconds from the creation of a job to its completion."),
    "vidgen_online_wait_seconds": MetricSpec("histogram", ("tenant",), "Seconds from the creation of a job to its start."),
    "vidgen_online_stage_seconds": MetricSpec(
        "counter", ("stage", "tenant"), "Seconds of stage execution for completed jobs, without cache hits."
    ),
    "vidgen_online_gpu_seconds": MetricSpec("counter", ("tenant",), "GPU-seconds of completed jobs."),
    "vidgen_online_step_seconds": MetricSpec(
        "histogram", ("stage",), "Duration of a stage for one job in seconds, without cache hits."
    ),
    "vidgen_online_cache_hits": MetricSpec("counter", ("stage",), "Stage results taken from the cache."),
    "vidgen_online_attempts_failed": MetricSpec("counter", ("stage", "error"), "Failed attempts, by error class."),
    "vidgen_online_retries": MetricSpec("counter", ("stage",), "Attempts of a stage after the first."),
    "vidgen_online_adapter_loads": MetricSpec("counter", (), "LoRA files loaded into a model."),
    "vidgen_online_frames_upscaled": MetricSpec("counter", (), "Upscaled frames."),
    "vidgen_online_quarantines": MetricSpec("counter", (), "Workers and encoders that were quarantined."),
    "vidgen_online_workers": MetricSpec("gauge", ("stage",), "Workers that hold the stage."),
    "vidgen_online_busy_share": MetricSpec(
        "gauge", ("stage",), "Utilization of these workers over the last 30 seconds, 0 to 1."
    ),
    "vidgen_online_quarantined": MetricSpec("gauge", (), "Workers and encoders that are in quarantine or given up."),
    "vidgen_online_queued": MetricSpec("gauge", (), "Queued jobs."),
    "vidgen_online_in_progress": MetricSpec("gauge", (), "Jobs that have started and not finished."),
}


class ServerMetrics:
    """Metrics of a server, and observer of its engine. Create it in the director replica only."""

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

    def shot_rendered(self, tenant: str, records: Iterable[StepRecord]) -> None:
        """Count the computing time of a finished shot for its tenant."""
        tenant = self._tenants(tenant)
        for record in records:
            if not record.cached:
                self._count("vidgen_online_stage_seconds", record.seconds, stage=record.stage, tenant=tenant)
                self._count("vidgen_online_gpu_seconds", record.gpu_seconds, tenant=tenant)

    def jobs(self, queued: int, in_progress: int) -> None:
        self._gauges["vidgen_online_queued"].set(queued)
        self._gauges["vidgen_online_in_progress"].set(in_progress)

    # Events of the engine

    def step_ended(self, stage: str, seconds: float, cached: bool) -> None:
        if cached:
            self._count("vidgen_online_cache_hits", 1, stage=stage)
        else:
            self._observe("vidgen_online_step_seconds", seconds, stage=stage)

    def step_failed(self, stage: str, error_class: str) -> None:
        self._count("vidgen_online_attempts_failed", 1, stage=stage, error=self._errors(error_class))

    def retried(self, stage: str) -> None:
        self._count("vidgen_online_retries", 1, stage=stage)

    def adapter_loads(self, n: int) -> None:
        self._count("vidgen_online_adapter_loads", n)

    def frames_upscaled(self, n: int) -> None:
        self._count("vidgen_online_frames_upscaled", n)

    def quarantined(self, process: str, reason: str) -> None:
        log.warning("%s is quarantined: %s", process, reason)
        self._count("vidgen_online_quarantines", 1)

    def snapshot(self, snapshot: Snapshot) -> None:
        for stage, status in snapshot.stages.items():
            self._gauges["vidgen_online_workers"].set(status.workers, tags={"stage": stage})
            self._gauges["vidgen_online_busy_share"].set(status.busy, tags={"stage": stage})
        self._gauges["vidgen_online_quarantined"].set(len(snapshot.quarantined))

    def _count(self, name: str, amount: float, **labels: str) -> None:
        if amount > 0:  # Ray's counters reject an increment of 0
            self._counters[name].inc(amount, tags=labels)

    def _observe(self, name: str, seconds: float, **labels: str) -> None:
        self._histograms[name].observe(max(0.0, seconds), tags=labels)
