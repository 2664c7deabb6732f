"""IR-SE50: published layout, parity with the published network, and errors for unusable files."""

import hashlib

import numpy as np
import pytest
import torch

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.ir_se50 import IRSE50, IRSE50Embedder, read_network
from vidgen_ray.weights import resolve


def layout(network):
    """Return a digest of the names and shapes of all tensors of a network, sorted by name."""
    tensors = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in network.state_dict().items())
    return hashlib.sha256("\n".join(tensors).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def weights():
    return resolve("builtin:tiny/ir_se50.pth")


@pytest.fixture(scope="module")
def crops():
    """Three random images in place of aligned faces, (3, 112, 112, 3)."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(14, axis=1).repeat(14, axis=2)


def test_state_dict_matches_the_published_file():
    """The digest covers the names and shapes of facexlib's `Backbone(50, 0.6, "ir_se")`, sorted by name."""
    with torch.device("meta"):
        network = IRSE50()
    assert layout(network) == "471eb9bc30358c01"
    assert sum(weights.numel() for weights in network.parameters()) == 43_797_696


def test_embeddings_match_facexlib():
    """Equal to 1e-6, with values of about 0.04, at the full size."""
    arcface_arch = pytest.importorskip("facexlib.recognition.arcface_arch")
    torch.manual_seed(0)
    reference = arcface_arch.Backbone(50, 0.6, "ir_se").eval()
    with torch.device("meta"):
        network = IRSE50().eval()
    network.load_state_dict(reference.state_dict(), assign=True)
    faces = torch.rand(2, 3, 112, 112) * 2 - 1
    with torch.inference_mode():
        assert torch.allclose(network(faces), reference(faces), rtol=0, atol=1e-6)


def test_embeddings_of_bgr_pixels_have_length_1_and_do_not_depend_on_the_batch(weights, crops):
    """InfiniteYou's `extract_arcface_bgr_embedding` uses BGR / 255 * 2 - 1."""
    embedder = IRSE50Embedder(weights)
    embeddings = embedder.embed(crops)
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    assert (embeddings @ embeddings.T)[np.triu_indices(3, 1)].max() < 0.95
    assert np.allclose(embeddings[1:2], embedder.embed(crops[1:2]), rtol=0, atol=1e-6)
    with torch.inference_mode():
        expected = read_network(weights)(torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert np.allclose(embeddings, expected.numpy(), rtol=0, atol=1e-6)


def test_other_files_are_rejected_but_old_ones_without_num_batches_tracked(weights, crops, tmp_path):
    state, file = torch.load(weights, weights_only=True), tmp_path / "weights.pth"
    for content, message in (
        ([1, 2], "not the weights of an IR-SE50"),
        ({k: v for k, v in state.items() if k != "output_layer.3.bias"}, r"Missing key.* \"output_layer.3.bias\""),
        ({**state, "head.weight": torch.zeros(2)}, r"Unexpected key.* \"head.weight\""),
        ({**state, "output_layer.4.weight": torch.full((512,), float("nan"))}, "NaN or infinite"),
    ):
        torch.save(content, file)
        with pytest.raises(SetupError, match=f"(?s){message}"):
            IRSE50Embedder(file)
    with pytest.raises(SetupError, match=r"use recognition.*No such file"):
        IRSE50Embedder(tmp_path / "absent.pth")
    torch.save({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}, file)
    assert np.array_equal(IRSE50Embedder(file).embed(crops), IRSE50Embedder(weights).embed(crops))
