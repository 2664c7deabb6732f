"""Ports of the local Ray and of Serve, servers that refuse to start, and modes of files."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from tests.conftest import ASTRONAUT
from tests.online.directors import LOCAL, local_server
from vidgen_ray.engine.ray_cluster import _private_folder
from vidgen_ray.errors import SetupError
from vidgen_ray.online import application, server_plan
from vidgen_ray.online.application import build
from vidgen_ray.online.auth import hash_key, is_loopback
from vidgen_ray.online.server_settings import OnlineSettings

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys
import grpc, psutil
from ray import serve
from vidgen_ray.engine.ray_cluster import init_local_ray, requires_token
from vidgen_ray.errors import SetupError
from vidgen_ray.online import application, server_plan
from vidgen_ray.online.application import build
from vidgen_ray.online.server_settings import OnlineSettings

init_local_ray(num_cpus=2, log_to_driver=False, object_store_memory=100_000_000, _temp_dir=sys.argv[1])
found = {"requires_token": requires_token(), "refused": []}
for keys in ("", os.environ.pop("KEYS")):
    os.environ["VIDGEN_API_KEYS"] = keys
    try:
        build(OnlineSettings(profile="tiny", data=sys.argv[2], host="0.0.0.0"))
    except SetupError as error:
        found["refused"].append(str(error))

@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Nothing:
    pass

serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["SERVE_PORT"])})
serve.run(Nothing.bind())
sockets = [
    (process.name(), connection.laddr)
    for process in psutil.Process().children(recursive=True)
    for connection in process.net_connections("inet")
    if connection.status == psutil.CONN_LISTEN
]
found["listening"] = [(name, *address) for name, address in sockets]
found["grpc"] = []
for name, (ip, port) in sockets:
    if ip == "::":
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=20)
            except grpc.RpcError as error:
                found["grpc"].append(error.code().name)
print("FOUND", json.dumps(found))
"""


def test_no_other_user_can_enter_the_folder_of_ray(monkeypatch):
    folder = Path(_private_folder())
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert len(str(folder)) < 40, "Ray adds up to 63 characters to the paths of sockets"
    monkeypatch.setattr(os, "getuid", lambda: 999_999_999)
    try:
        with pytest.raises(SetupError, match="belongs to another user"):
            _private_folder()
    finally:
        Path("/tmp/ray-999999999").rmdir()


@pytest.fixture
def short(tmp_path_factory):
    """Folder with a short path: paths of sockets are limited to 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="vx", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_ha_proxy_is_refused_at_any_host(monkeypatch):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    with pytest.raises(SetupError, match="Run `unset RAY_SERVE_ENABLE_HA_PROXY`"):
        build(OnlineSettings())


@pytest.mark.slow
def test_local_ray_requires_its_token_and_listens_on_loopback(tmp_path, short):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = {"SERVE_PORT": str(port), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "KEYS": f"ada={hash_key('k')}"}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | own
    command = [sys.executable, "-c", PROGRAM, str(short), str(tmp_path / "data")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("FOUND ")[2].splitlines()[0])
    assert found["requires_token"]
    beyond = [(name, ip) for name, ip, _ in found["listening"] if not is_loopback(ip.removeprefix("::ffff:"))]
    assert {name for name, _ in beyond} <= {"ray::ServeReplica:default:Nothing"}, beyond
    assert len(found["listening"]) > 8
    assert found["grpc"] == ["UNAUTHENTICATED"] * len(beyond)
    assert len(found["refused"]) == 1
    assert "requires API keys" in found["refused"][0]
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    assert (tmp_path / ".ray").stat().st_mode & 0o077 == 0


def test_server_beyond_loopback_is_refused_without_keys_and_token_authentication(monkeypatch):
    def refusal(keys="", host="127.0.0.1", host_of_serve="127.0.0.1", token_is_required=False):
        monkeypatch.setenv("VIDGEN_API_KEYS", keys)
        monkeypatch.setattr(application, "serve_http_config", lambda: SimpleNamespace(host=host_of_serve))
        monkeypatch.setattr(server_plan, "requires_token", lambda: token_is_required)
        try:
            build(OnlineSettings(host=host))
        except SetupError as error:
            return str(error)

    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    for name in ("server_plan", "parts_of", "application"):
        monkeypatch.setattr(application, name, lambda *_: None)
    keys = f"ada={hash_key('k')}"
    assert "vidgen keys new" in refusal(host="0.0.0.0", token_is_required=True)
    assert "export RAY_AUTH_MODE=token" in refusal(keys, host="0.0.0.0")
    assert refusal(keys, host_of_serve="0.0.0.0") == refusal(keys, host="0.0.0.0")
    assert refusal() is refusal(keys, host="0.0.0.0", token_is_required=True) is None


def test_files_of_a_server_are_closed_to_other_users(tiny, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    (shared / "jobs.db").touch(mode=0o644)
    for data, mode in ((tmp_path / "new", 0o700), (shared, 0o750)):
        with local_server(tiny, OnlineSettings(profile="tiny", data=str(data))) as server:
            photo = {"file": ("a.png", ASTRONAUT.read_bytes())}
            assert TestClient(server.app, **LOCAL).post("/v1/files", files=photo).status_code == 200
            assert data.stat().st_mode & 0o777 == mode
            assert (data / "inputs").stat().st_mode & 0o777 == 0o700
            private = [*data.glob("jobs.db*"), *(data / "inputs").iterdir()]
            assert len(private) == 5
            assert {path.stat().st_mode & 0o777 for path in private} == {0o600}


def test_documented_starts_of_ray_and_shipped_configs_require_the_token():
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```.*?```", file.read_text(), re.DOTALL):
            if "ray start" in block:
                assert block.index("export RAY_AUTH_MODE=token") < block.index("ray start"), block
            # In a container, whose port is published on loopback only.
            assert "--host 0.0.0.0" not in block or ("docker run" in block and "-p 127.0.0.1:" in block), block
            assert "host: 0.0.0.0" not in block, block
    for file in (ROOT / "serve_configs").iterdir():
        text = file.read_text()
        assert text.index("export RAY_AUTH_MODE=token") < text.index("serve deploy"), file
