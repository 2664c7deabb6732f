"""Simulated GPUs: an exclusive lock and memory accounting per GPU, and models that sleep while they hold the lock.

Independent of the executor. Processes on one GPU run their calls one after another. Allocating more memory than a GPU has
raises an error, as with CUDA. GPUs and events are stored in a run folder on the local disk, which all processes of a run
share. Times are wall clock times in seconds, which all processes of a machine share.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

TIME_SCALE = float(os.environ.get("VIDGEN_BENCHMARK_TIME_SCALE", "25"))
"""Seconds on an H100 per second of the benchmark. Starting processes is not scaled, so it weighs TIME_SCALE times as much as in
a real run. All processes of a run inherit the variable."""
FRAMES = 25
SECONDS_PER_FRAME = 0.06 / TIME_SCALE
"""Seconds of upscaling per frame."""
LOAD_SECONDS_PER_GB = 0.25 / TIME_SCALE
"""Loading weights from disk: 4 GB/s, scaled."""
SWAP_GB_PER_SECOND = 25 * TIME_SCALE
"""Transfer rate between host and GPU memory: PCIe 4 x16, scaled."""
IMAGE_SHAPE = (128, 320, 3)
"""0.1 MB of uint8."""
FRAMES_SHAPE = (FRAMES, *IMAGE_SHAPE)
"""3 MB of uint8."""
SCALE = 2
UPSCALED_SHAPE = (FRAMES, *(SCALE * side for side in IMAGE_SHAPE[:2]), 3)
"""12 MB of uint8."""
CLIP_BYTES = 100_000
"""Size of the output file of a shot."""

MODEL_GB = {"instantid": 1.0, "flux": 34.0, "svd": 20.0, "realesrgan": 6.0}
"""Model -> GB of weights and working memory."""
SLOW = 20
"""Factor of the seconds of a slow GPU."""
SWAP, COMMIT, READY = "swap", "commit", "ready"
"""Names of events that are not stages. READY: a process has loaded a model."""


class StageCost(NamedTuple):
    """Cost of a stage."""

    seconds: float
    """Seconds per shot."""
    model: str


STAGES = {
    "instantid": StageCost(0.1 / TIME_SCALE, "instantid"),
    "flux": StageCost(4.25 / TIME_SCALE, "flux"),
    "lora": StageCost(1.75 / TIME_SCALE, "flux"),
    "svd": StageCost(22.5 / TIME_SCALE, "svd"),
    "realesrgan": StageCost(FRAMES * SECONDS_PER_FRAME, "realesrgan"),
}
"""Stages in order. Seconds have the proportions of the models on an H100."""
CHAIN = tuple(STAGES)
SECONDS_PER_SHOT = sum(stage.seconds for stage in STAGES.values())


class OutOfMemoryError(RuntimeError):
    """A simulated GPU is out of memory."""


class DoesNotFit(Exception):
    """A system cannot run on these GPUs."""


@dataclass(frozen=True, slots=True)
class Event:
    """Use of a GPU from `t0` to `t1`, a loaded model (t0 = t1) or a commit (gpu -1, t0 = t1)."""

    stage: str
    shot: str
    """Id of the shot. Empty if unknown, as for chunks of frames."""
    gpu: int
    t0: float
    t1: float
    pid: int
    seconds: float
    """Seconds of useful work, as requested. Excludes swapping, and oversleeping on a busy machine."""


def prepare(run_folder: Path, gpus: int, memory_gb: float) -> None:
    """Initialise a run folder with `gpus` GPUs of `memory_gb` each."""
    for gpu in range(gpus):
        (run_folder / f"gpu-{gpu}" / "memory").mkdir(parents=True)
    for name in ("events", "claims", "clips"):
        (run_folder / name).mkdir()
    (run_folder / "gpus.json").write_text(json.dumps({"gpus": gpus, "memory_gb": memory_gb}))


def record(run_folder: Path, event: Event) -> None:
    """Append an event to the file of this process, in a single write, so that a killed process leaves no partial line."""
    line = json.dumps(asdict(event)) + "\n"
    file = os.open(run_folder / "events" / f"{event.pid}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def events(run_folder: Path) -> list[Event]:
    """Return all events of a run, ordered by start time."""
    files = (run_folder / "events").glob("*.jsonl")
    recorded = [Event(**json.loads(line)) for file in files for line in file.read_text().splitlines()]
    return sorted(recorded, key=lambda event: event.t0)


def commit(run_folder: Path, shot: str) -> None:
    """Write the output file of a shot atomically, and record the commit."""
    file = run_folder / "clips" / f"{shot}.mp4"
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(bytes(CLIP_BYTES))
    temporary.rename(file)
    now = time.time()
    record(run_folder, Event(COMMIT, shot, -1, now, now, os.getpid(), 0.0))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock during the block. The kernel releases the lock of a process that dies."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class SimulatedGPU:
    """One GPU of a run folder. Can be used by several processes."""

    _numbers = count()

    def __init__(self, run_folder: Path, index: int) -> None:
        config = json.loads((run_folder / "gpus.json").read_text())
        if not 0 <= index < config["gpus"]:
            raise ValueError(f"GPU {index}: this run has {config['gpus']}, counted from 0")
        self.run_folder = run_folder
        self.index = index
        self.memory_gb = float(config["memory_gb"])
        self._folder = run_folder / f"gpu-{index}"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the exclusive lock of the GPU during the block.

        The turnstile lock makes this fair: a process that releases the lock and requests it again waits behind the others.
        """
        with open(self._folder / "compute.lock", "a") as compute:
            with _locked(self._folder / "turnstile.lock"):
                fcntl.flock(compute, fcntl.LOCK_EX)
            yield

    def busy(self, seconds: float, stage: str, shot: str, work_seconds: float) -> None:
        """Occupy the GPU exclusively for `seconds`, and record an event."""
        with self.exclusive():
            t0 = time.time()
            time.sleep(seconds)
            t1 = time.time()
        record(self.run_folder, Event(stage, shot, self.index, t0, t1, os.getpid(), work_seconds))

    def allocate(self, gb: float, what: str) -> IO[bytes]:
        """Allocate memory. Closing the result, or the end of the process, frees it. Raises OutOfMemoryError.

        Each allocation is a file that its owner keeps locked. A file that can be locked has no owner any more.
        """
        with _locked(self._folder / "memory.lock"):
            used_gb = sum(self._allocated_gb(entry) for entry in (self._folder / "memory").iterdir())
            if used_gb + gb > self.memory_gb:
                raise OutOfMemoryError(
                    f"CUDA out of memory (simulated): {what} needs {gb:g} GB, GPU {self.index} has "
                    f"{self.memory_gb - used_gb:g} of {self.memory_gb:g} GB free"
                )
            entry = open(self._folder / "memory" / f"{gb}_{what}_{os.getpid()}_{next(self._numbers)}", "wb")  # noqa: SIM115
            fcntl.flock(entry, fcntl.LOCK_EX)
        return entry

    @staticmethod
    def _allocated_gb(entry: Path) -> float:
        """Return the memory of an allocation. Removes it if it has no owner."""
        with open(entry, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return float(entry.name.split("_")[0])
        entry.unlink()
        return 0.0


def assigned_gpu() -> int:
    """Return the GPU that Ray assigned to this process, else the one in CUDA_VISIBLE_DEVICES."""
    import ray

    assigned: list[str] = ray.get_runtime_context().get_accelerator_ids().get("GPU", []) if ray.is_initialized() else []
    assigned = assigned or [index for index in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if index]
    if len(assigned) != 1:
        raise RuntimeError(f"assigned GPUs: got {assigned}, must be exactly one")
    return int(assigned[0])


_claims: list[IO[str]] = []


def claimed_gpu(run_folder: Path, pool: str) -> int:
    """Claim a GPU that no other running process has claimed for this pool, until this process exits."""
    gpus = json.loads((run_folder / "gpus.json").read_text())["gpus"]
    for gpu in range(gpus):
        file = open(run_folder / "claims" / f"{pool}-{gpu}", "a")  # noqa: SIM115  # stays open until the process exits
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _claims.append(file)
        return gpu
    raise RuntimeError(f"all {gpus} GPUs already have a process of pool {pool}")


def inject(run_folder: Path, **fault: Any) -> None:
    """Let the GPUs of a run fail. `kind`: `kill`, `hang`, `poison`, `sick` or `slow`, of the `gpu` or the `shot`."""
    (run_folder / "fault.json").write_text(json.dumps(fault))


def _inject_fault(gpu: SimulatedGPU, stage: str, shot: str) -> float:
    """Fail, or return by how much the call is slower. `kill` and `hang` happen once, in the call of a shot."""
    try:
        fault = json.loads((gpu.run_folder / "fault.json").read_text())
    except FileNotFoundError:
        return 1.0
    if fault.get("gpu") == gpu.index:
        if fault["kind"] == "sick":
            raise RuntimeError("CUDA error: an illegal memory access was encountered (simulated)")
        return float(SLOW)
    if fault.get("shot") == shot and stage == "svd":
        if fault["kind"] != "poison":
            try:
                (gpu.run_folder / "happened").touch(exist_ok=False)
            except FileExistsError:
                return 1.0
        if fault["kind"] == "hang":
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


class SimulatedModel:
    """Model weights in GPU memory. Loading takes time but does not lock the GPU; swapping does both."""

    def __init__(self, name: str, gpu: SimulatedGPU) -> None:
        self.name = name
        self.gb = MODEL_GB[name]
        self._gpu = gpu
        self._memory: IO[bytes] | None = gpu.allocate(self.gb, name)
        time.sleep(self.gb * LOAD_SECONDS_PER_GB)
        now = time.time()
        record(gpu.run_folder, Event(READY, "", gpu.index, now, now, os.getpid(), 0.0))

    def to_host(self) -> None:
        """Drop the weights on the GPU. A copy is in host memory."""
        if self._memory is not None:
            self.close()

    def to_gpu(self) -> None:
        """Move the weights to GPU memory. Raises OutOfMemoryError."""
        if self._memory is None:
            self._memory = self._gpu.allocate(self.gb, self.name)
            self._gpu.busy(self.gb / SWAP_GB_PER_SECOND, SWAP, "", 0.0)

    def work(self, stage: str, shot: str, seconds: float) -> None:
        """Occupy the GPU for one call of a stage."""
        if self._memory is None:
            raise RuntimeError(f"{self.name} is in host memory, {stage} needs it on GPU {self._gpu.index}")
        self._gpu.busy(seconds * _inject_fault(self._gpu, stage, shot), stage, shot, seconds)

    def close(self) -> None:
        """Free the GPU memory. Can be called twice."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None


Payload = dict[str, NDArray[np.generic]]
"""Data that a shot passes from stage to stage."""


class Models:
    """Models of some stages on one GPU, for executors other than vidgen.

    With `turns`, only one of FLUX and SVD is in GPU memory at a time.
    """

    def __init__(self, run_folder: Path, stages: Sequence[str], gpu: int | None = None, *, turns: bool = False) -> None:
        self._run_folder = run_folder
        device = SimulatedGPU(run_folder, assigned_gpu() if gpu is None else gpu)
        self._turns = ("flux", "svd") if turns else ()
        self._models: dict[str, SimulatedModel] = {}
        for name in dict.fromkeys(STAGES[stage].model for stage in stages):
            self._models[name] = SimulatedModel(name, device)
            if name in self._turns:
                self._models[name].to_host()

    def run(self, stage: str, shot: str, payload: Payload) -> Payload:
        """Run one stage of a shot. The last stage commits the shot."""
        seconds, name = STAGES[stage]
        if name in self._turns:
            for other in self._turns:
                if other != name:
                    self._models[other].to_host()
            self._models[name].to_gpu()
        self._models[name].work(stage, shot, seconds)
        if stage == "instantid":
            return {"face": np.full(512, 0.5, np.float32)}
        if stage == "flux":
            return {"image": gradient(IMAGE_SHAPE, 100)}
        if stage == "lora":
            return {"image": payload["image"] + np.uint8(1)}
        if stage == "svd":
            return {"frames": gradient(FRAMES_SHAPE, payload["image"].flat[0])}
        assert payload["frames"].shape == FRAMES_SHAPE
        gradient(UPSCALED_SHAPE, 0)
        commit(self._run_folder, shot)
        return {}


@cache
def gradient(shape: tuple[int, ...], value: int) -> NDArray[np.uint8]:
    """Return pixels (..., H, W, 3) whose columns have different values, from `value` on, as those of an image.

    Each process makes them once: the work of real models is not measured.
    """
    row = (np.arange(shape[-2]) + value).astype(np.uint8).repeat(shape[-1])
    pixels = np.broadcast_to(row, (math.prod(shape[:-2]), row.size)).copy().reshape(shape)
    pixels.flags.writeable = False
    return pixels


def shot_ids(shots: int) -> list[str]:
    return [f"shot-{n:05d}" for n in range(shots)]
