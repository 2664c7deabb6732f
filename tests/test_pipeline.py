"""The library API: the call of the README, its result and its files."""

import base64
import copy
import gc
import io
import json
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from threading import Thread, get_ident

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import vidgen_ray
from tests.conftest import ASTRONAUT, SYNTHETIC
from vidgen_ray import VideoGenerationPipeline
from vidgen_ray.errors import FieldError, MediaError, ScriptError, UsageError
from vidgen_ray.media.decode import open_video
from vidgen_ray.media.images import read_image
from vidgen_ray.pipeline import progress_bar
from vidgen_ray.provenance.record import read_provenance
from vidgen_ray.render.step_runner import StepFailed
from vidgen_ray.system.cache_dir import sha256_of
from vidgen_ray.weights import resolve


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    pipeline = VideoGenerationPipeline.from_profile("tiny", tmp_path_factory.mktemp("out"))
    yield pipeline
    pipeline.close()


def test_readme_call(pipeline):
    result = pipeline.generate_video(
        prompt="a portrait of an astronaut",
        face_image=[Image.open(ASTRONAUT), ASTRONAUT],
        consent={"subject": "Eileen Collins", "basis": "public-domain"},
        lora_path=resolve("builtin:tiny/lora.safetensors"),
        use_hunyuan_style=True,
        style_prompt="oil painting",
        generate_video=True,
        upscale_video=True,
        num_frames=3,
        fps=5,
        motion_bucket_id=127,
        scale=4,
        seed=7,
    )
    assert result["image"].size == (128, 64)
    for clip, size in ((result["video"], (128, 64)), (result["hd_video"], (512, 256))):
        with open_video(clip) as video:
            assert (video.width, video.height) == size
            assert (video.frame_count, float(video.fps)) == (3, 5.0)
    record = json.loads((result["video"].parent / "shot.json").read_text())
    assert [s["stage"] for s in record["stages"]] == [
        "instantid", "flux", "lora", "hunyuan", "image_likeness", "svd", "clip_likeness", "realesrgan"
    ]  # fmt: skip
    assert record["seeds"]["flux"] == 7
    assert len(set(record["seeds"].values())) == 8, "stages do not share noise"
    for name, file in record["files"].items():
        assert sha256_of(result["video"].parent / name) == file["sha256"]


def test_interpolated_shot_has_clips_of_the_higher_rate(pipeline):
    smooth = pipeline.generate_video("a red ball", num_frames=3, fps=6, scale=2, seed=7, width=64, fps_out=12)
    assert [step.stage for step in smooth.record.stages] == ["flux", "svd", "rife", "realesrgan"]
    for name, size in (("video", (64, 64)), ("hd_video", (128, 128))):
        with open_video(smooth[name]) as clip:
            assert (clip.width, clip.height, clip.frame_count, float(clip.fps)) == (*size, 6, 12)


def test_repeated_call_renders_nothing_and_a_folder_that_keeps_stages_only_adds_files(pipeline):
    fields = {"id": "twice", "generate_video": False, "width": 64, "height": 80}
    first = pipeline.generate_video("a red ball", seed=1, **fields)
    assert (first["image"].size, first["video"], first["hd_video"]) == ((64, 80), None, None)
    file = pipeline.outputs.shot_folder("twice") / "image.png"
    before = file.stat().st_mtime_ns
    pipeline.generate_video("a red ball", seed=1, **fields)
    assert file.stat().st_mtime_ns == before
    keeping = VideoGenerationPipeline(pipeline.profile, pipeline.outputs.root, keep_stages=True)
    again = keeping.generate_video("a red ball", seed=1, **fields)
    assert set(again["record"].files) - set(first["record"].files) == {"base.png"}
    assert again["record"].stages[0].cached
    assert pipeline.generate_video("a red ball", seed=2, **fields)["record"].key != first["record"].key


def test_invalid_field_fails_before_loading(pipeline):
    with pytest.raises(ScriptError, match="num_frames: got 1, must be greater than or equal to 2"):
        pipeline.generate_video("a", num_frames=1)
    with pytest.raises(ScriptError, match=r"lora: got 'gone\.safetensors', must be an existing"):
        pipeline.generate_video("a", lora_path="gone.safetensors")
    with pytest.raises(ScriptError, match=r'image, steps: got 3, must be a mapping of stages to values, such as {"flux": 3}'):
        pipeline.image("a", steps=3)
    with pytest.raises(ScriptError, match=r"animate, image: got '/gone\.png', must be an existing file"):
        pipeline.animate("/gone.png")
    with pytest.raises(ScriptError, match=r"upscale, source: got 'https://a\.b/c\.mp4', must be a file"):
        pipeline.upscale("https://a.b/c.mp4")


