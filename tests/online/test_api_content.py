"""Files of a job over HTTP: ranges, ETags and previews. Also the synchronous image API."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.conftest import ASTRONAUT
from tests.online.directors import LOCAL, local_server
from tests.online.test_api_limits import png
from tests.online.test_api_videos import ended, error_of, made
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.outputs.records import shot_path
from vidgen_ray.system.cache_dir import sha256_of


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    settings = OnlineSettings(profile="tiny", data=str(tmp_path_factory.mktemp("out")), wait_s=120)
    with local_server(tiny, settings) as running:
        yield running


@pytest.fixture(scope="module")
def clip(client):
    return ended(client, made(client, prompt="ranges", seed=1)["id"])


@pytest.fixture(scope="module")
def whole(client, clip):
    return content(client, clip).content


def content(client, clip, variant="video", method="GET", **headers):
    return client.request(method, f"/v1/videos/{clip['id']}/content", params={"variant": variant}, headers=headers)


def test_range_requests(client, clip, whole):
    ends = {"bytes=0-99": (0, 100), "bytes=-100": (-100, None), "bytes=100-999999999999": (100, None), "BYTES=5-6": (5, 7)}
    for header, (start, stop) in ends.items():
        answer = content(client, clip, Range=header)
        assert (answer.status_code, answer.content) == (206, whole[start:stop])
        first = start % len(whole)
        assert answer.headers["content-range"] == f"bytes {first}-{first + len(answer.content) - 1}/{len(whole)}"
    for invalid in ("bytes=x-y", "lines=0-5", "bytes=", "bytes=9-1", "bytes=-", "nonsense"):
        answer = content(client, clip, Range=invalid)
        assert (answer.status_code, answer.content) == (200, whole), invalid
    for beyond in ("bytes=999999999-", "bytes=-0", "bytes=99999999-999999999"):
        answer = content(client, clip, Range=beyond)
        assert error_of(answer, 416)["code"] == "range_not_satisfiable"
        assert answer.headers["content-range"] == f"bytes */{len(whole)}"


def test_headers_of_content(client, clip, whole):
    head = content(client, clip, method="HEAD")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) == len(whole)
    assert (head.headers["accept-ranges"], head.headers["content-type"]) == ("bytes", "video/mp4")
    assert content(client, clip, method="HEAD", Range="bytes=0-4").status_code == 206
    headers = content(client, clip).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"] == f'inline; filename="{clip["id"]}.mp4"'
    assert "private" in headers["cache-control"]


def test_if_none_match_and_if_range_compare_the_etag(client, clip, whole):
    etag = content(client, clip).headers["etag"]
    for cached in (etag, f'"other", W/{etag}', "*"):
        answer = content(client, clip, **{"If-None-Match": cached})
        assert (answer.status_code, answer.content) == (304, b"")
    for wanted, status in ((etag, 200), (f'"other", {etag}', 200), ("*", 200), ('"other"', 412), (f"W/{etag}", 412)):
        assert content(client, clip, method="HEAD", **{"If-Match": wanted}).status_code == status
    assert content(client, clip, **{"If-Range": etag, "Range": "bytes=0-4"}).content == whole[:5]
    assert content(client, clip, **{"If-Range": '"other"', "Range": "bytes=0-4"}).content == whole


def test_etag_changes_when_a_clip_is_signed_again(client, server):
    signed = ended(client, made(client, prompt="signed", seed=2)["id"])
    folder = server.outputs.shot_folder(server.store.get(signed["id"], None).shot_id)
    video, record = folder / "video.mp4", json.loads((folder / "shot.json").read_text())

    def sign(signature):
        """Write a file of the same key and size with another signature, as rendering the shot again does."""
        video.write_bytes(video.read_bytes()[:-8] + signature)
        record["files"]["video.mp4"]["signed_sha256"] = sha256_of(video)
        (folder / "shot.json").write_text(json.dumps(record))
        return content(client, signed)

    first, second = sign(b"00000000"), sign(b"11111111")
    assert first.headers["etag"] != second.headers["etag"]
    cached = first.headers["etag"]
    assert content(client, signed, **{"If-None-Match": cached}).content == second.content
    assert content(client, signed, **{"If-Range": cached, "Range": "bytes=10-"}).content == second.content


def test_variants_return_image_thumbnail_and_spritesheet_until_the_files_are_deleted(client, server, clip):
    image = Image.open(io.BytesIO(content(client, clip, "image").content))
    assert (image.format, image.size) == ("PNG", (64, 64))
    assert Image.open(io.BytesIO(content(client, clip, "thumbnail").content)).format == "WEBP"
    assert Image.open(io.BytesIO(content(client, clip, "spritesheet").content)).size == (2 * 160, 160)
    wrong = error_of(content(client, clip, "hologram"), 400)
    assert (wrong["param"], wrong["message"].count("spritesheet")) == ("variant", 1)
    server.outputs.storage.delete_folder(shot_path(server.store.get(clip["id"], None).shot_id))
    for variant in ("video", "thumbnail", "image"):
        assert error_of(content(client, clip, variant), 404)["code"] == "expired"


def images_of(answer) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in answer.json()["data"]]


def test_images_have_different_seeds_and_come_as_data_or_url(client):
    body = {"prompt": "x", "size": "80x64", "n": 3, "seed": 4, "quality": "hd", "user": "me"}
    first, second, third = images_of(client.post("/v1/images/generations", json=body))
    assert first.shape == (64, 80, 3)
    assert (first != second).any()
    assert (second != third).any()
    (alone,) = images_of(client.post("/v1/images/generations", json={**body, "n": 1, "seed": 6}))
    assert (alone == third).all()
    by_url = {"prompt": "{id-7}", "size": "64x64", "response_format": "url", "output_format": "webp", "user": "[a"}
    answer = client.post("/v1/images/generations", files={name: (None, value) for name, value in by_url.items()}).json()
    assert answer["output_format"] == "png"
    assert client.get(answer["data"][0]["url"]).headers["content-type"] == "image/png"


def test_images_of_peers_and_of_openai_are_accepted_and_have_an_id(client):
    uploaded = client.post("/v1/files", files={"file": ("a.jpg", ASTRONAUT.read_bytes())}).json()["id"]
    for path, fields in (
        ("generations", {"model": "gpt-image-1"}),
        ("generations", {"model": "dall-e-3", "num_frames": 1, "response_format": "url"}),
        ("edits", {"model": "gpt-image-2.5-flare", "url": [uploaded]}),
    ):
        answer = client.post(f"/v1/images/{path}", json={"prompt": "x", "size": "64x64", **fields})
        assert answer.status_code == 200, answer.text
        (image,) = answer.json()["data"]
        video = client.get(f"/v1/videos/{image['id']}").json()
        assert (video["status"], video["model"]) == ("completed", fields["model"])
        assert client.delete(f"/v1/videos/{image['id']}").status_code == 200
    for path, fields in (("images/generations", {"model": "gpt-4"}), ("videos", {"model": "gpt-image-1"})):
        assert client.post(f"/v1/{path}", json={"prompt": "x", **fields}).json()["error"]["code"] == "model_not_found"


def test_invalid_image_field_is_named(client):
    for fields, param in (
        ({"n": 11}, "n"),
        ({"size": "71x64"}, "size"),
        ({"output_format": "gif"}, "output_format"),
        ({"background": "transparent"}, "background"),
        ({"output_compression": 101}, "output_compression"),
        ({"stream": "maybe"}, "stream"),
        ({"partial_images": 4}, "partial_images"),
        ({"num_frames": 3}, "num_frames"),
    ):
        answer = client.post("/v1/images/generations", json={"prompt": "x", "size": "64x64", **fields})
        assert error_of(answer, 400)["param"] == param


def test_failed_and_late_images_are_errors_that_clients_do_not_retry(client, tiny, tmp_path):
    failing = {"prompt": "fail", "size": "64x64"}
    answer = client.post("/v1/images/generations", json=failing)
    assert error_of(answer, 500)["code"] == "stage_failed"
    assert answer.headers["x-should-retry"] == "false"
    stream = client.post("/v1/images/generations", json={**failing, "stream": True}).text
    assert "event: error" in stream
    assert "stage_failed" in stream
    settings = OnlineSettings(profile="tiny", data=str(tmp_path), wait_s=0.1)
    with local_server(tiny, settings) as server:
        client = TestClient(server.app, **LOCAL)
        server.director.held.set()
        answer = client.post("/v1/images/generations", json={"prompt": "late", "size": "64x64"})
        assert error_of(answer, 504)["code"] == "timeout"
        assert answer.headers["x-should-retry"] == "false"
        server.director.held.clear()
        job_id = answer.json()["error"]["message"].rpartition("/")[2].removesuffix(".")
        assert ended(client, job_id)["status"] == "completed"


def edit(client, files, **fields):
    return client.post("/v1/images/edits", data={"prompt": "x", "size": "64x64", **fields}, files=files)


def test_edit_has_the_strength_and_the_aspect_ratio_of_its_request(client, server):
    edit(client, [("image", ("a.png", png()))], input_fidelity="high", seed="1")
    (job,) = server.store.list("local", limit=1).jobs
    assert (job.shot.use_hunyuan_style, job.shot.style_strength) == (True, 0.35)
    assert job.shot.image is not None
    edit(client, [("image", ("a.png", png()))], strength="0.9", seed="2")
    assert server.store.list("local", limit=1).jobs[0].shot.style_strength == 0.9
    upload = client.post("/v1/files", files={"file": ("a.png", png(300, 600))}).json()["id"]
    without_size = client.post("/v1/images/edits", json={"prompt": "x", "image": [upload]})
    assert [image.shape for image in images_of(without_size)] == [(128, 64, 3)]
    image = ("image", ("a.png", png()))
    assert error_of(client.post("/v1/images/edits", data={"prompt": "x"}), 400)["param"] == "image"
    assert error_of(edit(client, [("image[]", ("a.png", png()))] * 3, n="4"), 400)["param"] == "n"
    assert error_of(edit(client, [image, ("mask", ("m.png", png()))]), 400)["param"] == "mask"
    assert error_of(edit(client, [image], model="tiny-fast"), 400)["param"] == "mode"
    assert error_of(edit(client, [("picture", ("a.png", png()))]), 400)["param"] == "picture"
