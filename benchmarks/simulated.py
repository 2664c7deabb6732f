"""Simulated GPUs: an exclusive lock and a memory ledger per card, and models whose work is to sleep under that lock.

Knows nothing of any executor. Two processes on one card take turns, whole calls at a time; a card that is asked for more
memory than it has says so as CUDA does. Cards and what happened on them live in a run folder on the local disk, shared by
all processes of a run. Times are seconds of the wall clock, which the processes of one machine share.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

TIME_SCALE = 25
"""How much shorter simulated seconds are than those of an H100: FLUX takes 4.3 s there, SVD 22.6 s."""
FRAMES = 25
SECONDS_PER_FRAME = 0.0024
"""Of upscaling."""
LOAD_SECONDS_PER_GB = 0.01
"""Loading from disk: 4 GB a second, scaled."""
SWAP_GB_PER_SECOND = 25 * TIME_SCALE
"""Between host and card: what PCIe 4 x16 carries, scaled."""
IMAGE_SHAPE = (1024, 1024, 3)
"""3 MB of uint8."""
FRAMES_SHAPE = (FRAMES, 256, 576, 3)
"""11 MB of uint8."""
CLIP_BYTES = 100_000
"""What a shot leaves on disk."""

MODEL_GB = {"instantid": 1.0, "flux": 34.0, "svd": 20.0, "realesrgan": 6.0}
"""Weights and working memory together."""
SWAP, COMMIT = "swap", "commit"
"""Of events that are no stage."""


class StageCost(NamedTuple):
    seconds: float
    """Of one shot."""
    model: str


STAGES = {
    "instantid": StageCost(0.004, "instantid"),
    "flux": StageCost(0.17, "flux"),
    "lora": StageCost(0.07, "flux"),
    "svd": StageCost(0.90, "svd"),
    "realesrgan": StageCost(FRAMES * SECONDS_PER_FRAME, "realesrgan"),
}
"""In the order of the chain, in the proportions of the models on an H100."""
CHAIN = tuple(STAGES)
SECONDS_PER_SHOT = sum(stage.seconds for stage in STAGES.values())


class OutOfMemoryError(RuntimeError):
    """A simulated card has no room left."""


class DoesNotFit(Exception):
    """A system has no way to run on these cards."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that took a card from `t0` to `t1`, or a commit (gpu -1, an instant)."""

    stage: str
    shot: str
    """Empty where the work does not know whose it is, as with a chunk of frames."""
    gpu: int
    t0: float
    t1: float
    pid: int
    seconds: float
    """Of useful work: what it was asked to take. Sleeping longer on a busy machine is no work, nor is swapping."""


def prepare(run_folder: Path, gpus: int, memory_gb: float) -> None:
    """Make a run folder with so many cards of so much memory."""
    for gpu in range(gpus):
        (run_folder / f"gpu-{gpu}" / "memory").mkdir(parents=True)
    for name in ("events", "claims", "clips"):
        (run_folder / name).mkdir()
    (run_folder / "cards.json").write_text(json.dumps({"gpus": gpus, "memory_gb": memory_gb}))


