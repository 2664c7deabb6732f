"""Outputs of the profile `demo` follow their inputs, and each check fails if its input is disconnected."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.meaning.chain import Chain
from tests.meaning.checks import CHECKS, UNCUT

pytestmark = pytest.mark.slow
CASES, CASES_WITHOUT_INPUT = 3, 1
"""Cases per check, and with its input disconnected. `benchmarks/meaning.py` uses 50 or more."""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(Path(tmp_path_factory.mktemp("cast")))


@pytest.mark.parametrize("name", CHECKS)
def test_check_reaches_its_goal_and_fails_without_its_input(name: str, chain: Chain) -> None:
    check = CHECKS[name]
    # One miss of so few cases is within every goal.
    assert check.measure(chain, CASES, UNCUT) >= min(check.goal, (CASES - 1) / CASES)
    assert check.measure(chain, CASES_WITHOUT_INPUT, check.cut) < check.goal
