"""Tiles, receptive field, memory, calibration, models: what the speed of `vidgen upscale` rests on."""

import numpy as np
import pytest
import torch

from tests.upscale.conftest import compact
from tests.upscale.videos import picture, write_video
from vidgen_ray.errors import SetupError, StageError, UsageError
from vidgen_ray.stages.realesrgan import forward
from vidgen_ray.upscale import calibration as calibration_module
from vidgen_ray.upscale import run as run_module
from vidgen_ray.upscale import tiles as tiles_module
from vidgen_ray.upscale.calibration import Calibration, calibrate
from vidgen_ray.upscale.job import upscale_frames
from vidgen_ray.upscale.network import EngineSettings, UpscaleModel, UpscaleNetwork, find_model
from vidgen_ray.upscale.run import engine_settings
from vidgen_ray.upscale.source import read_source
from vidgen_ray.upscale.tiles import bytes_per_pixel, call_bytes, choose_tile, receptive_field

BASE = EngineSettings(threads=1)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path / "cache"))


def levels_apart(a, b) -> int:
    return max(int(np.abs(x.astype(int) - y).max()) for x, y in zip(a, b, strict=True))


def test_receptive_field_is_that_of_the_convolutions(tmp_path, empty_cache):
    """Four convolutions of 3x3 see four pixels, and nothing more. It is rounded up to a multiple of four."""
    model = UpscaleModel("four", compact(tmp_path / "four.safetensors", convs=2))
    assert receptive_field(model) == 4
    deeper = UpscaleModel("nine", compact(tmp_path / "nine.safetensors", convs=7))
    assert receptive_field(deeper) in (4, 8, 12)
    # The second time from the cache: no network is loaded.
    assert receptive_field(UpscaleModel("gone", model.file)) == 4


def test_receptive_field_of_a_network_that_sees_everything_is_none(tiny_model, empty_cache, monkeypatch):
    monkeypatch.setattr(tiles_module, "OVERLAPS_PX", (16, 32))
    monkeypatch.setattr(tiles_module, "forward", lambda network, pixels: forward(network, pixels) + pixels.mean())
    assert receptive_field(tiny_model) is None
    with pytest.raises(SetupError, match="sees whole frames, so tiles would show"):
        choose_tile(tiny_model, 4000, 4000, 1e6)


def test_tiles_give_the_untiled_frame_within_one_level():
    """The default network with its measured overlap, at all seams. Half of the overlap must show, or this checks nothing."""
    model = find_model("animevideov3")
    overlap = receptive_field(model)
    frame = np.ascontiguousarray(picture(3, 100, 72))
    whole = UpscaleNetwork(model, BASE)([frame])
    tiled = UpscaleNetwork(model, BASE.model_copy(update={"tile_px": 32, "overlap_px": overlap}))([frame])
    assert levels_apart(whole, tiled) <= 1
    short = UpscaleNetwork(model, BASE.model_copy(update={"tile_px": 32, "overlap_px": 4}))([frame])
    assert levels_apart(whole, short) > 1


def test_tile_is_the_largest_that_fits(tiny_model, empty_cache):
    width, height = 1920, 1080
    whole = call_bytes(tiny_model, width, height)
    result = width * height * 2 * 3 * 4 * 2**2
    tile, overlap = choose_tile(tiny_model, width, height, result + (whole - result) / 4)
    assert overlap == 4
    assert 0.45 * (width * height) ** 0.5 < tile <= 0.5 * (width * height) ** 0.5
    with pytest.raises(SetupError, match=r"needs [\d.]+ GB, in the smallest tiles [\d.]+ GB"):
        choose_tile(tiny_model, width, height, result * 0.9)


def test_memory_of_a_call_is_that_of_its_tensors(tmp_path):
    """Two of eight features at a time, in float32, and the result: between one and four layers at any size."""
    network = UpscaleModel("tiny", compact(tmp_path / "tiny.safetensors")).load()
    per_pixel = bytes_per_pixel(network)
    assert 2 * 8 * 4 <= per_pixel <= 4 * 12 * 4 + 100
    assert bytes_per_pixel(network, 24) == pytest.approx(per_pixel, rel=0.1)


def test_sixteen_bits_are_not_rounded_to_eight(tiny_model):
    network = UpscaleNetwork(tiny_model, BASE)
    frame = picture(1)
    deep = network([frame.astype(np.uint16) * 257])[0]
    assert deep.dtype == np.uint16
    assert np.abs(deep / 257 - network([frame])[0]).max() <= 0.51
    assert len(np.unique(deep)) > 256


