"""The examples in docs/api.md run. docs/openapi.json is the document of the server."""

import json
import os
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.online.directors import listening_on_a_port, local_server
from vidgen_ray.online.api import requests
from vidgen_ray.online.api.openapi import FormBody
from vidgen_ray.online.api.requests import CROPS, PLAIN_FIELDS, CreateImages, CreateShot, CreateVideo
from vidgen_ray.online.server_settings import OnlineSettings

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs" / "api.md"
DOCUMENT = ROOT / "docs" / "openapi.json"
URL_IN_DOCS = "http://127.0.0.1:8000"
UPDATE = "VIDGEN_UPDATE_OPENAPI"
"""Environment variable: write docs/openapi.json instead of comparing it."""


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    with local_server(tiny, OnlineSettings(profile="tiny", data=str(tmp_path_factory.mktemp("out")))) as running:
        yield running


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_examples_run_in_order(server, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    pytest.importorskip("httpx")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    vidgen = tmp_path / "vidgen"
    vidgen.write_text(f'#!/bin/sh\nexec {os.sys.executable} -m vidgen_ray "$@"\n')
    vidgen.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    examples = re.findall(r"^```(bash|python)\n(.*?)^```", DOCS.read_text(), re.M | re.S)
    assert len(examples) >= 8
    with listening_on_a_port(server.app) as url:
        for kind, text in examples:
            example = text.replace(URL_IN_DOCS, url)
            if kind == "python":
                exec(compile(example, str(DOCS), "exec"), names)
                continue
            path = f"{tmp_path}:{os.environ['PATH']}"
            environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
            run = subprocess.run(["bash", "-ec", example], capture_output=True, text=True, env=environment, timeout=120)
            assert run.returncode == 0, run.stderr
            assert '"error":{' not in run.stdout, run.stdout
    assert Path("ball.mp4").stat().st_size > 1000


def test_new_shot_fields_are_in_all_request_models_and_every_field_and_setting_is_described():
    assert set(PLAIN_FIELDS) <= CreateShot.model_fields.keys()
    # The server crops videos to the requested size.
    assert set(PLAIN_FIELDS) - set(CROPS) <= CreateVideo.model_fields.keys()
    assert set(CreateVideo.model_fields) - set(CreateImages.model_fields) > {"fps", "seconds", "upscale"}
    for name in ("CreateVideo", "RemixVideo", "EditImages", "CreateShot", "CreateCharacter", "CreateFile"):
        schema = getattr(requests, name).model_json_schema(schema_generator=FormBody)
        assert [field for field, properties in schema["properties"].items() if not properties.get("description")] == []
    text = (ROOT / "docs" / "online.md").read_text()
    assert [name for name in OnlineSettings.model_fields if f"`{name}`" not in text] == []


def test_openapi_json_matches_the_server(server):
    served = {**server.app.openapi(), "x-made-with": {name: version(name) for name in ("fastapi", "pydantic")}}
    if os.environ.get(UPDATE):
        DOCUMENT.write_text(json.dumps(served, indent=1, ensure_ascii=False) + "\n")
    stored = json.loads(DOCUMENT.read_text())
    if stored["x-made-with"] != served["x-made-with"]:
        # Other versions of these packages describe the same differently.
        stored, served = outline(stored), outline(served)
    assert stored == served, "docs/openapi.json is out of date; run make docs"


def outline(document: dict) -> dict:
    """Return the routes with their statuses, and the names of all fields."""
    return {
        "paths": {
            path: {method: sorted(operation["responses"]) for method, operation in operations.items()}
            for path, operations in document["paths"].items()
        },
        "schemas": {name: sorted(schema.get("properties", ())) for name, schema in document["components"]["schemas"].items()},
    }


def test_openapi_document_is_valid_and_accepted_values_are_those_of_the_routes(server):
    document = server.app.openapi()
    pytest.importorskip("schemathesis").openapi.from_dict(document).validate()
    used = {tag for operations in document["paths"].values() for operation in operations.values() for tag in operation["tags"]}
    assert {tag["name"] for tag in document["tags"]} == used
    assert document["servers"] == [{"url": "/"}]
    videos = {kind: document["components"]["schemas"][f"CreateVideo{kind}"]["properties"] for kind in ("Json", "Form")}
    assert videos["Json"]["flow_shift"]["type"] == "null"
    assert videos["Json"]["true_cfg_scale"]["anyOf"] == [{"enum": [0, 1]}, {"type": "null"}]
    assert videos["Json"]["seed"]["anyOf"][0] == {"type": "integer", "minimum": -1, "maximum": 2**32 - 1}
    assert "null" not in json.dumps(videos["Form"])


def test_openapi_document_is_complete(server, client):
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
    assert "security" not in client.get("/openapi.json").text, "this server needs no keys"
    schemas = document["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))) <= schemas.keys()
    for name, schema in schemas.items():
        for field, properties in schema.get("properties", {}).items():
            is_described = properties.get("description") or "$ref" in properties
            assert is_described or name in ("StageSteps", "StageGuidance"), (name, field)
