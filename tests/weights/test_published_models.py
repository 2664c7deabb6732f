"""Architectures of the published weights against the names and sizes in their repositories."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from vidgen_ray.bench import published_models
from vidgen_ray.bench.published_models import NETWORKS, build_network

INDEX = yaml.safe_load((Path(__file__).parent / "published_index.yaml").read_text())
TIED = {"encoder.embed_tokens.weight"}
"""Second name of T5's embedding in the model. The file has it once, as `shared.weight`."""
BYTES_PER_NUMBER = {"hunyuan/text_encoder_2": 4}
"""Network -> bytes of a number, if its weights are not published in 16 bits."""
NUMBERS = {"wan/transformer": 14_288_901_184, "wan/text_encoder": 5_680_910_336, "wan-ti2v/transformer": 4_999_787_712}
"""Network -> number of weights, by the index files of Wan2.2-I2V-A14B-Diffusers and -TI2V-5B-Diffusers, as others check it."""
FILES = {
    "svd/unet": ("F32", 6_098_682_464),
    "svd/vae": ("F32", 391_017_740),
    "svd/image_encoder": ("F32", 2_528_371_296),
    "sdxl/unet": ("F32", 10_270_077_736),
    "sdxl/vae": ("F32", 334_643_268),
    "sdxl/text_encoder": ("F32", 492_265_168),
    "sdxl/text_encoder_2": ("F32", 2_778_702_264),
    "flux/vae": ("BF16", 167_666_902),
    "flux/text_encoder": ("BF16", 246_144_352),
    "klein/transformer": ("BF16", 7_751_109_744),
    "klein/vae": ("BF16", 168_120_878),
    "qwen_edit/vae": ("BF16", 253_806_966),
    "wan/vae": ("F32", 507_591_892),
    "ltx/vae": ("F32", 1_676_798_532),
}
"""Network -> precision and size of its published safetensors file, with the header, as several projects pin them. Those of
SVD are of stable-video-diffusion-img2vid at 9cf024d5; the networks of img2vid-xt have the same tensors."""
PREFIXES = {"sdxl/text_encoder": "text_model.", "flux/text_encoder": "text_model."}
"""Network -> prefix of the names in the file, which transformers 5 leaves out."""


def published_names(entry):
    names = set(entry["single"])
    for group in entry["blocks"]:
        names |= {f"{group['prefix']}.{n}.{name}" for n in range(group["blocks"]) for name in group["names"]}
    return names


def differences(network, entry):
    """Return the names that only the model or only the index has, and the bytes that the model has more than the index."""
    model = build_network(network, torch.bfloat16)
    names = (set(model.state_dict()) ^ published_names(entry)) - TIED
    return names, BYTES_PER_NUMBER.get(network, 2) * numbers(model) - entry["total_bytes"]


def numbers(model):
    return sum(parameter.numel() for parameter in model.parameters())


def file_size(network):
    """Return the size of a network's weights as a safetensors file in the published precision."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    dtype, _ = FILES[network]
    for name, tensor in sorted(build_network(network, torch.bfloat16).state_dict().items()):
        number, size = (dtype, {"F32": 4, "BF16": 2}[dtype]) if tensor.is_floating_point() else ("I64", 8)
        begin, end = end, end + size * tensor.numel()
        entry = {"dtype": number, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[PREFIXES.get(network, "") + name] = entry
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end


@pytest.mark.parametrize("network", INDEX)
def test_published_index_has_the_names_and_the_size_of_the_model(network):
    entry = INDEX[network]
    assert len(published_names(entry)) == entry["tensors"]
    assert differences(network, entry) == (set(), 0)


@pytest.mark.parametrize("network", NUMBERS)
def test_model_has_the_published_number_of_weights(network):
    assert numbers(build_network(network, torch.bfloat16)) == NUMBERS[network]


@pytest.mark.parametrize("network", FILES)
def test_model_has_the_size_of_the_published_file(network):
    assert file_size(network) == FILES[network][1]


@pytest.mark.parametrize(
    ("network", "change"),
    [
        ("hunyuan/text_encoder_2", {"d_ff": 4096}),
        ("hunyuan/text_encoder_2", {"d_model": 1024}),
        ("flux/transformer", {"joint_attention_dim": 2048}),
        ("flux/text_encoder_2", {"num_layers": 23}),
        ("svd/vae", {"latent_channels": 8}),
        ("sdxl/unet", {"cross_attention_dim": 1024}),
        ("flux/text_encoder", {"intermediate_size": 4096}),
        ("wan-ti2v/transformer", {"ffn_dim": 13824}),
    ],
    ids=str,
)
def test_network_of_another_config_is_found(network, change, monkeypatch):
    """Positive control: the tests above fail for networks of another width or depth."""
    other = dataclasses.replace(NETWORKS[network], config={**NETWORKS[network].config, **change})
    monkeypatch.setattr(published_models, "NETWORKS", {**NETWORKS, network: other})
    if network in INDEX:
        assert differences(network, INDEX[network]) != (set(), 0)
    elif network in FILES:
        assert file_size(network) != FILES[network][1]
    else:
        assert numbers(build_network(network, torch.bfloat16)) != NUMBERS[network]
