"""Tiles, memory, settings, models: what the speed of `vidgen upscale` rests on."""

import numpy as np
import pytest
import torch

from tests.upscale.conftest import compact
from tests.upscale.videos import picture, write_video
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.profile import load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.realesrgan import RealESRGANParams, RealESRGANStage, forward
from vidgen_ray.upscale import network as network_module
from vidgen_ray.upscale import run
from vidgen_ray.upscale.network import (
    EngineSettings,
    UpscaleModel,
    UpscaleNetwork,
    bytes_per_pixel,
    call_bytes,
    choose_settings,
    choose_tile,
    default_workers,
    find_model,
    settings_for,
    tile_overlap_px,
)
from vidgen_ray.upscale.segments import upscale_frames
from vidgen_ray.upscale.source import read_source

BASE = EngineSettings(threads=1)


def levels_apart(a, b) -> int:
    return max(int(np.abs(x.astype(int) - y).max()) for x, y in zip(a, b, strict=True))


def test_tiles_give_the_untiled_frame_within_one_level():
    """The default network with its overlap, at all seams. Half of the overlap must show, or this checks nothing."""
    model = find_model("animevideov3")
    overlap = tile_overlap_px(model)
    frame = np.ascontiguousarray(picture(3, 100, 72))
    whole = UpscaleNetwork(model, BASE)(frame)
    tiled = UpscaleNetwork(model, BASE.model_copy(update={"tile_px": 32, "overlap_px": overlap}))(frame)
    assert levels_apart(whole, tiled) <= 1
    short = UpscaleNetwork(model, BASE.model_copy(update={"tile_px": 32, "overlap_px": 4}))(frame)
    assert levels_apart(whole, short) > 1


def test_tile_is_the_largest_that_fits(tiny_model, monkeypatch):
    width, height = 1920, 1080
    whole = call_bytes(tiny_model, width, height)
    result = width * height * 2 * 3 * 4 * 2**2
    tile, overlap = choose_tile(tiny_model, width, height, result + (whole - result) / 4)
    assert overlap == 20
    assert 0.45 * (width * height) ** 0.5 < tile <= 0.5 * (width * height) ** 0.5
    with pytest.raises(SetupError, match=r"needs [\d.]+ GB, in the smallest tiles [\d.]+ GB"):
        choose_tile(tiny_model, width, height, result * 0.9)
    monkeypatch.setattr(network_module, "tile_overlap_px", lambda model: None)
    with pytest.raises(SetupError, match="sees whole frames, so tiles would show"):
        choose_tile(tiny_model, 4000, 4000, 1e6)


def test_memory_of_a_call_is_that_of_its_tensors(tmp_path):
    """Two of eight features at a time, in float32, and the result: between one and four layers at any size."""
    network = UpscaleModel("tiny", compact(tmp_path / "tiny.safetensors")).load()
    per_pixel = bytes_per_pixel(network, 48)
    assert 2 * 8 * 4 <= per_pixel <= 4 * 12 * 4 + 100
    assert bytes_per_pixel(network, 8) == pytest.approx(per_pixel, rel=0.1)


def test_engines_threads_and_bits_give_the_same_pixels(tiny_model):
    frames = [picture(n) for n in (0, 1, 1, 2)]
    network = UpscaleNetwork(tiny_model, BASE)
    expected = [*map(network, frames)]
    openvino = UpscaleNetwork(tiny_model, BASE.model_copy(update={"engine": "openvino"}))
    assert levels_apart(map(openvino, frames), expected) <= 1
    parallel = UpscaleNetwork(tiny_model, BASE.model_copy(update={"threads": 2, "parallel_calls": 2}))
    assert levels_apart(upscale_frames(iter(frames), parallel), expected) == 0
    # Sixteen bits are not rounded to eight.
    deep = network(frames[1].astype(np.uint16) * 257)
    assert deep.dtype == np.uint16
    assert np.abs(deep / 257 - expected[1]).max() <= 0.51
    assert len(np.unique(deep)) > 256


