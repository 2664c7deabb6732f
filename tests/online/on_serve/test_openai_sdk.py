"""The released `openai` package against a running server.

Its `videos` is deprecated because OpenAI has shut down its service. Other servers still implement it.
"""

import base64
import io
import json
import threading
import time
from contextlib import closing
from http.client import HTTPConnection

import httpx
import numpy as np
import pytest

from tests.conftest import ASTRONAUT
from tests.online.on_serve.conftest import KEYS
from vidgen_ray.engine.shot_writer import write_clip
from vidgen_ray.media import Mp4Settings, open_video

openai = pytest.importorskip("openai")
from openai import OpenAI  # noqa: E402
from PIL import Image  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.timeout(600)]
SMALL = {"size": "64x64", "extra_body": {"num_frames": 2, "upscale": False}}


def client_of(address: str, tenant: str = "ada", **options) -> OpenAI:
    return OpenAI(api_key=KEYS.get(tenant, tenant), base_url=f"{address}/v1", **options)


@pytest.fixture(scope="module")
def client(address) -> OpenAI:
    return client_of(address)


@pytest.fixture(scope="module")
def clip(client):
    """Return a completed video."""
    return client.videos.create_and_poll(
        prompt="a man in the rain", seconds="1", size="128x64", extra_body={"seed": 7, "negative_prompt": "blur", "flag": None}
    )


