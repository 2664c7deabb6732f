"""What people would use instead, under faults: a script with a video server, a script with a fused Ray Data actor, and vidgen.

All render the same lines on the same simulated GPUs (`simulated.py`), and are configured for production: retries, timeouts,
atomic writes, a lock, skipping of clips that were made from the same line, a server that is restarted when it exits. A command
that does not exit with 0 within its limit is stopped and run once more. README.md says what is counted.

`--json benchmarks/rivals.json` stores results to publish. `--publish` draws docs/images/rivals.svg from them and
prints the table of README.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.local_ray import ENVIRONMENT
from benchmarks.machine import machine, write_json
from benchmarks.peers.lines import content_of
from benchmarks.peers.video_server import clip_of
from benchmarks.simulated import SECONDS_PER_SHOT, events, inject, prepare, shot_ids

ROOT = Path(__file__).parent.parent
STORED, CHART = ROOT / "benchmarks" / "rivals.json", ROOT / "docs" / "images" / "rivals.svg"
GPUS, GPU_GB = 2, 160.0
"""Two runs at once fit on a GPU."""
SHOTS, QUICK_SHOTS = 12, 4
TIMEOUT_S = 10.0
"""Timeout of a job of the video server: several times its usual seconds, with waiting."""
NO_PROGRESS_S = 20.0
LIMIT_S = 90.0
"""Seconds after which a command is stopped."""
OUTAGE_S = 8.0
STORE_BYTES = 80 * 2**20
"""Object store of Ray whose disk is full: eight generated clips."""
POLL_S = 0.05
BAD = 2
"""Index of the line that is changed, broken or poisonous, or whose call fails."""


@dataclass(frozen=True, slots=True)
class Fault:
    about: str
    gpu: dict[str, Any] | None = None
    """See `simulated.inject`."""
    happens: str = ""
    """What happens outside the GPUs: see `Run`."""


VICTIM = shot_ids(BAD + 1)[BAD]
FAULTS = {
    "none": Fault("no fault"),
    "worker killed": Fault("the process of a GPU is killed once, in a call", {"kind": "kill", "shot": VICTIM}),
    "driver killed": Fault("the command is killed after a quarter of the clips, and repeated", happens="kill"),
    "sick GPU": Fault("one of two GPUs fails in every call", {"kind": "sick", "gpu": 1}),
    "hang": Fault("one call never returns", {"kind": "hang", "shot": VICTIM}),
    "slow GPU": Fault("one of two GPUs is 20 times slower", {"kind": "slow", "gpu": 1}),
    "poison line": Fault("a line kills its process each time", {"kind": "poison", "shot": VICTIM}),
    "disk full": Fault(f"no space in the output folder for {OUTAGE_S:g} s", happens="full"),
    "changed prompt": Fault("a prompt is changed after the run, and the command repeated", happens="change"),
    "broken line": Fault("a line is not JSON", happens="break"),
    "two runs": Fault("the command runs twice at once", happens="twice"),
    "storage hangs": Fault(f"no file operation of the output folder ends for {OUTAGE_S:g} s", happens="freeze"),
    "storage unmounted": Fault(f"the output folder's file system is unmounted for {OUTAGE_S:g} s", happens="unmount"),
    "Ray's disk full": Fault("Ray cannot spill objects, its store holds eight clips", happens="no spilling"),
    "typo": Fault("after the run, a line is broken, and the command repeated (vidgen: with --prune)", happens="typo"),
    "notebook": Fault("one process executes twice; in between, a start image is replaced", happens="notebook"),
}
QUICK_FAULTS, QUICK_SYSTEMS = ("changed prompt",), ("video server", "vidgen")


@dataclass(frozen=True, slots=True)
class Result:
    system: str
    fault: str
    lost: int
    """Lines without a clip, of those that can be rendered."""
    stale: int
    """Clips of another prompt."""
    truncated: int
    doubled: int
    """Lines with several rows that say done, for the same prompt and image."""
    wrong_rows: int
    """Lines without a row, or whose last row is not true: done without a clip of its prompt, or failed with one."""
    seconds: float
    wasted_gpu_s: float
    """GPU-seconds of finished calls beyond one call of each stage and clip."""
    stopped: int
    """Commands that did not end."""
    codes: tuple[int, ...]
    """Exit codes of the others."""


class Run:
    """One system under one fault, in a folder of its own."""

    def __init__(self, system: str, fault: str, folder: Path, shots: int) -> None:
        self.system, self.fault, self.folder, self.out = system, FAULTS[fault], folder, folder / "disk" / "out"
        self.name, self.stopped = fault, 0
        self.codes: list[int] = []
        prepare(folder, GPUS, GPU_GB)
        self.script = folder / "script.jsonl"
        if system == "vidgen":
            from benchmarks.simulated_stages import write_inputs

            self.lines = write_inputs(folder, shots)
        else:
            self.lines = [{"id": shot, "prompt": f"simulated shot {number}"} for number, shot in enumerate(shot_ids(shots))]
        if self.fault.happens == "notebook":
            self._write_images()
        self._write_script(broken=self.fault.happens == "break")
        if self.fault.gpu is not None:
            inject(folder, **self.fault.gpu)

    def _write_script(self, *, broken: bool = False) -> None:
        texts = [json.dumps(line) for line in self.lines]
        if broken:
            texts[BAD] = texts[BAD][:-1]
        self.script.write_text("".join(text + "\n" for text in texts))

    def _write_images(self) -> None:
        """Let each line start from an image. After the first execution, the images in `next` replace those of their name."""
        from benchmarks.peers.vidgen_script import image_of
        from vidgen_ray.media.images import write_png

        for name in ("inputs", "next"):
            (self.folder / name).mkdir(exist_ok=True)
        for line in self.lines:
            file = self.folder / "inputs" / f"start-{line['id']}.png"
            write_png(file, image_of(line["id"].encode()))
            line["image"] = str(file)
        write_png(self.folder / "next" / Path(self.lines[BAD]["image"]).name, image_of(b"another image"))

    def measure(self) -> Result:
        with ExitStack() as stack:
            self.out.parent.mkdir()
            if self.fault.happens in DISKS:
                stack.enter_context(_disk(self.folder, self.out.parent, self.fault.happens))
            servers = stack.enter_context(_video_servers(self.folder)) if self.system == "video server" else []
            started = time.monotonic()
            self._run(servers)
            seconds = time.monotonic() - started
            return self._result(seconds)

    def _run(self, servers: list[str]) -> None:
        happens = self.fault.happens
        if happens == "kill":
            with self._command(servers) as process:
                while process.poll() is None and len(list(self._clips())) < len(self.lines) // 4:
                    time.sleep(POLL_S)
        outage = threading.Thread(target=self._outage) if happens in DISKS else None
        if outage:
            outage.start()
        if happens == "twice":
            with self._command(servers) as first, self._command(servers) as second:
                self._wait(first), self._wait(second)
        else:
            self._until_done(servers)
        if outage:
            outage.join()
        if happens == "change":
            self.lines[BAD]["prompt"] = "another prompt"
            self._write_script()
            self._until_done(servers)
        if happens == "typo":
            self._write_script(broken=True)
            with self._command(servers, "--prune") as process:
                self._wait(process)

    def _until_done(self, servers: list[str]) -> None:
        for _ in range(2):
            with self._command(servers) as process:
                if self._wait(process) == 0:
                    return

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.stopped += 1
            return -1
        self.codes.append(code)
        return code

    @contextmanager
    def _command(self, servers: list[str], *flags: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run the command in a session of its own, and kill it at the end of the block. `flags` are of vidgen."""
        paths = [str(self.folder), str(self.script), str(self.out)]
        arguments = {
            "video server": ["benchmarks.peers.video_script", *paths[1:], *servers, "--timeout", str(TIMEOUT_S)],
            "fused Ray Data": ["benchmarks.peers.fused_script", *paths, str(GPUS), str(NO_PROGRESS_S)],
            "vidgen": ["benchmarks.peers.vidgen_script", *paths, str(GPUS), str(GPU_GB), *flags],
        }[self.system]
        with (self.folder / "log.txt").open("ab") as log:
            process = _start(arguments, log, FULL_RAY if self.fault.happens == "no spilling" else {})
        try:
            yield process
        finally:
            _kill(process)

    def _outage(self) -> None:
        while not any(self._clips()):
            time.sleep(POLL_S)
        with DISKS[self.fault.happens](self.out.parent):
            time.sleep(OUTAGE_S)

    def _clips(self) -> Iterator[Path]:
        return self.out.glob("shots/*/*/shot.json" if self.system == "vidgen" else "*.mp4")

    def _result(self, seconds: float) -> Result:
        done, rows = self._clip_states(), self._rows()
        last = {row["id"]: row for row in rows}
        expected = [line for line in self.lines if line["id"] != VICTIM or self.name not in ("poison line", "broken line")]
        wrong = 0
        for line in self.lines:
            row = last.get(line["id"])
            if self.name == "broken line" and line["id"] == VICTIM:  # its row can have another id
                row = next((row for row in rows if row["status"] == "failed"), None)
            is_done = done.get(line["id"]) == "good"
            wrong += row is None or (row["status"] != "failed") != is_done or (is_done and row["prompt"] != line["prompt"])
        # Scripts append a row for a line that has changed.
        times = Counter((row["id"], row.get("digest")) for row in rows if row["status"] == "done")
        states = Counter(done.values())
        # The first clip of a changed line was useful, too.
        useful = len(done) + (self.fault.happens in ("change", "notebook") and not states["stale"])
        busy_s = sum(event.t1 - event.t0 for event in events(self.folder))
        return Result(
            self.system,
            self.name,
            lost=sum(line["id"] not in done for line in expected),
            stale=states["stale"],
            truncated=states["truncated"],
            doubled=sum(count > 1 for count in times.values()),
            wrong_rows=wrong,
            seconds=round(seconds, 1),
            wasted_gpu_s=round(max(0.0, busy_s - useful * SECONDS_PER_SHOT), 1),
            stopped=self.stopped,
            codes=tuple(self.codes),
        )

    def _clip_states(self) -> dict[str, str]:
        """Return for each line with a clip whether it is good, stale or truncated."""
        states = {}
        for number, line in enumerate(self.lines):
            if self.system == "vidgen":
                shows = line["prompt"].encode()
                if self.fault.happens == "notebook":
                    shows = b"another image" if number == BAD else line["id"].encode()
                for row in self._rows():
                    if row["id"] == line["id"] and row["hd_video"] is not None:
                        states[line["id"]] = _state_of_video(self.out / row["hd_video"], shows)
            elif (file := self.out / f"{line['id']}.mp4").exists():
                content, wanted = file.read_bytes(), clip_of(content_of({"image": "", **line}))
                is_whole = len(content) == len(wanted)
                states[line["id"]] = "good" if content == wanted else "stale" if is_whole else "truncated"
        return states

    def _rows(self) -> list[dict[str, Any]]:
        """Return the rows as users of each system read them."""
        if self.system == "video server":
            file = self.out / "manifest.jsonl"
            return [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
        if self.system == "fused Ray Data":
            from benchmarks.peers.fused_script import rows_of

            return rows_of(self.out)
        import pyarrow.parquet

        if not (self.out / "manifest").exists():
            return []
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(self.out / "manifest").to_pylist()
        return rows


def _state_of_video(file: Path, shows: bytes) -> str:
    import av

    from benchmarks.peers.vidgen_script import digests_shown
    from benchmarks.simulated import FRAMES

    try:
        with av.open(str(file)) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    except (OSError, av.FFmpegError):
        return "truncated"
    if len(frames) != FRAMES:
        return "truncated"
    return "good" if digests_shown(np.stack(frames)) == {hashlib.sha256(shows).digest()} else "stale"


def _start(arguments: list[str], log: Any, variables: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), **(variables or {})}
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the processes of a session. Those of Ray end when their driver has ended."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _disk(folder: Path, mount_point: Path, happens: str) -> Iterator[None]:
    """Mount a small disk: of memory if it is to be full, else an ext4 file system, which can be frozen and mounted again."""
    if happens == "full":
        _root("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", mount_point)
    else:
        with (folder / "disk.img").open("wb") as file:
            file.truncate(512 << 20)
        _root("mkfs.ext4", "-q", folder / "disk.img")
        _root("mount", "-o", "loop", folder / "disk.img", mount_point)
    try:
        yield
    finally:
        _root("umount", "--lazy", mount_point)


