"""Networks with random weights. Their full sizes are in tests/planner/test_memory.py."""

import torch
from diffusers import WanImageToVideoPipeline

from vidgen_ray.bench.published_models import random_model, random_pipeline
from vidgen_ray.stages.loading import load_pipeline
from vidgen_ray.stages.wan import WanParams
from vidgen_ray.weights import resolve


def test_random_networks_have_the_tensors_of_loaded_ones_and_are_repeatable():
    """The autoencoder of Wan and some layers of its transformers are in float32."""
    params = WanParams(weights=resolve("builtin:tiny/wan"), dtype="bfloat16")
    loaded = load_pipeline(WanImageToVideoPipeline, params, float32_parts=("vae",)).components
    networks = random_model("builtin:tiny/wan", None).networks
    first, second = (random_pipeline(networks, params, ("vae",)) for _ in range(2))
    assert first.keys() == {"transformer", "transformer_2", "text_encoder", "vae"}
    for component, model in first.items():
        tensors, again = model.state_dict(), second[component].state_dict()
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in loaded[component].state_dict().items()}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == expected
        assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