def test_photos_may_be_paths_images_pixels_or_bytes(pipeline, tmp_path):
    pixels = np.asarray(Image.open(ASTRONAUT).convert("RGB"))
    kinds = [ASTRONAUT, Image.open(ASTRONAUT), pixels, ASTRONAUT.read_bytes()]
    read = [read_image(Path(pipeline._as_file("test", "face_image", photo))) for photo in kinds]
    assert all(np.array_equal(image, pixels) for image in read)
    turned = Image.Exif()
    turned[274] = 6
    for image in (
        Image.open(ASTRONAUT),
        Image.new("RGBA", (9, 6), (9, 9, 9, 0)),
        Image.fromarray(np.full((6, 9), 40_000, np.uint16)),
    ):
        path = tmp_path / "photo.png"
        image.save(path, exif=turned)
        assert np.array_equal(read_image(Path(pipeline._as_file("test", "image", Image.open(path)))), read_image(path))
    wide, tall = (Image.fromarray(np.zeros(shape, np.uint8)) for shape in ((64, 128, 3), (128, 64, 3)))
    assert pipeline._as_file("test", "image", wide) != pipeline._as_file("test", "image", tall)
    for photo, message in (
        (5, "face_image: got 5, must be a path, a PIL image"),
        (np.zeros((4, 4), np.uint8), r"got an array of uint8 \(4, 4\), must be"),
        (np.zeros((0, 4, 3), np.uint8), r"got an array of uint8 \(0, 4, 3\)"),
        ([np.zeros((4, 4, 3), np.float32)], "got an array of float32"),
        ("https://example.com/a.jpg", "face_image: got 'https://example.com/a.jpg', must be a file on this machine; URLs are"),
        (Image.new("F", (4, 4)), "face_image: got an unusable image, a PIL image of mode F: got 32 bits per channel"),
        ([], "generate_video, face_image: got no photos, must be one or more photos, or None"),
    ):
        with pytest.raises(ScriptError, match=message):
            pipeline.generate_video("a", face_image=photo, consent=SYNTHETIC)
    with pytest.raises(ScriptError, match="animate, image: got None, must be an image"):
        pipeline.animate(None)


def test_progress_reaches_the_callback_and_a_bar(pipeline):
    steps = []
    pipeline.generate_video("a green ball", seed=5, num_frames=3, on_progress=lambda *report: steps.append(report))
    assert {stage for stage, _, _ in steps} == {"flux", "svd", "realesrgan"}
    assert ("realesrgan", 3, 3) in steps
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress_bar(console) as on_progress:
        for report in [("instantid", 0, 0), *steps]:
            on_progress(*report)
    shown = [line for line in console.file.getvalue().splitlines() if line]
    assert any("Upscale" in line and "3/3" in line and "elapsed" in line for line in shown)
    assert "1/1" in next(line for line in reversed(shown) if "Face" in line), "a stage without steps looks finished"


class Stopped(Exception):
    pass


def raising(error):
    def on_progress(stage, step, steps):
        if step:
            raise error

    return on_progress


def test_error_in_on_progress_reaches_the_caller(pipeline, tmp_path):
    # The last one looks like a GPU that is full, after which a stage would try again.
    for error in (Stopped("stop"), KeyboardInterrupt(), RuntimeError("CUDA out of memory")):
        with pytest.raises(type(error)) as caught:
            pipeline.image("a red ball", id="stopped", seed=3, on_progress=raising(error))
        assert caught.value is error
    assert not list(pipeline.outputs.shot_folder("stopped").glob("*"))
    clip = pipeline.generate_video("a red ball", id="clip", num_frames=3, seed=1).video
    steps = []
    pipeline.upscale(clip, scale=2, out=tmp_path / "a.mp4", on_progress=lambda *report: steps.append(report))
    assert steps == [("realesrgan", done, 3) for done in range(4)]
    with pytest.raises(Stopped):
        pipeline.upscale(clip, scale=2, out=tmp_path / "b.mp4", on_progress=raising(Stopped("stop")))
    with pytest.raises(UsageError, match="a call of a pipeline is in progress"):
        pipeline.upscale(clip, scale=3, out=tmp_path / "c.mp4", on_progress=lambda *_: pipeline.close())
    with pytest.raises(UsageError, match="a call of a pipeline is in progress"):
        pipeline.image("a red ball", seed=4, on_progress=lambda *_: pipeline.image("a blue ball"))