@pytest.mark.parametrize("bits", [8, 16])
def test_openvino_gives_the_same_pixels(tiny_model, bits):
    pytest.importorskip("openvino")
    frames = [picture(n) if bits == 8 else picture(n).astype(np.uint16) * 257 for n in range(2)]
    expected = UpscaleNetwork(tiny_model, BASE, (96, 72))(frames)
    got = UpscaleNetwork(tiny_model, BASE.model_copy(update={"engine": "openvino"}), (96, 72))(frames)
    assert levels_apart(got, expected) <= (1 if bits == 8 else 8)


@pytest.mark.slow
def test_compiled_networks_give_the_same_pixels(tiny_model):
    frames = [picture(n) for n in range(2)]
    expected = UpscaleNetwork(tiny_model, BASE)(frames)
    assert levels_apart(UpscaleNetwork(tiny_model, BASE.model_copy(update={"compiled": True}))(frames), expected) <= 1


def test_resized_results_are_those_of_a_larger_result_resized(tiny_model):
    frame = picture(1)
    assert UpscaleNetwork(tiny_model, BASE, (96, 72))([frame])[0].shape == (72, 96, 3)


def test_networks_that_give_nan_fail(tmp_path):
    from safetensors.torch import load_file, save_file

    path = compact(tmp_path / "tiny.safetensors")
    state = load_file(path)
    save_file({name: tensor * 1e30 for name, tensor in state.items()}, path)
    with pytest.raises(StageError, match="NaN or infinite"):
        UpscaleNetwork(UpscaleModel("tiny", path), BASE)([picture(0)])


@pytest.fixture
def clock(monkeypatch):
    """Seconds of each measured call, by a function of the settings of the network. Returns the list of measured settings."""
    measured = []

    def install(seconds):
        monkeypatch.setattr(calibration_module, "can_compile", lambda: False)
        monkeypatch.setattr(calibration_module, "usable_cpus", lambda: 2)
        monkeypatch.setattr(calibration_module, "cpu_has_bfloat16", lambda: True)
        monkeypatch.setattr(calibration_module, "has_openvino", lambda: False)
        run = calibration_module._Bench._run

        def record(self, network):
            measured.append(network.settings)
            return run(self, network)

        def fake(function):
            measured.clear()
            function()
            return sum(seconds(settings) for settings in measured[-1:]) * (len(measured) or 1)

        monkeypatch.setattr(calibration_module._Bench, "_run", record)
        monkeypatch.setattr(calibration_module, "_seconds", fake)

    return install


def test_slow_bfloat16_is_not_chosen(tiny_model, empty_cache, clock):
    clock(lambda settings: 2.0 if settings.dtype == "bfloat16" else 1.0)
    calibration = calibrate(tiny_model, "cpu")
    assert calibration.settings.dtype == "float32"
    assert {one.settings.dtype for one in calibration.measured} == {"float32", "bfloat16"}
    assert any("<- chosen" in line and "float32" in line for line in calibration.report())


def test_inaccurate_settings_are_not_chosen_however_fast(tiny_model, empty_cache, clock, monkeypatch):
    clock(lambda settings: 0.1 if settings.dtype == "bfloat16" else 1.0)
    monkeypatch.setattr(calibration_module, "MIN_PSNR_DB", 90.0)
    assert calibrate(tiny_model, "cpu").settings.dtype == "float32"


def test_calibration_is_measured_once_per_model(tiny_model, empty_cache, clock, tmp_path):
    clock(lambda settings: 1.0)
    progress = []
    first = calibrate(tiny_model, "cpu", on_progress=progress.append)
    assert progress.pop()
    progress.clear()
    assert calibrate(tiny_model, "cpu", on_progress=progress.append) == first
    assert not progress
    for model, again in ((tiny_model, True), (UpscaleModel("other", compact(tmp_path / "other.safetensors", seed=1)), False)):
        calibrate(model, "cpu", again=again, on_progress=progress.append)
        assert progress.pop()
        progress.clear()


