"""`vidgen trace`: show what each worker of a run did when, from the log of the run."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from more_itertools import chunked

from vidgen_ray.cli.options import OutArgument, local_path
from vidgen_ray.engine.messages import OUTPUT
from vidgen_ray.errors import SetupError, UsageError, install_command
from vidgen_ray.graph import STAGES
from vidgen_ray.outputs.run_log import ATTEMPT_FIELDS, logged_runs, read_run
from vidgen_ray.outputs.storage import Storage, storage_at
from vidgen_ray.remote.stages import RemoteParams
from vidgen_ray.system.files import new_file
from vidgen_ray.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

PARALLEL = {OUTPUT, *(stage.name for stage in STAGES if issubclass(stage.Params, RemoteParams))}
"""Stages of processes that run several calls at once."""
ROUNDING_US = 2000
"""Largest overlap of two steps that ran one after the other: the log has milliseconds."""
BATCH = 512
"""Spans per request."""


class LoggedStep(NamedTuple):
    """An attempt of a step. Times are in microseconds since 1970."""

    line: dict[str, Any]
    node: str
    start: int
    end: int
    failed: bool


def microseconds(at: str) -> int:
    """Return the microseconds since 1970 of a time in the log."""
    return round(datetime.fromisoformat(at).timestamp() * 1e6)


def logged_steps(lines: Sequence[dict[str, Any]]) -> Iterator[LoggedStep]:
    """Yield the attempts of steps in a log."""
    for line in lines:
        if line.keys() >= ATTEMPT_FIELDS:
            start = microseconds(line["started_at"])
            node = line.get("node") or ("a lost node" if line["worker"] else "driver")
            yield LoggedStep(line, node, start, start + round(line["seconds"] * 1e6), line["outcome"] not in ("done", "cached"))


def rows_of(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[LoggedStep]]:
    """Return node and worker -> its steps, without overlaps. Encoders and workers of servers have a row per call at once."""
    rows = defaultdict[tuple[str, str], list[LoggedStep]](list)
    for step in sorted(logged_steps(lines), key=lambda step: step.end):
        worker = step.line["worker"] or step.line["stage"]
        for lane in count(1):
            row = rows[step.node, worker if lane == 1 else f"{worker} ({lane})"]
            free_at = row[-1].end if row else step.start
            # A worker runs one call after another: before that, a failed call has waited for an earlier one.
            if step.line["stage"] not in PARALLEL or free_at - ROUNDING_US <= step.start:
                start = max(step.start, free_at)
                row.append(step._replace(start=start, end=max(step.end, start + 1)))
                break
    return rows


def trace_events(lines: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the events of a log in the Trace Event Format: nodes are processes, workers are threads, arrows connect a shot."""
    zero, rows = microseconds(lines[0]["at"]), rows_of(lines)
    # The log has milliseconds: a step may end after its line. The last one of a row ends last.
    end = max([microseconds(lines[-1]["at"]), *(row[-1].end for row in rows.values())])
    yield {"ph": "M", "name": "process_name", "pid": 1, "tid": 2, "args": {"name": "run"}}
    whole = {"pid": 1, "tid": 2, "ts": 0, "dur": end - zero}
    yield {"ph": "X", "name": lines[0]["run"], **whole, "args": lines[0]}
    pids = defaultdict[str, int](count(2).__next__)
    shots = defaultdict[str, list[dict[str, int]]](list)
    # Perfetto takes a thread with the id of its process for the main thread.
    for tid, ((node, worker), row) in enumerate(sorted(rows.items()), start=3):
        place = {"pid": pids[node], "tid": tid}
        yield {"ph": "M", "name": "process_name", **place, "args": {"name": node}}
        yield {"ph": "M", "name": "thread_name", **place, "args": {"name": worker}}
        for step in row:
            name = f"{step.line['stage']}: {step.line['outcome']}" if step.failed else step.line["stage"]
            at = {**place, "ts": step.start - zero}
            args = {name: value for name, value in step.line.items() if name not in ("run", "at", "worker", "node")}
            yield {"ph": "X", "name": name, "cat": step.line["outcome"], **at, "dur": step.end - step.start, "args": args}
            shots[step.line["shot"]].append(at)
    shots.pop("", None)
    for number, places in enumerate(places for places in shots.values() if len(places) > 1):
        phases = "s" + "t" * (len(places) - 2) + "f"
        for phase, at in zip(phases, sorted(places, key=lambda at: at["ts"]), strict=True):
            yield {"ph": phase, "bp": "e", "name": "shot", "cat": "shot", "id": number, **at}
    for line in lines:
        if "stage" not in line and "message" in line:
            yield {"ph": "i", "s": "t", "name": line["message"], "pid": 1, "tid": 2, "ts": microseconds(line["at"]) - zero}


