"""Slots for GPUs that have become free."""

from collections import Counter

import pytest

from vidgen_ray.planner import Cluster, Node
from vidgen_ray.planner.layout import Slot, WorkerSpec
from vidgen_ray.planner.solver import more_slots

SECONDS = {"flux": 6.0, "svd": 22.0}


def slot(*stages, memory_gb, cpus=1):
    return Slot((WorkerSpec(stages, cpus, 1.0),), memory_gb)


FUSED = slot("flux", "svd", memory_gb=60)
FLUX, SVD = slot("flux", memory_gb=35), slot("svd", memory_gb=21)


@pytest.mark.parametrize(
    ("slots", "gpus", "expected"),
    [
        ([FUSED], (80, 80), {FUSED: 2}),
        ([FUSED], (48,), {}),
        ([FLUX, SVD], (48,), {SVD: 1}),
        ([FLUX, SVD], (24, 24), {SVD: 2}),
        ([FLUX, SVD, SVD, SVD, SVD], (48,), {FLUX: 1}),
        ([FLUX, SVD, SVD, SVD, SVD], (24,), {}),
        ([FUSED, SVD], (24, 80), {FUSED: 1, SVD: 1}),
    ],
)
def test_free_gpus_get_the_kind_of_slot_that_raises_the_rate(slots, gpus, expected):
    added = more_slots(slots, SECONDS, Cluster((Node((), 9, None), Node(gpus, 64, None))))
    assert Counter(kind for kind, _ in added) == expected
    assert all(node == 1 for _, node in added)


def test_added_slots_fit_the_free_cpus_of_their_node():
    free = Cluster((Node((80.0,) * 4, 3.2, None), Node((80.0,), 1.0, None)))
    assert [node for _, node in more_slots([FUSED], SECONDS, free)] == [0, 0]