def decode_image(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def photo(width: int, height: int) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.open(ASTRONAUT).convert("RGB").resize((width, height)).save(buffer, "PNG")
    buffer.name = "../../anything.png"
    buffer.seek(0)
    return buffer


def test_create_and_poll(clip):
    assert clip.status == "completed", clip.error
    assert (clip.progress, clip.seconds, clip.size) == (100, "1", "128x64")
    assert clip.model == "tiny"
    assert clip.model_extra["seed"] == 7
    # The models draw this size themselves.
    assert set(clip.model_extra["stage_durations"]) == {"flux", "svd"}
    assert (clip.model_extra["model_size"], clip.model_extra["hd_size"]) == ("128x64", None)


def test_content_variants(client, clip, tmp_path):
    video = tmp_path / "clip.mp4"
    client.videos.download_content(clip.id).write_to_file(video)
    with open_video(video) as opened:
        assert (opened.frame_count, opened.width, opened.height) == (5, 128, 64)
        assert opened.frames(0, 5).shape == (5, 64, 128, 3)
    sheet = Image.open(io.BytesIO(client.videos.download_content(clip.id, variant="spritesheet").read()))
    assert (sheet.format, sheet.size) == ("JPEG", (3 * 160, 2 * 80))


def test_list_follows_pages(client):
    created = [client.videos.create(prompt=f"a page {number}", **SMALL).id for number in range(5)]
    seen = [video.id for video in client.videos.list(limit=2)]
    assert seen[:5] == created[::-1]
    oldest_first = [video.id for video in client.videos.list(limit=2, order="asc")]
    assert oldest_first == seen[::-1]
    first = client.videos.list(limit=2)
    assert (first.has_next_page(), first.last_id) == (True, created[3])


def test_events_and_range_requests(client, address):
    headers = {"Authorization": f"Bearer {KEYS['ada']}"}
    video = client.videos.create(prompt="followed", size="64x64", extra_body={"num_frames": 4})
    with httpx.Client(base_url=f"{address}/v1", headers=headers, timeout=120) as plain:
        with plain.stream("GET", f"/videos/{video.id}/events") as events:
            assert events.headers["content-type"].startswith("text/event-stream")
            names = [line.removeprefix("event: ") for line in events.iter_lines() if line.startswith("event: ")]
        assert names[-1] == "video.completed"
        assert set(names[:-1]) <= {"video.queued", "video.in_progress"}
        whole = plain.get(f"/videos/{video.id}/content").content
        part = plain.get(f"/videos/{video.id}/content", headers={"Range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, whole[10:20])


def test_remix_changes_the_prompt_and_keeps_the_seed(client, clip):
    remixed = client.videos.remix(clip.id, prompt="a man in the snow")
    assert remixed.remixed_from_video_id == clip.id
    assert (remixed.prompt, remixed.size, remixed.model_extra["seed"]) == ("a man in the snow", "128x64", 7)
    client.videos.delete(remixed.id)


def test_create_character_and_use_it(client, tmp_path):
    face = np.asarray(Image.open(ASTRONAUT).convert("RGB"))
    write_clip(tmp_path / "me.mp4", [np.stack([np.zeros_like(face), face])], 6, Mp4Settings(threads=1))
    consent = {"subject": "Eileen Collins", "basis": "public-domain"}
    character = client.videos.create_character(name="Eileen", video=tmp_path / "me.mp4", extra_body={"consent": consent})
    assert client.videos.get_character(character.id).name == "Eileen"
    video = client.videos.create(prompt="at the sea", size="64x64", extra_body={"character": "Eileen", "num_frames": 2})
    assert client.videos.poll(video.id).status == "completed"


def test_generate_images(client):
    response = client.images.generate(prompt="a lighthouse", size="64x64", n=2, extra_body={"seed": 1})
    images = [np.asarray(decode_image(image.b64_json)) for image in response.data]
    assert [image.shape for image in images] == [(64, 64, 3)] * 2
    assert (images[0] != images[1]).any()
    assert (response.size, response.output_format) == ("64x64", "png")
    webp = client.images.generate(prompt="a lighthouse", size="64x64", output_format="webp", extra_body={"seed": 1})
    image = decode_image(webp.data[0].b64_json)
    assert image.format == "WEBP"
    assert b"digitalsourcetype/trainedAlgorithmicMedia" in image.info["xmp"]


def test_stream_partial_images(client):
    stream = client.images.generate(
        prompt="a lighthouse",
        size="64x64",
        stream=True,
        partial_images=2,
        extra_body={"seed": 3, "style_prompt": "oil", "use_hunyuan_style": True, "steps": {"hunyuan": 30}},
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert events[-1].usage.total_tokens == 0
    images = [decode_image(event.b64_json) for event in events]
    assert all(b"digitalsourcetype/trainedAlgorithmicMedia" in image.info["xmp"] for image in images)
    first, last = map(np.asarray, images)
    assert first.shape == last.shape
    assert (first != last).any()


def test_edit_two_images(client):
    response = client.images.edit(
        image=[photo(96, 64), photo(64, 64)], prompt="a woodcut", size="64x64", extra_body={"seed": 1}
    )
    first, second = (np.asarray(decode_image(one.b64_json)) for one in response.data)
    assert (first != second).any()


def test_list_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-fast"]
    assert client.models.retrieve("tiny-fast").owned_by == "vidgen-ray"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("sora-9")


def test_client_retries_after_429(address):
    client = client_of(address, "eve")
    first = client.videos.create(prompt="one of one", size="256x256", extra_body={"num_frames": 25, "steps": {"svd": 200}})
    with pytest.raises(openai.RateLimitError) as raised:
        client.with_options(max_retries=0).videos.create(prompt="one too many", **SMALL)
    assert raised.value.code == "too_many_jobs"
    assert int(raised.value.response.headers["retry-after-ms"]) == 2000
    cancelled = threading.Timer(0.5, client.post, (f"/videos/{first.id}/cancel",), {"cast_to": object})
    cancelled.start()
    # The client waits for the time of retry-after-ms. By then the first job is cancelled.
    started = time.monotonic()
    second = client.videos.create(prompt="one after it", **SMALL)
    assert second.id != first.id
    assert time.monotonic() - started > 1.9
    cancelled.join()
    cancelled_video = client.videos.retrieve(first.id)
    assert (cancelled_video.status, cancelled_video.error.code) == ("failed", "cancelled")


def test_invalid_key_is_rejected(address):
    with pytest.raises(openai.AuthenticationError) as raised:
        client_of(address, "unknown").models.list()
    assert raised.value.code == "invalid_api_key"


def test_disconnect_cancels_a_synchronous_video(address):
    """Through the proxy of Ray Serve, which cancels the request handler."""
    body = {"prompt": "left alone", "size": "256x256", "upscale": False, "num_frames": 25, "steps": {"svd": 200}}
    headers = {"Authorization": f"Bearer {KEYS['amy']}", "Content-Type": "application/json"}
    amy = client_of(address, "amy")
    with closing(HTTPConnection(address.removeprefix("http://"))) as connection:
        connection.request("POST", "/v1/videos/sync", json.dumps(body), headers)
        while not list(amy.videos.list()):
            time.sleep(0.2)
    until = time.monotonic() + 120
    while (video := next(iter(amy.videos.list()))).error is None:
        assert time.monotonic() < until, video
        time.sleep(0.5)
    assert (video.prompt, video.error.code) == ("left alone", "cancelled")
