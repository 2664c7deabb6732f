"""Run stages on several GPUs of one machine: a process for each GPU holds the whole model and computes a part of each step.

The worker that starts the processes sends them every call and takes the result of the first one. It computes nothing itself, so
no failure leaves it waiting for another process. If they cannot work together, it computes alone. Does not depend on Ray.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from math import prod
from mmap import mmap
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from vidgen_ray.errors import Cancelled, VidgenError
from vidgen_ray.render.oom_fallback import prepare_gpu
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import (
    Artefacts,
    ChunkedStage,
    ChunkPart,
    Frames,
    Item,
    Stage,
    StageParams,
    progress_callback,
    report_progress,
)
from vidgen_ray.stages.context_parallel import join_group
from vidgen_ray.system.free_memory import free_gpu_memory, is_out_of_memory

SAME_ERROR_S = 20.0
"""Seconds after an error in one process in which the others have to end the call, too. An error that all processes meet, such
as wrong inputs, leaves them usable. Otherwise the others wait for the one that failed, and all are started again."""
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
RUN, _RUN_CHUNK, _PROGRESS, _DONE, ERROR = "run", "run chunk", "progress", "done", "error"
"""Methods of requests for a result, and kinds of answers."""

StageKind = tuple[type[Stage[Any]], StageParams]


class GroupLost(Exception):
    """The processes of a group crashed, or could not work together."""


class GpuGroup:
    """The processes of one worker. They start with the first call and end with the worker.

    Methods that call the processes raise what the stage raises, Cancelled, and GroupLost after which the group is not used.
    """

    def __init__(self, gpus: int) -> None:
        self._gpus = gpus
        self._stages: dict[str, StageKind] = {}
        self._placed: dict[str, str | None] = {}
        """Loaded stage -> device that it was moved to. `None` if it was not moved."""
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self.lost = ""
        """Why the group is not used any more. Empty if it is."""

    @property
    def pids(self) -> Iterator[int]:
        return (process.pid for process in self._processes)

    def divided(self, stage: type[Stage[Any]], params: StageParams) -> Stage[Any]:
        """Return the stage as one that runs in these processes."""
        self._stages[stage.name] = stage, params
        mixin = _DividedClips if issubclass(stage, ChunkedStage) else DividedStage
        made: Stage[Any] = type(stage.__name__, (mixin, stage), {"group": self})(params)
        return made

    def load(self, name: str) -> None:
        self._call(name, "load")
        self._placed[name] = None

    def move(self, name: str, device: str) -> None:
        self._call(name, "move", device)
        self._placed[name] = device

    def run(self, name: str, params: StageParams, item: Item) -> tuple[Artefacts, tuple[str, ...], int]:
        """Return the artefacts, the notes and the number of loaded LoRAs."""
        free_gpu_memory()
        result: tuple[Artefacts, tuple[str, ...], int] = self._call(name, RUN, params, item)
        return result

    def run_chunk(self, stage: ChunkedStage[Any], shot: Shot, frames: Frames, chunk: slice | None) -> Frames:
        """Return the frames, every process having made those of some calls."""
        free_gpu_memory()
        shape = stage.output_shape(shot, frames, chunk)
        with _shared(frames.shape) as (source, source_file), _shared(shape) as (output, output_file):
            source[:] = frames
            arguments = (shot, (source_file, frames.shape), chunk, (output_file, shape))
            self._call(stage.name, _RUN_CHUNK, stage.params, *arguments)
        return output

    def stop(self) -> None:
        """Kill the processes. The next call starts them again and loads the stages that were loaded."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _call(self, *request: Any) -> Any:
        try:
            if not self._processes:
                self._start()
                for name, device in self._placed.items():
                    self._ask(name, "load")
                    if device is not None:
                        self._ask(name, "move", device)
            return self._ask(*request)
        except Exception as error:
            if isinstance(error, VidgenError) or is_out_of_memory(error):
                raise
            self.stop()
            self.lost = f"{type(error).__name__}: {error}"
            raise GroupLost(self.lost) from error

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="vidgen-group-")
        meeting = Path(self._folder.name) / "meeting"
        visible = os.environ.get(VISIBLE_GPUS)
        gpus: Sequence[str | None] = visible.split(",") if visible else [None] * self._gpus
        for rank in range(self._gpus):
            pipe, other = context.Pipe()
            arguments = (other, rank, self._gpus, gpus[rank], meeting, self._stages)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self._processes.append(process)
            self._pipes.append(pipe)

    def _ask(self, *request: Any) -> Any:
        """Return the answer of the first process to a request to all."""
        for pipe in self._pipes:
            _send(pipe, request)
        results: dict[Connection, Any] = {}
        errors: list[Exception] = []
        asking: dict[Connection, tuple[str, int, int]] = {}
        """Process -> progress after which it waits for the permission to continue."""
        deadline: float | None = None
        while len(results) < self._gpus:
            computing = [pipe for pipe in self._pipes if pipe not in results and pipe not in asking]
            ready = wait(computing, None if deadline is None else max(0.0, deadline - time.monotonic()))
            if not ready:
                self.stop()
                break
            for pipe in [pipe for pipe in computing if pipe in ready]:
                kind, value = _receive(pipe)
                if kind == _PROGRESS:
                    asking[pipe] = value
                    continue
                results[pipe] = value
                if kind == ERROR:
                    errors.append(value)
                    deadline = deadline or time.monotonic() + SAME_ERROR_S
            if asking and len(asking) + len(results) == self._gpus:
                # The calls of a chunk may be more in some processes than in others.
                may_continue = not errors and _report(*next(iter(asking.values())))
                for pipe in asking:
                    _send(pipe, may_continue)
                asking.clear()
        if errors:
            # An error of one process cancels the others.
            raise min(errors, key=lambda error: isinstance(error, Cancelled))
        return results[self._pipes[0]]


