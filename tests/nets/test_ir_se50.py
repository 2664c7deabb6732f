"""IR-SE50: published layout, parity with the published network, and errors for unusable files."""

import hashlib

import numpy as np
import pytest
import torch

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.ir_se50 import IRSE50, IRSE50Embedder, read_network
from vidgen_ray.weights import resolve


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
    tensors = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in network.state_dict().items())
    assert len(tensors) == 397
    assert hashlib.sha256("\n".join(tensors).encode()).hexdigest()[:16] == "471eb9bc30358c01"
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


def test_embeddings_have_length_1_and_do_not_depend_on_the_batch(weights, crops):
    embedder = IRSE50Embedder(weights)
    embeddings = embedder.embed(crops)
    assert embeddings.shape == (3, 512)
    assert embeddings.dtype == np.float32
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    singles = np.concatenate([embedder.embed(crop[None]) for crop in crops])
    assert np.allclose(embeddings, singles, rtol=0, atol=1e-6)
    assert (embeddings @ embeddings.T)[np.triu_indices(3, 1)].max() < 0.95


def test_pixels_are_bgr_scaled_to_minus_one_to_one(weights, crops):
    """InfiniteYou's `extract_arcface_bgr_embedding` uses BGR / 255 * 2 - 1."""
    tensor = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        expected = read_network(weights)(2 * tensor - 1).numpy()
    assert np.allclose(IRSE50Embedder(weights).embed(crops), expected, rtol=0, atol=1e-6)


def test_bfloat16_embedding_is_close_to_float32(weights, crops):
    full, half = IRSE50Embedder(weights).embed(crops), IRSE50Embedder(weights, dtype=torch.bfloat16).embed(crops)
    assert half.dtype == np.float32
    assert (full * half).sum(axis=1).min() > 0.999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_embedding_is_close_to_cpu(weights, crops):
    cpu, gpu = IRSE50Embedder(weights).embed(crops), IRSE50Embedder(weights, "cuda", torch.float16).embed(crops)
    assert (cpu * gpu).sum(axis=1).min() > 0.999


class Raw(torch.nn.Module):
    """The network without the final normalisation."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, faces):
        network = self.network
        return network.output_layer(network.body(network.input_layer(faces)))


@pytest.mark.parametrize("wrap", [Raw, lambda network: network], ids=["raw", "normalised"])
def test_onnx_export_matches_the_weights(weights, crops, tmp_path, wrap):
    """The exports have a batch size of 1, with and without the final normalisation. Equal to 1e-5."""
    file = tmp_path / "arcface_ir_se50.onnx"
    torch.onnx.export(wrap(read_network(weights)), (torch.zeros(1, 3, 112, 112),), str(file), dynamo=False)
    assert np.allclose(IRSE50Embedder(file).embed(crops), IRSE50Embedder(weights).embed(crops), rtol=0, atol=1e-5)


def test_onnx_file_of_another_model_is_rejected(tmp_path):
    file = tmp_path / "other.onnx"
    torch.onnx.export(torch.nn.Linear(4, 4), (torch.zeros(1, 4),), str(file), dynamo=False)
    with pytest.raises(SetupError, match="does not take faces of 112x112 pixels; use recognition_arcface_ir_se50"):
        IRSE50Embedder(file)


class Payload:
    """A pickle that calls a function when it is loaded."""

    def __reduce__(self):
        return (print, ("run",))


def changed(state, name, tensor):
    return {**state, name: tensor}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {}, "not the state dict of an IR-SE50; use recognition_arcface_ir_se50.pth"),
        (lambda s: [1, 2], "not the state dict"),
        (
            lambda s: {k: v for k, v in s.items() if k != "output_layer.3.bias"},
            r"1 of .* output_layer.3.bias: got none, must be",
        ),
        (lambda s: changed(s, "head.weight", torch.zeros(2)), r"head.weight: got \(2,\), must be none"),
        (lambda s: changed(s, "input_layer.2.weight", torch.zeros(7)), r"input_layer.2.weight: got \(7,\), must be \(4,\)"),
        (lambda s: changed(s, "output_layer.4.weight", torch.full((512,), float("nan"))), "finite: False"),
        (lambda s: changed(s, "extra", Payload()), "cannot be read as a state dict; use recognition"),
    ],
    ids=["empty", "list", "missing tensor", "unexpected tensor", "wrong shape", "nan", "pickled code"],
)
def test_wrong_weights_are_rejected_without_running_code(weights, tmp_path, capsys, content, message):
    file = tmp_path / "weights.pth"
    torch.save(content(torch.load(weights, weights_only=True)), file)
    with pytest.raises(SetupError, match=message):
        IRSE50Embedder(file)
    assert capsys.readouterr().out == ""


def test_old_files_without_num_batches_tracked_load(weights, crops, tmp_path):
    state = torch.load(weights, weights_only=True)
    file = tmp_path / "old.pth"
    torch.save({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}, file)
    assert np.array_equal(IRSE50Embedder(file).embed(crops), IRSE50Embedder(weights).embed(crops))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, "no file at .*absent.pth; use recognition"),
        ("weights.bin", b"x", "must end with .pth or .onnx"),
        ("damaged.pth", b"x" * 100, "cannot be read as a state dict"),
        ("damaged.onnx", b"x" * 100, "cannot be loaded, use an intact ONNX file"),
    ],
    ids=["missing", "wrong suffix", "damaged pth", "damaged onnx"],
)
def test_missing_or_damaged_weights_raise_setup_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SetupError, match=message):
        IRSE50Embedder(tmp_path / name)
