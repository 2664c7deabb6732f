"""Ray actor of an engine that holds models on the GPU of a slot and runs one call after another."""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.calls import CallResult
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.gpu_group import GpuGroup
from vidgen_ray.engine.messages import LOADING
from vidgen_ray.engine.status import Progress
from vidgen_ray.errors import Cancelled
from vidgen_ray.graph import clip_length, durations
from vidgen_ray.nets.deferred_imports import rare_garbage_collection
from vidgen_ray.outputs.records import Failure
from vidgen_ray.planner.layout import WorkerSpec
from vidgen_ray.render.oom_fallback import has_cuda_driver, prepare_gpu
from vidgen_ray.render.step_runner import StepFailed, StepRunner, likeness_of
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, Frames, Item, Stage, progress_callback
from vidgen_ray.system.free_memory import free_gpu_memory


@contextmanager
def load_lock(processes: int = 1, folder: Path | None = None) -> Iterator[None]:
    """Hold one of the `processes` locks of this user on this machine while the block runs. Waits for other processes.

    `folder`: folder of the lock files, on a local disk. Default: that for temporary files. The kernel releases the lock of a
    process that crashes. Raises OSError if a file cannot be opened.
    """
    descriptors = [_open((folder or Path(tempfile.gettempdir())) / _name(number)) for number in range(processes)]
    try:
        if not any(map(_lock_if_free, descriptors)):
            # The first lock was taken first, so its owner is likely to be done first.
            fcntl.flock(descriptors[0], fcntl.LOCK_EX)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _name(number: int) -> str:
    return f"vidgen-load-{os.getuid()}{f'-{number}' if number else ''}.lock"


def _open(path: Path) -> int:
    # In a shared folder, another user could have placed a link under this name.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _lock_if_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_T = TypeVar("_T")

MAX_CONCURRENT_CALLS = 2
"""The next call runs while the result of the previous one is copied to Ray's object store, which takes a fifth of the
computing time for a chunk of large frames."""
CONTROL = "control"
"""Concurrency group of the methods that respond during a call."""


@dataclass(frozen=True, slots=True)
class ActorPlace:
    """Process of an actor."""

    node: str
    """Ray node id."""
    pid: int
    gpus: tuple[str, ...]
    """Ray's ids of its GPUs on the node."""
    host: str
    """Name of the machine."""


