"""`upscale_file`: what is kept, which frames come out, frames that are drawn between, resume, bad inputs, and provenance."""

import os
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.sidedata.sidedata import Type as SideData

from tests.upscale.conftest import FAST, TAGGED
from tests.upscale.videos import SIZE, decoded, disc, packets, picture, woven, write_video
from vidgen_ray.errors import MediaError
from vidgen_ray.media.media_file import append_xmp
from vidgen_ray.profile import ProvenanceSettings
from vidgen_ray.provenance.record import ProvenanceRecord, read_provenance
from vidgen_ray.provenance.signing import create_signing_key, read_signature, sign_file
from vidgen_ray.system.cache_dir import sha256_of
from vidgen_ray.upscale import segments as job_module
from vidgen_ray.upscale.frames import FrameInterpolator, FrameReader, interpolated, write_segment
from vidgen_ray.upscale.network import UpscaleNetwork
from vidgen_ray.upscale.run import UpscaleOptions
from vidgen_ray.upscale.segments import SegmentFailed, SegmentWorker
from vidgen_ray.upscale.source import Place, places, read_source, timeline_of


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_upscaling_keeps_all_but_the_size(tmp_path, upscale, short_segments, suffix):
    chapters = [(0, 0.5, "One"), (0.5, 1, "Two")]
    streams = {"sound_s": 1.0, "subtitles": [(0.1, "Hello"), (0.6, "Bye")], "metadata": {"title": "A film"}}
    video = tmp_path / f"in{suffix}"
    write_video(video, 12, **streams, chapters=chapters, aspect=Fraction(4, 3), colour=TAGGED)
    out = tmp_path / f"out{suffix}"
    report = upscale(video, out)
    assert (report.frames, report.size, report.notes) == (12, "128x96", ())
    assert decoded(out)[1] == decoded(video)[1]
    for kind in ("audio", "subtitle"):
        assert packets(out, kind) == packets(video, kind)
    with av.open(str(out)) as container:
        assert container.metadata["title"] == "A film"
        assert [chapter["metadata"]["title"] for chapter in container.chapters()] == ["One", "Two"]
        stream = container.streams.video[0]
        frame = next(container.decode(stream))
        assert stream.sample_aspect_ratio == Fraction(4, 3)
        assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == TAGGED
        assert container.streams.subtitles[0].language == "eng"


def test_metadata_of_phones_is_kept(tmp_path, upscale):
    """Make, place and date of a MOV, in the keys that Apple's cameras write."""
    tags = {"make": "Apple", "location.ISO6709": "+48.1+011.5/", "creationdate": "2026-05-06T07:08:09+0200"}
    metadata = {"title": "A film", **{f"com.apple.quicktime.{name}": value for name, value in tags.items()}}
    video = write_video(
        tmp_path / "in.mov", 2, metadata=metadata, container_options={"movflags": "use_metadata_tags"}, colour=TAGGED
    )
    for out in (tmp_path / "out.mov", tmp_path / "out.mp4"):
        upscale(video, out)
        with av.open(str(out)) as container:
            assert metadata.items() <= dict(container.metadata).items()


def test_frames_are_those_of_the_network_in_order(tmp_path, upscale, short_segments, tiny_model):
    video = write_video(tmp_path / "in.mp4", 12, colour=TAGGED)
    upscale(video, tmp_path / "out.mp4")
    source = read_source(video)
    frames = list(FrameReader(source).read(0, 12))
    network = UpscaleNetwork(tiny_model, job_module.EngineSettings(threads=1))
    got, _ = decoded(tmp_path / "out.mp4")
    for number in range(len(frames)):
        scores = [psnr(got[number], network(other)) for other in frames]
        assert int(np.argmax(scores)) == number
        # Chroma at half resolution and a little compression.
        assert scores[number] > 28


def test_variable_frame_times_are_kept(tmp_path, upscale, short_segments):
    times = [0, 40, 50, 120, 121, 180, 260, 300, 333, 420, 470, 480]
    for suffix in (".mp4", ".mkv"):
        video = write_video(tmp_path / f"in{suffix}", 12, times=times, time_base=Fraction(1, 1000))
        upscale(video, tmp_path / f"out{suffix}")
        got = decoded(tmp_path / f"out{suffix}")[1]
        assert got == decoded(video)[1]
        assert [round(time * 1000) for time in got] == times


