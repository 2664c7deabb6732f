"""Reading and writing of images and videos: colours, exactness, random access and malicious files."""

import io
import itertools
import os
import subprocess
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image as PILImage

from tests.upscale.videos import repeatable, write_video
from vidgen_ray.dataset.data_card import _middle_frame
from vidgen_ray.dataset.export_formats import encode_again
from vidgen_ray.dataset.scorers import Clip
from vidgen_ray.errors import MediaError
from vidgen_ray.film.timeline import probe_clip, sound_seconds
from vidgen_ray.media.decode import _end_all, decode_lossless, open_foreign_video, open_video, sample_frames
from vidgen_ray.media.encode import Mp4Settings, Mp4Writer, encode_lossless
from vidgen_ray.media.images import cover_crop, read_image
from vidgen_ray.media.media_file import open_media
from vidgen_ray.remote.stages import _decoded
from vidgen_ray.upscale.frames import end_real_time_priority
from vidgen_ray.upscale.source import read_source

FAST = Mp4Settings(preset="veryfast", threads=2)
SQUARE = 32


def saturated_chart():
    """Return a chart (128, 256, 3) of 32 squares, including all corners and midpoints of the RGB cube."""
    colours = [*itertools.product((0, 128, 255), repeat=3), (220, 20, 60), (64, 64, 64), (255, 200, 180), (30, 90, 40)]
    squares = np.array([*colours, colours[0]], np.uint8).reshape(4, 8, 3)
    return squares.repeat(SQUARE, 0).repeat(SQUARE, 1)


