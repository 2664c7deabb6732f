"""Hostile HTTP requests of a client with a key: the door of the API. Uploads are the images of `images.py`.

Fields with a wrong value are in tests/online/test_api_videos.py.
"""

import base64
import json
from typing import Any

from tests.hostile.case import Case, refused, used
from tests.hostile.images import NOISE, RED, encoded

VIDEOS = "/v1/videos"
SMALL = {"prompt": "a", "size": "64x64", "num_frames": 2, "upscale": False}


def post(path: str = VIDEOS, **arguments: Any):
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
    refused("JSON with 1 MB of opening brackets", "", raw(b"[" * 1_000_000), status=400),
    refused("JSON of 3 MB", "larger than", raw(b'{"prompt": "' + b"x" * 3_000_000 + b'"}'), status=413),
    refused("JSON in UTF-16", "not valid JSON", raw(json.dumps(SMALL).encode("utf-16")), status=400),
    refused("JSON with NaN", "NaN is not JSON", raw(b'{"prompt": "a", "fps": NaN}'), status=400),
    refused(
        "JSON with a number of 5,000 digits",
        "not valid JSON",
        raw(b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}"),
        status=400,
    ),
    refused("JSON with a field twice", "same name twice", raw(b'{"prompt": "a", "prompt": "b"}'), status=400),
    refused("lone surrogate", "lone surrogate", raw(b'{"prompt": "\\ud800"}'), status=400),
    refused("another content type", "must be application/json", raw(b"<a/>", "application/xml"), status=415),
    refused("pickle as body", "must be application/json", raw(b"\x80\x04.", "application/octet-stream"), status=415),
    refused("prompt of 100 kB", "at most 10000 characters", body(prompt="x" * 100_000), status=400, field="prompt"),
    refused("NUL in the prompt", "NUL", body(prompt="a\0b"), status=400, field="prompt"),
    refused("unknown field with a long name", "", body(**{"x" * 100_000: 1}), status=400),
    refused("seed true", "true", body(seed=True), status=400, field="seed"),
    refused("job above the limit of the key", "must be at most", body(size="1024x1024", num_frames=256), status=400),
    refused(
        "LoRA with a weight of NaN", "NaN is not JSON", raw(b'{"prompt": "a", "lora": {"name": "x", "scale": NaN}}'), status=400
    ),
    refused("start image as path", "", reference("/etc/passwd"), status=400, field="image_reference"),
    refused("start image as HTML", "data: URL", reference(data_url(b"<script>", "text")), status=400, field="image_reference"),
    refused("10,000 form fields", "ields", post(data={f"f{n}": "x" for n in range(10_000)}), status=400),
    refused("form text of 3 MB", "larger than", post(data={"prompt": "x" * 3_000_000}), status=413),
    refused("20 files", "iles", post(data=SMALL, files=[("face_image", ("a", b""))] * 20), status=400),
    refused(
        "multipart without an end",
        "",
        raw(b"--x\r\nContent-Disposition: form-data; na", "multipart/form-data; boundary=x"),
        status=400,
    ),
    refused("upload above the limit", "larger than", upload(encoded(NOISE, "PNG") + bytes(700_000)), status=413),
    *(refused(f"image at {url}", "", reference(url), status=400, field="image_reference") for url in LOCALHOST),
    used("file name that leaves the folder", post("/v1/files", files={"file": ("../../../etc/passwd", encoded(RED, "PNG"))})),
    used("HTML in the prompt", body(prompt="</script><script>alert(1)</script>")),
    used("escape sequences in the prompt", body(prompt="a\x1b[2J\x1b]0;owned\x07b")),
]