class Worker:
    """Actor that holds stages in memory and runs one call at a time.

    The call result is returned last: if Ray cannot store the artefacts, all returned values are the error.
    """

    def __init__(self, config: EngineConfig, spec: WorkerSpec, parallel_loads: int = 1) -> None:
        """`parallel_loads`: maximum number of processes of this machine that load weights at once."""
        self._load_lock = threading.Lock()
        # A server works on several calls at once.
        self._call_lock: AbstractContextManager[Any] = nullcontext() if spec.server else threading.Lock()
        self._config = config
        self._spec = spec
        self._parallel_loads = parallel_loads
        self._loaded: Failure | StepRunner | None = None
        self._device = ""
        self._group = GpuGroup(int(spec.gpus)) if spec.gpus > 1 else None
        self._waits = False
        """Waits until other processes of the machine have loaded their weights."""
        self._progress: dict[int, Progress] = {}
        self._deadlines: dict[int, float] = {}
        """Running call -> time at which it exceeds its timeout."""
        self._cancelled: set[int] = set()
        self._first_call: int = 0
        """Calls with lower numbers are not needed any more."""

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]  # Ray has no type for it
    def place(self) -> ActorPlace:
        return place_of_process()

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]  # Ray has no type for it
    def progress(self, call: int) -> Progress | None:
        """Return the progress of a call. `None` if it is not running."""
        return self._progress.get(call)

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]  # Ray has no type for it
    def cancel(self, call: int) -> None:
        """Stop a call at its next step, or before it starts."""
        self._cancelled.add(call)

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]  # Ray has no type for it
    def attach(self, first_call: int) -> None:
        """Start to work for a director whose calls have numbers from `first_call` on. Stops earlier calls.

        They are of a director that has crashed, or were sent to the process before. One that hangs ends the process when its
        timeout is over.
        """
        self._first_call = first_call
        for call, deadline in self._deadlines.copy().items():
            if call < first_call:
                timer = threading.Timer(max(0.0, deadline - time.monotonic()), self._exit_if_running, [call])
                timer.daemon = True
                timer.start()

    def _exit_if_running(self, call: int) -> None:
        if call in self._deadlines:
            os._exit(1)

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]  # Ray has no type for it
    def activity(self) -> float | None:
        """Return CPU seconds plus MB read of its processes, which grow while it loads. `None` while it waits for others."""
        return None if self._waits else activity_of_process(() if self._group is None else self._group.pids)

    def load(self) -> Failure | None:
        """Load the weights. Return the failure if that is impossible. Repeated calls return the same.

        Not part of `__init__`: Ray rejects calls during a restart, so a crash while loading would look like a slow start.
        """
        ready = self._ready()
        return ready if isinstance(ready, Failure) else None

    def run(self, call: int, plan: ShotPlan, steps: tuple[str, ...], artefacts: Artefacts) -> tuple[Artefacts, CallResult]:
        """Run these steps of a shot. Return the artefacts and the call result."""

        def run_steps(runner: StepRunner) -> tuple[CallResult, Artefacts]:
            item, records = runner.run(plan, Item(plan.shot, artefacts), steps)
            return CallResult(tuple(records), likeness_of(item.artefacts)), item.artefacts

        return self._execute(call, plan.shot, steps, run_steps, Artefacts())

    def run_clip(
        self, call: int, plan: ShotPlan, steps: tuple[str, ...], chunked: tuple[str, ...], artefacts: Artefacts
    ) -> tuple[Artefacts, Artefacts, CallResult]:
        """Run these steps of a shot, and then these chunked steps on the whole clip.

        Return the artefacts of the steps, those of the chunked steps, and the call result.
        """

        def run_all(runner: StepRunner) -> tuple[CallResult, tuple[Artefacts, Artefacts]]:
            item, records = runner.run(plan, Item(plan.shot, artefacts), steps)
            n_frames, _ = clip_length(plan.shot)
            clip, chunked_records = runner.run_chunk(plan, chunked, slice(0, n_frames), item.artefacts)
            return CallResult((*records, *chunked_records), likeness_of(item.artefacts)), (item.artefacts, clip)

        output, result = self._execute(call, plan.shot, (*steps, *chunked), run_all, (Artefacts(), Artefacts()))
        return *output, result

    def run_chunk(
        self, call: int, plan: ShotPlan, steps: tuple[str, ...], chunk: slice | None, artefacts: Artefacts
    ) -> tuple[Artefacts, CallResult]:
        """Run these chunked steps on a chunk of the clip. See `StepRunner.run_chunk`."""

        def process(runner: StepRunner) -> tuple[CallResult, Artefacts]:
            output, records = runner.run_chunk(plan, steps, chunk, artefacts)
            return CallResult(tuple(records)), output

        return self._execute(call, plan.shot, steps, process, Artefacts())

    def compare(
        self, call: int, plan: ShotPlan, steps: tuple[str, ...], artefacts: Artefacts, *others: Artefacts
    ) -> tuple[Artefacts, CallResult]:
        """Run these steps of a shot without the stage cache, and compare the artefacts with those of other workers."""

        def run_steps(runner: StepRunner) -> tuple[CallResult, Artefacts]:
            item, records = runner.run(plan, Item(plan.shot, artefacts), steps, use_cache=False)
            differences = tuple(difference(item.artefacts, other) for other in others)
            return CallResult(tuple(records), differences=differences), item.artefacts

        return self._execute(call, plan.shot, steps, run_steps, Artefacts())

    @ray.method(concurrency_group=CONTROL)  # type: ignore[untyped-decorator]  # Ray has no type for it
    def close(self) -> None:
        """Free the GPUs, then write the cache entries that are queued. Call it before the process is stopped.

        While a write hangs, the kernel cannot end the process, and would keep its GPU memory as long.
        """
        if isinstance(self._loaded, StepRunner):
            for stage in self._loaded.stages.values():
                stage.close()
            if self._group is not None:
                self._group.stop()
            if self._spec.gpus:
                free_gpu_memory()
            self._loaded.close()

    def _execute(
        self,
        call: int,
        shot: Shot,
        stages: tuple[str, ...],
        function: Callable[[StepRunner], tuple[CallResult, _T]],
        default: _T,
    ) -> tuple[_T, CallResult]:
        """Return what the function returns, in reverse, or `default` and its failure."""

        def on_progress(stage: str, step: int, steps: int) -> None:
            if call in self._cancelled or call < self._first_call:
                raise Cancelled
            self._progress[call] = Progress(stage, step, steps)

        with self._call_lock:
            ready = self._ready()
            if isinstance(ready, Failure):
                return default, CallResult(failure=ready, load_failed=True)
            started_at = time.time()
            self._deadlines[call] = time.monotonic() + self._config.timeout_s(shot, durations(shot, stages))
            try:
                with progress_callback(on_progress):
                    on_progress(stages[0], 0, 0)
                    result, output = function(ready)
                    return output, replace(result, started_at=started_at, device=self._device)
            except Cancelled:
                return default, CallResult()
            except StepFailed as failed:
                result = CallResult.of_failure(failed)
                return default, replace(result, started_at=started_at, seconds=time.time() - started_at)
            finally:
                self._progress.pop(call, None)
                del self._deadlines[call]
                self._cancelled.discard(call)

    def _ready(self) -> StepRunner | Failure:
        """Return the step runner, and load it first if needed.

        A call meant for the previous process can arrive before `load`.
        """
        with self._load_lock:
            if self._loaded is None:
                self._load()
        assert self._loaded is not None
        return self._loaded

    def _load(self) -> None:
        config, spec = self._config, self._spec
        try:
            if spec.gpus:
                prepare_gpu(spec.gpus, spec.gpu_gb)
            stages = [self._stage(config.stages[name]) for name in spec.stages]
            cache = config.cache.open(config.outputs.stage_cache)
            runner = StepRunner(stages, spec.gpus, cache, spec.swap_groups, safety=self._config.profile.checker)
            # On a machine without GPUs, the weights stay where they are loaded.
            self._waits = bool(spec.gpus)
            with load_lock(self._parallel_loads) if spec.gpus else nullcontext(), rare_garbage_collection():
                self._waits = False
                runner.load()
            self._device = gpu_of_process() if spec.gpus else ""
            self._loaded = runner
        except Exception as error:
            # If raised, the user would see Ray's wrapper of the error.
            self._loaded = StepFailed(LOADING, error).failure()

    def _stage(self, stage: type[Stage[Any]]) -> Stage[Any]:
        """Return the stage, divided among the GPUs of the worker if it has several and the stage can use them."""
        params = self._config.profile.params(stage)
        if self._spec.server:
            others = (server for server in stage.places(params) if server != self._spec.server)
            made = stage(params.model_copy(update={"servers": (self._spec.server, *others)}))
            made.jobs = self._config.outputs.remote_jobs
            return made
        divided = None if self._group is None else stage.divided(params)
        return stage(params) if self._group is None or divided is None else self._group.divided(stage, divided)