def test_calibration_reports_each_setting_and_the_frames_left(tiny_model, empty_cache, clock, monkeypatch):
    """Every frame takes a second. bfloat16 cannot be used, so its frames are not waited for."""
    clock(lambda settings: float(settings.frames_per_call))

    class Network(UpscaleNetwork):
        def __init__(self, model, settings):
            if settings.dtype == "bfloat16":
                raise StageError("not here")
            super().__init__(model, settings)

    monkeypatch.setattr(calibration_module, "UpscaleNetwork", Network)
    progress = []
    calibration = calibrate(tiny_model, "cpu", on_progress=progress.append)
    activities = " ".join(one.activity for one in progress)
    assert all(f"measuring {one.settings}" in activities for one in calibration.measured)
    assert "2 calls on 2 threads" in activities
    assert calibration.failed
    assert progress[0].left_s is None
    assert [one.left_s for one in progress if one.frames] == [one.total - one.frames for one in progress if one.frames]
    # Until bfloat16 has failed, its frames count.
    assert progress[1].total > progress[-1].total
    later = [one for one in progress if one.total == progress[-1].total]
    last_call = 3 * 2 * calibration.measured[-1].settings.frames_per_call
    assert later[-1].total - later[-1].frames == last_call


def test_workers_share_the_cpus():
    settings = EngineSettings(threads=4, parallel_calls=2)
    calibration = Calibration(settings=settings, workers=1, frame_size=(64, 48), machine="m", measured=())
    divided = map(calibration.with_workers, (1, 2, 4, 8))
    assert [(one.workers, one.settings.threads, one.settings.parallel_calls) for one in divided] == [
        (1, 4, 2),
        (2, 2, 2),
        (4, 1, 1),
        (8, 1, 1),
    ]


def test_parallel_calls_are_chosen_if_they_are_faster_and_fit_in_memory(tiny_model, empty_cache, clock, monkeypatch, tmp_path):
    clock(lambda settings: 1.0 / settings.parallel_calls)
    monkeypatch.setattr(calibration_module, "usable_cpus", lambda: 8)
    calibration = calibrate(tiny_model, "cpu")
    chosen = calibration.settings
    assert (calibration.workers, chosen.threads, chosen.parallel_calls) == (2, 4, 4)
    source = read_source(write_video(tmp_path / "in.mp4", 1))
    for calls, expected in ((4, 4), (3, 1)):
        free = calibration.workers * calls * call_bytes(tiny_model, source.width, source.height)
        monkeypatch.setattr(run_module, "free_memory", lambda device, free=free: free)
        assert engine_settings(source, tiny_model, calibration).parallel_calls == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parallel_calls_give_the_same_pixels(dtype):
    frames = [picture(n) for n in range(4)]
    alone = UpscaleNetwork(find_model("animevideov3"), BASE.model_copy(update={"dtype": dtype}))
    expected = [alone([frame])[0] for frame in frames]
    settings = BASE.model_copy(update={"dtype": dtype, "threads": 2, "parallel_calls": 2})
    got = list(upscale_frames(iter(frames), UpscaleNetwork(find_model("animevideov3"), settings)))
    assert levels_apart(got, expected) == 0


def test_networks_of_real_esrgan_give_the_pixels_of_their_published_code():
    """The network for videos is run layer by layer, which must not change a bit."""
    network = find_model("animevideov3").load()
    pixels = torch.from_numpy(picture(1)).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        assert torch.equal(forward(network, pixels), network.model(pixels))
        network.model.bfloat16()
        assert torch.equal(forward(network, pixels.bfloat16()), network.model(pixels.bfloat16()))


def test_denoise_mixes_two_weights(tmp_path):
    general = compact(tmp_path / "realesr-general-x4v3.safetensors", seed=1)
    other = compact(tmp_path / "realesr-general-wdn-x4v3.safetensors", seed=2)
    a, b = (UpscaleModel("m", path).load().model.state_dict() for path in (general, other))
    mixed = find_model(str(general), 0.25)
    for name, tensor in mixed.load().model.state_dict().items():
        torch.testing.assert_close(tensor, 0.25 * a[name] + 0.75 * b[name])
    assert len({mixed.key, find_model(str(general)).key, find_model(str(general), 0.5).key}) == 3


@pytest.mark.parametrize(
    ("name", "denoise", "message"),
    [
        ("x5plus", None, "must be one of animevideov3, x4plus-anime, x4plus, or the path"),
        ("animevideov3", 0.5, "must be those of realesr-general-x4v3"),
        ("weights.bin", None, "must end in .safetensors or .pth"),
    ],
)
def test_wrong_models_are_named(tmp_path, monkeypatch, name, denoise, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=message):
        find_model(name, denoise)


def test_denoise_without_its_second_weights_says_what_is_missing(tmp_path):
    general = compact(tmp_path / "realesr-general-x4v3.safetensors")
    with pytest.raises(SetupError, match=r"realesr-general-wdn-x4v3\.safetensors, which does not exist"):
        find_model(str(general), 0.5)
