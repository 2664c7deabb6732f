"""`vidgen serve` with the tiny models, started as a process, for tests of released clients."""

import socket
from collections.abc import Iterator

import pytest
import yaml

from tests.online.scripted_server import started
from vidgen_ray.online.auth import hash_key

KEYS = {name: f"vg-{name}-key" for name in ("ada", "amy", "eve")}
LIMITS = {"eve": {"open_jobs": 1}}


# Not for the whole session: its processes would compete with the tests of other files.
@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """Start a server and return its URL."""
    folder = tmp_path_factory.mktemp("serve")
    keys = [{"tenant": name, "sha256": hash_key(key), "limits": LIMITS.get(name, {})} for name, key in KEYS.items()]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": keys}))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = {"profile": "tiny", "data": str(folder / "out"), "keys_file": str(folder / "keys.yaml"), "port": port}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    command = ["vidgen_ray", "serve", "--settings", str(folder / "settings.yaml")]
    with started(command, f"http://127.0.0.1:{port}", folder / "log.txt", "/readyz") as server:
        yield server.url
