"""Digests of model folders: only files that are loaded count."""

import json
import shutil

import pytest

from vidgen_ray.system.cache_dir import digest
from vidgen_ray.system.model_files import loaded_files, missing_files
from vidgen_ray.weights import resolve

NOT_LOADED = (
    "README.md", ".gitattributes", ".cache/huggingface/x.metadata", "teaser.jpg", "LICENSE.txt", "flux1-dev.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.fp16.json", "unet/diffusion_pytorch_model.bin", "unet/model.onnx",
    "vae_decoder/model.safetensors", "image_encoder/model.fp32.safetensors", "image_encoder/pytorch_model.bin",
)  # fmt: skip


@pytest.fixture
def snapshot(tmp_path):
    return shutil.copytree(resolve("builtin:tiny/svd"), tmp_path / "snapshot")


def test_digest_of_a_snapshot_depends_on_loaded_files_only(snapshot):
    before = digest(snapshot)
    for name in NOT_LOADED:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(b"x")
        assert digest(snapshot) == before, name
    for name in ("model_index.json", "unet/diffusion_pytorch_model.safetensors", "feature_extractor/preprocessor_config.json"):
        with (snapshot / name).open("ab") as file:
            file.write(b" ")
        assert digest(snapshot) != before, name
        before = digest(snapshot)


def test_shards_and_tokenizer_files_count(snapshot):
    index = json.loads((snapshot / "model_index.json").read_text())
    index |= {"tokenizer": ["transformers", "T5Tokenizer"], "no": [None, None]}
    (snapshot / "model_index.json").write_text(json.dumps(index))
    names = (
        "tokenizer/spiece.model", "tokenizer/merges.txt", "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
    )  # fmt: skip
    for name in (*names, "no/model.safetensors"):
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).write_bytes(b"x")
    loaded = {file.relative_to(snapshot).as_posix() for file in loaded_files(snapshot)}
    assert set(names) < loaded
    assert "no/model.safetensors" not in loaded


def test_weights_in_other_formats_count_where_they_are_loaded(tmp_path):
    folder = shutil.copytree(resolve("builtin:tiny/instantid-sdxl"), tmp_path / "instantid")
    loaded = {file.relative_to(folder).as_posix() for file in loaded_files(folder)}
    assert loaded == {"ip-adapter.bin", "ControlNetModel/config.json", "ControlNetModel/diffusion_pytorch_model.safetensors"}
    faces = resolve("builtin:tiny/antelopev2")
    assert {file.suffix for file in loaded_files(faces)} == {".onnx"}


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
