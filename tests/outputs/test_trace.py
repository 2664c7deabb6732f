"""Traces of runs: the file for Perfetto, and spans at a real receiver of OTLP over HTTP."""

import json
import threading
from collections import defaultdict
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.outputs.test_run_log import LABELS, RUN, recorder
from vidgen_ray.cli.app import run_command
from vidgen_ray.engine.status import Attempt
from vidgen_ray.outputs.run_log import read_run
from vidgen_ray.outputs.storage import storage_at
from vidgen_ray.trace.trace_command import spans_of

WORKER, ENCODER = f"{RUN}/1/worker/0/0", f"{RUN}/1/encoder/0"


def attempt(shot, stage, outcome, start, seconds, worker=WORKER, number=1, waited=0.0, node="node-a", error=None):
    """Return an attempt that starts these seconds after the first step."""
    return Attempt(shot, stage, number, outcome, start, seconds, waited, worker, node, error, error and "out of luck")


ATTEMPTS = [
    attempt("", "loading", "done", 0, 1.5),
    attempt("c", "remote", "done", 3, 9.0, f"{RUN}/1/worker/2/0", node="node-b"),
    attempt("b", "remote", "error", 4, 8.5, f"{RUN}/1/worker/2/0", node="node-b", error="ServerFailed"),
    attempt("a", "flux", "done", 2, 2.0, waited=0.5),
    attempt("a", "svd", "done", 4, 3.0),
    attempt("b", "flux", "cached", 7.001, 0.002),
    # Sent while the worker rendered `a`.
    attempt("b", "svd", "error", 5, 4.0, error="RuntimeError"),
    attempt("a", "output", "done", 7, 5.0, ENCODER),
    attempt("b", "svd", "done", 10, 1.0, f"{RUN}/1/worker/1/0", 2, node="node-b"),
    attempt("b", "output", "done", 11, 0.5, ENCODER),
    attempt("c", "likeness", "too low", 11, 0.0, "", node=None, error="LikenessTooLow"),
]


def record(storage, attempts=ATTEMPTS, **options):
    """Record a run. Return the time of its first step, which is after its start."""
    with recorder(storage, **options) as running:
        first = datetime.now(UTC).timestamp() + 60
        for each in attempts:
            running.on_attempt(each._replace(started_at=first + each.started_at))
        running.on_message("waiting for 2 GPUs")
    return first


def read_trace(path, ended=True):
    """Return the slices of a trace by row, after checking its events. `ended`: no step is after the end of the run."""
    rows, names, arrows = defaultdict(list), {}, defaultdict(list)
    for event in json.loads(path.read_text())["traceEvents"]:
        place = event["pid"], event["tid"]
        if event["ph"] == "M":
            names[event["name"], *place] = event["args"]["name"]
        elif event["ph"] == "X" and names["process_name", *place] == "run":
            end = event["dur"]
        elif event["ph"] == "X":
            assert event["ts"] + event["dur"] <= end or not ended
            rows[names["process_name", *place], names["thread_name", *place]].append(event)
        elif event["ph"] in "stf":
            arrows[event["id"]].append(event)
        assert event.get("ts", 0) >= 0
    for row in rows.values():
        for before, after in pairwise(row):
            assert before["ts"] + before["dur"] <= after["ts"], (before, after)
    for events in arrows.values():
        assert [event["ph"] for event in events] == ["s", *"t" * (len(events) - 2), "f"]
    return rows


