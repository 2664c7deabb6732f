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


def file_size(network, model):
    """Return the size of a network's weights as a safetensors file in the published precision."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    dtype, _ = FILES[network]
    for name, tensor in sorted(model.state_dict().items()):
        number, size = (dtype, {"F32": 4, "BF16": 2}[dtype]) if tensor.is_floating_point() else ("I64", 8)
        begin, end = end, end + size * tensor.numel()
        entry = {"dtype": number, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[PREFIXES.get(network, "") + name] = entry
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end


def differences(network):
    """Return what differs from what is known about the published network."""
    model = build_network(network, torch.bfloat16)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    found = {}
    if (entry := INDEX.get(network)) is not None:
        found["names"] = (set(model.state_dict()) ^ published_names(entry)) - TIED
        found["bytes"] = BYTES_PER_NUMBER.get(network, 2) * numbers - entry["total_bytes"]
        found["tensors"] = len(published_names(entry)) - entry["tensors"]
    if network in NUMBERS:
        found["numbers"] = numbers - NUMBERS[network]
    if network in FILES:
        found["file"] = file_size(network, model) - FILES[network][1]
    return {what: difference for what, difference in found.items() if difference}


@pytest.mark.parametrize("network", {**INDEX, **NUMBERS, **FILES})
def test_network_has_the_names_and_the_size_of_the_published_one(network):
    assert differences(network) == {}


@pytest.mark.parametrize(
    ("network", "change"),
    [
        ("hunyuan/text_encoder_2", {"d_ff": 4096}),
        ("flux/text_encoder_2", {"num_layers": 23}),
        ("svd/vae", {"latent_channels": 8}),
        ("wan-ti2v/transformer", {"ffn_dim": 13824}),
    ],
    ids=str,
)
def test_network_of_another_config_is_found(network, change, monkeypatch):
    """Positive control."""
    other = dataclasses.replace(NETWORKS[network], config={**NETWORKS[network].config, **change})
    monkeypatch.setattr(published_models, "NETWORKS", {**NETWORKS, network: other})
    assert differences(network)
