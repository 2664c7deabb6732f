"""Architectures of the published weights against the index files of their repositories."""

from pathlib import Path

import pytest
import torch
import yaml

from vidgen_ray.bench.published_models import build_network

INDEX = yaml.safe_load((Path(__file__).parent / "published_index.yaml").read_text())
TIED = {"encoder.embed_tokens.weight"}
"""Second name of T5's embedding in the model. The file has it once, as `shared.weight`."""


def published_names(entry):
    names = set(entry["single"])
    for group in entry["blocks"]:
        names |= {f"{group['prefix']}.{n}.{name}" for n in range(group["blocks"]) for name in group["names"]}
    return names


def differing_names(network, entry):
    model = build_network(network, torch.bfloat16)
    return (set(model.state_dict()) ^ published_names(entry)) - TIED


@pytest.mark.parametrize("network", INDEX)
def test_published_index_has_the_names_of_the_model(network):
    entry = INDEX[network]
    assert len(published_names(entry)) == entry["tensors"]
    assert differing_names(network, entry) == set()


def test_network_with_another_number_of_blocks_differs():
    entry = INDEX["flux/text_encoder_2"]
    fewer = {**entry, "blocks": [{**group, "blocks": group["blocks"] - 1} for group in entry["blocks"]]}
    assert differing_names("flux/text_encoder_2", fewer)


@pytest.mark.parametrize(("network", "bytes_per_number"), [("flux/transformer", 2), ("flux/text_encoder_2", 2)])
def test_published_size_is_that_of_the_model(network, bytes_per_number):
    parameters = sum(parameter.numel() for parameter in build_network(network, torch.bfloat16).parameters())
    assert INDEX[network]["total_bytes"] == bytes_per_number * parameters
