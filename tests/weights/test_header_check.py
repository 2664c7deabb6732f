"""Files of model folders: those that are loaded, and their headers against the networks that load them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidgen_ray.system.cache_dir import digest
from vidgen_ray.system.model_files import loaded_files, missing_files
from vidgen_ray.weights import resolve
from vidgen_ray.weights.inventory import header_problems


@pytest.mark.parametrize("name", ["flux", "svd", "infusenet", "instantid-sdxl"])
def test_intact_weights_have_no_problems(name):
    assert header_problems(resolve(f"builtin:tiny/{name}")) == []


@pytest.fixture
def svd(tmp_path):
    return shutil.copytree(resolve("builtin:tiny/svd"), tmp_path / "svd")


@pytest.mark.parametrize(
    ("component", "file"),
    [("unet", "diffusion_pytorch_model.safetensors"), ("image_encoder", "model.safetensors")],
    ids=["diffusers", "transformers"],
)
def test_missing_unexpected_and_wrong_tensors_are_named(svd, component, file):
    tensors = load_file(svd / component / file)
    first, second = sorted(tensors)[:2]
    tensors["intruder"] = tensors.pop(first)
    tensors[second] = torch.zeros(7, 5, 3)
    save_file(tensors, svd / component / file)
    missing, unexpected, shapes = header_problems(svd)
    assert missing == f"{component}: missing tensors: {first}"
    assert unexpected == f"{component}: unexpected tensors: intruder"
    assert shapes.startswith(f"{component}: tensors of another shape: {second} (7, 5, 3) for (")


def test_missing_and_truncated_files_are_named(svd):
    (svd / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}})
    )
    shutil.rmtree(svd / "scheduler")
    file = svd / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    *missing, truncated = header_problems(svd)
    assert missing == ["scheduler is missing", "unet/diffusion_pytorch_model-00002-of-00002.safetensors is missing"]
    assert truncated.startswith("vae/diffusion_pytorch_model.safetensors: not an intact safetensors file")


def test_config_of_another_model_is_named(svd):
    config = json.loads((svd / "unet" / "config.json").read_text())
    (svd / "unet" / "config.json").write_text(json.dumps(config | {"block_out_channels": [1]}))
    assert any(problem.startswith("unet: its config.json is not that of a") for problem in header_problems(svd))


NOT_LOADED = (
    "README.md", ".cache/huggingface/x.metadata", "LICENSE.txt", "flux1-dev.safetensors", "unet/model.onnx",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json", "vae_decoder/model.safetensors",
)  # fmt: skip


def test_digest_of_a_svd_depends_on_loaded_files_only(svd):
    before = digest(svd)
    for name in NOT_LOADED:
        (svd / name).parent.mkdir(parents=True, exist_ok=True)
        (svd / name).write_bytes(b"x")
        assert digest(svd) == before, name
    for name in ("model_index.json", "unet/diffusion_pytorch_model.safetensors", "feature_extractor/preprocessor_config.json"):
        with (svd / name).open("ab") as file:
            file.write(b" ")
        assert digest(svd) != before, name
        before = digest(svd)


def test_tokenizers_count_and_weights_in_other_formats_where_they_are_loaded(svd):
    index = json.loads((svd / "model_index.json").read_text())
    index |= {"tokenizer": ["transformers", "T5Tokenizer"], "no": [None, None]}
    (svd / "model_index.json").write_text(json.dumps(index))
    names = ("tokenizer/spiece.model", "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    for name in (*names, "no/model.safetensors"):
        (svd / name).parent.mkdir(exist_ok=True)
        (svd / name).write_bytes(b"x")
    loaded = {file.relative_to(svd).as_posix() for file in loaded_files(svd)}
    assert set(names) < loaded
    assert "no/model.safetensors" not in loaded
    folder = resolve("builtin:tiny/instantid-sdxl")
    loaded = {file.relative_to(folder).as_posix() for file in loaded_files(folder)}
    assert loaded == {"ip-adapter.bin", "ControlNetModel/config.json", "ControlNetModel/diffusion_pytorch_model.safetensors"}


def test_weights_beside_the_folder_of_the_same_network_do_not_count(tmp_path):
    """ByteDance/InfiniteYou has InfuseNet in two more files beside its folder."""
    folder = shutil.copytree(resolve("builtin:tiny/infusenet"), tmp_path / "sim_stage1")
    before = digest(folder)
    for name in ("infusenet_sim_bf16.safetensors", "infusenet_sim_fp8e4m3fn.safetensors"):
        (folder / name).symlink_to("/nowhere")
    assert digest(folder) == before
    assert missing_files(folder) == []
    # With a network of its own, the root is no second copy.
    (folder / "config.json").write_text("{}")
    assert len(missing_files(folder)) == 2
