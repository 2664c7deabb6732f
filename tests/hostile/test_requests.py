"""Hostile requests and uploads: a 4xx with one sentence, or an accepted job; the server and other clients go on."""

import base64
from typing import Any

import pytest

from tests.hostile.files import IMAGES, NOISE, RED, VIDEOS, Case, encoded, refused, used
from tests.online.directors import SMALL, client_of, local_server, settings_with_keys
from tests.online.test_api_videos import ended, error_of, made


def post(path: str = "/v1/videos", **arguments: Any):
    """Return a builder of a POST request: its path and the arguments of httpx."""
    return lambda _: (path, arguments)


def body(**fields: Any):
    return post(json={**SMALL, **fields})


def raw(content: bytes, kind: str = "application/json"):
    return post(content=content, headers={"Content-Type": kind})


def upload(content: bytes):
    return post("/v1/files", files={"file": ("a.png", content)})


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def reference(url: str):
    return body(image_reference={"image_url": url})


LOCALHOST = ("http://127.0.0.1/x.png", "http://[::ffff:7f00:1]/x.png", "file:///etc/passwd")
"""More spellings are in tests/online/test_http_fetch.py."""

REQUESTS: list[Case] = [
    refused("JSON nested 10,000 times", "nested too deeply", raw(b'{"metadata": ' + b"[" * 40 + b"]" * 40 + b"}"), status=400),
    refused("JSON with 200,000 values", "too many values", raw(b'{"a": [' + b"0," * 200_000 + b"0]}"), status=400),
    refused("JSON of 3 MB", "larger than", raw(b'{"prompt": "' + b"x" * 3_000_000 + b'"}'), status=413),
    refused("JSON with NaN", "NaN is not JSON", raw(b'{"prompt": "a", "fps": NaN}'), status=400),
    refused("JSON with a number of 5,000 digits", "not valid JSON", raw(b'{"seed": ' + b"1" * 5000 + b"}"), status=400),
    refused("JSON with a field twice", "same name twice", raw(b'{"prompt": "a", "prompt": "b"}'), status=400),
    refused("lone surrogate", "lone surrogate", raw(b'{"prompt": "\\ud800"}'), status=400),
    refused("another content type", "must be application/json", raw(b"<a/>", "application/xml"), status=415),
    refused("prompt of 100 kB", "at most 10000 characters", body(prompt="x" * 100_000), status=400, field="prompt"),
    refused("NUL in the prompt", "control characters", body(prompt="a\0b"), status=400, field="prompt"),
    refused("escape in a prompt", "control characters", body(style_prompt="\x1b[2J"), status=400, field="style_prompt"),
    used("lines and tabs in the prompt", body(prompt="a\r\nb\n\tc")),
    refused("job above the limit of the key", "must be at most", body(size="1024x1024", num_frames=256), status=400),
    refused("start image as HTML", "data: URL", reference(data_url(b"<script>", "text")), status=400, field="image_reference"),
    refused("10,000 form fields", "ields", post(data={f"f{n}": "x" for n in range(10_000)}), status=400),
    refused("20 files", "iles", post(data=SMALL, files=[("face_image", ("a", b""))] * 20), status=400),
    refused("multipart without an end", "", raw(b"--x\r\nContent-Disp", "multipart/form-data; boundary=x"), status=400),
    refused("upload above the limit", "larger than", upload(encoded(NOISE, "PNG") + bytes(700_000)), status=413),
    *(refused(f"image at {url}", "", reference(url), status=400, field="image_reference") for url in LOCALHOST),
    used("file name that leaves the folder", post("/v1/files", files={"file": ("../../../etc/passwd", encoded(RED, "PNG"))})),
    used("HTML in the prompt", body(prompt="</script><script>alert(1)</script>")),
]
CAPS = {"image_bytes": 600_000, "video_bytes": 700_000, "json_bytes": 2_500_000}


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    options = {"uploads": CAPS, "url_inputs": {"allow_hosts": ["allowed.example", "*"]}}
    options["limits"] = {"pixel_frames": 64 * 64 * 100, "open_jobs": 1000, "requests_per_minute": 100_000}
    settings = settings_with_keys(tmp_path_factory.mktemp("server"), {"ada": {}, "bob": {}}, **options)
    with local_server(tiny, settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def assert_refused(response, status, message="", param=None):
    error = error_of(response, status)
    assert message in error["message"]
    assert param is None or (error["param"] or "").startswith(param)
    assert len(response.content) < 5000
    assert "Traceback" not in response.text


@pytest.mark.parametrize("case", REQUESTS, ids=str)
def test_request(client, case):
    path, arguments = case.build(None)
    response = client.post(path, **arguments)
    if case.outcome == "used":
        assert response.status_code == 200, response.text
    else:
        assert_refused(response, case.status, case.message, case.field)


def test_uploads_reach_the_checks_of_files(tmp_path, client, server):
    """All cases of the corpus are in test_corpus.py; here, one of each outcome."""
    for name in ("PNG above 40 megapixels", "SVG with a file URL, named .png", "truncated JPEG", "JPEG rotated by EXIF"):
        (case,) = (case for case in IMAGES if case.name == name)
        case.build(tmp_path / "a")
        response = client.post("/v1/files", files={"file": ("photo.png", (tmp_path / "a").read_bytes(), "image/png")})
        if case.outcome == "used":
            assert response.status_code == 200, response.text
            continue
        assert_refused(response, 400, case.message, "file")
        assert server.settings.data not in response.text
    for name in ("playlist of local files", "MP4 with 60% of its bytes"):
        (case,) = (case for case in VIDEOS if case.name == name)
        case.build(tmp_path / "a")
        files = {"video": ("a.mp4", (tmp_path / "a").read_bytes())}
        response = client.post("/v1/videos/characters", data={"name": "x"}, files=files)
        assert_refused(response, 400, case.message, "video")
        assert str(tmp_path) not in response.text


def test_other_clients_are_served_afterwards(server):
    """The last test of this module: jobs of another tenant are still rendered."""
    bob = client_of(server, "bob")
    assert ended(bob, made(bob)["id"])["status"] == "completed"
