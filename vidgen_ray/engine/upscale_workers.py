"""Upscale a video with Ray: actors on all nodes make its segments, and this process stores and joins them.

Each actor reads the source itself, so all nodes need the file. Only encoded segments travel.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import ray

from vidgen_ray.atomic_files import write_atomically
from vidgen_ray.engine.retries import ATTEMPTS, first_line
from vidgen_ray.errors import SetupError, VidgenError
from vidgen_ray.upscale.calibration import Calibration, CalibrationListener, CalibrationProgress, calibrate
from vidgen_ray.upscale.job import CHECK_S, Segment, SegmentFailed, SegmentWorker, UpscaleJob
from vidgen_ray.upscale.models import UpscaleModel
from vidgen_ray.upscale.network import EngineSettings

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
        shared = ray.put(job)
        actor_class: Any = ray.remote(max_restarts=-1, max_task_retries=0)(UpscaleActor)
        actors = [
            actor_class.options(scheduling_strategy="SPREAD", **_resources(job.settings)).remote(shared) for _ in range(count)
        ]
        try:
            self._run(job, actors, [_Pending(segment) for segment in segments], folder, on_frame)
        finally:
            for actor in actors:
                ray.kill(actor)

    def _run(
        self, job: UpscaleJob, actors: list[Any], waiting: list[_Pending], folder: Path, on_frame: Callable[[Segment], None]
    ) -> None:
        running: dict[Any, tuple[_Pending, int]] = {}
        idle = list(range(len(actors)))
        last_result = time.monotonic()
        noted = False
        while waiting or running:
            self._check_interrupt()
            while waiting and (choice := _choose(waiting, idle, len(actors))) is not None:
                pending, worker = choice
                waiting.remove(pending)
                idle.remove(worker)
                running[actors[worker].make.remote(pending.segment)] = pending, worker
            ready, _ = ray.wait(list(running), timeout=CHECK_S)
            if not ready and not noted and time.monotonic() - last_result > WAIT_NOTE_S and not _has_started(actors):
                noted = True
                self._on_wait(f"waiting for the cluster: needs {_needed(job.settings)} for each of {len(actors)} workers")
            for reference in ready:
                last_result = time.monotonic()
                pending, worker = running.pop(reference)
                idle.append(worker)
                result = _result(reference)
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


def _choose(waiting: Sequence[_Pending], idle: Sequence[int], workers: int) -> tuple[_Pending, int] | None:
    """Return the next segment and an idle worker: one that has not failed on it, if there is any."""
    for pending in waiting:
        others = [worker for worker in idle if worker not in pending.failed_on]
        if others:
            return pending, others[0]
        if idle and len(set(pending.failed_on)) >= workers:
            return pending, idle[0]
    return None


def _result(reference: Any) -> bytes | Exception:
    try:
        result: bytes | Exception = ray.get(reference)
    except ray.exceptions.RayError as error:
        return RuntimeError(f"the worker crashed: {first_line(error)}")
    return result


def _has_started(actors: Sequence[Any]) -> bool:
    """Return whether a process of one of the actors runs."""
    ready, _ = ray.wait([actor.__ray_ready__.remote() for actor in actors], timeout=0.5)
    return bool(ready)


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
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            fitting = resources.get("CPU", 0) // cpus
            slots += int(min(fitting, resources.get("GPU", 0) // gpus) if gpus else fitting)
    return slots


def _resources(settings: EngineSettings) -> dict[str, int]:
    return (
        {"num_cpus": 1, "num_gpus": 1} if settings.device.startswith("cuda") else {"num_cpus": settings.threads, "num_gpus": 0}
    )


def _needed(settings: EngineSettings) -> str:
    needed = _resources(settings)
    return f"{needed['num_cpus']} CPUs" + (" and a GPU" if needed["num_gpus"] else "")
