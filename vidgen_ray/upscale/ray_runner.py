"""Upscale a video with Ray: actors on all nodes make its segments, and this process stores and joins them.

Each actor reads the source itself, so all nodes need the file. Only encoded segments travel.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ray

from vidgen_ray.engine.retries import ATTEMPTS, first_line
from vidgen_ray.errors import SetupError, VidgenError
from vidgen_ray.system.files import write_atomically
from vidgen_ray.upscale.calibration import Calibration, CalibrationListener, CalibrationProgress, calibrate
from vidgen_ray.upscale.job import CHECK_S, Segment, SegmentFailed, SegmentWorker, UpscaleJob
from vidgen_ray.upscale.network import EngineSettings, UpscaleModel

ATTEMPTS_OF_REFUSED = 2
"""Attempts for a segment whose file or weights are refused with an error for the user. The second one is on another worker."""
WAIT_NOTE_S = 15.0
"""Seconds without a free worker after which the run reports what it waits for."""


class UpscaleActor:
    """Makes segments of one job. The network is loaded with the first segment."""

    def __init__(self, job: UpscaleJob) -> None:
        self._job = job
        self._worker: SegmentWorker | None = None

    def make(self, segment: Segment) -> bytes | Exception:
        """Return the file of a segment, or the error. Raising it would wrap it in one of Ray."""
        try:
            if self._worker is None:
                self._worker = SegmentWorker(self._job)
            with tempfile.TemporaryDirectory(prefix="vidgen-upscale-") as folder:
                path = Path(folder) / segment.file_name
                self._worker.write(segment, path, lambda: None)
                return path.read_bytes()
        except Exception as error:
            return error if isinstance(error, VidgenError) else RuntimeError(f"{type(error).__name__}: {error}")


@dataclass
class _Pending:
    """A segment that is not made yet, and the numbers of the workers that failed to make it."""

    segment: Segment
    failed_on: list[int] = field(default_factory=list)


class RayRunner:
    """Runs segments on the nodes of the connected Ray cluster. See `SegmentRunner`."""

    def __init__(
        self,
        max_workers: int | None = None,
        on_wait: Callable[[str], None] = lambda message: None,
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """`max_workers`: maximum number of actors. `None`: as many as the cluster has room for.

        `check_interrupt` is called every CHECK_S at least, and ends the work if it raises.
        """
        self._max_workers = max_workers
        self._on_wait = on_wait
        self._check_interrupt = check_interrupt

    def __call__(self, job: UpscaleJob, segments: Sequence[Segment], folder: Path, on_frame: Callable[[Segment], None]) -> None:
        """Write the files of the segments to the folder. `on_frame` is called for all frames of a segment at its end.

        A segment is tried again on another worker, also after a crash or the loss of a node. Raises SegmentFailed, and what
        `check_interrupt` raises.
        """
        count = min(len(segments), cluster_slots(job.settings), self._max_workers or len(segments))
        if not count:
            raise SetupError(f"no node of the cluster has {_needed(job.settings)}")
        actor_class: Any = ray.remote(UpscaleActor).options(scheduling_strategy="SPREAD", **_resources(job.settings))
        workers = _Workers(partial(actor_class.remote, ray.put(job)), count)
        try:
            self._run(job, workers, [_Pending(segment) for segment in segments], folder, on_frame)
        finally:
            workers.kill()

    def _run(
        self, job: UpscaleJob, workers: _Workers, waiting: list[_Pending], folder: Path, on_frame: Callable[[Segment], None]
    ) -> None:
        running: dict[Any, tuple[_Pending, int]] = {}
        note_at = time.monotonic() + WAIT_NOTE_S
        while waiting or running:
            self._check_interrupt()
            started = {*workers.idle, *(worker for _, worker in running.values())}
            while waiting and (choice := _choose(waiting, workers.idle, started)) is not None:
                pending, worker = choice
                waiting.remove(pending)
                running[workers.make(worker, pending.segment)] = pending, worker
            ready, _ = ray.wait([*running, *workers.starting], timeout=CHECK_S)
            if started:
                note_at = time.monotonic() + WAIT_NOTE_S
            elif time.monotonic() > note_at:
                note_at = math.inf
                self._on_wait(f"waiting for the cluster: needs {_needed(job.settings)} for each of {workers.count} workers")
            for reference in ready:
                if reference in workers.starting:
                    workers.finish_start(reference)
                    continue
                pending, worker = running.pop(reference)
                result = _result(reference)
                if isinstance(result, _Crash):
                    workers.start(worker)
                else:
                    workers.idle.append(worker)
                if isinstance(result, Exception):
                    pending.failed_on.append(worker)
                    limit = ATTEMPTS_OF_REFUSED if isinstance(result, VidgenError) else ATTEMPTS
                    if len(pending.failed_on) >= limit:
                        raise SegmentFailed(pending.segment, result)
                    waiting.insert(0, pending)
                    continue
                write_atomically(folder / pending.segment.file_name, result)
                for _ in range(pending.segment.stop - pending.segment.start):
                    on_frame(pending.segment)


class _Workers:
    """Actors of one run, by number. One that crashes is replaced, which may wait for a node; no call waits with it."""

    def __init__(self, create: Callable[[], Any], count: int) -> None:
        """`create` returns a new actor."""
        self.count = count
        self.starting: dict[Any, int] = {}
        """Reference that is ready when a worker has started -> its number."""
        self.idle: list[int] = []
        self._create = create
        self._actors: dict[int, Any] = {}
        self._failed_starts: Counter[int] = Counter()
        for number in range(count):
            self.start(number)

    def start(self, number: int) -> None:
        """Start a worker, in place of the one with this number if there is one."""
        if number in self._actors:
            ray.kill(self._actors[number])
        self._actors[number] = self._create()
        self.starting[self._actors[number].__ray_ready__.remote()] = number

    def finish_start(self, reference: Any) -> None:
        """Make a worker idle that has started. If it could not start, start it again, up to ATTEMPTS times.

        Raises SetupError if no worker is left.
        """
        number = self.starting.pop(reference)
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            self._failed_starts[number] += 1
            if self._failed_starts[number] < ATTEMPTS:
                self.start(number)
                return
            del self._actors[number]
            if not self._actors:
                raise SetupError(f"no worker can be started: {first_line(error)}") from None
        else:
            self._failed_starts[number] = 0
            self.idle.append(number)

    def make(self, number: int, segment: Segment) -> Any:
        """Send a segment to an idle worker. Return the reference of its result."""
        self.idle.remove(number)
        return self._actors[number].make.remote(segment)

    def kill(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)


def _choose(waiting: Sequence[_Pending], idle: Sequence[int], started: Set[int]) -> tuple[_Pending, int] | None:
    """Return the next segment and an idle worker: one that has not failed on it, if any that has started has not."""
    for pending in waiting:
        others = [worker for worker in idle if worker not in pending.failed_on]
        if others:
            return pending, others[0]
        if idle and started <= set(pending.failed_on):
            return pending, idle[0]
    return None


class _Crash(RuntimeError):
    """The process or the node of a worker has ended."""


def _result(reference: Any) -> bytes | Exception:
    try:
        result: bytes | Exception = ray.get(reference)
    except ray.exceptions.RayError as error:
        return _Crash(f"the worker crashed: {first_line(error)}")
    return result


def calibrate_on_cluster(
    model: UpscaleModel,
    *,
    again: bool = False,
    on_progress: CalibrationListener = lambda progress: None,
    on_wait: Callable[[str], None] = lambda message: None,
    check_interrupt: Callable[[], None] = lambda: None,
) -> Calibration:
    """Return the calibration of a node of the cluster, one with a GPU if there is any. All workers use its settings.

    `on_wait` is called with a message if no node is free. `check_interrupt` is called every CHECK_S at least, and ends the
    call if it raises. Raises what `calibrate` raises.
    """
    on_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    task = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0, max_retries=0, num_returns="streaming")(_calibrate)
    items = task.remote(model, "cuda" if on_gpu else "cpu", again)
    note_at = time.monotonic() + WAIT_NOTE_S
    try:
        while True:
            while not ray.wait([items], timeout=CHECK_S)[0]:
                check_interrupt()
                if time.monotonic() > note_at:
                    on_wait(f"waiting for the cluster: the calibration needs 1 CPU{' and a GPU' if on_gpu else ''}")
                    note_at = math.inf
            note_at = math.inf
            item: CalibrationProgress | Calibration = ray.get(next(items))
            if isinstance(item, Calibration):
                return item
            on_progress(item)
    except ray.exceptions.RayTaskError as error:
        raise error.cause or error from None


def _calibrate(model: UpscaleModel, device: str, again: bool) -> Iterator[CalibrationProgress | Calibration]:
    """Yield the progress of the calibration, and then the calibration."""
    messages: SimpleQueue[CalibrationProgress | None] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        calibration = pool.submit(calibrate, model, device, again=again, on_progress=messages.put)
        calibration.add_done_callback(lambda _: messages.put(None))
        yield from iter(messages.get, None)
        yield calibration.result()


def cluster_slots(settings: EngineSettings) -> int:
    """Return the number of actors that the alive nodes have room for when they are idle."""
    needed = _resources(settings)
    cpus, gpus = needed["num_cpus"], needed["num_gpus"]
    slots = 0
    for resources in _alive_nodes():
        fitting = resources.get("CPU", 0) // cpus
        slots += int(min(fitting, resources.get("GPU", 0) // gpus) if gpus else fitting)
    return slots


def _alive_nodes() -> list[dict[str, float]]:
    """Return the resources of each alive node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _resources(settings: EngineSettings) -> dict[str, int]:
    """Return what an actor reserves: a GPU, or a CPU for each thread, but not more than a node offers to Ray."""
    if settings.device.startswith("cuda"):
        return {"num_cpus": 1, "num_gpus": 1}
    largest = max((int(resources.get("CPU", 0)) for resources in _alive_nodes()), default=0)
    return {"num_cpus": max(1, min(settings.threads, largest)), "num_gpus": 0}


def _needed(settings: EngineSettings) -> str:
    needed = _resources(settings)
    return f"{needed['num_cpus']} CPUs" + (" and a GPU" if needed["num_gpus"] else "")
