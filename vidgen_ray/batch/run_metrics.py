"""Prometheus metrics of a run: those of its engine, and its finished shots."""

from __future__ import annotations

from collections.abc import Callable

from vidgen_ray.engine.engine_metrics import ENGINE_METRICS, EngineMetrics
from vidgen_ray.engine.metrics import MetricSpec
from vidgen_ray.outputs.manifest import Status

METRICS = {"vidgen_shots": MetricSpec("counter", ("status",), "Finished shots: done or failed."), **ENGINE_METRICS}


class RunMetrics(EngineMetrics):
    """Metrics of one run."""

    definitions = METRICS

    def __init__(self, profile: str, on_quarantined: Callable[[str, str], None] = lambda process, reason: None) -> None:
        """`on_quarantined` gets the name and node of each quarantined process, and the reason."""
        super().__init__(profile)
        self._on_quarantined = on_quarantined

    def shot_ended(self, status: Status) -> None:
        self._count("vidgen_shots", 1, status=status)

    def quarantined(self, process: str, reason: str) -> None:
        super().quarantined(process, reason)
        self._on_quarantined(process, reason)