def test_threads_that_share_pipelines_get_the_bytes_of_one_thread(pipeline, tiny, tmp_path):
    """Threads share a pipeline, and two pipelines an output folder. Another thread closes a pipeline during a call."""
    fields = {"width": 64, "height": 64, "steps": {"flux": 8}}
    expected = [pipeline.image("a red ball", id=f"one-{seed}", seed=seed, **fields).tobytes() for seed in range(6)]
    running, closing = [], []
    first, second = (VideoGenerationPipeline(tiny, tmp_path) for _ in range(2))

    def on_progress(stage, step, steps):
        running.append(get_ident())
        if len(running) == 10:
            closing.append(Thread(target=first.close))
            closing[0].start()

    def drawn(number):
        used = (first, first, second)[number % 3]
        seed = number % 6
        return used.image("a red ball", id=f"shot-{seed}", seed=seed, on_progress=on_progress, **fields).tobytes()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(drawn, range(12))) == [*expected, *expected]
    closing[0].join()
    calls = [len(list(reports)) for _, reports in groupby(running)]
    assert sum(calls) == 6 * 9, "the second image of a seed is the finished one"
    assert all(reports % 9 == 0 for reports in calls), "steps of two calls never mix"
    for loaded in (first, second):
        loaded.close()
    again = first.image("a red ball", id="again", seed=0, **fields)
    first.close()
    assert again.tobytes() == expected[0]
    assert again.fp is None, "decoded, so that threads can share it"


def test_pipeline_cannot_be_pickled_or_copied(pipeline):
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied; create one in each process"):
            way(pipeline)


def test_single_stages_and_what_a_notebook_shows(pipeline, tmp_path, monkeypatch):
    image = pipeline.image("a red ball", seed=1)
    result = pipeline.animate(image, num_frames=3, seed=1)
    assert (image.size, result["hd_video"]) == ((128, 64), None)
    assert sorted(result) == ["hd_video", "image", "record", "video"]
    html = result._repr_html_()
    assert '<img src="data:image/png;base64,' in html
    assert '<video src="data:video/mp4;base64,' in html
    (tmp_path / "shown.png").write_bytes(base64.b64decode(html.partition("base64,")[2].partition('"')[0]))
    for marked in (tmp_path / "shown.png", Path(result.video).with_name("image.png")):
        assert read_provenance(marked).source_type == "trainedAlgorithmicMedia", "animated images stay generated"
    clip = pipeline.upscale(result.video, scale=2, out=tmp_path / "large.mp4")
    with open_video(clip) as video:
        assert (video.width, video.height, video.frame_count) == (256, 128, 3)
    assert pipeline.upscale(image, scale=3).size == (384, 192)
    monkeypatch.setattr("vidgen_ray.render.weights_on_gpu.adds_by_address", lambda: True)
    with pytest.warns(UserWarning, match="import vidgen_ray first"):
        VideoGenerationPipeline(pipeline.profile, tmp_path).upscale(image, scale=2)
    with pytest.raises(UsageError, match=r"must end in \.mp4"):
        pipeline.upscale(result.video, out=tmp_path / "x.png")


def test_failed_stage_is_named_and_leaves_no_files(pipeline):
    wall = Image.fromarray(np.full((200, 200, 3), 128, np.uint8))
    with pytest.raises(StepFailed, match=r"instantid: face_image \(.*\.png\): no face found"):
        pipeline.generate_video("a", id="wall", face_image=wall, consent=SYNTHETIC)
    assert not list(pipeline.outputs.shot_folder("wall").glob("*"))


def test_unusable_images_are_found_before_a_stage_is_loaded(tiny, tmp_path):
    (tmp_path / "music.wav").write_bytes(b"RIFF\0\0\0\0WAVEfmt ")
    (tmp_path / "cut.jpg").write_bytes(ASTRONAUT.read_bytes()[:40_000])
    with VideoGenerationPipeline(tiny, tmp_path / "out") as pipeline:
        for field, file in (("face_image", "music.wav"), ("face_image", "cut.jpg"), ("image", "cut.jpg")):
            with pytest.raises(ScriptError, match=rf"{field}: got an unusable file, .*{file}"):
                pipeline.generate_video("a", consent=SYNTHETIC, **{field: tmp_path / file})
        with pytest.raises(MediaError, match=r"cut\.jpg: cannot be read"):
            pipeline.upscale(tmp_path / "cut.jpg")
        assert not pipeline._loaded


def test_errors_can_be_pickled():
    failed = StepFailed("svd", ScriptError([FieldError("s", 1, "f", "got", "allowed")]))
    same = pickle.loads(pickle.dumps(failed))
    assert (str(same), same.stage) == (str(failed), "svd") == ("svd: s line 1, f: got got, allowed", "svd")


def test_close_frees_the_weights_at_once(tiny, tmp_path):
    # Another type, so that the model is not shared with that of the other tests.
    actors = {**tiny.actors, "flux": tiny.actors["flux"].model_copy(update={"dtype": "bfloat16"})}
    pipeline = VideoGenerationPipeline(tiny.model_copy(update={"actors": actors}), tmp_path)
    pipeline.generate_video("a red ball", generate_video=False, width=64, height=64)
    weights = weakref.ref(pipeline._loaded["flux"].model.text_to_image.transformer)
    gc.disable()
    try:
        pipeline.close()
        assert weights() is None
    finally:
        gc.enable()


def test_editors_know_the_api():
    assert set(vidgen_ray.__all__) <= set(dir(vidgen_ray))
    assert (Path(vidgen_ray.__file__).parent / "py.typed").exists()