def record(run_folder: Path, event: Event) -> None:
    """Append to this process's own file, by one write, so that a killed process leaves whole lines."""
    line = json.dumps(asdict(event)) + "\n"
    file = os.open(run_folder / "events" / f"{event.pid}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def events(run_folder: Path) -> list[Event]:
    """All that happened in a run, by time of start."""
    files = (run_folder / "events").glob("*.jsonl")
    found = [Event(**json.loads(line)) for file in files for line in file.read_text().splitlines()]
    return sorted(found, key=lambda event: event.t0)


def commit(run_folder: Path, shot: str) -> None:
    """Leave the shot's file, by rename, as a renderer would."""
    file = run_folder / "clips" / f"{shot}.mp4"
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_bytes(bytes(CLIP_BYTES))
    unfinished.rename(file)
    now = time.time()
    record(run_folder, Event(COMMIT, shot, -1, now, now, os.getpid(), 0.0))


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """A block that one thread of one process runs at a time. The kernel lets go of the lock of a process that dies."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class SimulatedGPU:
    """One card of a run folder, as any process sees it."""

    _numbers = count()

    def __init__(self, run_folder: Path, index: int) -> None:
        cards = json.loads((run_folder / "cards.json").read_text())
        if not 0 <= index < cards["gpus"]:
            raise ValueError(f"GPU {index}: this run has {cards['gpus']}, counted from 0")
        self.run_folder = run_folder
        self.index = index
        self.memory_gb = float(cards["memory_gb"])
        self._folder = run_folder / f"gpu-{index}"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Have the card's compute units alone.

        Whoever lets go and comes back at once finds those who waited at the turnstile before it, so nobody starves.
        """
        with open(self._folder / "compute.lock", "a") as compute:
            with _held(self._folder / "turnstile.lock"):
                fcntl.flock(compute, fcntl.LOCK_EX)
            yield

    def busy(self, seconds: float, stage: str, shot: str, work_seconds: float) -> None:
        """Keep the card busy, alone, and record it."""
        with self.exclusive():
            t0 = time.time()
            time.sleep(seconds)
            t1 = time.time()
        record(self.run_folder, Event(stage, shot, self.index, t0, t1, os.getpid(), work_seconds))

    def allocate(self, gb: float, what: str) -> IO[bytes]:
        """Take memory; closing the result, or the end of the process, gives it back. Raises OutOfMemoryError.

        An entry of the ledger is a file that its owner holds locked: one that can be locked belongs to nobody any more.
        """
        with _held(self._folder / "ledger.lock"):
            used_gb = sum(self._gb_of(entry) for entry in (self._folder / "memory").iterdir())
            if used_gb + gb > self.memory_gb:
                raise OutOfMemoryError(
                    f"CUDA out of memory (simulated): {what} needs {gb:g} GB, GPU {self.index} has "
                    f"{self.memory_gb - used_gb:g} of {self.memory_gb:g} GB free"
                )
            entry = open(self._folder / "memory" / f"{gb}_{what}_{os.getpid()}_{next(self._numbers)}", "wb")  # noqa: SIM115
            fcntl.flock(entry, fcntl.LOCK_EX)
        return entry

    @staticmethod
    def _gb_of(entry: Path) -> float:
        """How much memory an entry holds; one without an owner is removed."""
        with open(entry, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return float(entry.name.split("_")[0])
        entry.unlink()
        return 0.0


def assigned_gpu() -> int:
    """The card that Ray gave this process, or else the one in CUDA_VISIBLE_DEVICES."""
    import ray

    given: list[str] = ray.get_runtime_context().get_accelerator_ids().get("GPU", []) if ray.is_initialized() else []
    given = given or [index for index in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if index]
    if len(given) != 1:
        raise RuntimeError(f"got the GPUs {given}, a simulated model lives on exactly one")
    return int(given[0])


_claims: list[IO[str]] = []


def claimed_gpu(run_folder: Path, pool: str) -> int:
    """A card that no other living process has claimed for this pool, for the rest of this process's life."""
    gpus = json.loads((run_folder / "cards.json").read_text())["gpus"]
    for gpu in range(gpus):
        file = open(run_folder / "claims" / f"{pool}-{gpu}", "a")  # noqa: SIM115  # open while the process lives
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _claims.append(file)
        return gpu
    raise RuntimeError(f"each of the {gpus} GPUs has a process of pool {pool} already")


class SimulatedModel:
    """Weights in a card's memory. Loading takes time but not the card; swapping takes both."""

    def __init__(self, name: str, gpu: SimulatedGPU) -> None:
        self.name = name
        self.gb = MODEL_GB[name]
        self._gpu = gpu
        self._memory: IO[bytes] | None = gpu.allocate(self.gb, name)
        time.sleep(self.gb * LOAD_SECONDS_PER_GB)

    def to_host(self) -> None:
        if self._memory is not None:
            self._gpu.busy(self.gb / SWAP_GB_PER_SECOND, SWAP, "", 0.0)
            self.close()

    def to_gpu(self) -> None:
        """Raises OutOfMemoryError."""
        if self._memory is None:
            self._memory = self._gpu.allocate(self.gb, self.name)
            self._gpu.busy(self.gb / SWAP_GB_PER_SECOND, SWAP, "", 0.0)

    def work(self, stage: str, shot: str, seconds: float) -> None:
        if self._memory is None:
            raise RuntimeError(f"{self.name} is in the host's memory, {stage} needs it on GPU {self._gpu.index}")
        self._gpu.busy(seconds, stage, shot, seconds)

    def close(self) -> None:
        """Give the memory back. Safe to call twice."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None


Payload = dict[str, NDArray[np.generic]]
"""What a shot carries from stage to stage."""


class Models:
    """The models of some stages of the chain on one card, for executors that know nothing of vidgen.

    With `turns` FLUX and SVD are on the card one at a time.
    """

    def __init__(self, run_folder: Path, stages: Sequence[str], gpu: int | None = None, *, turns: bool = False) -> None:
        self._run_folder = run_folder
        card = SimulatedGPU(run_folder, assigned_gpu() if gpu is None else gpu)
        self._turns = ("flux", "svd") if turns else ()
        self._models: dict[str, SimulatedModel] = {}
        for name in dict.fromkeys(STAGES[stage].model for stage in stages):
            self._models[name] = SimulatedModel(name, card)
            if name in self._turns:
                self._models[name].to_host()

    def run(self, stage: str, shot: str, payload: Payload) -> Payload:
        """One stage of one shot; the last one commits it."""
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
            return {"image": np.full(IMAGE_SHAPE, 100, np.uint8)}
        if stage == "lora":
            return {"image": payload["image"] + np.uint8(1)}
        if stage == "svd":
            return {"frames": np.full(FRAMES_SHAPE, payload["image"].flat[0], np.uint8)}
        assert payload["frames"].shape == FRAMES_SHAPE
        commit(self._run_folder, shot)
        return {}


def shot_ids(shots: int) -> list[str]:
    return [f"shot-{n:05d}" for n in range(shots)]
