"""The director, with every fault in simulated time: rules of `tests/chaos/history.py` for many seeds.

VIDGEN_SEEDS is the number of seeds, 10,000 in `make chaos`. VIDGEN_SEED=N repeats one seed and prints its history.
VIDGEN_FAULTS=crash,hang leaves out all other faults.
"""

import os

import pytest

from tests.chaos.history import check, printed
from tests.chaos.model import FAULTS, SURVIVED, simulate

SEEDS = int(os.environ.get("VIDGEN_SEEDS", "200"))
GROUPS = 2
"""Processes of `make test` that share the seeds."""
CHOSEN = os.environ.get("VIDGEN_FAULTS")
KINDS = SURVIVED if CHOSEN is None else FAULTS if CHOSEN == "all" else CHOSEN.split(",")


def failures(seeds):
    """Return a line for each broken rule."""
    return [f"VIDGEN_SEED={seed} {rule}: {text}" for seed in seeds for rule, text in check(simulate(seed, KINDS))]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "group", [pytest.param(group, marks=pytest.mark.xdist_group(f"model-{group}")) for group in range(GROUPS)]
)
def test_rules_hold_for_every_seed(group):
    if "VIDGEN_SEED" in os.environ:
        world = simulate(int(os.environ["VIDGEN_SEED"]), KINDS)
        print(printed(world))  # noqa: T201  # what the option is for
        assert not check(world)
    else:
        found = failures(range(group, SEEDS, GROUPS))
        assert not found, "\n".join(["broken rules:", *found])
