"""Reading and writing of images and videos: colours, exactness, random access and malicious files."""

import io
import itertools
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image as PILImage

from vidgen_ray.errors import MediaError
from vidgen_ray.media import (
    Mp4Settings,
    Mp4Writer,
    cover_crop,
    decode_lossless,
    encode_lossless,
    encode_png,
    open_video,
    read_image,
    write_png,
)
from vidgen_ray.stages.base import Frames, Image
from vidgen_ray.upscale.frames import end_real_time_priority

FAST = Mp4Settings(preset="veryfast", threads=2)
SQUARE = 32


def saturated_chart() -> Image:
    """Return a chart (128, 256, 3) of 32 squares, including all corners and midpoints of the RGB cube."""
    colours = [*itertools.product((0, 128, 255), repeat=3), (220, 20, 60), (64, 64, 64), (255, 200, 180), (30, 90, 40)]
    squares = np.array([*colours, colours[0]], np.uint8).reshape(4, 8, 3)
    return squares.repeat(SQUARE, 0).repeat(SQUARE, 1)


def moving_frames(count: int = 30, width: int = 96, height: int = 64) -> Frames:
    """Return smooth noise that drifts, so that all frames differ."""
    coarse = np.random.default_rng(7).integers(0, 256, (height // 8 + 8, width // 8 + 8, 3), np.uint8)
    wide = np.asarray(PILImage.fromarray(coarse).resize((width + 64, height + 64), PILImage.Resampling.BICUBIC))
    return np.stack([wide[k : k + height, 2 * k : 2 * k + width] for k in range(count)])


def noise(count: int, height: int, width: int) -> Frames:
    return np.random.default_rng(3).integers(0, 256, (count, height, width, 3), np.uint8)


def write_mp4(path: Path, frames: Frames, fps: int | Fraction = 24, settings: Mp4Settings = FAST) -> Path:
    with Mp4Writer(path, frames.shape[2], frames.shape[1], fps, settings) as clip:
        clip.write(frames)
    return path


def write_foreign(
    path: Path,
    frames: Frames,
    *,
    codec: str = "libx264",
    container: str = "mp4",
    options: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
) -> Path:
    """Write a video as other programs do. Equal frames may differ in a pixel, because swscale's exact mode is off."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=24, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        output.mux(stream.encode())
    end_real_time_priority()
    return path


def write_rotated(path: Path, upright: Path, rotation: int) -> Path:
    """Copy the video and add a display rotation in degrees, as phones do."""
    with av.open(str(upright)) as source, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(rotation)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
    return path


def read_all(path: Path, backend: Any = "auto") -> Frames:
    with open_video(path, backend=backend) as video:
        return video.frames(0, video.frame_count)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mp4(tmp_path_factory.mktemp("clip") / "clip.mp4", moving_frames())


# MP4


def test_mp4_is_h264_tagged_bt709_with_faststart(tmp_path: Path) -> None:
    path = write_mp4(tmp_path / "a.mp4", moving_frames(25), fps=7)
    with av.open(str(path)) as opened:
        stream = opened.streams.video[0]
        frame = next(opened.decode(stream))
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range) == (1, 1, 1, 1)
        assert (stream.frames, stream.average_rate) == (25, 7)
        assert stream.duration * stream.time_base == Fraction(25, 7)
        assert "creation_time" not in opened.metadata
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert b"Lavf" not in content


@pytest.mark.parametrize("fps", [1, 5, 24, 60, Fraction(24000, 1001), Fraction(25, 2)])
def test_fps_is_exact(tmp_path: Path, fps: int | Fraction) -> None:
    with open_video(write_mp4(tmp_path / "a.mp4", moving_frames(5), fps)) as video:
        assert video.fps == fps


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_saturated_colours_are_preserved(tmp_path: Path, backend: str) -> None:
    chart = saturated_chart()
    path = write_mp4(tmp_path / "chart.mp4", np.stack([chart] * 4), settings=Mp4Settings())
    error = np.abs(read_all(path, backend).astype(int) - chart)
    assert error.max() <= 4
    assert error.mean() < 1


def test_chunks_give_the_same_bytes_as_one_write(tmp_path: Path, clip: Path) -> None:
    frames = moving_frames()
    with Mp4Writer(tmp_path / "chunks.mp4", 96, 64, 24, FAST) as chunks:
        for start in range(0, 30, 7):
            chunks.write(frames[start : start + 7])
        chunks.write(frames[:0])
    assert chunks.frames_written == 30
    assert (tmp_path / "chunks.mp4").read_bytes() == clip.read_bytes()


def test_file_is_deleted_when_the_block_raises(tmp_path: Path) -> None:
    def write_until_the_model_fails() -> None:
        with Mp4Writer(tmp_path / "a.mp4", 96, 64, 24, FAST) as clip:
            clip.write(moving_frames())
            raise KeyError

    with pytest.raises(KeyError):
        write_until_the_model_fails()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "frames",
    [noise(1, 64, 98), noise(1, 64, 96).astype(np.float32), noise(1, 64, 96)[0]],
    ids=["size", "type", "image"],
)
def test_frames_of_another_size_or_type_are_rejected_and_the_file_is_deleted(tmp_path: Path, frames: Any) -> None:
    raises = pytest.raises(MediaError, match=r"a\.mp4: got .*must be uint8 \(64, 96, 3\)")
    with raises, Mp4Writer(tmp_path / "a.mp4", 96, 64, 24, FAST) as clip:
        clip.write(frames)
    assert not any(tmp_path.iterdir())


def test_video_without_frames_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no frames"), Mp4Writer(tmp_path / "a.mp4", 96, 64, 24, FAST):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("width", "height", "fps"), [(97, 64, 24), (96, 63, 24), (0, 0, 24), (96, 64, 0)])
def test_invalid_h264_size_or_fps_is_rejected(tmp_path: Path, width: int, height: int, fps: int) -> None:
    with pytest.raises(MediaError, match=r"a\.mp4: got"):
        Mp4Writer(tmp_path / "a.mp4", width, height, fps, FAST)


def test_missing_output_folder_raises_media_error(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"a\.mp4: cannot be written: No such file"):
        write_mp4(tmp_path / "missing" / "a.mp4", moving_frames(2))


# Lossless


@pytest.mark.parametrize("shape", [(3, 64, 96), (2, 37, 53), (1, 3, 5)])
def test_lossless_round_trip_is_bitwise_equal(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    frames = noise(*shape)
    encode_lossless(tmp_path / "a.mkv", frames, 5)
    assert np.array_equal(decode_lossless(tmp_path / "a.mkv"), frames)
    encode_lossless(tmp_path / "b.mkv", frames, 5)
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()


@pytest.mark.parametrize("damage", ["flipped bit", "truncated"])
def test_damaged_lossless_file_is_rejected(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.mkv"
    encode_lossless(path, noise(4, 64, 96), 5)
    content = bytearray(path.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) * 6 // 10 :]
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"a\.mkv"):
        decode_lossless(path)


def test_decode_lossless_rejects_a_clip(clip: Path) -> None:
    with pytest.raises(MediaError, match="checksum"):
        decode_lossless(clip)


# Reading videos


def test_decord_random_access_equals_pyav_sequential_reading(tmp_path: Path) -> None:
    pytest.importorskip("decord")
    path = write_foreign(tmp_path / "a.mp4", moving_frames(), options={"x264-params": "keyint=8:bframes=3"})
    expected = read_all(path, "pyav")
    indices = np.random.default_rng(1).integers(0, 30, 40).tolist()
    with open_video(path) as video, open_video(path, backend="pyav") as forwards:
        assert (video.backend, forwards.backend) == ("decord", "pyav")
        assert np.array_equal(video.frames_at(indices), expected[indices])
        assert np.array_equal(forwards.frames_at(indices), expected[indices])
        assert np.array_equal(video.frames(11, 19), expected[11:19])
        assert np.array_equal(forwards.frames(11, 19), expected[11:19])


@pytest.mark.parametrize("backend", ["auto", "pyav"])
def test_reader_properties_and_index_errors(clip: Path, backend: Any) -> None:
    with open_video(clip, backend=backend) as video:
        assert (video.frame_count, video.width, video.height, video.fps) == (30, 96, 64, Fraction(24))
        assert video.frames(4, 4).shape == (0, 64, 96, 3)
        for read in (lambda: video.frames(0, 31), lambda: video.frames(-1, 2), lambda: video.frames_at([3, 30])):
            with pytest.raises(MediaError, match=r"clip\.mp4: got frame"):
                read()
    video.close()


@pytest.mark.parametrize(
    "keyframes", ["open-gop=1:bframes=3", "intra-refresh=1", "tff=1"], ids=["open-gop", "intra-refresh", "interlaced"]
)
def test_pyav_reads_streams_that_decord_reads_wrongly(tmp_path: Path, keyframes: str) -> None:
    path = write_foreign(tmp_path / "a.mp4", moving_frames(), options={"x264-params": f"keyint=8:{keyframes}"})
    with open_video(path) as video:
        assert video.backend == "pyav"
        assert np.array_equal(video.frames_at([13, 5]), read_all(path)[[13, 5]])


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libsvtav1", "mp4", {"preset": "12", "svtav1-params": "lp=1"}),
        ("libvpx-vp9", "webm", {"deadline": "realtime"}),
        ("libx265", "mp4", {"preset": "ultrafast", "x265-params": "log-level=none"}),
        ("libx264", "avi", {}),
    ],
)
def test_other_codecs_fall_back_to_pyav(tmp_path: Path, codec: str, container: str, options: dict[str, str]) -> None:
    frames = moving_frames(6)
    path = write_foreign(tmp_path / "a.video", frames, codec=codec, container=container, options=options)
    with open_video(path) as video:
        assert (video.backend, video.frame_count) == ("pyav", 6)
        assert np.abs(video.frames(0, 6).astype(int) - frames).mean() < 12


def test_pyav_reads_when_decord_is_not_installed(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_all(clip)
    monkeypatch.setitem(sys.modules, "decord", None)
    with open_video(clip) as video:
        assert video.backend == "pyav"
        assert np.array_equal(video.frames(0, 30), expected)


def test_untagged_files_are_read_as_bt601(tmp_path: Path) -> None:
    chart = saturated_chart()
    path = write_foreign(tmp_path / "a.mp4", np.stack([chart] * 3), options={"crf": "10"})
    for backend in ("auto", "pyav"):
        inner = np.abs(read_all(path, backend)[0].astype(int) - chart)[8:24, 8:24]
        assert inner.max() <= 4


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_display_rotation_is_applied(tmp_path: Path, rotation: int) -> None:
    stored = write_foreign(tmp_path / "stored.mp4", moving_frames(4))
    unrotated = read_all(stored, "pyav")
    with open_video(write_rotated(tmp_path / "rotated.mp4", stored, rotation)) as video:
        upright = video.frames(0, 4)
        assert upright.shape[1:3] == (video.height, video.width) == ((64, 96) if rotation == 180 else (96, 64))
    assert np.array_equal(upright, np.rot90(unrotated, rotation // 90, (1, 2)))


def test_missing_cut_and_remote_videos_raise_a_media_error_with_the_file_name(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:-1])
    for path in (*(tmp_path / f"{name}.mp4" for name in ("folder", "cut", "missing")), Path("http://127.0.0.1:9/a.mp4")):
        with pytest.raises(MediaError, match=rf"{path.name}: \w") as caught:
            open_video(path)
        assert "\n" not in str(caught.value)


# Images


def test_png_round_trip_is_exact_and_deterministic(tmp_path: Path) -> None:
    image = noise(1, 33, 21)[0]
    write_png(tmp_path / "a.png", image)
    assert np.array_equal(read_image(tmp_path / "a.png"), image)
    assert (tmp_path / "a.png").read_bytes() == encode_png(image)


@pytest.mark.parametrize("size", [(64, 64), (256, 64), (31, 77), (500, 250)])
def test_cover_crop_keeps_circles_round(size: tuple[int, int]) -> None:
    width, height = size
    y, x = np.mgrid[0:300, 0:400]
    radius = 20
    disc = (((x - 199.5) ** 2 + (y - 149.5) ** 2 < radius**2)[:, :, None] * np.full(3, 255)).astype(np.uint8)
    cropped = cover_crop(disc, width, height)
    assert cropped.shape == (height, width, 3)
    scale = max(width / 400, height / 300)
    inside = cropped[:, :, 0] / 255
    # The centre of mass, and the mean square distance to it, which for a disc is radius² / 4 along each axis.
    for axis, length in ((0, height), (1, width)):
        mass = inside.sum(axis=1 - axis)
        offset = np.arange(length) - (length - 1) / 2
        assert abs((mass * offset).sum() / mass.sum()) < 0.05
        assert (mass * offset**2).sum() / mass.sum() == pytest.approx((radius * scale) ** 2 / 4, rel=0.05, abs=0.3)


def pillow_bytes(image: PILImage.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED = PILImage.new("RGB", (40, 20), (255, 0, 0))


def rotated_jpeg() -> bytes:
    """Return a landscape JPEG with red on the left and an EXIF rotation that moves red to the top."""
    image = PILImage.new("RGB", (40, 20), "blue")
    image.paste((255, 0, 0), (0, 0, 20, 20))
    exif = PILImage.Exif()
    exif[0x0112] = 6
    return pillow_bytes(image, "JPEG", exif=exif, quality=95)


def palette_with_alpha() -> bytes:
    image = PILImage.new("P", (40, 20), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(0, (20, 0, 40, 20))
    return pillow_bytes(image, "PNG", transparency=b"\x00\xff")


def half_transparent() -> bytes:
    return pillow_bytes(PILImage.new("RGBA", (40, 20), (255, 0, 0, 128)), "PNG")


def grey_16_bit() -> bytes:
    return pillow_bytes(PILImage.fromarray(np.full((20, 40), 32896, np.uint16)), "PNG")


def animation(kind: str) -> bytes:
    return pillow_bytes(RED, kind, save_all=True, append_images=[PILImage.new("RGB", (40, 20), "blue")])


RED_PIXEL, BLUE_PIXEL, WHITE_PIXEL = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def test_unusual_images_are_read(tmp_path: Path) -> None:
    """Each with its first and last pixel. All but the first are 40 pixels wide and 20 high."""
    images = {
        "EXIF rotation": (rotated_jpeg(), RED_PIXEL, BLUE_PIXEL),
        "palette with alpha": (palette_with_alpha(), RED_PIXEL, WHITE_PIXEL),
        "half transparent": (half_transparent(), (255, 127, 127), (255, 127, 127)),
        "16-bit PNG": (grey_16_bit(), (128, 128, 128), (128, 128, 128)),
        "16-bit TIFF": (pillow_bytes(PILImage.new("I;16", (40, 20), 65535), "TIFF"), WHITE_PIXEL, WHITE_PIXEL),
        "CMYK JPEG": (pillow_bytes(PILImage.new("CMYK", (40, 20), (0, 255, 255, 0)), "JPEG"), RED_PIXEL, RED_PIXEL),
        "grey BMP": (pillow_bytes(PILImage.new("L", (40, 20), 90), "BMP"), (90, 90, 90), (90, 90, 90)),
        "1-bit PNG": (pillow_bytes(PILImage.new("1", (40, 20), 1), "PNG"), WHITE_PIXEL, WHITE_PIXEL),
        "grey with alpha": (pillow_bytes(PILImage.new("LA", (40, 20), (0, 0)), "PNG"), WHITE_PIXEL, WHITE_PIXEL),
        "animated GIF": (animation("GIF"), RED_PIXEL, RED_PIXEL),
        "animated WEBP": (animation("WEBP"), RED_PIXEL, RED_PIXEL),
        "appended zip": (pillow_bytes(RED, "JPEG") + b"PK\x03\x04 an appended zip", RED_PIXEL, RED_PIXEL),
    }
    for kind, (content, first, last) in images.items():
        (tmp_path / "photo").write_bytes(content)
        image = read_image(tmp_path / "photo")
        assert (image.dtype, image.shape) == (np.uint8, (40, 20, 3) if kind == "EXIF rotation" else (20, 40, 3)), kind
        assert np.abs(image[0, 0].astype(int) - first).max() <= 6, kind
        assert np.abs(image[-1, -1].astype(int) - last).max() <= 6, kind
