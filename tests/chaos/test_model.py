"""The director, with every fault in simulated time: rules of `tests/chaos/history.py` for many seeds.

VIDGEN_SEEDS is the number of seeds, 10,000 in `make chaos`. VIDGEN_SEED=N repeats one seed and prints its history.
VIDGEN_FAULTS=crash,hang leaves out all other faults.
"""

import os

import pytest

from tests.chaos.history import check, printed
from tests.chaos.model import FAULTS, SURVIVED, worlds

SEEDS = int(os.environ.get("VIDGEN_SEEDS", "200"))
GROUPS = 2
"""Processes of `make test` that share the seeds."""
CHOSEN = os.environ.get("VIDGEN_FAULTS")
KINDS = SURVIVED if CHOSEN is None else FAULTS if CHOSEN == "all" else CHOSEN.split(",")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "group", [pytest.param(group, marks=pytest.mark.xdist_group(f"model-{group}")) for group in range(GROUPS)]
)
def test_rules_hold_for_every_seed(group):
    chosen = os.environ.get("VIDGEN_SEED")
    found = []
    for world in worlds(range(group, SEEDS, GROUPS) if chosen is None else [int(chosen)], KINDS):
        if chosen is not None:
            print(printed(world))  # noqa: T201  # what the option is for
        found += [f"VIDGEN_SEED={world.seed} {rule}: {text}" for rule, text in check(world)]
    assert not found, "\n".join(["broken rules:", *found])
