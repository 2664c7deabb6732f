"""Slots that a layout gains from GPUs that have become free, such as those of a new node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from vidgen_ray.planner.cluster import Cluster
from vidgen_ray.planner.gpu_assignment import EPSILON
from vidgen_ray.planner.layout import Slot
from vidgen_ray.planner.solver import ENCODER_CPUS, LinearProgramme

MIN_GAIN = 1e-6
"""Minimum relative gain in the rate for which a slot is added."""


def more_slots(slots: Sequence[Slot], seconds: Mapping[str, float], free: Cluster) -> tuple[tuple[Slot, int], ...]:
    """Return the slots to add, and the index of the free node of each.

    The kinds of slots are those of `slots`, the present ones. `seconds`: stage -> mean seconds per shot. Each free GPU gets the
    kind that it has the memory and CPUs for and that raises the rate most; the time for swapping weights is neglected.
    """
    counts = Counter(slots)
    cpus = [node.cpus for node in free.nodes]
    added = []
    rate = _rate(counts, seconds)
    for memory_gb, node in sorted(((gb, n) for n, each in enumerate(free.nodes) for gb in each.gpus), reverse=True):
        kinds = [
            kind
            for kind in dict.fromkeys(slots)
            if kind.has_gpu and kind.memory_gb <= memory_gb + EPSILON and kind.cpus + ENCODER_CPUS <= cpus[node] + EPSILON
        ]
        rates = {kind: _rate(counts + Counter([kind]), seconds) for kind in kinds}
        best = max(kinds, key=lambda kind: rates[kind], default=None)
        if best is not None and rates[best] >= rate * (1 + MIN_GAIN):
            counts[best] += 1
            cpus[node] -= best.cpus + ENCODER_CPUS
            rate = rates[best]
            added.append((best, node))
    return tuple(added)


def _rate(counts: Mapping[Slot, int], seconds: Mapping[str, float]) -> float:
    """Return the shots per second of these slots, each of which divides its time among its stages in the best way."""
    programme = LinearProgramme()
    # Relative to one slot, so that all coefficients have a similar magnitude.
    total = sum(seconds.values())
    rate = programme.add_variable(float(sum(counts.values())))
    supply: dict[str, dict[int, float]] = {stage: {rate: -seconds[stage] / total} for stage in seconds}
    for slot, count in counts.items():
        times = {stage: programme.add_variable(float(count)) for stage in slot.stages if stage in seconds}
        programme.add_constraint(dict.fromkeys(times.values(), 1.0), high=float(count))
        for stage, time in times.items():
            supply[stage][time] = 1.0
    for terms in supply.values():
        programme.add_constraint(terms, low=0.0)
    cost = programme.zero_cost()
    cost[rate] = -1.0
    values = programme.minimize(cost)
    return 0.0 if values is None else float(values[rate]) / total
