"""Definitions of Prometheus metrics, shared by batch and online. Does not use Ray."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "histogram", "gauge"]

SECONDS = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0, 1800.0]
"""Bucket bounds of histograms in seconds. Quantiles of real stages (seconds to minutes) are accurate to about a third."""
OTHER = "other"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """Definition of one metric."""

    kind: Kind
    labels: tuple[str, ...]
    description: str


def of_kind(metrics: Mapping[str, MetricSpec], kind: Kind) -> list[tuple[str, MetricSpec]]:
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
