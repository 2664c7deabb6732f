"""`vidgen models check`: headers of weights against the networks that load them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidgen_ray.weights import resolve
from vidgen_ray.weights.inventory import header_problems

FAMILIES = ("flux", "flux-schnell", "hunyuandit", "svd", "sdxl", "infusenet", "instantid-sdxl")


@pytest.mark.parametrize("name", FAMILIES)
def test_intact_weights_have_no_problems(name):
    assert header_problems(resolve(f"builtin:tiny/{name}")) == []


@pytest.fixture
def svd(tmp_path):
    return shutil.copytree(resolve("builtin:tiny/svd"), tmp_path / "svd")


def _change(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("component", "file"),
    [("unet", "diffusion_pytorch_model.safetensors"), ("image_encoder", "model.safetensors")],
    ids=["diffusers", "transformers"],
)
def test_missing_unexpected_and_wrong_tensors_are_named(svd, component, file):
    first, second = sorted(load_file(svd / component / file))[:2]

    def change(tensors):
        tensors["intruder"] = tensors.pop(first)
        tensors[second] = torch.zeros(7, 5, 3)

    _change(svd / component / file, change)
    missing, unexpected, shapes = header_problems(svd)
    assert missing == f"{component}: missing tensors: {first}"
    assert unexpected == f"{component}: unexpected tensors: intruder"
    assert shapes.startswith(f"{component}: tensors of another shape: {second} (7, 5, 3) for (")


def test_truncated_file_is_named(svd):
    file = svd / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    (problem,) = header_problems(svd)
    assert problem.startswith("vae/diffusion_pytorch_model.safetensors: not an intact safetensors file")


def test_missing_shard_and_component_are_named(svd):
    (svd / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}})
    )
    shutil.rmtree(svd / "scheduler")
    problems = header_problems(svd)
    assert "scheduler is missing" in problems
    assert "unet/diffusion_pytorch_model-00002-of-00002.safetensors is missing" in problems


def test_config_of_another_model_is_named(svd):
    config = json.loads((svd / "unet" / "config.json").read_text())
    (svd / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [1]}))
    assert any(problem.startswith("unet: its config.json is not that of a") for problem in header_problems(svd))