def spans_of(lines: Sequence[dict[str, Any]]) -> Iterator[ReadableSpan]:
    """Yield the OpenTelemetry spans of a log: a trace per shot, whose root is the shot, with a span per attempt of a step.

    Ids follow from run, shot and position in the log, so that spans that are sent again have the same ids.
    """
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

    labels = {f"vidgen.{name}": value for name, value in lines[0].items() if name != "at"}
    service = Resource({"service.name": "vidgen-ray", "service.version": __version__, **labels})
    resource = service.merge(OTELResourceDetector().detect())
    shots = defaultdict[str, list[LoggedStep]](list)
    for step in logged_steps(lines):
        shots[step.line["shot"]].append(step)
    shots.pop("", None)
    for shot, steps in shots.items():
        parts = (f"{lines[0]['run']} {lines[0]['at']} {shot} {part}" for part in ("trace", *range(len(steps) + 1)))
        trace, *ids = (int.from_bytes(hashlib.sha256(part.encode()).digest()[:16]) for part in parts)
        contexts = [SpanContext(trace, each >> 64, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)) for each in ids]
        start = min(step.start - round(step.line["waited"] * 1e6) for step in steps)
        last = {name: value for name, value in steps[-1].line.items() if name in ("shot", "error", "message")}
        root = steps[-1]._replace(line={**last, "stage": "shot"}, start=start, end=max(step.end for step in steps))
        for context, step in zip(contexts, (root, *steps), strict=True):
            shown = step.line.keys() & {"shot", "attempt", "outcome", "waited", "worker", "node"}
            error = {"error.type": step.line["error"]} if step.failed else {}
            # Made without a tracer, which would choose the ids.
            yield ReadableSpan(
                step.line["stage"],
                context,
                None if step is root else contexts[0],
                resource,
                {f"vidgen.{name}": step.line[name] for name in shown} | error,
                status=Status(StatusCode.ERROR, step.line["message"]) if step.failed else Status(),
                start_time=step.start * 1000,
                end_time=step.end * 1000,
            )


def send(spans: Iterable[ReadableSpan]) -> None:
    """Send spans to the collector that the environment names. Raises SetupError."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import SpanExportResult

    exporter = OTLPSpanExporter()
    for batch in chunked(spans, BATCH):
        if exporter.export(batch) is not SpanExportResult.SUCCESS:  # it logs the reason
            raise SetupError("--otlp: cannot send the spans; set OTEL_EXPORTER_OTLP_ENDPOINT to the URL of a collector")


def lines_of_run(storage: Storage, run: str | None) -> list[dict[str, Any]]:
    """Return the log of a run, by default the last one with a step. Raises SetupError if there is none."""
    runs = logged_runs(storage)
    for each in reversed(runs) if run is None else (run,):
        lines = list(read_run(storage, each))
        if any(True for _ in logged_steps(lines)):
            return lines
    wanted, known = "a run" if run is None else f"the run {run!r}", ", ".join(runs) or "none"
    raise SetupError(f"{storage.url}: has no step of {wanted} in its logs; runs with a log: {known}")


def trace(
    out: OutArgument,
    path: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", parser=local_path, help="JSON file to write, for Perfetto.")
    ] = None,
    otlp: Annotated[
        bool, typer.Option("--otlp", help="Send OpenTelemetry spans over HTTP, to OTEL_EXPORTER_OTLP_ENDPOINT.")
    ] = False,
    run: Annotated[str | None, typer.Option("--run", metavar="RUN", help="Name in the logs. Default: the last run.")] = None,
) -> None:
    """Show what each worker of a run did when: all attempts of all steps, and their waits.

    Writes a file for ui.perfetto.dev, or sends a trace per shot to a collector of OpenTelemetry.
    """
    if path is None and not otlp:
        raise UsageError("pass --out FILE, --otlp, or both")
    lines = lines_of_run(storage_at(out), run)
    if path is not None:
        with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            file.write(",\n".join(map(json.dumps, trace_events(lines))))
            file.write("\n]}\n")
    if otlp:
        try:
            send(spans_of(lines))
        except ImportError as error:
            raise SetupError(f"--otlp: {error}; {install_command('trace')}") from None