def test_rotated_videos_become_upright(tmp_path, upscale):
    video = write_video(tmp_path / "in.mp4", 3, rotation=270, aspect=Fraction(2), colour=TAGGED)
    upscale(video, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = next(container.decode(video=0))
        aspect = container.streams.video[0].sample_aspect_ratio
    with av.open(str(video)) as container:
        turned = next(container.decode(video=0))
        upright = np.rot90(turned.to_ndarray(format="rgb24"), round(turned.rotation / 90) % 4)
    assert (frame.rotation, frame.width, frame.height, aspect) == (0, 96, 128, Fraction(1, 2))
    small = frame.reformat(width=48, height=64).to_ndarray(format="rgb24")
    assert psnr(small, upright) > psnr(small, upright[::-1]) + 3


@pytest.mark.parametrize("codec", ["hevc", "h264", "av1"])
def test_ten_bit_hdr_is_kept_in_segments_that_join_without_a_gap(tmp_path, upscale, short_segments, codec):
    mastering = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,1)"
    options = {"x265-params": f"log-level=none:master-display={mastering}:max-cll=1000,400"}
    video, out = tmp_path / "in.mkv", tmp_path / "out.mkv"
    deep = {"codec": "libx265", "pixel_format": "yuv420p10le", "colour": (9, 9, 16, 1)}
    write_video(video, 12, size=(160, 96), **deep, options=options)
    upscale(video, out, encode=FAST.model_copy(update={"codec": codec, "preset": "superfast"}))
    with av.open(str(out)) as container:
        frame = next(container.decode(video=0))
    assert frame.format.name == "yuv420p10le"
    assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (9, 9, 16, 1)
    assert SideData.MASTERING_DISPLAY_METADATA in frame.side_data
    assert SideData.CONTENT_LIGHT_LEVEL in frame.side_data
    got, expected = read_source(out).hdr, read_source(video).hdr
    assert got.light == expected.light == (1000, 400)
    # AV1 stores 16 binary digits.
    assert [float(x) for x in got.mastering] == pytest.approx([float(x) for x in expected.mastering], abs=1e-4)
    assert float(expected.mastering[-1]) == 1000
    with av.open(str(out)) as container:
        flags = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert [number for number, is_key in enumerate(flags) if is_key] == [0, 5]
    assert len(decoded(out)[0]) == 12


@pytest.mark.parametrize("frames", [1, 2])
def test_hevc_of_fewer_than_three_frames_has_no_b_frames(tmp_path, upscale, frames):
    """With B-frames, x265 gives random decoding times to so few frames, and most of these cannot be written."""
    video, out = write_video(tmp_path / "in.mp4", frames), tmp_path / "out.mp4"
    upscale(video, out, encode=FAST.model_copy(update={"codec": "hevc", "preset": "medium"}))
    assert len(decoded(out)[0]) == frames
    with av.open(str(out)) as container:
        assert not container.streams.video[0].codec_context.has_b_frames


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="SVT-AV1 gets a real-time priority as root only")
def test_av1_leaves_no_thread_with_a_real_time_priority(tmp_path):
    source = read_source(write_video(tmp_path / "in.mp4", 1))
    settings = FAST.model_copy(update={"codec": "av1"})
    write_segment(tmp_path / "out.mp4", [picture(0)], 1, SIZE, Fraction(24), source, settings)
    threads = [int(thread.name) for thread in Path("/proc/self/task").iterdir()]
    assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_OTHER}


def test_other_codecs_formats_and_odd_sizes(tmp_path, upscale):
    for codec, pixel_format, suffix, size in (
        ("libsvtav1", "yuv420p", ".mp4", SIZE),
        ("libx264", "yuv444p", ".mp4", (51, 37)),
        ("libvpx-vp9", "yuv420p", ".webm", (50, 38)),
        ("mpeg2video", "yuv420p", ".mpg", SIZE),
        ("gif", "rgb8", ".gif", SIZE),
    ):
        video, out, fps = tmp_path / f"{codec}{suffix}", tmp_path / f"{codec}.mkv", 25 if codec == "mpeg2video" else 12
        write_video(video, 7, codec=codec, pixel_format=pixel_format, size=size, time_base=Fraction(1, fps))
        report = upscale(video, out)
        got, times = decoded(out)
        assert (len(got), got[0].shape) == (7, (size[1] * 2, size[0] * 2, 3))
        assert [round((time - times[0]) * fps) for time in times] == list(range(7))
        assert any("4:2:0" in note for note in report.notes) == (pixel_format == "yuv444p")
        if codec != "gif":
            assert any("BT.601 is assumed" in note for note in report.notes)
            assert read_source(out).colour.matrix in (5, 6)
    # Rounded to even sizes.
    assert upscale(tmp_path / "libx264.mp4", tmp_path / "even.mp4", scale=1.5).size == "76x56"


