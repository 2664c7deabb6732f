"""What a process imports that renders on a CPU, and that it can import the rest afterwards."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from vidgen_ray.content_keys import params_of
from vidgen_ray.nets.deferred_imports import rare_garbage_collection
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.qwen_edit import QwenEditStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage

HEAVY = (
    *("boto3", "pandas", "scipy.integrate", "scipy.optimize", "scipy.stats", "torch._dynamo", "torch.distributed.tensor"),
    *("onnxruntime", "torchvision.datasets", "torchvision.models"),
)
RENDER = """
import json, sys
from vidgen_ray.nets.deferred_imports import deferred_imports
from vidgen_ray.pipeline import VideoGenerationPipeline
from tests.ray_workers import use_small_images
pipeline = VideoGenerationPipeline.from_profile("tiny")
pipeline.generate_video("a cat", seed=1)
assert "sympy" not in sys.modules
with deferred_imports("cpu"):
    use_small_images()
style = {"use_hunyuan_style": True, "style_model": "qwen-edit", "style_prompt": "a drawing"}
pipeline.generate_video("a cat", seed=1, video_model="wan", num_frames=5, **style)
print(json.dumps([name for name in sys.argv[1:] if name in sys.modules]))
import torchvision
assert torchvision.models.resnet18 and torchvision.datasets.MNIST
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


def test_shot_is_rendered_on_a_cpu_without_compiler_and_scipy(tiny, tmp_path):
    params_of(tiny, [FluxStage, QwenEditStage, SVDStage, WanStage, RealESRGANStage])  # builds the weights, which imports more
    # In a folder without results of the same shot.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", RENDER, *HEAVY]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[0]) == []


def test_blocks_of_threads_restore_garbage_collection_in_any_order():
    thresholds, (first, second) = gc.get_threshold(), (rare_garbage_collection(), rare_garbage_collection())
    for block in (first, second):
        block.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold() != thresholds
    second.__exit__(None, None, None)
    assert gc.get_threshold() == thresholds
