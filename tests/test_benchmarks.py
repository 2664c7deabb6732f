"""Benchmarks: a run on simulated GPUs, and the simulated stages."""

from inspect import getattr_static
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import noop_stages, simulated_stages
from benchmarks.line_chart import charts_svg
from benchmarks.loss_curves import SHOWN, Made, Row, charts, errors_by_step
from benchmarks.runs import Case, run_once
from vidgen_ray.graph import STAGE_BY_NAME


def test_curves_of_loss_are_drawn_from_the_errors_of_each_step():
    first, last = np.ones((2, 3), np.float32), np.full((2, 3), 2, np.float32)
    errors = errors_by_step(Made((), [first, last]), Made((), [first, last * 1.5]))
    assert errors == [0.0, 0.5]
    assert errors_by_step(Made((), [first, last]), Made((), [last])) == []
    rows = [Row(kind, SHOWN[0], 0.8, 40, 39, 0.99, None, errors) for kind in ("interval", "step", "option")]
    rows += [Row("cache", case, 0.5, 40, 39, 0.99, None) for case in ("0.1", "0.05", "16 steps")]
    drawing = ElementTree.fromstring(charts_svg(charts(rows)))
    lines = [element.get("points") for element in drawing.iter() if element.tag.endswith("polyline")]
    assert [len(points.split()) for points in lines] == [2, 2, 1, 1, 1, 1], "an error of 0 has no place on a logarithmic axis"


@pytest.mark.slow
def test_vidgen_renders_the_simulated_shots():
    run = run_once(Case("vidgen", "auto with cache", 1, 80.0, 2), limit_s=300, stall_s=120, keep=None)
    assert run.measurement is not None, run.reason


def test_benchmark_stages_have_the_declarations_of_the_real_stages():
    for stage in (*simulated_stages.STAGES.values(), *noop_stages.STAGES.values()):
        for declared in ("name", "actor", "reads", "takes", "writes", "Params", "chosen_by"):
            assert getattr_static(stage, declared) is getattr_static(STAGE_BY_NAME[stage.name], declared), (stage, declared)