def test_fit_keeps_the_shape_and_makes_pixels_square(tmp_path, upscale):
    video = write_video(tmp_path / "in.mp4", 2, aspect=Fraction(4, 3))  # shown as 85.3 x 48
    assert upscale(video, tmp_path / "out.mp4", fit=(320, 320)).size == "320x180"
    assert read_source(tmp_path / "out.mp4").pixel_aspect == 1
    with pytest.raises(MediaError, match="more than the size 60x60"):
        upscale(video, tmp_path / "small.mp4", fit=(60, 60))


def test_streams_that_the_output_cannot_hold_are_named(tmp_path, upscale):
    video = write_video(tmp_path / "in.mkv", 3, subtitles=[(0.1, "Hello")])
    (note,) = [note for note in upscale(video, tmp_path / "out.mp4").notes if "stream" in note]
    assert note == "stream 1 (subtitle, srt) is not copied, .mp4 cannot hold it; choose an output that ends in .mkv"
    video = write_video(tmp_path / "in.mov", 3, sound_s=0.2, sound_codec="pcm_s16le", colour=TAGGED)
    assert upscale(video, tmp_path / "out.mov").notes == ()
    assert packets(tmp_path / "out.mov", "audio") == packets(video, "audio")
    (note,) = upscale(video, tmp_path / "sound.mp4").notes
    assert "(audio, pcm_s16le) is not copied, .mp4 cannot hold it" in note


def test_matroska_file_that_ends_early_is_noted(tmp_path, upscale):
    video = write_video(tmp_path / "in.mkv", 60, size=(320, 240), colour=TAGGED, options={"g": "6"})
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    (note,) = upscale(video, tmp_path / "out.mkv").notes
    assert note.startswith("the file declares 5.0 s, its frames end after ")


@pytest.mark.parametrize("suffix", [".mkv", ".ts", ".mpg"])
def test_reading_after_a_seek_gives_the_frames_of_reading_from_the_start(tmp_path, suffix):
    video = {"options": {"x264-params": "keyint=8:min-keyint=8:open-gop=1:bframes=3:scenecut=0"}}
    if suffix != ".mkv":
        options = {"g": "8", "bf": "3", "flags": "-cgop"}
        video = {"options": options, "codec": "mpeg2video", "time_base": Fraction(1, 25), "sound_s": 3.0, "sound_codec": "mp2"}
    source = read_source(write_video(tmp_path / f"in{suffix}", 60, **video))
    straight = list(FrameReader(source).read(0, 60))
    assert source.seek_time(40) is not None
    for start in (1, 17, 31, 40, 55):
        for number, pixels in enumerate(FrameReader(source).read(start, min(60, start + 5)), start):
            np.testing.assert_array_equal(pixels, straight[number])


def test_failed_segment_is_named_and_other_settings_do_not_resume(tmp_path, upscale, short_segments, monkeypatch):
    video = write_video(tmp_path / "in.mp4", 12)
    write = SegmentWorker.write

    def failing(self, segment, path, on_frame):
        if segment.number == 1:
            raise MediaError("broken")
        write(self, segment, path, on_frame)

    monkeypatch.setattr(SegmentWorker, "write", failing)
    with pytest.raises(SegmentFailed) as failed:
        upscale(video, tmp_path / "out.mp4")
    assert str(failed.value.segment) == "frames 5 to 11"
    assert not (tmp_path / "out.mp4").exists()
    # The first segment is that of other settings.
    monkeypatch.setattr(SegmentWorker, "write", write)
    assert upscale(video, tmp_path / "out.mp4", encode=FAST.model_copy(update={"crf": 30})).resumed_frames == 0


def test_next_segment_is_computed_while_an_encoder_finishes(tmp_path, upscale, short_segments, monkeypatch):
    begun, second_begun = [], threading.Event()

    def write(path, frames, *arguments):
        def encoded():
            for number, frame in enumerate(frames):
                if number == 0:
                    begun.append(path)
                    if len(begun) == 2:
                        second_begun.set()
                yield frame
            assert second_begun.wait(30)

        write_segment(path, encoded(), *arguments)

    monkeypatch.setattr(job_module, "write_segment", write)
    assert upscale(write_video(tmp_path / "in.mp4", 10, colour=TAGGED), tmp_path / "out.mp4").frames == 10


