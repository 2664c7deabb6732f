"""Upscale a video with Ray: tasks on all nodes make its segments, and this process stores and joins them.

Each task reads the source itself, so all nodes need the file. Only encoded segments travel.
"""

from __future__ import annotations

import tempfile
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from vidgen_ray.engine.processes import ATTEMPTS
from vidgen_ray.errors import SetupError, VidgenError, first_line
from vidgen_ray.system.files import write_atomically
from vidgen_ray.upscale.network import EngineSettings, UpscaleModel, choose_settings
from vidgen_ray.upscale.segments import CHECK_S, Segment, SegmentFailed, SegmentWorker, UpscaleTarget

ATTEMPTS_OF_REFUSED = 2
"""Attempts for a segment whose file or weights are refused with an error for the user."""

_worker: tuple[str, SegmentWorker] | None = None
"""Id of the run, and the worker with the loaded network that this process keeps for its next segment."""


def make_segment(run_id: str, target: UpscaleTarget, segment: Segment) -> bytes | Exception:
    """Return the file of a segment, or the error. Raising it would wrap it in one of Ray."""
    global _worker
    try:
        if _worker is None or _worker[0] != run_id:
            if _worker is not None:
                _worker[1].close()
            _worker = run_id, SegmentWorker(target)
        with tempfile.TemporaryDirectory(prefix="vidgen-upscale-") as folder:
            path = Path(folder) / segment.file_name
            _worker[1].write(segment, path, lambda: None)
            return path.read_bytes()
    except Exception as error:
        return error if isinstance(error, VidgenError) else RuntimeError(f"{type(error).__name__}: {error}")


class RayRunner:
    """Runs segments on the nodes of the connected Ray cluster. See `SegmentRunner`."""

    workers = 1

    def __init__(
        self,
        max_tasks: int | None = None,
        on_wait: Callable[[str], None] = lambda message: None,
        check_interrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """`max_tasks`: maximum number of tasks at the same time. `None`: as many as the cluster has room for.

        `check_interrupt` is called every CHECK_S at least, and ends the work if it raises.
        """
        self._max_tasks = max_tasks
        self._on_wait = on_wait
        self._check_interrupt = check_interrupt

    def __call__(
        self, target: UpscaleTarget, segments: Sequence[Segment], folder: Path, on_frame: Callable[[Segment], None]
    ) -> None:
        """Write the files of the segments to the folder. `on_frame` is called for all frames of a segment at its end.

        Ray repeats a task after a crash or the loss of its node, and a task that returns an error is tried again. Raises
        SegmentFailed, and what `check_interrupt` raises.
        """
        needed = _resources(target.settings)
        named = f"{needed['CPU']} CPUs" + (" and a GPU" if "GPU" in needed else "")
        if not (slots := cluster_slots(target.settings)):
            raise SetupError(f"no node of the cluster has {named}")
        if any(ray.available_resources().get(kind, 0) < amount for kind, amount in needed.items()):
            self._on_wait(f"waiting for the cluster: each segment needs {named}")
        # max_calls=0: the process keeps its network, also on a GPU.
        options = {"max_calls": 0, "max_retries": ATTEMPTS - 1, "scheduling_strategy": "SPREAD"}
        task: Any = ray.remote(num_cpus=needed["CPU"], num_gpus=needed.get("GPU", 0), **options)(make_segment)
        run_id, shared_target = uuid.uuid4().hex, ray.put(target)
        waiting, running, failures = deque(segments), dict[Any, Segment](), Counter[Segment]()
        try:
            while waiting or running:
                while waiting and len(running) < (self._max_tasks or slots):
                    segment = waiting.popleft()
                    running[task.remote(run_id, shared_target, segment)] = segment
                self._check_interrupt()
                for reference in ray.wait([*running], timeout=CHECK_S)[0]:
                    segment = running.pop(reference)
                    try:
                        result: bytes | Exception = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        result = RuntimeError(f"the worker crashed: {first_line(error)}")
                    if isinstance(result, Exception):
                        failures[segment] += 1
                        if failures[segment] >= (ATTEMPTS_OF_REFUSED if isinstance(result, VidgenError) else ATTEMPTS):
                            raise SegmentFailed(segment, result)
                        waiting.appendleft(segment)
                        continue
                    write_atomically(folder / segment.file_name, result)
                    for _ in range(segment.stop - segment.start):
                        on_frame(segment)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def settings_on_cluster(model: UpscaleModel) -> EngineSettings:
    """Return the settings for a node of the cluster, one with a GPU if there is any. Raises what `choose_settings` raises."""
    on_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    task: Any = ray.remote(num_cpus=1, num_gpus=1 if on_gpu else 0)(choose_settings)
    try:
        settings: EngineSettings = ray.get(task.remote(model, "cuda" if on_gpu else "cpu", 1))
    except ray.exceptions.RayTaskError as error:
        raise error.cause or error from None
    return settings


def cluster_slots(settings: EngineSettings) -> int:
    """Return the number of tasks that the alive nodes have room for when they are idle."""
    needed = _resources(settings)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(min(resources.get(kind, 0) // amount for kind, amount in needed.items())) for resources in nodes)


def _resources(settings: EngineSettings) -> dict[str, int]:
    """Return what a task reserves: a GPU, or a CPU for each thread, but not more than a node offers to Ray."""
    if settings.device.startswith("cuda"):
        return {"CPU": 1, "GPU": 1}
    largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    return {"CPU": max(1, min(settings.threads, largest))}
