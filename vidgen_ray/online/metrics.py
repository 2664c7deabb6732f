"""Prometheus metrics of a server: those of its engine, and its jobs."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from vidgen_ray.engine.engine_metrics import ENGINE_METRICS, EngineMetrics, LabelLimit, MetricSpec
from vidgen_ray.outputs.records import StepRecord

log = logging.getLogger("ray.serve")

MAX_TENANT_LABELS = 100
"""Tenants with a label value of their own. Further ones are `other`, to limit the number of series."""


JOB_METRICS = {
    "vidgen_online_jobs": MetricSpec("counter", ("tenant", "status"), "Finished jobs: completed, failed or cancelled."),
    "vidgen_online_job_seconds": MetricSpec("histogram", ("tenant",), "Seconds from the creation of a job to its completion."),
    "vidgen_online_wait_seconds": MetricSpec("histogram", ("tenant",), "Seconds from the creation of a job to its start."),
    "vidgen_online_stage_seconds": MetricSpec(
        "counter", ("stage", "tenant"), "Seconds of stage execution for completed jobs, without cache hits."
    ),
    "vidgen_online_gpu_seconds": MetricSpec("counter", ("tenant",), "GPU-seconds of completed jobs."),
    "vidgen_online_queued": MetricSpec("gauge", (), "Queued jobs."),
    "vidgen_online_in_progress": MetricSpec("gauge", (), "Jobs that have started and not finished."),
}
METRICS = {**JOB_METRICS, **ENGINE_METRICS}


class ServerMetrics(EngineMetrics):
    """Metrics of a server. Create it in the director replica only."""

    definitions = METRICS

    def __init__(self, profile: str) -> None:
        super().__init__(profile)
        self._tenants = LabelLimit(MAX_TENANT_LABELS)

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
        self._set("vidgen_online_queued", queued)
        self._set("vidgen_online_in_progress", in_progress)

    def quarantined(self, process: str, reason: str) -> None:
        super().quarantined(process, reason)
        log.warning("%s is quarantined: %s", process, reason)
