"""Fixtures: a tiny network with random weights, and settings that are the same on every machine."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vidgen_ray.upscale import segments as job_module
from vidgen_ray.upscale.frames import EncodeSettings
from vidgen_ray.upscale.network import EngineSettings, UpscaleModel
from vidgen_ray.upscale.run import UpscaleOptions, UpscaleReport, upscale_file
from vidgen_ray.upscale.segments import Threads

FAST = EncodeSettings(crf=10, preset="ultrafast", threads=1)
SETTINGS = EngineSettings(threads=1)
TAGGED = (1, 1, 1, 1)
"""Colours of a video: BT.709, limited range."""


def compact(path: Path, convs: int = 2, features: int = 8, scale: int = 2, seed: int = 0) -> Path:
    """Write random weights of Real-ESRGAN's video network."""
    from spandrel.architectures.Compact import Compact

    torch.manual_seed(seed)
    network = Compact(num_in_ch=3, num_out_ch=3, num_feat=features, num_conv=convs, upscale=scale)
    save_file({name: tensor * 0.2 for name, tensor in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> UpscaleModel:
    path = compact(tmp_path_factory.mktemp("weights") / "tiny.safetensors")
    return UpscaleModel("tiny", path)


@pytest.fixture
def short_segments(monkeypatch):
    """Cut videos into segments of five frames."""
    for name in ("MAX_SEGMENT_FRAMES", "MIN_SEGMENT_FRAMES"):
        monkeypatch.setattr(job_module, name, 5)


@pytest.fixture
def upscale(tiny_model):
    """Return a function that upscales a video by 2 with the tiny network."""

    def run(video: Path, out: Path, *, encode=FAST, scale=2, fit=None, **options) -> UpscaleReport:
        options = UpscaleOptions(tiny_model, encode, scale=None if fit else scale, fit=fit, **options)
        return upscale_file(video, out, options, SETTINGS, Threads(1))

    return run