def moving_frames(count=30, width=96, height=64):
    """Return smooth noise that drifts, so that all frames differ."""
    coarse = np.random.default_rng(7).integers(0, 256, (height // 8 + 8, width // 8 + 8, 3), np.uint8)
    wide = np.asarray(PILImage.fromarray(coarse).resize((width + 64, height + 64), PILImage.Resampling.BICUBIC))
    return np.stack([wide[k : k + height, 2 * k : 2 * k + width] for k in range(count)])


def noise(count, height, width):
    return np.random.default_rng(3).integers(0, 256, (count, height, width, 3), np.uint8)


def write_mp4(path, frames, fps=24, settings=FAST):
    with Mp4Writer(path, frames.shape[2], frames.shape[1], fps, settings) as clip:
        clip.write(frames)
    return path


def write_foreign(path, frames, *, codec="libx264", container="mp4", options=None):
    """Write a video as other programs do. Equal frames may differ in a pixel, because swscale's exact mode is off."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=24, options=repeatable(codec, options or {}))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for pixels in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        output.mux(stream.encode())
    end_real_time_priority()
    return path


def read_all(path, backend="pyav"):
    with open_video(path, backend=backend) as video:
        return video.frames(0, video.frame_count)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_mp4(tmp_path_factory.mktemp("clip") / "clip.mp4", moving_frames())


# MP4


def test_mp4_is_h264_tagged_bt709_with_faststart(tmp_path):
    path = write_mp4(tmp_path / "a.mp4", moving_frames(25), fps=Fraction(24000, 1001))
    with av.open(str(path)) as opened:
        stream = opened.streams.video[0]
        frame = next(opened.decode(stream))
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range) == (1, 1, 1, 1)
        assert (stream.frames, stream.average_rate) == (25, Fraction(24000, 1001))
        assert stream.duration * stream.time_base == 25 / Fraction(24000, 1001)
        assert "creation_time" not in opened.metadata
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert b"Lavf" not in content


def test_saturated_colours_are_preserved(tmp_path):
    chart = saturated_chart()
    path = write_mp4(tmp_path / "chart.mp4", np.stack([chart] * 4), settings=Mp4Settings())
    # Files of other programs have no tags, and are read as BT.601.
    untagged = write_foreign(tmp_path / "untagged.mp4", np.stack([chart] * 3), options={"crf": "10"})
    for backend in ("decord", "pyav"):
        error = np.abs(read_all(path, backend).astype(int) - chart)
        assert error.max() <= 4
        assert error.mean() < 1
        assert np.abs(read_all(untagged, backend)[0].astype(int) - chart)[8:24, 8:24].max() <= 4


def test_logs_that_another_package_turned_on_are_off_while_a_file_is_open(tmp_path, clip):
    """With them, a decoder's thread and the thread that closes the decoder may wait for each other forever."""
    av.logging.set_level(av.logging.ERROR)
    with open_video(clip):
        assert av.logging.get_level() is None
    av.logging.set_level(av.logging.ERROR)
    write_mp4(tmp_path / "a.mp4", moving_frames(2))
    assert av.logging.get_level() is None


def test_file_is_deleted_when_the_block_raises(tmp_path):
    wrong = r"a\.mp4: got .*must be uint8 \(64, 96, 3\)"
    for frames, error, message in (
        (noise(1, 64, 98), MediaError, wrong),
        (noise(1, 64, 96).astype(np.float32), MediaError, wrong),
        (noise(0, 64, 96), MediaError, "no frames"),
        (None, AttributeError, "dtype"),
    ):
        with pytest.raises(error, match=message), Mp4Writer(tmp_path / "a.mp4", 96, 64, 24, FAST) as clip:
            clip.write(frames)
        assert not any(tmp_path.iterdir()), message


def test_invalid_size_fps_or_folder_is_rejected(tmp_path):
    for width, height, fps in ((97, 64, 24), (96, 63, 24), (0, 0, 24), (96, 64, 0)):
        with pytest.raises(MediaError, match=r"a\.mp4: got"):
            Mp4Writer(tmp_path / "a.mp4", width, height, fps, FAST)
    with pytest.raises(MediaError, match=r"a\.mp4: cannot be written: No such file"):
        write_mp4(tmp_path / "missing" / "a.mp4", moving_frames(2))


# Lossless


@pytest.mark.parametrize("shape", [(2, 37, 53), (1, 3, 5)])
def test_lossless_round_trip_is_bitwise_equal(tmp_path, shape):
    frames = noise(*shape)
    encode_lossless(tmp_path / "a.mkv", frames, 5)
    assert np.array_equal(decode_lossless(tmp_path / "a.mkv"), frames)
    encode_lossless(tmp_path / "b.mkv", frames, 5)
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()


def test_damaged_lossless_file_is_rejected(tmp_path, clip):
    path = tmp_path / "a.mkv"
    encode_lossless(path, noise(4, 64, 96), 5)
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (flipped, content[: len(content) * 6 // 10], clip.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(MediaError, match=r"a\.mkv"):
            decode_lossless(path)


# Reading videos


def test_decord_random_access_equals_pyav_sequential_reading(tmp_path):
    pytest.importorskip("decord")
    path = write_foreign(tmp_path / "a.mp4", moving_frames(), options={"x264-params": "keyint=8:bframes=3"})
    expected = read_all(path, "pyav")
    indices = np.random.default_rng(1).integers(0, 30, 40).tolist()
    readers = {"decord": open_video(path, backend="decord"), "pyav": open_video(path), "child": open_foreign_video(path)}
    for name, opened in readers.items():
        with opened as video:
            assert (video.backend == "decord") == (name == "decord")
            assert np.array_equal(video.frames_at(indices), expected[indices])
            assert np.array_equal(video.frames(11, 19), expected[11:19])


@pytest.mark.parametrize("opened_by", [open_video, open_foreign_video, partial(open_video, backend="decord")])
def test_reader_properties_and_index_errors(clip, opened_by):
    with opened_by(clip) as video:
        assert (video.frame_count, video.width, video.height, video.fps) == (30, 96, 64, Fraction(24))
        assert video.frames(4, 4).shape == (0, 64, 96, 3)
        for read in (lambda: video.frames(0, 31), lambda: video.frames(-1, 2), lambda: video.frames_at([3, 30])):
            with pytest.raises(MediaError, match=r"clip\.mp4: got frame"):
                read()


@pytest.mark.parametrize("keyframes", ["open-gop=1:bframes=3", "intra-refresh=1", "tff=1"])
def test_pyav_reads_streams_that_decord_reads_wrongly(tmp_path, keyframes):
    """Open GOPs, intra refresh and interlaced frames."""
    path = write_foreign(tmp_path / "a.mp4", moving_frames(), options={"x264-params": f"keyint=8:{keyframes}"})
    with open_video(path, backend="decord") as video:
        assert video.backend == "pyav"
        assert np.array_equal(video.frames_at([13, 5]), read_all(path)[[13, 5]])


def test_other_codecs_fall_back_to_pyav(tmp_path):
    frames = moving_frames(6)
    for codec, container, options in (
        ("libsvtav1", "mp4", {"preset": "12", "svtav1-params": "lp=1"}),
        ("libvpx-vp9", "webm", {"deadline": "realtime"}),
        ("libx264", "avi", {}),
    ):
        path = write_foreign(tmp_path / f"{codec}.video", frames, codec=codec, container=container, options=options)
        with open_video(path, backend="decord") as video:
            assert (video.backend, video.frame_count) == ("pyav", 6), codec
            assert np.abs(video.frames(0, 6).astype(int) - frames).mean() < 12, codec


def test_display_rotation_is_applied(tmp_path):
    stored = write_foreign(tmp_path / "stored.mp4", moving_frames(4))
    unrotated = read_all(stored)
    for rotation in (90, 180, -90):
        path = tmp_path / f"{rotation}.mp4"
        with av.open(str(stored)) as source, av.open(str(path), "w") as output:
            stream = output.add_stream_from_template(source.streams.video[0])
            stream.set_display_rotation(rotation)
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    output.mux(packet)
        with open_video(path) as video:
            upright = video.frames(0, 4)
            assert upright.shape[1:3] == (video.height, video.width) == ((64, 96) if rotation == 180 else (96, 64))
        assert np.array_equal(upright, np.rot90(unrotated, rotation // 90, (1, 2))), rotation


def test_no_packet_of_a_codec_outside_of_the_list_is_decoded(tmp_path, monkeypatch):
    """FFmpeg finds the pixel format of MagicYUV by decoding, when it opens the file."""
    write_video(path := tmp_path / "a b.avi", 3, codec="magicyuv")
    with open_media(path) as opened:
        assert opened.streams.video[0].codec_context.pix_fmt is None
    for read in (open_video, open_foreign_video, probe_clip, read_source):
        with pytest.raises(
            MediaError, match=r"a b\.avi: got video in magicyuv, must be in one of h264, .*ffmpeg -i 'a b\.avi' -c"
        ):
            read(path)
    write_video(sound := tmp_path / "a.mkv", 3, sound_s=0.1, sound_codec="tta")
    with pytest.raises(MediaError, match=r"a\.mkv: got sound in tta, must be in one of aac, "):
        sound_seconds(sound)
    monkeypatch.setattr("vidgen_ray.media.media_file.VIDEO_CODECS", ("magicyuv",))
    with open_media(path) as opened:
        assert opened.streams.video[0].codec_context.pix_fmt == "yuv420p"
    assert len(read_all(path)) == 3


def test_foreign_video_whose_decoder_crashes_or_hangs_is_refused(tmp_path, clip, monkeypatch):
    # Modules of the working directory are not those of this process.
    (tmp_path / "numpy.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    _end_all()
    with open_foreign_video(clip) as video:
        child = video._child
        assert video.frames(3, 5).shape == (2, 64, 96, 3)
    with open_foreign_video(clip) as video:
        assert video._child is child  # started once for all files without an error
        child.kill()
        with pytest.raises(MediaError, match=r"clip\.mp4: the decoder crashed"):
            video.frames(0, 1)
    with open_foreign_video(clip, own_process=True) as video:
        assert video._child is not child
    monkeypatch.setattr("vidgen_ray.media.decode.VIDEO_DECODE_S", 1e-5)
    with pytest.raises(MediaError, match=r"clip\.mp4: could not be decoded within 1e-05 s"):
        open_foreign_video(clip, own_process=True)


def test_process_for_videos_starts_with_any_module_path_and_names_any_file(tmp_path, monkeypatch):
    """The working directory is gone, an entry of the path is no text, and the name of the file is not UTF-8."""
    (folder := tmp_path / "gone").mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    monkeypatch.setattr(sys, "path", ["", tmp_path, *sys.path])
    path = write_mp4(tmp_path / "a.mp4", moving_frames(3)).rename(tmp_path / os.fsdecode(b"\xff.mp4"))
    with open_foreign_video(path, own_process=True) as video:
        assert video.frame_count == 3
    path.write_bytes(b"-")
    with pytest.raises(MediaError) as caught:
        open_foreign_video(path, own_process=True)
    assert str(caught.value).startswith(f"{path}: not a supported video format")


def test_time_in_which_frames_wait_for_their_reader_is_not_that_of_the_decoder(tmp_path, monkeypatch):
    monkeypatch.setattr("vidgen_ray.media.decode.VIDEO_DECODE_S", 4.0)
    # A frame is larger than a pipe holds.
    path = write_mp4(tmp_path / "a.mp4", np.zeros((3, 256, 384, 3), np.uint8))
    with open_foreign_video(path, own_process=True) as video:
        frames = video.each_frame([0, 1, 2])
        next(frames)
        with pytest.raises(subprocess.TimeoutExpired):
            video._child.wait(4.2)
        assert len(list(frames)) == 2


def test_videos_of_others_are_not_decoded_in_this_process(tmp_path, monkeypatch, make_shot):
    """Answers of servers, sources of data cards, exports and scores, and uploads."""
    path = write_mp4(tmp_path / "a.mp4", moving_frames(5))
    for name in ("open_video", "open_video_stream"):
        monkeypatch.setattr(f"vidgen_ray.media.decode.{name}", None)
    assert (
        len(
            _decoded(
                path.read_bytes(),
                make_shot(num_frames=5, width=96, height=64, fps=24, video_model="remote", upscale_video=False),
            )
        )
        == 5
    )
    assert _middle_frame(path).shape == (64, 96, 3)
    assert encode_again(path, tmp_path / "b.mp4", "32")["num_frames"] == 5
    assert len(Clip({"clip": "a.mp4"}, path, None, None).frames) == 5
    assert len(list(sample_frames(path, 2, 900))) == 2


def test_missing_cut_and_remote_videos_raise_a_media_error_with_the_file_name(tmp_path, clip):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:-1])
    for path in (*(tmp_path / f"{name}.mp4" for name in ("folder", "cut", "missing")), Path("http://127.0.0.1:9/a.mp4")):
        with pytest.raises(MediaError, match=rf"{path.name}: \w") as caught:
            open_video(path)
        assert "\n" not in str(caught.value)


# Images


def test_cover_crop_keeps_circles_round():
    y, x = np.mgrid[0:300, 0:400]
    disc = ((x - 199.5) ** 2 + (y - 149.5) ** 2 < 20**2).astype(np.uint8) * 255
    for width, height in ((256, 64), (31, 77)):
        cropped = cover_crop(disc[:, :, None].repeat(3, 2), width, height)
        assert cropped.shape == (height, width, 3)
        radius = 20 * max(width / 400, height / 300)
        # The centre of mass, and the mean square distance to it, which for a disc is radius² / 4 along each axis.
        for axis, length in ((0, height), (1, width)):
            mass = cropped[:, :, 0].sum(axis=1 - axis) / 255
            offset = np.arange(length) - (length - 1) / 2
            assert abs((mass * offset).sum() / mass.sum()) < 0.05
            assert (mass * offset**2).sum() / mass.sum() == pytest.approx(radius**2 / 4, rel=0.05, abs=0.3)


def pillow_bytes(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def solid(mode, colour, kind="PNG", **options):
    return pillow_bytes(PILImage.new(mode, (40, 20), colour), kind, **options)


def rotated_jpeg():
    """Return a landscape JPEG with red on the left and an EXIF rotation that moves red to the top."""
    image = PILImage.new("RGB", (40, 20), "blue")
    image.paste((255, 0, 0), (0, 0, 20, 20))
    exif = PILImage.Exif()
    exif[0x0112] = 6
    return pillow_bytes(image, "JPEG", exif=exif, quality=95)


RED_PIXEL, BLUE_PIXEL, WHITE_PIXEL = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def test_unusual_images_are_read(tmp_path):
    """Each with its first and last pixel. All but the first are 40 pixels wide and 20 high."""
    animation = {"save_all": True, "append_images": [PILImage.new("RGB", (40, 20), "blue")]}
    images = {
        "EXIF rotation": (rotated_jpeg(), RED_PIXEL, BLUE_PIXEL),
        "half transparent": (solid("RGBA", (255, 0, 0, 128)), (255, 127, 127), (255, 127, 127)),
        "16-bit PNG": (solid("I;16", 32896), (128, 128, 128), (128, 128, 128)),
        "CMYK JPEG": (solid("CMYK", (0, 255, 255, 0), "JPEG"), RED_PIXEL, RED_PIXEL),
        "grey BMP": (solid("L", 90, "BMP"), (90, 90, 90), (90, 90, 90)),
        "grey with alpha": (solid("LA", (0, 0)), WHITE_PIXEL, WHITE_PIXEL),
        "animated WEBP": (solid("RGB", RED_PIXEL, "WEBP", **animation), RED_PIXEL, RED_PIXEL),
        "appended zip": (solid("RGB", RED_PIXEL, "JPEG") + b"PK\x03\x04 an appended zip", RED_PIXEL, RED_PIXEL),
    }
    for kind, (content, first, last) in images.items():
        (tmp_path / "photo").write_bytes(content)
        image = read_image(tmp_path / "photo")
        assert (image.dtype, image.shape) == (np.uint8, (40, 20, 3) if kind == "EXIF rotation" else (20, 40, 3)), kind
        assert np.abs(image[0, 0].astype(int) - first).max() <= 6, kind
        assert np.abs(image[-1, -1].astype(int) - last).max() <= 6, kind
