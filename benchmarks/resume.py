"""Benchmark of resuming: a folder in which every line of the script is finished, on a disk and in an object store.

The folder is written directly, without rendering. Then `render_shots` finds all lines finished. Its parts are measured on
their own as well. Each measurement runs in a new process, which is the driver of `render_shots`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from more_itertools import batched
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine, write_json
from benchmarks.noop_stages import STAGES, line, noop_profile

LINES, QUICK_LINES = 1_000_000, 10_000
STORE_LINES, QUICK_STORE_LINES = 100_000, 2_000
LATENCY_MS = 20.0
"""Added to every request to the object store."""
CLIP = b"x" * 1000
LINKS = 10_000
"""Shots whose files are hard links to the same file. File systems limit the number of links."""
CPU_WORKERS = 2
GOALS = {("disk, resume", LINES): (180.0, 600), ("object store, resume", STORE_LINES): (60.0, None)}
"""Seconds, and memory in MB."""
OLD_RUN = "000001-aaaaaa"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"Use {QUICK_LINES} and {QUICK_STORE_LINES} lines.")
    parser.add_argument("--lines", type=int, help=f"Lines on the disk, 0 for none. Default: {LINES}.")
    parser.add_argument("--store-lines", type=int, help=f"Lines in the object store, 0 for none. Default: {STORE_LINES}.")
    parser.add_argument("--latency-ms", type=float, default=LATENCY_MS, help="Added to each request. Default: %(default)s.")
    parser.add_argument("--folder", type=Path, help="Where to create the folder. Default: the temporary folder.")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="Keep the script and the folder on the disk, and use them again."
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="What to measure. Default: %(default)s.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the results as JSON.")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: got {', '.join(sorted(unknown))}, must be some of {', '.join(PARTS)}")
    lines = args.lines if args.lines is not None else QUICK_LINES if args.quick else LINES
    store_lines = args.store_lines if args.store_lines is not None else QUICK_STORE_LINES if args.quick else STORE_LINES
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vidgen-resume-", dir=args.folder)))
        rows = []
        if lines:
            kept = folder if args.keep is None else args.keep / str(lines)
            kept.mkdir(parents=True, exist_ok=True)
            rows += measure(kept, str(kept / "out"), lines, "disk", parts)
        if store_lines:
            url = stack.enter_context(object_store(args.latency_ms / 1000))
            rows += measure(folder, url, store_lines, "object store", parts)
    table = Table(title="Resuming")
    for column in ("what", "lines", "seconds", "goal", "CPU seconds of the process", "peak memory in MB", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        goal_s, goal_mb = GOALS.get((row["what"], row["lines"]), (None, None))
        numbers = (
            f"{row['seconds']:.1f}",
            f"{goal_s or ''}",
            f"{row['cpu_s']:.1f}",
            f"{row['peak_mb']:.0f}",
            f"{goal_mb or ''}",
        )
        table.add_row(row["what"], str(row["lines"]), *numbers)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if args.json:
        write_json(args.json, {"machine": machine(("vidgen-ray", "ray", "pyarrow")), "rows": rows})
    return 0


def measure(folder: Path, out: str, lines: int, place: str, parts: Sequence[str]) -> list[dict[str, Any]]:
    """Write the folder, unless it was kept, and measure these parts of a resumed run."""
    script, is_written = folder / f"{lines}.jsonl", folder / "written"
    rows = []
    for name, part in PARTS.items():
        if name == "write":
            if place == "disk" and is_written.exists():
                continue
            with script.open("w") as file:
                file.writelines(json.dumps(line(number)) + "\n" for number in range(lines))
        elif name not in parts:
            continue
        Console(stderr=True).print(f"{place}, {lines} lines: {part.__name__}")
        measured, cpu_s, peak_mb = _in_new_process(part, folder, script, out)
        if name == "write" and place == "disk":
            is_written.touch()
        for what, seconds in measured:
            row = {"what": f"{place}, {what}", "lines": lines, "seconds": seconds, "cpu_s": cpu_s, "peak_mb": peak_mb}
            rows.append(row)
    return rows


Measured = list[tuple[str, float]]
"""Names and seconds of the measured parts."""


def write_finished_folder(folder: Path, script: Path, out: str) -> Measured:
    """Write the records and rows of all lines as finished. In an object store only rows: they are trusted."""
    from vidgen_ray.outputs.folder import OutputFolder
    from vidgen_ray.outputs.manifest_writer import ManifestWriter
    from vidgen_ray.script.lines import ScriptSettings
    from vidgen_ray.script.read import open_lines

    with script.open() as file:
        lines = sum(1 for _ in file)
    profile = noop_profile(folder, CPU_WORKERS)
    checker, _ = open_lines(ScriptSettings(script, profile_defaults=profile.defaults))
    outputs = OutputFolder(out)
    writer = ManifestWriter(outputs, OLD_RUN, script.name)
    add_s = 0.0
    with ProcessPoolExecutor(CPU_WORKERS, multiprocessing.get_context("spawn")) as pool:
        numbers = [range(first, min(first + LINKS, lines)) for first in range(0, lines, LINKS)]
        for rows in pool.map(partial(_write_shots, folder, profile, checker, outputs), numbers):
            started = time.perf_counter()
            for row in rows:
                writer.add(row)
            add_s += time.perf_counter() - started
    started = time.perf_counter()
    writer.close()
    return [("write the rows of a first run", add_s), ("close its manifest", time.perf_counter() - started)]


def _write_shots(folder: Path, profile: Any, checker: Any, outputs: Any, numbers: range) -> list[Any]:
    """Write the shots of these lines, counted from 0, and return their manifest rows."""
    from vidgen_ray.content_keys import ShotPlanner, params_of
    from vidgen_ray.licences import ShotLicences
    from vidgen_ray.outputs.manifest import ManifestRow
    from vidgen_ray.outputs.records import RECORD, FileRecord, ShotRecord, StepRecord, shot_path
    from vidgen_ray.script.lines import Line

    planner = ShotPlanner(params_of(profile, list(STAGES.values())), profile.encode, ShotLicences(profile))
    names = ("image.png", "video.mp4", "hd.mp4")
    files = {name: FileRecord(sha256="ab" * 32, bytes=len(CLIP)) for name in names}
    clip = folder / f"clip-{numbers.start}"
    clip.write_bytes(CLIP)
    rows = []
    for number in numbers:
        (shot,) = checker.check(Line(number + 1, line(number))).shots
        plan = planner(shot)
        steps = tuple(
            StepRecord(stage=step.stage, key=step.key, weights=step.weights, seconds=1, gpu_seconds=1, cached=False)
            for step in plan.steps
        )
        record = ShotRecord(
            key=plan.key,
            shot=shot,
            tries=1,
            likeness=None,
            seeds={},
            stages=steps,
            files=files,
            software={},
            licences=plan.licences,
        )
        if outputs.storage.local is not None:
            target = f"{outputs.storage.local}/{shot_path(shot.id)}"
            os.makedirs(target)
            for name in names:
                os.link(clip, f"{target}/{name}")
            with open(f"{target}/{RECORD}", "w") as file:
                file.write(record.model_dump_json(indent=1, exclude={"committed_at"}))
                file.flush()
                record = record.model_copy(update={"committed_at": os.stat(file.fileno()).st_mtime})
        rows.append(ManifestRow.of_shot(OLD_RUN, checker.source, shot, number + 1, record, "rendered"))
    return rows


def load_finished_shots(folder: Path, script: Path, out: str) -> Measured:
    from vidgen_ray.outputs.folder import OutputFolder
    from vidgen_ray.outputs.manifest import FinishedShots

    started = time.perf_counter()
    FinishedShots.load(OutputFolder(out))
    return [("FinishedShots.load", time.perf_counter() - started)]


def skip_all_lines(folder: Path, script: Path, out: str) -> Measured:
    """Plan the lines as the tasks of `render_shots` do, then compare their ids and record them as its driver does."""
    from vidgen_ray.batch.line_planner import BLOCK_LINES, LinePlanner
    from vidgen_ray.outputs.folder import OutputFolder
    from vidgen_ray.outputs.manifest import ManifestRow
    from vidgen_ray.outputs.manifest_writer import ManifestWriter
    from vidgen_ray.script.lines import ScriptIndex, ScriptSettings
    from vidgen_ray.script.read import open_lines, unique_lines

    outputs, profile = OutputFolder(out), noop_profile(folder, CPU_WORKERS)
    checker, lines = open_lines(ScriptSettings(script, profile_defaults=profile.defaults))
    planner = LinePlanner(checker, profile, outputs)
    planner.load_finished()
    run = "000002-bbbbbb"
    writer, index = ManifestWriter(outputs, run, script.name), ScriptIndex()
    plan_s = accept_s = 0.0
    for batch in batched(lines, BLOCK_LINES):
        text = pickle.dumps(batch)
        started = time.perf_counter()
        block = pickle.dumps(planner.plan(pickle.loads(text)))
        plan_s += time.perf_counter() - started
        started = time.perf_counter()
        for each in unique_lines(pickle.loads(block), index):
            _require(isinstance(each.result, ManifestRow), f"{each.shot.id} was not found")
            writer.add(ManifestRow.of_shot(run, script.name, each.shot, each.number, each.result, "reused"))
        accept_s += time.perf_counter() - started
    started = time.perf_counter()
    writer.close()
    return [
        ("plan the lines and find their shots", plan_s),
        ("compare ids and write rows", accept_s),
        ("close the manifest", time.perf_counter() - started),
    ]


def resume(folder: Path, script: Path, out: str) -> Measured:
    """Run `render_shots` on the finished script."""
    from vidgen_ray.batch.render_script import render_shots
    from vidgen_ray.batch.run_options import RenderOptions
    from vidgen_ray.outputs.folder import OutputFolder
    from vidgen_ray.script.lines import ScriptSettings

    options = RenderOptions(cache="none", stages=STAGES)
    profile = noop_profile(folder, CPU_WORKERS)
    settings = ScriptSettings(script, profile_defaults=profile.defaults)
    started = time.perf_counter()
    report = render_shots(settings, profile, OutputFolder(out), options, listener=_Silent())
    _require(report.done + report.failed == 0, f"got {report}")
    return [("resume", time.perf_counter() - started)]


PARTS: dict[str, Callable[[Path, Path, str], Measured]] = {
    "write": write_finished_folder,
    "load": load_finished_shots,
    "skip": skip_all_lines,
    "resume": resume,
}


class _Silent:
    """Progress listener that does nothing."""

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None: ...
    def on_message(self, message: str) -> None: ...
    def on_rejected(self, row: Any) -> None: ...
    def on_finished(self, row: Any) -> None: ...
    def on_status(self, snapshot: Any) -> None: ...


def _require(is_true: bool, message: str) -> None:
    if not is_true:
        raise RuntimeError(message)


def _in_new_process(part: Callable[..., Measured], *args: object) -> tuple[Measured, float, float]:
    """Return what a part measured, and the CPU seconds and the peak memory of its process in MB."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, part, args).result()


