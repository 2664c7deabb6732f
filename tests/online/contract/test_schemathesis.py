"""Fuzz all routes: the responses match the OpenAPI document."""

import os
import time

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies

from tests.conftest import ASTRONAUT
from tests.online.directors import listening_on_a_port, local_server
from vidgen_ray.online.server_settings import OnlineSettings

EXAMPLES = int(os.environ.get("VIDGEN_FUZZ_EXAMPLES", "2"))
"""Requests per route. Use more in nightly runs."""


@pytest.fixture(scope="module")
def document(tiny, tmp_path_factory):
    # Takes a second to import.
    schemathesis = pytest.importorskip("schemathesis")
    limits = {"pixel_frames": 64 * 64 * 16, "requests_per_minute": 1_000_000, "open_jobs": 1000}
    server_settings = OnlineSettings(
        profile="tiny", data=str(tmp_path_factory.mktemp("out")), limits=limits, max_queued=1000, wait_s=10
    )
    with local_server(tiny, server_settings) as server, listening_on_a_port(server.app) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json"), create_objects(url, {})


def create_objects(url: str, headers: dict[str, str]) -> dict[str, str]:
    """Create one object of each kind and return path parameter -> id."""
    with httpx.Client(base_url=f"{url}/v1", timeout=60, headers=headers) as client:
        file = client.post("/files", files={"file": ("a.jpg", ASTRONAUT.read_bytes())}).json()["id"]
        small = {"prompt": "x", "width": 64, "height": 64, "num_frames": 2}
        shot = client.post("/shots", json={**small, "image": file}).json()["id"]
        video = client.post("/videos", json=small).json()["id"]
        until = time.monotonic() + 60
        while client.get(f"/videos/{video}").json()["status"] != "completed":
            assert time.monotonic() < until
            time.sleep(0.05)
    return {"video_id": video, "shot_id": shot, "file_id": file, "model_id": "tiny"}


@pytest.mark.timeout(600)
def test_responses_match_the_openapi_document(document):
    assert not (failures := failures_of(*document, {})), "\n\n".join(failures)


def failures_of(schema, ids: dict[str, str], headers: dict[str, str]) -> list[str]:
    """Fuzz all operations, and return how their responses differ from the document."""
    failures = []
    # Deleting routes last.
    for result in sorted(schema.get_all_operations(), key=lambda result: result.ok().method == "delete"):
        operation = result.ok()
        try:
            _fuzz(operation, ids, headers)
        except BaseExceptionGroup as group:
            failures += [f"{operation.label}: {error}" for error in group.exceptions]
        except Exception as error:  # continue with the other routes
            failures.append(f"{operation.label}: {type(error).__name__} {error}")
    return failures


def _fuzz(operation, ids: dict[str, str], headers: dict[str, str]) -> None:
    from schemathesis import checks

    @given(case=operation.as_strategy(), use_existing_ids=strategies.booleans())
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check_response(case, use_existing_ids: bool) -> None:
        if use_existing_ids:
            parameters = case.path_parameters or {}
            case.path_parameters = {name: ids.get(name, value) for name, value in parameters.items()}
        started = time.monotonic()
        response = case.call(headers=headers)
        assert time.monotonic() - started < 30
        case.validate_response(
            response,
            checks=[
                checks.not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
            ],
        )

    check_response()