def _root(*command: Any) -> None:
    subprocess.run([str(part) for part in command], check=True)


@contextmanager
def _full(disk: Path) -> Iterator[None]:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    ballast.unlink()


@contextmanager
def _frozen(disk: Path) -> Iterator[None]:
    _root("fsfreeze", "--freeze", disk)
    yield
    _root("fsfreeze", "--unfreeze", disk)


@contextmanager
def _unmounted(disk: Path) -> Iterator[None]:
    _root("umount", "--lazy", disk)
    yield
    _root("mount", "-o", "loop", disk.parent / "disk.img", disk)


DISKS = {"full": _full, "freeze": _frozen, "unmount": _unmounted}
"""Kind of outage of the disk with the output folder -> context manager in which it happens."""
FULL_RAY = {"RAY_local_fs_capacity_threshold": "0.0001", "VIDGEN_BENCHMARK_STORE_BYTES": str(STORE_BYTES)}


@contextmanager
def _video_servers(folder: Path) -> Iterator[list[str]]:
    """Run a video server for each GPU, and start it again when it exits, as a container would be."""
    with ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(GPUS)]
    stop = threading.Event()

    def keep(port: int, gpu: int) -> None:
        while not stop.is_set():
            with (folder / "servers.txt").open("ab") as log:
                process = _start(["benchmarks.peers.video_server", str(port), str(folder), str(gpu)], log)
            while process.poll() is None and not stop.wait(POLL_S):
                ...
            _kill(process)

    threads = [threading.Thread(target=keep, args=(port, gpu)) for gpu, port in enumerate(ports)]
    for thread in threads:
        thread.start()
    try:
        for port in ports:
            _wait_until_open(port)
        yield [f"http://127.0.0.1:{port}" for port in ports]
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _wait_until_open(port: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


SYSTEMS = ("video server", "fused Ray Data", "vidgen")
SYSTEM_LABELS = {"video server": "script, video server", "fused Ray Data": "fused Ray Data actor", "vidgen": "vidgen"}
WRONG = {"lost": "lost", "stale": "stale", "truncated": "truncated", "doubled": "doubled", "wrong_rows": "wrong row"}
CHART_PX = (760, 136)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="A few shots, one fault, two systems.")
    parser.add_argument("--systems", type=_some_of(SYSTEMS), default=SYSTEMS, help="Default: all.")
    parser.add_argument("--faults", type=_some_of(tuple(FAULTS)), default=tuple(FAULTS), help="Default: all.")
    parser.add_argument("--runs", type=int, default=1, help="Runs of each fault and system, in turns. Default: 1.")
    parser.add_argument("--shots", type=int, help=f"Default: {SHOTS}.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the results as JSON.")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="Copy logs and events there.")
    parser.add_argument("--publish", action="store_true", help="Only publish the stored results.")
    args = parser.parse_args()
    if args.publish:
        rows = json.loads(STORED.read_text())["rows"]
        CHART.write_text(chart(rows))
        sys.stdout.write("\n".join(published_table(rows)) + "\n")
        return 0
    faults, systems = (QUICK_FAULTS, QUICK_SYSTEMS) if args.quick else (args.faults, args.systems)
    shots = args.shots or (QUICK_SHOTS if args.quick else SHOTS)
    console, results = Console(width=None if sys.stdout.isatty() else 160), []
    for fault in faults:
        for system in [*systems] * args.runs:
            folder = Path(tempfile.mkdtemp(prefix="vidgen-rivals-"))
            try:
                results.append(Run(system, fault, folder, shots).measure())
                console.print(str(results[-1]), highlight=False)
                if args.keep:
                    ignored = shutil.ignore_patterns("disk", "weights", "inputs", "gpu-*")
                    shutil.copytree(
                        folder, args.keep / f"{fault}-{system}".replace(" ", "-"), ignore=ignored, dirs_exist_ok=True
                    )
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    console.print(_table(results))
    if args.json:
        rows = [{name: getattr(result, name) for name in Result.__slots__} for result in results]
        write_json(args.json, {"machine": machine(("vidgen-ray", "ray", "httpx")), "shots": shots, "rows": rows})
    return 0


