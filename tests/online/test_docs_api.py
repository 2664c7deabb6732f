"""docs/api.md does what it says, and docs/openapi.json is what the server answers."""

import json
import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.online.directors import listening_on_a_port, local_server
from vidgen_ray.online.api.request_models import EDIT_FIELDS, IMAGE_FIELDS, VIDEO_FIELDS
from vidgen_ray.online.settings import OnlineSettings

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs" / "api.md"
DOCUMENT = ROOT / "docs" / "openapi.json"
HERE = "http://127.0.0.1:8000"
UPDATE = "VIDGEN_UPDATE_OPENAPI"


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    with local_server(tiny, OnlineSettings(profile="tiny", data=str(tmp_path_factory.mktemp("out")), poll_s=0.02)) as running:
        yield running


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_examples_run_in_their_order(server, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    pytest.importorskip("httpx")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    vidgen = tmp_path / "vidgen"
    vidgen.write_text(f'#!/bin/sh\nexec {os.sys.executable} -m vidgen_ray "$@"\n')
    vidgen.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    examples = re.findall(r"^```(bash|python)\n(.*?)^```", DOCS.read_text(), re.M | re.S)
    assert len(examples) >= 9
    with listening_on_a_port(server.app) as url:
        for kind, text in examples:
            example = text.replace(HERE, url)
            if kind == "python":
                exec(compile(example, str(DOCS), "exec"), names)
                continue
            path = f"{tmp_path}:{os.environ['PATH']}"
            environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
            run = subprocess.run(["bash", "-ec", example], capture_output=True, text=True, env=environment, timeout=120)
            assert run.returncode == 0, run.stderr
            assert '"error":{' not in run.stdout, run.stdout
    assert Path("ball.mp4").stat().st_size > 1000


def test_every_field_is_described():
    text = DOCS.read_text()
    missing = [name for name in sorted(VIDEO_FIELDS | IMAGE_FIELDS | EDIT_FIELDS) if f"`{name}`" not in text]
    assert missing == []


def test_every_setting_is_named():
    text = (ROOT / "docs" / "online.md").read_text()
    assert [name for name in OnlineSettings.model_fields if f"`{name}`" not in text] == []


def test_the_document_is_the_one_that_is_served(server):
    serving_profile = {**server.app.openapi(), "x-made-with": {name: version(name) for name in ("fastapi", "pydantic")}}
    if os.environ.get(UPDATE):
        DOCUMENT.write_text(json.dumps(serving_profile, indent=1, ensure_ascii=False) + "\n")
    kept = json.loads(DOCUMENT.read_text())
    if kept["x-made-with"] != serving_profile["x-made-with"]:
        # Other versions write the same in other words.
        kept, serving_profile = outline(kept), outline(serving_profile)
    assert kept == serving_profile, f"docs/openapi.json is old; run this test with {UPDATE}=1"


def outline(document: dict) -> dict:
    """Routes with the statuses of their answers, and the names of fields."""
    return {
        "paths": {
            path: {method: sorted(operation["responses"]) for method, operation in operations.items()}
            for path, operations in document["paths"].items()
        },
        "schemas": {name: sorted(schema.get("properties", ())) for name, schema in document["components"]["schemas"].items()},
    }


def test_the_document_says_what_every_route_may_answer(server):
    document = server.app.openapi()
    error = {"$ref": "#/components/schemas/ErrorBody"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"]
            assert operation.get("description"), (path, method)
            if path.startswith("/v1/"):
                assert operation["security"] == [{"HTTPBearer": []}], path
                assert operation["responses"]["401"]["content"]["application/json"]["schema"] == error
            if method == "post" and not path.endswith("/cancel"):
                assert operation["requestBody"]["required"]
    known = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert known <= document["components"]["schemas"].keys()
