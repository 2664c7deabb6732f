"""Hostile requests and uploads: a 4xx with one sentence, or an accepted job; the server and other clients go on."""

import pytest
import yaml
from starlette.testclient import TestClient

from tests.hostile.images import IMAGES
from tests.hostile.requests import REQUESTS, SMALL
from tests.hostile.videos import VIDEOS
from tests.online.directors import local_server
from tests.online.test_api_videos import ended
from vidgen_ray.online.auth import hash_key
from vidgen_ray.online.server_settings import OnlineSettings

CAPS = {"image_bytes": 600_000, "video_bytes": 700_000, "json_bytes": 2_500_000}


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    limits = {"pixel_frames": 64 * 64 * 100, "open_jobs": 1000, "requests_per_minute": 100_000}
    keys = [{"tenant": name, "sha256": hash_key(f"vg-{name}"), "limits": {**limits}} for name in ("ada", "bob")]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    settings = OnlineSettings(
        profile="tiny",
        data=str(folder / "out"),
        keys_file=folder / "keys.yaml",
        uploads=CAPS,
        url_inputs={"allow_hosts": ["allowed.example", "*"]},
    )
    with local_server(tiny, settings) as running:
        yield running


def client_of(server, tenant):
    headers = {"Authorization": f"Bearer vg-{tenant}"}
    return TestClient(server.app, base_url="http://videos.example", headers=headers)


@pytest.fixture(scope="module")
def client(server):
    """Client that raises the exceptions of the server."""
    return client_of(server, "ada")


def assert_refused(response, status, message="", param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
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
    for name in ("playlist of local files", "MP4 with 60% of its bytes", "sound only"):
        (case,) = (case for case in VIDEOS if case.name == name)
        case.build(tmp_path / "a")
        files = {"video": ("a.mp4", (tmp_path / "a").read_bytes())}
        response = client.post("/v1/videos/characters", data={"name": "x"}, files=files)
        assert_refused(response, 400, case.message, "video")
        assert str(tmp_path) not in response.text


def test_other_clients_are_served_afterwards(server):
    """The last test of this module: jobs of another tenant are still rendered."""
    bob = client_of(server, "bob")
    job = bob.post("/v1/videos", json=SMALL).json()
    assert ended(bob, job["id"])["status"] == "completed"
