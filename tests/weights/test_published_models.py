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
FILES = {"svd/unet": 6_098_682_464, "svd/vae": 391_017_740, "svd/image_encoder": 2_528_371_296}
"""Network -> size of its safetensors file in float32, with the header, as others pin those of stable-video-diffusion-img2vid at
9cf024d5. The networks of img2vid-xt have the same tensors."""


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


def file_size(model):
    """Return the size of the model's weights as a safetensors file in float32."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in sorted(model.state_dict().items()):
        begin, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
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
    assert file_size(build_network(network, torch.bfloat16)) == FILES[network]


@pytest.mark.parametrize(
    ("network", "change"),
    [
        ("hunyuan/text_encoder_2", {"d_ff": 4096}),
        ("hunyuan/text_encoder_2", {"d_model": 1024}),
        ("flux/transformer", {"joint_attention_dim": 2048}),
        ("flux/text_encoder_2", {"num_layers": 23}),
        ("svd/vae", {"latent_channels": 8}),
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
        assert file_size(build_network(network, torch.bfloat16)) != FILES[network]
    else:
        assert numbers(build_network(network, torch.bfloat16)) != NUMBERS[network]
