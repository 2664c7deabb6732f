"""What the OpenAPI document says is what the server does, for requests that nobody would think of."""

import os
import time

import pytest

from tests.online.directors import listening_on_a_port, local_server
from vidgen_ray.online.settings import OnlineSettings

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import checks  # noqa: E402

EXAMPLES = int(os.environ.get("VIDGEN_FUZZ_EXAMPLES", "6"))
"""Of each operation; more are for nights."""


@pytest.fixture(scope="module")
def document(tiny, tmp_path_factory):
    limits = {"pixel_frames": 64 * 64 * 16, "requests_per_minute": 1_000_000, "open_jobs": 1000}
    told = OnlineSettings(
        profile="tiny", data=str(tmp_path_factory.mktemp("out")), limits=limits, max_queued=1000, wait_s=10, poll_s=0.02
    )
    with local_server(tiny, told) as server, listening_on_a_port(server.app) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.timeout(600)
def test_no_request_breaks_the_server(document):
    failures = []
    for result in document.get_all_operations():
        operation = result.ok()
        # A stream of events ends with its job; tests of its own are in tests/online.
        if operation.path.endswith("/events"):
            continue
        try:
            _try_out(operation)
        except BaseExceptionGroup as group:
            failures += [f"{operation.label}: {error}" for error in group.exceptions]
        except Exception as error:  # to see what is wrong with the others, too
            failures.append(f"{operation.label}: {type(error).__name__} {error}")
    assert not failures, "\n\n".join(failures)


def _try_out(operation) -> None:
    @given(case=operation.as_strategy())
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def requests_are_answered(case) -> None:
        begun = time.monotonic()
        response = case.call()
        assert time.monotonic() - begun < 30
        case.validate_response(
            response,
            checks=[
                checks.not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
            ],
        )

    requests_are_answered()
