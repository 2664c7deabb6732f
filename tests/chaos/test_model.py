"""The director, with every fault in simulated time: rules of `tests/chaos/history.py` for many seeds.

VIDGEN_SEEDS is the number of seeds, 10,000 in `make chaos`. VIDGEN_SEED=N repeats one seed and prints its history.
VIDGEN_FAULTS=crash,hang leaves out all other faults.
"""

import os
from statistics import mean

import pytest

from tests.chaos.history import check, figures, printed
from tests.chaos.model import BAD_END, FAULTS, SURVIVED, worlds

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


def test_bad_lines_at_the_end_are_tried_side_by_side():
    made = [check(world) for world in worlds(range(3), [BAD_END], lines=40)]
    assert not [text for broken in made for rule, text in broken if rule == "end_of_script"]


CALM_SEEDS = (11, 15, 19, 22, 25, 34, 35, 39)
"""Seeds of runs without faults whose figures are compared with LIMITS."""
LIMITS = {"loads": 0.48, "features": 1.01, "gap_s": 0.06, "transfers": 2.2, "end_s": 240.0}


def test_throughput_without_faults():
    made = [figures(world) for world in worlds(CALM_SEEDS, lines=60)]
    means = {name: round(mean(figure[name] for figure in made), 3) for name in LIMITS}
    assert all(means[name] <= limit for name, limit in LIMITS.items()), means