def published_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table in README.md: for each fault what is wrong, the wasted GPU-seconds and the exit codes.

    Faults after which nothing is wrong, and less than a GPU-second wasted, with all systems are left out.
    """
    found = {(row["fault"], row["system"]): row for row in rows}
    told = {row["fault"] for row in rows if row["wasted_gpu_s"] >= 1 or any(row[name] for name in WRONG)}
    return [
        f"| {FAULTS[fault].about} | " + " | ".join(_published_cell(found[fault, system]) for system in SYSTEMS) + " |"
        for fault in FAULTS
        if fault in told
    ]


def _published_cell(row: dict[str, Any]) -> str:
    wrong = [f"**{row[name]} {label}**" for name, label in WRONG.items() if row[name]]
    return "; ".join([*([", ".join(wrong)] if wrong else []), str(row["wasted_gpu_s"]), " ".join(map(str, row["codes"]))])


def chart(rows: list[dict[str, Any]]) -> str:
    """Draw an SVG: for each system the wrong lines, and the wasted GPU-seconds, of all faults."""
    parts = [f'<rect width="{CHART_PX[0]}" height="{CHART_PX[1]}" fill="#fff"/>']

    def text(x: float, y: float, content: str, anchor: str = "start") -> None:
        parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{content}</text>')

    own = {system: [row for row in rows if row["system"] == system and row["fault"] != "none"] for system in SYSTEMS}
    for number, system in enumerate(SYSTEMS):
        text(182, 44 + 26 * number, SYSTEM_LABELS[system], "end")
    for left, title, names in (
        (190, "rows or clips lost, wrong or doubled", tuple(WRONG)),
        (500, "GPU-seconds wasted", ("wasted_gpu_s",)),
    ):
        text(left, 18, title)
        sums = [round(sum(row[name] for row in own[system] for name in names)) for system in SYSTEMS]
        for number, value in enumerate(sums):
            y, width = 30 + 26 * number, max(2, round(200 * value / max(1, *sums)))
            colour = "#1a7f64" if SYSTEMS[number] == "vidgen" else "#8b949e"
            parts.append(f'<rect x="{left}" y="{y}" width="{width}" height="18" fill="{colour}"/>')
            text(left + width + 8, y + 14, str(value))
    text(190, 124, f"{len(own['vidgen'])} faults, {SHOTS} lines each, on {GPUS} simulated GPUs")
    size = f'width="{CHART_PX[0]}" height="{CHART_PX[1]}"'
    style = 'font-family="sans-serif" font-size="13" fill="#1f2328"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def _some_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, must be some of {', '.join(known)}")
        return text.split(",")

    return parse


def _table(results: list[Result]) -> Table:
    table = Table(title=f"Faults on {GPUS} simulated GPUs")
    for column in (
        "fault",
        "system",
        "lost",
        "stale",
        "truncated",
        "doubled",
        "wrong rows",
        "seconds",
        "wasted GPU-s",
        "stopped",
        "exit codes",
    ):
        table.add_column(column, justify="left" if column in ("fault", "system") else "right")
    for result in results:
        numbers = (result.lost, result.stale, result.truncated, result.doubled, result.wrong_rows, result.seconds)
        table.add_row(
            result.fault,
            result.system,
            *map(str, (*numbers, result.wasted_gpu_s, result.stopped)),
            " ".join(map(str, result.codes)),
        )
    return table


if __name__ == "__main__":
    raise SystemExit(main())
