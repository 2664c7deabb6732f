"""Outputs of the profile `demo` follow their inputs, and each check fails if its input is disconnected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.meaning.chain import Chain
from tests.meaning.checks import CHECKS, PERSON_LORA, STYLE_LORA, UNCUT, person_prompt

pytestmark = pytest.mark.slow
CASES, CASES_WITHOUT_INPUT = 5, 3
"""Cases per check, and with its input disconnected. `benchmarks/meaning.py` uses 50 or more."""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(Path(tmp_path_factory.mktemp("cast")))


@pytest.mark.parametrize("name", CHECKS)
def test_check_reaches_its_goal(name: str, chain: Chain) -> None:
    check = CHECKS[name]
    assert check.measure(chain, CASES, UNCUT) >= check.goal


@pytest.mark.parametrize("name", CHECKS)
def test_check_fails_without_its_input(name: str, chain: Chain) -> None:
    check = CHECKS[name]
    assert check.measure(chain, CASES_WITHOUT_INPUT, check.cut) < check.goal


def test_lora_with_weight_zero_changes_nothing(chain: Chain) -> None:
    def refined(weight: float) -> np.ndarray:
        lora = [{"path": PERSON_LORA, "weight": weight}]
        return chain.make(prompt=person_prompt(0), seed=3, lora=lora)["image"]

    without, with_it = refined(0.0), refined(1.0)
    image_to_image = chain.make(prompt=person_prompt(0), seed=3, lora=[{"path": STYLE_LORA, "weight": 0.0}])["image"]
    np.testing.assert_array_equal(without, image_to_image)
    assert np.abs(without.astype(int) - with_it.astype(int)).mean() > 1
