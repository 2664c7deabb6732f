"""Files of a job over HTTP: ranges, ETags and previews. Also the synchronous image API."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

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


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=100-", 100, None),
        ("bytes=-100", -100, None),
        ("bytes=0-999999999999", 0, None),
        ("BYTES=5-6", 5, 7),
    ],
)
def test_range_request_returns_206_with_that_part(client, clip, whole, header, start, stop):
    answer = content(client, clip, Range=header)
    assert answer.status_code == 206
    assert answer.content == whole[start:stop]
    first = start % len(whole)
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(answer.content) - 1}/{len(whole)}"


@pytest.mark.parametrize("header", ["bytes=x-y", "lines=0-5", "bytes=", "bytes=9-1", "bytes=-", "nonsense"])
def test_invalid_range_header_is_ignored(client, clip, whole, header):
    answer = content(client, clip, Range=header)
    assert (answer.status_code, answer.content) == (200, whole)


@pytest.mark.parametrize("header", ["bytes=999999999-", "bytes=-0", "bytes=99999999-999999999"])
def test_range_beyond_the_end_returns_416(client, clip, whole, header):
    answer = content(client, clip, Range=header)
    assert error_of(answer, 416)["code"] == "range_not_satisfiable"
    assert answer.headers["content-range"] == f"bytes */{len(whole)}"


def test_if_none_match_and_if_range_compare_the_etag(client, clip, whole):
    etag = content(client, clip).headers["etag"]
    for cached in (etag, f'"other", W/{etag}'):
        answer = content(client, clip, **{"If-None-Match": cached})
        assert (answer.status_code, answer.content) == (304, b"")
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


def test_head_returns_headers_without_body(client, clip, whole):
    answer = content(client, clip, method="HEAD")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) == len(whole)
    assert (answer.headers["accept-ranges"], answer.headers["content-type"]) == ("bytes", "video/mp4")
    assert content(client, clip, method="HEAD", Range="bytes=0-4").status_code == 206


def test_content_headers_prevent_sniffing_and_public_caching(client, clip):
    headers = content(client, clip).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-disposition"] == f'inline; filename="{clip["id"]}.mp4"'
    assert "private" in headers["cache-control"]


def test_variants_return_image_thumbnail_and_spritesheet(client, clip):
    image = Image.open(io.BytesIO(content(client, clip, "image").content))
    assert (image.format, image.size) == ("PNG", (64, 64))
    assert Image.open(io.BytesIO(content(client, clip, "thumbnail").content)).format == "WEBP"
    assert Image.open(io.BytesIO(content(client, clip, "spritesheet").content)).size == (2 * 160, 160)
    assert error_of(content(client, clip, "hologram"), 400)["param"] == "variant"


def test_deleted_files_return_404_expired(client, server):
    clip = ended(client, made(client, prompt="gone", seed=2)["id"])
    job = server.store.get(clip["id"], None)
    server.outputs.storage.delete_folder(shot_path(job.shot_id))
    for variant in ("video", "thumbnail", "image"):
        assert error_of(content(client, clip, variant), 404)["code"] == "expired"


def images_of(answer) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in answer.json()["data"]]


def test_n_images_have_different_seeds(client):
    body = {"prompt": "x", "size": "80x64", "n": 3, "seed": 4, "quality": "hd", "user": "me"}
    first, second, third = images_of(client.post("/v1/images/generations", json=body))
    assert first.shape == (64, 80, 3)
    assert (first != second).any()
    assert (second != third).any()
    (alone,) = images_of(client.post("/v1/images/generations", json={**body, "n": 1, "seed": 6}))
    assert (alone == third).all()


def test_image_response_format_url(client):
    body = {"prompt": "x", "size": "64x64", "response_format": "url", "output_format": "webp"}
    answer = client.post("/v1/images/generations", json=body).json()
    assert answer["output_format"] == "png"
    assert client.get(answer["data"][0]["url"]).headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"size": "71x64"}, "size"),
        ({"output_format": "gif"}, "output_format"),
        ({"background": "transparent"}, "background"),
        ({"output_compression": 101}, "output_compression"),
        ({"stream": "maybe"}, "stream"),
        ({"partial_images": 4}, "partial_images"),
        ({"num_frames": 3}, "num_frames"),
    ],
)
def test_invalid_image_field_is_named(client, fields, param):
    answer = client.post("/v1/images/generations", json={"prompt": "x", "size": "64x64", **fields})
    assert error_of(answer, 400)["param"] == param


@pytest.mark.parametrize("text", ["{id-7}", "[a", '{"a": 1}'])
def test_text_fields_are_not_parsed_as_json(client, text):
    form = {"prompt": text, "size": "64x64", "user": text, "moderation": "low"}
    assert client.post("/v1/images/generations", files={name: (None, value) for name, value in form.items()}).status_code == 200


def test_failed_image_returns_500_that_clients_do_not_retry(client):
    answer = client.post("/v1/images/generations", json={"prompt": "fail", "size": "64x64"})
    assert error_of(answer, 500)["code"] == "stage_failed"
    assert answer.headers["x-should-retry"] == "false"
    stream = client.post("/v1/images/generations", json={"prompt": "fail", "size": "64x64", "stream": True}).text
    assert "event: error" in stream
    assert "stage_failed" in stream


def test_image_timeout_returns_504_with_the_job(tiny, tmp_path):
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


def test_input_fidelity_sets_the_strength_of_an_edit(client, server):
    edit(client, [("image", ("a.png", png()))], input_fidelity="high", seed="1")
    (job,) = server.store.list("local", limit=1).jobs
    assert (job.shot.use_hunyuan_style, job.shot.style_strength) == (True, 0.35)
    assert job.shot.image is not None
    edit(client, [("image", ("a.png", png()))], strength="0.9", seed="2")
    assert server.store.list("local", limit=1).jobs[0].shot.style_strength == 0.9


def test_edit_without_size_keeps_the_aspect_ratio_of_the_image(client, server):
    answer = client.post("/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", png(300, 600))})
    assert [image.shape for image in images_of(answer)] == [(128, 64, 3)]


def test_invalid_edit_is_rejected(client):
    assert error_of(client.post("/v1/images/edits", data={"prompt": "x"}), 400)["param"] == "image"
    assert error_of(edit(client, [("image[]", ("a.png", png()))] * 3, n="4"), 400)["param"] == "n"
    assert error_of(edit(client, [("image", ("a.png", png())), ("mask", ("m.png", png()))]), 400)["param"] == "mask"
    assert error_of(edit(client, [("image", ("a.png", png()))], model="tiny-fast"), 400)["param"] == "mode"
    assert error_of(edit(client, [("picture", ("a.png", png()))]), 400)["param"] == "picture"


def test_edit_accepts_the_id_of_an_upload(client):
    upload = client.post("/v1/files", files={"file": ("a.png", png())}).json()
    answer = client.post("/v1/images/edits", json={"prompt": "x", "size": "64x64", "image": [upload["id"]]})
    assert len(images_of(answer)) == 1