class DividedStage(Stage[StageParams]):
    """Mixin of a stage that runs in a group of processes, or in this one if the group is lost. It comes before the stage in the
    base classes."""

    group: GpuGroup
    _adapter_loads = 0
    _is_loaded_here = False

    def load(self) -> None:
        if not self.group.lost:
            with suppress(GroupLost):
                self.group.load(self.name)

    def move(self, device: str) -> None:
        if self._is_loaded_here:
            super().move(device)
        elif not self.group.lost:
            with suppress(GroupLost):
                self.group.move(self.name, device)

    @property
    def adapter_loads(self) -> int:
        return super().adapter_loads if self._is_loaded_here else self._adapter_loads

    def __call__(self, item: Item) -> Artefacts:
        if not self.group.lost:
            with suppress(GroupLost):
                result, notes, self._adapter_loads = self.group.run(self.name, self.params, item)
                self.note(*notes)
                return result
        self._prepare_alone()
        return super().__call__(item)

    def _prepare_alone(self) -> None:
        self.note(f"computed on one GPU, because several could not work together: {self.group.lost}")
        if not self._is_loaded_here:
            super().load()  # type: ignore[safe-super]  # that of the stage, the next base class
            self._is_loaded_here = True


class _DividedClips(DividedStage, ChunkedStage[StageParams]):
    """The same of a stage that makes clips in chunks: every process makes some of them, alone."""

    def run_chunk(
        self, shot: Shot, frames: Frames, chunk: slice | None = None, output: Frames | None = None, share: ChunkPart = (0, 1)
    ) -> Frames:
        if not self.group.lost:
            with suppress(GroupLost):
                return self.group.run_chunk(self, shot, frames, chunk)
        self._prepare_alone()
        return super().run_chunk(shot, frames, chunk, output, share)


@contextmanager
def _shared(shape: tuple[int, ...]) -> Iterator[tuple[Frames, str]]:
    """Yield an array in memory, and a path by which processes of this group can open it. The array stays after the block."""
    file = os.memfd_create("vidgen-frames")
    try:
        os.truncate(file, prod(shape))
        yield np.frombuffer(mmap(file, prod(shape)), np.uint8).reshape(shape), f"/proc/{os.getpid()}/fd/{file}"
    finally:
        os.close(file)


def _report(stage: str, done: int, steps: int) -> bool:
    """Report the progress. Return whether the call may continue."""
    try:
        report_progress(stage, done, steps)
    except Cancelled:
        return False
    return True


def _send(pipe: Connection, message: Any) -> None:
    with suppress(BrokenPipeError):  # the next answer of this process is missing
        pipe.send(message)


def _receive(pipe: Connection) -> tuple[str, Any]:
    """Return the next message of a process. Raises RuntimeError if it has crashed."""
    try:
        message: tuple[str, Any] = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise RuntimeError("the process of a GPU has crashed") from None
    return message


# In the processes of a group


def _serve(pipe: Connection, rank: int, gpus: int, own_gpu: str | None, meeting: Path, kinds: Mapping[str, StageKind]) -> None:
    """Run the requests of the worker until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_worker, daemon=True).start()
    if own_gpu is not None:
        os.environ[VISIBLE_GPUS] = own_gpu
    prepare_gpu(1)
    (device,) = {params.device for _, params in kinds.values()}
    join_group(rank, gpus, meeting, device)
    stages = {name: stage(params) for name, (stage, params) in kinds.items()}
    calls: dict[str, Callable[..., Any]] = {RUN: _run, _RUN_CHUNK: partial(_run_chunk, (rank, gpus))}

    def on_progress(*progress: Any) -> None:
        pipe.send((_PROGRESS, progress))
        if not pipe.recv():
            raise Cancelled

    while True:
        name, method, *arguments = pipe.recv()
        stage = stages[name]
        try:
            with progress_callback(on_progress):
                run = calls.get(method)
                result = getattr(stage, method)(*arguments) if run is None else run(stage, *arguments)
            # The result is the same everywhere.
            answer = (_DONE, result if rank == 0 else None)
        except Exception as error:
            answer = (ERROR, _sendable(error))
        # Also releases the error, which refers to tensors. The worker may have stages of its own on this GPU.
        free_gpu_memory()
        pipe.send(answer)


def _run(stage: Stage[Any], params: StageParams, item: Item) -> tuple[Artefacts, tuple[str, ...], int]:
    stage.params = params
    stage.take_notes()
    result = stage(item)
    return result, stage.take_notes(), stage.adapter_loads


def _run_chunk(
    share: ChunkPart,
    stage: Stage[Any],
    params: StageParams,
    shot: Shot,
    source: tuple[str, tuple[int, ...]],
    chunk: slice | None,
    output: tuple[str, tuple[int, ...]],
) -> None:
    """Write this process' share of the frames. `source`, `output`: path and shape of an array in memory."""
    assert isinstance(stage, ChunkedStage)
    stage.params = params
    frames: Frames = np.memmap(source[0], np.uint8, "r", shape=source[1])
    made: Frames = np.memmap(output[0], np.uint8, "r+", shape=output[1])
    stage.run_chunk(shot, frames, chunk, made, share)


def _sendable(error: Exception) -> Exception:
    """Return an error that can be sent to the worker: this one, or one with its name and message."""
    try:
        same: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return same


def _exit_with_worker() -> None:
    worker = multiprocessing.parent_process()
    assert worker is not None
    wait([worker.sentinel])
    os._exit(1)