def test_frames_of_the_source_stay_at_their_times_and_the_others_lie_between(tmp_path, upscale, short_segments):
    video = write_video(tmp_path / "in.mp4", 8, colour=TAGGED, sound_s=0.6)
    lossless = FAST.model_copy(update={"crf": 0})
    report = upscale(video, tmp_path / "out.mp4", fps=Fraction(24), encode=lossless)
    frames, times = decoded(tmp_path / "out.mp4")
    assert report.frames == len(frames) == 16
    assert times == [Fraction(n, 24) for n in range(16)]
    assert packets(tmp_path / "out.mp4", "audio") == packets(video, "audio")
    with pytest.raises(MediaError, match="has 12 frames per second, more than 10; frames would be dropped"):
        upscale(video, tmp_path / "fewer.mp4", fps=Fraction(10))
    upscale(video, tmp_path / "plain.mp4", encode=lossless)
    plain, _ = decoded(tmp_path / "plain.mp4")
    for number in range(8):
        np.testing.assert_array_equal(frames[2 * number], plain[number])
    repeated = [number for number in range(8) if np.array_equal(frames[2 * number + 1], plain[number])]
    # The chessboard flips after frames 2 and 5, which may be taken for cuts. The last frame is held. All others are drawn.
    assert {7} <= set(repeated) <= {2, 5, 7}


def test_places_in_a_video_with_variable_times(tmp_path):
    video = write_video(tmp_path / "in.mkv", 4, times=[100, 200, 250, 400], time_base=Fraction(1, 1000))
    source = read_source(video)
    timeline = timeline_of(source, Fraction(20))
    first = Fraction(source.times[0], 1000)
    assert [time * timeline.time_base - first for time in timeline.times[:4]] == [Fraction(n, 20) for n in range(4)]
    shares = [(0, "0"), (0, "1/2"), (1, "0"), (2, "0"), (2, "1/3"), (2, "2/3")]
    assert places(source, timeline, 0, 6) == [Place(frame, Fraction(share)) for frame, share in shares]


def test_cuts_repeat_the_frame_before_and_sixteen_bits_stay():
    network = FrameInterpolator("cpu", threads=1)
    rng = np.random.default_rng(0)
    cut = [picture(0), rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)]
    wanted = [Place(0, Fraction(0)), Place(0, Fraction(1, 2)), Place(1, Fraction(0))]
    frames = list(interpolated(iter(cut), wanted, network))
    np.testing.assert_array_equal(frames[1], cut[0])
    deep = [picture(n, levels=65535) for n in (0, 1)]
    drawn = list(interpolated(iter(deep), wanted, network))[1]
    assert drawn.dtype == np.uint16
    shallow = list(interpolated(iter([picture(0), picture(1)]), wanted, network))[1]
    assert np.abs(drawn / 257 - shallow).mean() < 0.6


@pytest.mark.parametrize(
    ("order", "suffix", "codec", "options"),
    [
        ("tff", ".mp4", "libx264", {"x264-params": "tff=1"}),
        ("bff", ".ts", "mpeg2video", {"flags": "+ilme+ildct", "b": "5000000"}),
        ("tff", ".mp4", "libx264", {"x264-params": "bff=1"}),  # the tags lie
        ("bff", ".mkv", "libx264", {}),
    ],
)
def test_deinterlaced_frames_are_those_of_the_progressive_video(tmp_path, order, suffix, codec, options):
    size, moving = (160, 96), {"codec": codec, "time_base": Fraction(1, 25), "colour": TAGGED, "draw": woven(order)}
    video = write_video(tmp_path / f"in{suffix}", 16, size=size, options={"g": "4", "crf": "12", **options}, **moving)
    plain, deinterlaced = read_source(video), read_source(video, deinterlace=True)
    frames = list(FrameReader(deinterlaced).read(0, 16))
    for number, (combed, got) in enumerate(zip(FrameReader(plain).read(0, 16), frames, strict=True)):
        truth = disc(2 * number, *size)
        assert psnr(got, truth) > psnr(combed, truth) + 5
    # Segments start anywhere.
    np.testing.assert_array_equal(list(FrameReader(deinterlaced).read(9, 16)), frames[9:])
    assert any("is interlaced" in note for note in plain.notes) == bool(options)
    assert not any("interlaced" in note for note in deinterlaced.notes)