def test_settings_follow_the_machine(monkeypatch, tiny_model, tmp_path):
    other = compact(tmp_path / "animevideov3.safetensors")
    for cpus, bfloat16, openvino, expected in (
        (1, False, False, "torch float32, 1 call at a time on 1 threads"),
        (16, True, True, "torch bfloat16, 2 calls at a time on 8 threads"),
        (16, False, True, "openvino float32, 2 calls at a time on 8 threads"),
    ):
        for name, value in (("usable_cpus", cpus), ("cpu_has_bfloat16", bfloat16), ("has_openvino", openvino)):
            monkeypatch.setattr(network_module, name, lambda value=value: value)
        assert str(choose_settings(find_model("animevideov3"), "cpu", default_workers("cpu"))) == expected
        # The difference of half precision is known for the builtin networks only, not for a file with the name of one.
        assert choose_settings(tiny_model, "cpu", 1).dtype == "float32"
        assert choose_settings(find_model(str(other)), "cpu", 1).dtype == "float32"


def test_calls_at_the_same_time_must_fit_in_memory(tiny_model, monkeypatch, tmp_path):
    source = read_source(write_video(tmp_path / "in.mp4", 1))
    settings = EngineSettings(threads=4, parallel_calls=2)
    for calls, expected in ((2, 2), (1.5, 1)):
        free = calls * call_bytes(tiny_model, source.width, source.height) / network_module.MEMORY_SHARE
        monkeypatch.setattr(network_module, "free_bytes", lambda device, free=free: free)
        assert settings_for(source, tiny_model, settings, 1).parallel_calls == expected


def test_networks_of_real_esrgan_give_the_pixels_of_their_published_code():
    """The network for videos is run layer by layer, which must not change a bit."""
    network = find_model("animevideov3").load()
    pixels = torch.from_numpy(picture(1, 32, 24)).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        assert torch.equal(forward(network, pixels), network.model(pixels))
        network.model.bfloat16()
        assert torch.equal(forward(network, pixels.bfloat16()), network.model(pixels.bfloat16()))


def test_denoise_mixes_two_weights(tmp_path):
    general = compact(tmp_path / "realesr-general-x4v3.safetensors", seed=1)
    with pytest.raises(SetupError, match=r"realesr-general-wdn-x4v3\.safetensors, which does not exist"):
        find_model(str(general), 0.5)
    other = compact(tmp_path / "realesr-general-wdn-x4v3.safetensors", seed=2)
    a, b = (UpscaleModel("m", path).load().model.state_dict() for path in (general, other))
    mixed = find_model(str(general), 0.25)
    for name, tensor in mixed.load().model.state_dict().items():
        torch.testing.assert_close(tensor, 0.25 * a[name] + 0.75 * b[name])
    assert len({mixed.key, find_model(str(general)).key, find_model(str(general), 0.5).key}) == 3


def test_wrong_models_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    for name, denoise, message in (
        ("x5plus", None, "must be one of animevideov3, x4plus-anime, x4plus, or the path"),
        ("animevideov3", 0.5, "must be those of realesr-general-x4v3"),
        ("weights.bin", None, "must end in .safetensors or .pth"),
    ):
        with pytest.raises(UsageError, match=message):
            find_model(name, denoise)


def test_frames_go_through_the_stage(tiny_model, monkeypatch, tmp_path):
    """A field that the stage reads then has an effect in `vidgen upscale` and `vidgen stage`, too."""
    frame = picture(0)
    expected = UpscaleNetwork(tiny_model, BASE, (128, 96))(frame)
    stage = RealESRGANStage(RealESRGANParams(weights=tiny_model.file.parent, threads=1))
    stage.load()
    shot = Shot(prompt="a", upscaler=tiny_model.file.stem, scale=2)
    np.testing.assert_array_equal(stage.run_chunk(shot, frame[None])[0], expected)

    process = RealESRGANStage.process_chunk
    monkeypatch.setattr(
        RealESRGANStage, "process_chunk", lambda stage, shot, *chunk: process(stage, shot, *chunk) // shot.max_tries
    )
    changed = UpscaleNetwork(tiny_model, BASE, (128, 96), shot.model_copy(update={"max_tries": 2}))(frame)
    np.testing.assert_array_equal(changed, expected // 2)

    jobs = []
    monkeypatch.setattr(run, "upscale_file", lambda source, out, options, *_, **__: jobs.append(options.shot))
    own = Shot(prompt="a", max_tries=2)
    run.process_clip(load_profile("tiny"), RealESRGANStage, own, write_video(tmp_path / "in.mp4", 1), tmp_path / "out.mp4")
    assert jobs == [own]
