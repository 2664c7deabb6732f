"""A running server with the tiny models, for the clients that people have."""

import hashlib
from collections.abc import Iterator

import pytest
import yaml

from tests.online.directors import LocalServer, by_pipeline, listening_on_a_port, local_server
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.profile import Profile

KEYS = {"ada": "vg-ada-key", "bob": "vg-bob-key", "eve": "vg-eve-key", "joe": "vg-joe-key"}


@pytest.fixture(scope="module")
def server(tiny: Profile, tmp_path_factory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("server")
    keys = [{"tenant": name, "sha256": hashlib.sha256(key.encode()).hexdigest()} for name, key in KEYS.items()]
    keys[2]["limits"] = {"open_jobs": 1}
    keys[3]["limits"] = {"requests_per_minute": 3}
    file = folder / "keys.yaml"
    file.write_text(yaml.safe_dump({"keys": keys}))
    settings = OnlineSettings(profile="tiny", data=str(folder / "out"), keys_file=file, poll_s=0.05, poll_after_s=0.1)
    with local_server(tiny, settings, by_pipeline(tiny, folder / "out")) as running:
        yield running


@pytest.fixture(scope="module")
def address(server: LocalServer) -> Iterator[str]:
    with listening_on_a_port(server.app) as url:
        yield url