def test_progressive_video_is_not_deinterlaced_whatever_its_tags(tmp_path, upscale):
    moving = {"colour": TAGGED, "draw": lambda number, width, height, **_: disc(number, width, height)}
    video = write_video(tmp_path / "in.mp4", 12, size=(160, 96), options={"x264-params": "tff=1"}, **moving)
    report = upscale(video, tmp_path / "out.mp4", deinterlace=True)
    assert report.notes == ("0 of the first 12 frames are interlaced; --deinterlace changes nothing",)
    still = {"colour": TAGGED, "draw": lambda number, width, height, **_: disc(0, width, height)}
    video = write_video(tmp_path / "still.mp4", 4, size=(160, 96), options={"x264-params": "tff=1"}, **still)
    assert "parity=tff" in read_source(video, deinterlace=True).deinterlacer


def test_frames_are_deinterlaced_if_a_part_of_them_is_interlaced(tmp_path):
    def draw(number, width, height, **_):
        return woven("tff")(number, width, height) if number > 8 else disc(2 * number, width, height)

    source = read_source(write_video(tmp_path / "in.mp4", 14, size=(160, 96), colour=TAGGED, draw=draw), deinterlace=True)
    assert "parity=tff" in source.deinterlacer
    assert source.notes == ("6 of the first 14 frames are interlaced; the others are deinterlaced, too",)


# Provenance: recorded media is not called generated, generated media keeps its record and manifest.

SHOT = ProvenanceRecord(source_type="trainedAlgorithmicMedia", key="a" * 64, stages=("svd",), shot={"prompt": "a dog"})
WITHOUT_METADATA, PRIVATE = (ProvenanceSettings(metadata=kind) for kind in ("off", "private"))


@pytest.fixture
def recorded(tmp_path):
    return write_video(tmp_path / "recorded.mp4", 2, metadata={"comment": "my holiday"})


@pytest.fixture
def generated(tmp_path):
    video = write_video(tmp_path / "generated.mp4", 2)
    append_xmp(video, SHOT.metadata().xmp)
    return video


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_recorded_video_is_enhanced_and_generated_video_stays_generated(tmp_path, upscale, recorded, generated, suffix):
    out = tmp_path / f"large{suffix}"
    upscale(recorded, out)
    found = read_provenance(out)
    assert (found.source_type, found.record.key, found.record.stages) == ("algorithmicallyEnhanced", None, ("tiny",))
    assert not found.record.is_generated
    assert [source.sha256 for source in found.record.sources] == [sha256_of(recorded)]
    with av.open(str(out)) as opened:
        assert {key.lower(): value for key, value in opened.metadata.items()}["comment"] == "my holiday"
    assert upscale(recorded, out).was_finished
    # Another marking is another result. The present one is kept unless it is forced.
    with pytest.raises(MediaError, match="exists and is not the result of this command"):
        upscale(recorded, out, provenance=WITHOUT_METADATA)
    upscale(generated, out, force=True)
    found = read_provenance(out)
    assert (found.source_type, found.record.key, found.record.stages) == ("trainedAlgorithmicMedia", "a" * 64, ("svd", "tiny"))
    assert found.record.shot == SHOT.shot
    assert found.record.sources[0].key == "a" * 64


def test_drawn_frames_make_a_composite_and_private_drops_the_shot(tiny_model, recorded, generated):
    smooth = UpscaleOptions(tiny_model, FAST, fps=Fraction(24), provenance=PRIVATE)
    assert smooth.record(recorded).source_type == "compositeWithTrainedAlgorithmicMedia"
    assert smooth.record(generated).source_type == "trainedAlgorithmicMedia"
    assert (smooth.record(generated).key, smooth.record(generated).shot) == ("a" * 64, None)
    assert UpscaleOptions(tiny_model, FAST, provenance=WITHOUT_METADATA).record(generated) is None


def test_signed_result_has_the_signed_source_as_its_parent(tmp_path, upscale, recorded):
    key = tmp_path / "key.pem"
    create_signing_key(key, "Studio")
    sign_file(recorded, SHOT, key)
    signing = ProvenanceSettings(c2pa_key=key)
    upscale(recorded, tmp_path / "out.mp4", provenance=signing)
    signature = read_signature(tmp_path / "out.mp4")
    assert (signature.state, signature.problems) == ("Valid", ())
    assert (signature.actions, signature.ingredients) == (("c2pa.opened", "c2pa.edited"), ("recorded.mp4",))
    assert upscale(recorded, tmp_path / "out.mp4", provenance=signing).was_finished
    with pytest.raises(MediaError, match="Matroska files cannot be signed"):
        upscale(recorded, tmp_path / "out.mkv", provenance=signing)
