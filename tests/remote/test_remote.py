"""Remote stages against servers with the shapes of vLLM-Omni and SGLang."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from tests.fake_stages import use_fakes
from tests.online.directors import listening_on_a_port, local_server, renderer
from tests.remote.fake_server import FPS, FRAMES, HEIGHT, MODEL, SIZE, WIDTH, FakeServer, colour_of, profile_of
from vidgen_ray.cli import main
from vidgen_ray.cli.doctor import check_servers
from vidgen_ray.content_keys import ShotPlanner, params_of
from vidgen_ray.errors import Cancelled, ProfileError, SetupError, StageError, VidgenError
from vidgen_ray.graph import stages_of
from vidgen_ray.media.decode import open_video
from vidgen_ray.media.images import write_png
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.profile import load_profile
from vidgen_ray.remote import video_server
from vidgen_ray.remote.stages import RemoteVideoStage
from vidgen_ray.remote.video_server import RemoteJob, ServerFailed, VideoServers, WrongAnswer
from vidgen_ray.render.step_runner import StepFailed


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(video_server, "REQUEST_RETRY_S", (0.01, 0.05))
    monkeypatch.setattr(video_server, "STATUS_POLL_S", (0.02, 0.05))
    video_server.reported_model.cache_clear()


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Kind -> server."""
    with ExitStack() as stack:
        kinds = ("vllm-omni", "sglang")
        yield {kind: stack.enter_context(FakeServer(tmp_path_factory.mktemp(kind), kind)) for kind in kinds}


@pytest.fixture
def server(servers):
    return servers["vllm-omni"]


@pytest.fixture
def start(tmp_path):
    """A start image that differs from those of the other tests."""
    seed = abs(hash(tmp_path.name)) % 2**32
    path = tmp_path / "start.png"
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 16, 3), dtype=np.uint8))
    # As a stage encodes it, so that a server gets the same file.
    write_png(path, np.asarray(small.resize((WIDTH, HEIGHT))))
    return path