def _measured(part: Callable[..., Measured], args: tuple[Any, ...]) -> tuple[Measured, float, float]:
    measured = part(*args)
    # Unlike getrusage, VmHWM does not include the peak of the parent process.
    (peak,) = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM")]
    return measured, time.process_time(), int(peak.split()[1]) / 1024


@contextmanager
def object_store(latency_s: float) -> Iterator[str]:
    """Start an S3 server (moto) behind a proxy that delays every request, and yield the URL of an empty folder."""
    os.environ.update(AWS_ACCESS_KEY_ID="KEY", AWS_SECRET_ACCESS_KEY="SECRET")
    # In another process: it must not take the time of the measured one.
    context = multiprocessing.get_context("spawn")
    ports, done = context.SimpleQueue(), context.Event()
    process = context.Process(target=_serve, args=(ports, done, latency_s))
    process.start()
    try:
        port = ports.get()
        endpoint = f"http://127.0.0.1:{port}"
        urlopen(Request(f"{endpoint}/clips", method="PUT")).close()
        yield f"s3://clips/out?endpoint={endpoint}"
    finally:
        done.set()
        process.join()


def _serve(ports: Any, done: Any, latency_s: float) -> None:
    from moto.server import ThreadedMotoServer

    # It logs every request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    threading.Thread(target=lambda: asyncio.run(_delay_requests(port, ports, latency_s)), daemon=True).start()
    done.wait()


async def _delay_requests(port: int, ports: Any, latency_s: float) -> None:
    """Forward connections to the port, and delay their requests."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        answers = asyncio.create_task(_forward(server_reader, writer, 0))
        await _forward(reader, server_writer, latency_s)
        await answers

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=4 << 20)
    ports.put(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    while content := await reader.read(4 << 20):
        await asyncio.sleep(delay_s)
        writer.write(content)
        await writer.drain()
    writer.close()


if __name__ == "__main__":
    raise SystemExit(main())
