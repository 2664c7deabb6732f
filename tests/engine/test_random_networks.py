"""Networks with random weights: sizes, places and values."""

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from safetensors.torch import load_file

from vidgen_ray.bench import published_models
from vidgen_ray.bench.published_models import (
    empty_network,
    published_networks,
    random_model,
    random_pipeline,
)
from vidgen_ray.errors import SetupError
from vidgen_ray.stages.flux_model import FluxParams
from vidgen_ray.stages.loading import load_pipeline
from vidgen_ray.stages.svd import SVDParams
from vidgen_ray.stages.wan import WanParams
from vidgen_ray.weights import resolve


def test_full_size_networks_have_the_published_number_of_parameters():
    """The others are in tests/planner/test_memory.py."""

    def parameters_of(model, component):
        network = empty_network(published_networks(model)[component])
        assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
        return sum(parameter.numel() for parameter in network.parameters())

    # Half of `total_size` in the published index file, which is in bfloat16.
    assert parameters_of("flux-schnell", "transformer") == 11_891_178_560
    # OpenCLIP ViT-H/14, vision part.
    assert parameters_of("svd", "image_encoder") == pytest.approx(632e6, rel=0.005)


def test_schnell_has_the_encoders_of_dev():
    dev, schnell = published_networks("flux"), published_networks("flux-schnell")
    assert dev.keys() == schnell.keys() == {"transformer", "text_encoder", "text_encoder_2", "vae"}
    assert [name for name in dev if dev[name] != schnell[name]] == ["transformer"]


def test_wan_has_one_or_two_transformers():
    a14b, ti2v = published_networks("wan"), published_networks("wan-ti2v")
    assert a14b.keys() == {"transformer", "transformer_2", "text_encoder", "vae"}
    assert ti2v.keys() == a14b.keys() - {"transformer_2"}
    assert [name for name in ti2v if ti2v[name] == a14b[name]] == ["text_encoder"]


def test_random_networks_have_the_precisions_of_loaded_ones():
    """The autoencoder of Wan and some layers of its transformers are in float32."""
    params = WanParams(weights=resolve("builtin:tiny/wan"), dtype="bfloat16")
    loaded = load_pipeline(WanImageToVideoPipeline, params, float32_parts=("vae",)).components
    for component, model in random_pipeline(random_model("builtin:tiny/wan", None).networks, params, ("vae",)).items():
        expected = {name: tensor.dtype for name, tensor in loaded[component].state_dict().items()}
        assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == expected


def test_random_networks_have_the_tensors_of_the_weights_and_are_repeatable():
    folder, params = resolve("builtin:tiny/svd"), SVDParams(weights="unused", dtype="bfloat16")
    networks = random_model("builtin:tiny/svd", None).networks
    first, second = (random_pipeline(networks, params) for _ in range(2))
    assert first.keys() == {"unet", "vae", "image_encoder"}
    for component, model in first.items():
        (file,) = (folder / component).glob("*.safetensors")
        tensors = model.state_dict()
        assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in load_file(file).items()}
        assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values() if tensor.is_floating_point())
        assert all(torch.equal(tensor, second[component].state_dict()[name]) for name, tensor in tensors.items())
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_networks_that_flux_quantizes_or_keeps_on_the_host_are_built_there():
    options = {"weights": "unused", "device": "cuda"}
    components = ("transformer", "text_encoder_2", "vae")

    def places(**changes):
        return [published_models._place(name, FluxParams(**options, **changes)) for name in components]

    assert places() == ["cuda", "cuda", "cuda"]
    assert places(quantize="fp8_storage", text_encoder="cpu") == ["cpu", "cpu", "cuda"]
    assert published_models._place("vae", WanParams(**options, cpu_offload=True)) == "cpu"


def test_unknown_repository_is_refused():
    with pytest.raises(SetupError, match=r"random weights are known only for black-forest-labs/FLUX\.1-dev"):
        random_model("hub:someone/model@main", None)