def shows(result, prompt):
    """Return whether the clip begins with its start image, and then shows what its prompt and seed decide."""
    with open_video(result.video) as video:
        frames = video.frames(0, video.frame_count).astype(int)
    image = np.asarray(result.image).astype(int)
    end = np.array(colour_of(prompt, result.record.shot.seed))
    first = abs(frames[0] - image).mean()
    last = abs(frames[-1, HEIGHT * 3 // 4 :] - end).mean()
    return frames.shape == (FRAMES, HEIGHT, WIDTH, 3) and first < 8 and last < 8


@pytest.mark.parametrize(
    ("kind", "faults"),
    [
        ("vllm-omni", ("none", "busy", "busy-without-time", "truncated", "damaged", "foreign", "slow", "grey")),
        ("sglang", ("none", "busy", "failed")),
    ],
)
def test_clip_is_that_of_its_prompt_and_seed_whatever_happens(servers, tmp_path, start, kind, faults):
    server, errors = servers[kind], {"failed": "failed: out of memory", "grey": "a single colour"}
    with VideoGenerationPipeline(profile_of(server.url), tmp_path / "out") as pipeline:
        for fault in faults:
            prompt = f"a boat fault:{fault}"
            if fault in errors:
                with pytest.raises(StepFailed, match=errors[fault]):
                    pipeline.generate_video(prompt, image=start)
            assert shows(pipeline.generate_video(prompt, image=start), prompt)
            accepted = [each for each in server.events("accepted") if each["prompt"] == prompt]
            assert len(accepted) == (2 if fault in errors else 1), fault


def test_server_of_this_project_gives_the_bytes_of_a_local_run(tiny, tmp_path, start):
    shot = {"prompt": "a red boat", "image": start, "seed": 3}
    fields = {"video_model": "svd", "upscale_video": False}
    settings = OnlineSettings(profile="tiny", data=str(tmp_path / "server"))
    with ExitStack() as stack:
        serving = use_fakes(stack.enter_context(VideoGenerationPipeline(tiny, settings.data)))
        server = stack.enter_context(local_server(tiny, settings, renderer(serving)))
        url = stack.enter_context(listening_on_a_port(server.app))
        farm = profile_of(url, fields=fields)
        actor = farm.actors["remote"].model_copy(update={"weights": "remote:tiny"})
        farm = farm.model_copy(update={"actors": {"remote": actor}})
        pipeline = stack.enter_context(VideoGenerationPipeline(farm, tmp_path / "farm"))
        key = pipeline.generate_video(**shot).record.stages[0].key
        received = pipeline.outputs.stage_cache.get(key, ["frames"])["frames"]
        job_id = RemoteJob.model_validate_json(pipeline.outputs.remote_jobs.get(key)).id
        content = httpx2.get(f"{url}/v1/videos/{job_id}/content").content
        local = use_fakes(stack.enter_context(VideoGenerationPipeline(tiny, tmp_path / "local")))
        video = local.generate_video(**shot, **fields, **SIZE).video
    assert video.read_bytes() == content
    with open_video(video) as opened:
        assert (opened.frames(0, opened.frame_count) == received).all()


@pytest.mark.parametrize("kind", ["vllm-omni", "sglang"])
def test_job_whose_submission_had_no_response_is_found(tmp_path, start, kind):
    prompt = "a boat fault:500-after-success"
    with (
        FakeServer(tmp_path / kind, kind) as server,
        VideoGenerationPipeline(profile_of(server.url), tmp_path / "out") as pipeline,
    ):
        # The same prompt and size, with another seed.
        pipeline.generate_video("a boat fault:500-after", image=start, seed=1)
        assert shows(pipeline.generate_video(prompt, image=start, seed=2), prompt)
        assert len(server.events("accepted")) == 2
    if kind == "vllm-omni":
        return
    # Its list of jobs has no prompts. Of a later run with another seed, the job of the earlier one is not taken.
    with FakeServer(tmp_path / "again", kind) as server:
        for seed in (1, 2):
            with VideoGenerationPipeline(profile_of(server.url), tmp_path / str(seed)) as pipeline:
                result = pipeline.generate_video(prompt if seed == 2 else "a boat", image=start, seed=seed)
        assert shows(result, prompt)


def test_job_is_deleted_at_the_deadline_and_when_it_is_stopped(server, tmp_path, start):
    def stop(stage, step, steps):
        if server.events("accepted") and server.events("accepted")[-1]["prompt"] == prompt:
            raise error

    with VideoGenerationPipeline(profile_of(server.url, timeout_s=1), tmp_path / "out") as pipeline:
        for error, prompt in (
            (StepFailed, "a boat fault:never"),
            (Cancelled, "a boat that is cancelled fault:slow"),
            (KeyboardInterrupt, "a boat that is interrupted fault:slow"),
        ):
            with pytest.raises(error, match="took longer than 1 s" if error is StepFailed else None):
                pipeline.generate_video(prompt, image=start, on_progress=None if error is StepFailed else stop)
            assert [each["prompt"] for each in server.events("deleted")].count(prompt) == 1


def test_shot_that_the_server_does_not_take_fails_with_the_reason(server, tmp_path, start):
    for fields, options, message in (
        ({"prompt": "a boat fault:refused"}, {}, "400: the size is not supported"),
        ({"num_frames": 6}, {"frame_step": 4}, "num_frames: got 6, must be 4k \\+ 1"),
        ({"num_frames": 9}, {"max_frames": 8}, "num_frames: got 9, must be at most 8"),
        ({}, {"size_multiple_px": 48}, "width: got 128, must be a multiple of 48"),
    ):
        with (
            VideoGenerationPipeline(profile_of(server.url, **options), tmp_path / "out") as pipeline,
            pytest.raises(VidgenError, match=message),
        ):
            pipeline.generate_video(**{"prompt": "a boat", **fields}, image=start)


def test_missing_server_key_and_model_are_named(server, tmp_path, start, monkeypatch):
    monkeypatch.delenv("VIDEO_KEY", raising=False)
    monkeypatch.setenv("WRONG_KEY", "secret\n")
    closed = "http://127.0.0.1:9"
    other_model = profile_of(server.url)
    weights = {"weights": "remote:Wan-AI/Wan2.2"}
    other_model = other_model.model_copy(update={"actors": {"remote": other_model.actors["remote"].model_copy(update=weights)}})
    for profile, message in (
        (profile_of(closed), "no server responds"),
        (profile_of(server.url, key_env="VIDEO_KEY"), "VIDEO_KEY is not set"),
        (profile_of(server.url, key_env="WRONG_KEY"), "WRONG_KEY has a line break"),
        (other_model, "has no model 'Wan-AI/Wan2.2', must be one of Lightricks/LTX-2"),
    ):
        with VideoGenerationPipeline(profile, tmp_path / "out") as pipeline, pytest.raises(SetupError, match=message):
            pipeline.generate_video("a boat", image=start)
        findings = list(check_servers(profile))
        assert findings
        assert all(finding.status == "fail" and message in finding.text for finding in findings)
    # The first server that responds says what the model is.
    with VideoGenerationPipeline(profile_of(closed, server.url), tmp_path / "out") as pipeline:
        assert pipeline.profile.params(RemoteVideoStage).reported


def test_key_has_the_model_that_the_server_reports_and_all_fields_that_are_sent(server, make_shot):
    def key(*urls, reported=True, **options):
        video_server.reported_model.cache_clear()
        shot = make_shot(image_model="remote", video_model="remote", upscale_video=False)
        profile = profile_of(*urls, **options)
        return ShotPlanner(params_of(profile, stages_of(shot)), profile.encode)(shot).key

    first = key(server.url)
    assert first == key(server.url, "http://127.0.0.1:9", parallel=9, price_per_second=0.1)
    assert first != key(server.url, fields={"flow_shift": 3})
    models = server.folder / "models.json"
    before = models.read_text()
    models.write_text(json.dumps({MODEL: "LTX-2@def"}))
    assert first != key(server.url)
    models.write_text(before)


def test_image_passes_and_price_of_a_shot_by_servers_alone(server, tmp_path):
    prompt = "an image of a boat fault:500-after-success"
    with VideoGenerationPipeline(profile_of(server.url, price_per_second=0.5), tmp_path / "out") as pipeline:
        result = pipeline.generate_video(prompt, image_model="remote", extend=1)
    with open_video(result.video) as video:
        assert video.frame_count == 2 * FRAMES - 1
    image, clip = result.record.stages
    assert (image.price, clip.price) == (0.5, 0.5 * (2 * FRAMES - 1) / FPS)
    assert "not verified by this project" in clip.origin
    assert [(used.weights, used.commercial_use) for used in result.record.licences] == [(f"remote:{MODEL}", "unknown")]
    accepted = [each["seed"] for each in server.events("accepted") if each["prompt"] == prompt]
    assert len(accepted) == len(set(accepted)) == 2


def test_first_profile_of_the_docs_makes_clips_from_prompts_alone(server, tmp_path, capsys):
    text = (Path(__file__).parents[2] / "docs" / "remote.md").read_text().split("```yaml\n")[1].split("```")[0]
    for documented, tested in (
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", MODEL),
        ("http://127.0.0.1:8091", server.url),
        ("width: 832, height: 480, num_frames: 81, fps: 16", f"width: {WIDTH}, height: {HEIGHT}, num_frames: 5, fps: 8"),
    ):
        assert documented in text
        text = text.replace(documented, tested)
    (tmp_path / "my-server.yaml").write_text(text)
    profile = load_profile(str(tmp_path / "my-server.yaml"))
    with VideoGenerationPipeline(profile, tmp_path / "out") as pipeline:
        result = pipeline.generate_video("a boat")
        with pytest.raises(VidgenError, match="lora is set, must not be with image_model none"):
            pipeline.generate_video("a boat", lora="a.safetensors")
    with open_video(result.video) as video:
        first = video.frames(0, 1)[0].astype(int)
    assert abs(first - np.asarray(result.image)).mean() < 8
    assert [stage.stage for stage in result.record.stages] == ["remote"]
    # Servers that cannot be used are named by the plan and by doctor.
    (tmp_path / "prompts.txt").write_text("a boat\n")
    down = text.replace(f'"{server.url}"', f'"{server.url}", "http://127.0.0.1:9"')
    (tmp_path / "my-server.yaml").write_text(down)
    assert (
        main(["plan", str(tmp_path / "prompts.txt"), "-p", str(tmp_path / "my-server.yaml"), "-o", str(tmp_path / "new")]) == 0
    )
    assert "note: http://127.0.0.1:9: does not respond: " in capsys.readouterr().out
    profile = load_profile(str(tmp_path / "my-server.yaml"))
    assert [finding.status for finding in check_servers(profile)] == ["pass", "warn"]
    with_image = profile.with_options({"remote": {"send_image": True}})
    with (
        VideoGenerationPipeline(with_image, tmp_path / "out") as pipeline,
        pytest.raises(VidgenError, match="send_image: false"),
    ):
        pipeline.generate_video("a boat")


def test_wrong_options_are_named():
    urls, url = "must be a list of URLs", "must be a URL such as"
    for options, message in (
        ({"servers": []}, urls),
        ({"servers": "http://video"}, urls),
        ({"servers": ["http://video", "video:8000"]}, f"'video:8000' {url} .*; write http://video:8000"),
        ({"servers": ["http://video:port"]}, f"'http://video:port' {url}"),
        *(({"servers": [f"http://{wrong}"]}, url) for wrong in ("user:secret@video", "video..local", "vi\tdeo", "video#1")),
        ({"fields": {"seed": 7}}, "seed is that of the shot"),
        ({"price_per_second": -1}, "price_per_second: got -1"),
    ):
        with pytest.raises(ProfileError, match=message):
            profile_of("http://video", **options).options_of(RemoteVideoStage)
    profile = profile_of("http://video")
    for weights in ("remote:", "builtin:demo/svd"):
        actor = profile.actors["remote"].model_copy(update={"weights": weights})
        with pytest.raises(ProfileError, match="must be remote:NAME"):
            profile.model_copy(update={"actors": {"remote": actor}}).options_of(RemoteVideoStage)


def test_deeply_nested_list_of_models_is_refused():
    with pytest.raises(SetupError, match="got no list of models"):
        video_server.model_digest(MODEL, "http://video", httpx2.Response(200, content=b"[" * 100_000))


MODELS = {"data": [{"id": MODEL}]}
FIELDS = {"prompt": "a boat", "size": "64x64"}
SUBMIT, POLL, LIST = ("POST", "/v1/videos"), ("GET", "/v1/videos/a"), ("GET", "/v1/videos")
CONTENT = ("GET", "/v1/videos/a/content")


def servers_with(answers, timeout_s=5.0, others=()):
    """Return the client of a server that gives these answers: (method, path) -> content, status, or a function of neither.

    An iterator of bytes is a body in parts.
    """
    requests = []

    def answer(request):
        requests.append((request.method, request.url.path))
        content = {("GET", "/v1/models"): MODELS, LIST: {"data": []}, **answers}.get(requests[-1], b"")
        content = content() if callable(content) else content
        if isinstance(content, int):
            return httpx2.Response(content, headers={"Location": "/"}, json={})
        body = {"content": content} if isinstance(content, bytes | Iterator) else {"json": content}
        return httpx2.Response(200, headers={"Date": "Mon, 30 Nov 2026 00:00:00 GMT"}, **body)

    reported = video_server.model_digest(MODEL, "", httpx2.Response(200, json=MODELS))
    servers = VideoServers(MODEL, reported, ("http://video", *others), {}, timeout_s, lambda percent: None)
    servers._http = httpx2.Client(transport=httpx2.MockTransport(answer))
    return servers, requests


def job(**fields):
    return {"id": "a", "status": "completed", **fields}


def test_answers_of_another_form_are_errors_of_the_server():
    for answers, error, message in (
        ({SUBMIT: []}, ServerFailed, "no response to 3 submissions: .*got '.*', must be JSON"),
        ({SUBMIT: {"status": "queued"}}, ServerFailed, "no response to 3 submissions: .*got '.*', must be JSON"),
        ({SUBMIT: 301}, StageError, "/v1/videos: 301"),
        ({SUBMIT: 500, LIST: {"data": None}}, ServerFailed, "/v1/videos.*, must be JSON"),
        ({SUBMIT: 500, LIST: {"data": [job(created_at="today")]}}, ServerFailed, "/v1/videos.*, must be JSON"),
        ({POLL: job(status="failed", error="no memory")}, ServerFailed, "the job a failed: no memory"),
        ({POLL: job(status="failed", error=["no memory"])}, ServerFailed, "the job a failed: .*no memory"),
        ({POLL: job(status="in_progress", progress="half")}, ServerFailed, "took longer than 0 s$"),
        ({POLL: 503}, ServerFailed, "took longer than 0 s: 503"),
    ):
        servers, _ = servers_with({SUBMIT: job(), **answers}, timeout_s=0.3)
        with pytest.raises(error, match=message):
            servers.clip("key", FIELDS, None, {}, lambda content, found: content)
    servers, requests = servers_with({("GET", "/v1/models"): {"data": [{"id": "other"}]}})
    for _ in range(2):
        with pytest.raises(SetupError, match="has no model"):
            servers.clip("key", FIELDS, None, {}, lambda content, found: content)
    assert SUBMIT not in requests


def test_bodies_are_limited_in_bytes_and_time(monkeypatch):
    now, passed = time.monotonic, []

    def slowly():
        while len(passed) < 100:
            passed.append(0.5)
            yield b"x"

    monkeypatch.setattr(time, "monotonic", lambda: now() + sum(passed))
    large = partial(map, bytes, [10_000] * 100)
    for answers, message in (
        ({CONTENT: slowly}, "http://video: took longer than 6 s: ReadTimeout: sent 1[0-3] bytes, and not yet the whole"),
        ({CONTENT: large}, "^http://video/v1/videos/a/content: answers with more than 500,000 bytes"),
        ({POLL: large}, "^http://video/v1/videos/a: answers with more than 500,000 bytes"),
    ):
        monkeypatch.setattr(video_server, "MAX_JSON_BYTES", 500_000)
        servers, _ = servers_with({SUBMIT: job(), POLL: job(), **answers}, timeout_s=6)
        with pytest.raises(ServerFailed, match=message):
            servers.clip("key", FIELDS, None, {}, lambda content, found: content, 500_000)
    assert len(passed) < 20


def test_wrong_answers_of_another_server_do_not_fail_the_own_one():
    """A worker takes over the job of a server that lies, and then submits it to its own."""

    def check(content, found):
        if content != b"clip":
            raise WrongAnswer("the clip has another size")
        return content

    liar, content = "http://liar", {CONTENT: b"clip", ("GET", "/v1/videos/lie/content"): b"lie"}
    store = {"key": RemoteJob(key="key", server=liar, id="lie").model_dump_json().encode()}
    servers, _ = servers_with({SUBMIT: job(), POLL: job(), ("GET", "/v1/videos/lie"): job(id="lie"), **content}, others=[liar])
    assert servers.clip("key", FIELDS, None, store, check) == (b"clip", 2)
    store = {"key": RemoteJob(key="key", server="http://video", id="lie").model_dump_json().encode()}
    with pytest.raises(WrongAnswer, match=r"^http://video: the clip has another size"):
        servers.clip("key", FIELDS, None, store, check)


def test_search_of_a_job_begins_at_its_submission(monkeypatch):
    servers, _ = servers_with({SUBMIT: job(), POLL: job()})
    store, now = {}, time.monotonic
    servers.clip("first", FIELDS, None, store, lambda content, found: content)
    monkeypatch.setattr(time, "monotonic", lambda: now() + 1000)
    servers.clip("second", FIELDS, None, store, lambda content, found: content)
    first, second = (RemoteJob.model_validate_json(store[key]).since for key in ("first", "second"))
    assert second - first == pytest.approx(1000, abs=60)


def test_found_job_is_left_to_the_step_whose_response_comes_later():
    """Two steps with the same prompt: one submission has no response, the response of the other is under way."""
    store = {}

    def other_response():
        servers._put(RemoteJob(key="other", server="http://video", id="a"), store)
        return job()

    submissions = iter([500, job(id="b")])
    servers, requests = servers_with(
        {
            SUBMIT: lambda: next(submissions),
            LIST: {"data": [job(created_at=9e9)]},
            POLL: other_response,
            ("GET", "/v1/videos/a/content"): b"clip of other",
            ("GET", "/v1/videos/b"): job(id="b"),
            ("GET", "/v1/videos/b/content"): b"clip of own",
        }
    )
    assert servers.clip("own", FIELDS, None, store, lambda content, found: content) == (b"clip of own", 2)
    assert RemoteJob.model_validate_json(store["other"]).id == "a"
    assert not any(method == "DELETE" for method, _ in requests)