def worker_class(parallel: int = 1) -> Any:
    """Return the Ray actor class of workers with this many calls at once.

    Ray restarts a crashed process; its caller decides about retries.
    """
    return ray.remote(
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=MAX_CONCURRENT_CALLS - 1 + parallel,
        concurrency_groups={CONTROL: 1},
    )(Worker)


BLOCK_PX = 32
"""Size of the blocks in which images are compared."""


def difference(result: Artefacts, other: Artefacts) -> float:
    """Return the largest mean difference of a block of BLOCK_PX x BLOCK_PX pixels, 0 to 255, between images and clips."""
    pairs = ((result[name], other[name]) for name in ("image", "frames") if name in result)
    return max((_largest(made, expected) for made, expected in pairs), default=0.0)


def _largest(made: Frames, expected: Frames) -> float:
    if made.ndim == 4:
        return max(map(_largest, made, expected))
    apart = np.abs(made.astype(np.int16) - expected).mean(axis=2)
    rows, columns = (np.arange(0, size, BLOCK_PX) for size in apart.shape)
    sums = np.add.reduceat(np.add.reduceat(apart, rows, axis=0), columns, axis=1)
    heights, widths = (np.diff(starts, append=size) for starts, size in zip((rows, columns), apart.shape, strict=True))
    return float((sums / np.outer(heights, widths)).max())


def activity_of_process(others: Iterable[int] = ()) -> float:
    """Return the CPU seconds and the MB read from files of this process and of others with these ids, added."""
    times = os.times()
    activity = times.user + times.system
    for process in ("self", *others):
        with suppress(OSError):
            counters = dict(line.split(": ") for line in Path(f"/proc/{process}/io").read_text().splitlines())
            activity += (int(counters["rchar"]) + int(counters["read_bytes"])) / 1e6
    for process in others:
        with suppress(OSError):
            # User and system time are the 12th and 13th field after the name, which is in brackets.
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            activity += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return activity


def gpu_of_process() -> str:
    """Return the name of the GPU and the version of its driver. Empty without CUDA."""
    if not has_cuda_driver():
        return ""
    import torch

    if not torch.cuda.is_available():
        return ""
    driver = Path("/proc/driver/nvidia/version")
    return f"{torch.cuda.get_device_name()} {driver.read_text().partition(chr(10))[0] if driver.exists() else ''}"


def place_of_process() -> ActorPlace:
    """Return the place of the actor that this process runs."""
    context: Any = ray.get_runtime_context()
    gpus = tuple(context.get_accelerator_ids().get("GPU", ()))
    return ActorPlace(context.get_node_id(), os.getpid(), gpus, os.uname().nodename)
