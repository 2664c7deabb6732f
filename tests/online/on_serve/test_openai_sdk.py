"""The released `openai` package against a running server.

Its `videos` is deprecated because OpenAI has shut down its service. Other servers still implement it.
"""

import base64
import io
import itertools
import json
import time
from contextlib import closing
from http.client import HTTPConnection

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.online.on_serve.conftest import KEYS
from vidgen_client import Client
from vidgen_ray.media.decode import open_video

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.timeout(600)]


def client_of(address: str, tenant: str):
    # Takes a second to import.
    openai = pytest.importorskip("openai")
    return openai.OpenAI(api_key=KEYS[tenant], base_url=f"{address}/v1")


@pytest.fixture(scope="module")
def client(address):
    return client_of(address, "ada")


def test_video_is_created_followed_downloaded_and_listed(client, address, tmp_path):
    extra = {"seed": 7, "negative_prompt": "blur", "flag": None}
    clip = client.videos.create(prompt="a man in the rain", seconds="1", size="128x64", extra_body=extra)
    headers = {"Authorization": f"Bearer {KEYS['ada']}"}
    with httpx.stream("GET", f"{address}/v1/videos/{clip.id}/events", headers=headers, timeout=120) as events:
        assert events.headers["content-type"].startswith("text/event-stream")
        names = [line.removeprefix("event: ") for line in events.iter_lines() if line.startswith("event: ")]
    assert names[-1] == "video.completed"
    assert set(names[:-1]) <= {"video.queued", "video.in_progress"}
    clip = client.videos.retrieve(clip.id)
    assert (clip.status, clip.progress, clip.seconds, clip.size) == ("completed", 100, "1", "128x64")
    assert clip.model == client.models.list().data[0].id
    # The models draw this size themselves.
    assert set(clip.model_extra["stage_durations"]) == {"flux", "svd"}
    video = tmp_path / "clip.mp4"
    client.videos.download_content(clip.id).write_to_file(video)
    with open_video(video) as opened:
        assert opened.frames(0, opened.frame_count).shape == (5, 64, 128, 3)
    remixed = client.videos.remix(clip.id, prompt="a man in the snow")
    assert (remixed.remixed_from_video_id, remixed.size, remixed.model_extra["seed"]) == (clip.id, "128x64", 7)
    listed = itertools.islice(client.videos.list(limit=1), 2)
    assert [video.id for video in listed] == [remixed.id, clip.id], "pages are followed"
    client.videos.delete(remixed.id)


def test_own_client_follows_a_video_and_a_batch(address):
    with Client(address, KEYS["ada"]) as own:
        video = own.create_video("a boat", size="64x64", num_frames=2, seed=1)
        assert [each.status for each in own.follow_video(video, timeout_s=120)][-1] == "completed"
        body = {"prompt": "a boat", "width": 64, "height": 64, "generate_video": False}
        lines = [{"custom_id": f"{n}", "method": "POST", "url": "/v1/shots", "body": {**body, "seed": n}} for n in range(3)]
        file = own.upload_batch("\n".join(map(json.dumps, lines)).encode())
        done = own.wait_for_batch(own.create_batch(file, endpoint="/v1/shots"))
        rows, errors = own.batch_results(done)
        assert ([row["custom_id"] for row in rows], errors) == (["0", "1", "2"], [])


def test_stream_partial_images(client):
    style = {"seed": 3, "style_prompt": "oil", "use_hunyuan_style": True, "steps": {"hunyuan": 30}}
    size = {"size": "64x64", "output_format": "webp"}
    events = list(client.images.generate(prompt="a lighthouse", **size, stream=True, partial_images=2, extra_body=style))
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert events[-1].usage.total_tokens == 0
    images = [Image.open(io.BytesIO(base64.b64decode(event.b64_json))) for event in events]
    assert all(b"digitalsourcetype/trainedAlgorithmicMedia" in image.info["xmp"] for image in images)
    first, last = map(np.asarray, images)
    assert first.shape == last.shape
    assert (first != last).any()


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