def test_trace_has_a_row_per_worker_and_a_slice_per_attempt(tmp_path, capsys):
    out, path = str(tmp_path / "out"), tmp_path / "trace.json"
    storage, command = storage_at(out), ["trace", out, "-o", str(path)]
    assert run_command(command) == 4
    assert "has no step of a run in its logs; runs with a log: none" in capsys.readouterr().err
    first = record(storage)
    # Without a step, the last run is not the one that is shown.
    record(storage, [], labels=LABELS.model_copy(update={"run": "000002"}))
    assert run_command([*command, "--run", "000002"]) == 4
    assert f"has no step of the run '000002' in its logs; runs with a log: {RUN}, 000002" in capsys.readouterr().err
    assert run_command(command) == 0
    rows = read_trace(path, ended=False)
    (start,) = [datetime.fromisoformat(line["at"]).timestamp() - first for line in read_run(storage, RUN) if "team" in line]
    shown = {
        row: [(each["name"], round(each["ts"] / 1e6 + start, 2), round(each["dur"] / 1e6, 2)) for each in slices]
        for row, slices in rows.items()
    }
    assert shown == {
        ("driver", "likeness"): [("likeness: too low", 11, 0)],
        ("node-a", "1/encoder/0"): [("output", 11, 0.5)],
        # The encoder writes two shots at once.
        ("node-a", "1/encoder/0 (2)"): [("output", 7, 5)],
        ("node-a", "1/worker/0/0"): [("loading", 0, 1.5), ("flux", 2, 2), ("svd", 4, 3), ("flux", 7, 0), ("svd: error", 7, 2)],
        ("node-b", "1/worker/1/0"): [("svd", 10, 1)],
        # A server works on two shots at once.
        ("node-b", "1/worker/2/0"): [("remote", 3, 9)],
        ("node-b", "1/worker/2/0 (2)"): [("remote: error", 4, 8.5)],
    }
    slices = [each for row in rows.values() for each in row]
    assert sum(each["args"]["seconds"] for each in slices) == pytest.approx(sum(each.seconds for each in ATTEMPTS))
    last = json.loads(path.read_text())["traceEvents"][-1]
    assert (last["name"], last["ph"]) == ("waiting for 2 GPUs", "i")


@pytest.fixture
def collector(monkeypatch):
    """Yield the requests to a receiver of OTLP, which the environment names. It refuses the authorization `refused`."""
    requests = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.append((self.path, self.headers["Authorization"], ExportTraceServiceRequest.FromString(body)))
            self.send_response(400 if self.headers["Authorization"] == "refused" else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield requests
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_are_sent_with_the_same_ids_each_time(tmp_path, collector, monkeypatch, capsys):
    storage = storage_at(tmp_path)
    start_s = record(storage)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "films")
    command = ["trace", str(tmp_path), "--otlp"]
    assert run_command(command) == run_command(command) == 0
    (path, header, first), (*_, second) = collector
    assert (path, header) == ("/v1/traces", "secret")
    assert first == second
    (received,) = first.resource_spans
    resource = {each.key: each.value.string_value for each in received.resource.attributes}
    assert resource.items() >= {"service.name": "films", "vidgen.run": RUN, "vidgen.team": "blue"}.items()
    spans = [span for scope in received.scope_spans for span in scope.spans]
    assert len({span.span_id for span in spans}) == len(spans)
    roots = {span.trace_id: span for span in spans if not span.parent_span_id}
    times, failed = [], []
    for span in spans:
        assert span.parent_span_id in (b"", roots[span.trace_id].span_id)
        (shot,) = [each.value.string_value for each in span.attributes if each.key == "vidgen.shot"]
        start, end = (round(at / 1e9 - start_s, 2) for at in (span.start_time_unix_nano, span.end_time_unix_nano))
        times.append((shot, span.name, start, end))
        if span.status.code:
            failed.append((shot, span.name, span.status.message))
    # The first shot has waited for half a second.
    shots = [("a", "shot", 1.5, 12), ("b", "shot", 4, 12.5), ("c", "shot", 3, 12)]
    steps = [
        (each.shot, each.stage, round(each.started_at, 2), round(each.started_at + each.seconds, 2))
        for each in ATTEMPTS
        if each.shot
    ]
    assert sorted(times) == sorted([*shots, *steps])
    failures = [("b", "remote"), ("b", "svd"), ("c", "likeness"), ("c", "shot")]
    assert sorted(failed) == [(*each, "out of luck") for each in failures]
    other = [{**line, "run": "000007-film"} for line in read_run(storage, RUN)]
    assert not {span.context.trace_id.to_bytes(16) for span in spans_of(other)} & roots.keys()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=refused")
    assert run_command(command) == 4
    assert "cannot send the spans; set OTEL_EXPORTER_OTLP_ENDPOINT" in capsys.readouterr().err
