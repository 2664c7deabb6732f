"""What a process imports that loads models on a CPU, and that it can import the rest afterwards."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("boto3", "scipy.integrate", "scipy.optimize", "scipy.stats", "torch._dynamo", "torch.distributed.tensor")
LOAD = """
import json, sys
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.content_keys import params_of
from vidgen_ray.profile import load_profile
stage = STAGE_BY_NAME[sys.argv[1]]
loaded = stage(params_of(load_profile("tiny"), [stage])[stage.name])
loaded.load()
print(json.dumps([name for name in sys.argv[2:] if name in sys.modules]))
import scipy.optimize, scipy.stats, torch, torch._dynamo
from diffusers.schedulers import scheduling_lms_discrete
from transformers.loss import loss_for_object_detection
from transformers.masking_utils import TransformGetItemToIndex
assert scheduling_lms_discrete.integrate.quad(float, 0, 1)[0] == 0.5
assert len(loss_for_object_detection.linear_sum_assignment([[1, 0], [0, 1]])) == 2
assert scipy.stats.norm.cdf(0) == 0.5
assert torch.distributed.is_available()
with TransformGetItemToIndex():
    pass
assert torch.compile(lambda number: number + 1, backend="eager")(torch.ones(1)) == 2
"""


@pytest.mark.parametrize("stage", ["flux", "svd"])
def test_models_on_a_cpu_are_loaded_without_compiler_and_scipy(stage):
    ended = subprocess.run([sys.executable, "-c", LOAD, stage, *HEAVY], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[0]) == []
