"""Find the fastest settings of a network on this machine by measuring them, and keep the result in the cache folder."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from vidgen_ray.errors import VidgenError
from vidgen_ray.system.cache_dir import cache_dir
from vidgen_ray.system.files import write_atomically
from vidgen_ray.upscale.frames import Pixels
from vidgen_ray.upscale.network import EngineSettings, UpscaleModel, UpscaleNetwork, has_openvino, runs_in_openvino, usable_cpus

CPUINFO = Path("/proc/cpuinfo")
FRAME_SIZE = 256, 144
"""Width and height in pixels of the frames that are measured, smaller ones if the network is slow."""
MAX_FRAME_S = 0.6
"""Seconds that a frame may take in the measurement."""
ROUNDS = 5
PARALLEL_ROUNDS = 3
"""Calls of each thread in a round of several calls at the same time."""
MAX_PARALLEL_CALLS = 4
"""Calls at the same time in one worker. Further ones get a worker of their own, since a worker has one encoder."""
MIN_PSNR_DB = 50.0
"""Similarity to float32 below which settings are not chosen, however fast they are."""
MIN_GAIN = 1.05
"""Settings that cost more memory or a longer start are chosen if they are faster by this factor at least."""
PARALLEL_GAIN = 1.1
"""Factor by which parallel calls gain beside an encoder, which is not measured: threads of one call wait for each other."""
COMPILE_S = 60.0
"""Seconds that the estimate allows for torch.compile."""
CALIBRATION_VERSION = 2


class Measurement(BaseModel):
    """One measured setting."""

    model_config = ConfigDict(frozen=True)

    settings: EngineSettings
    workers: int = 1
    seconds_per_frame: float
    """Seconds per frame of `Calibration.frame_size`, of all workers together."""
    psnr_db: float | None
    """Similarity to torch in float32. `None` if there is no difference."""


class Calibration(BaseModel):
    """The settings that were chosen for a network on this machine, and what was measured."""

    model_config = ConfigDict(frozen=True)

    settings: EngineSettings
    workers: int
    frame_size: tuple[int, int]
    machine: str
    measured: tuple[Measurement, ...]
    failed: tuple[str, ...] = ()
    """Settings that cannot run here, with the reason."""

    def with_workers(self, workers: int) -> Calibration:
        """Return a copy with another number of workers, which share the CPUs."""
        threads = max(1, self.settings.threads * self.workers // workers)
        update = {"threads": threads, "parallel_calls": min(threads, self.settings.parallel_calls)}
        return self.model_copy(update={"workers": workers, "settings": self.settings.model_copy(update=update)})

    def report(self) -> Iterator[str]:
        """Yield lines that say what was measured, what was chosen and why."""
        width, height = self.frame_size
        yield f"{self.machine}; milliseconds per frame of {width}x{height}, similarity to float32:"
        for one in sorted(self.measured, key=lambda one: one.seconds_per_frame):
            similarity = "same pixels" if one.psnr_db is None else f"{one.psnr_db:.1f} dB"
            chosen = "  <- chosen" if (one.settings, one.workers) == (self.settings, self.workers) else ""
            plural = "s" if one.workers > 1 else ""
            yield f"  {one.seconds_per_frame * 1000:8.1f}  {one.settings}, {one.workers} worker{plural}, {similarity}{chosen}"
        yield from (f"  {text}" for text in self.failed)
        yield (
            f"chosen: the fastest with at least {MIN_PSNR_DB:g} dB, simpler ones unless others gain {MIN_GAIN - 1:.0%}; "
            f"several calls at the same time, which gain beside an encoder, unless they lose {PARALLEL_GAIN - 1:.0%}"
        )


class CalibrationProgress(NamedTuple):
    """State of a calibration before its next call."""

    activity: str
    """The settings that are loaded, compiled or measured now."""
    frames: int
    """Frames measured so far."""
    total: int
    """Frames to measure. It changes when settings turn out to be unusable or not worth measuring. 0: not known yet."""
    left_s: float | None
    """Estimated seconds until the end. `None` before the first frame."""


CalibrationListener = Callable[[CalibrationProgress], object]

_CalibrationFile = TypeAdapter(dict[str, Calibration])


def calibrate(
    model: UpscaleModel, device: str, *, again: bool = False, on_progress: CalibrationListener = lambda progress: None
) -> Calibration:
    """Return the calibration of a network on this machine, measured if it is not in the cache folder, or if `again`.

    Takes up to some minutes, because of torch.compile. `on_progress` is called before each call of a network, and
    never if the result comes from the cache folder.
    """
    key = "; ".join([str(CALIBRATION_VERSION), _machine(device), _versions(), model.key])
    stored = _read()
    if key in stored and not again:
        return stored[key]
    calibration = _measure(model, device, _Meter(on_progress))
    # If the file cannot be written, the next run measures again.
    with suppress(OSError):
        cache_dir().mkdir(parents=True, exist_ok=True)
        with FileLock(f"{_file()}.lock"):
            content = _CalibrationFile.dump_python({**_read(), key: calibration}, mode="json")
            write_atomically(_file(), json.dumps(content, indent=1, sort_keys=True) + "\n")
    return calibration


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return f"{cpu_model()}, {usable_cpus()} CPUs"


def _versions() -> str:
    found = []
    for package in ("torch", "openvino", "spandrel"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


class _Meter:
    """Times the calls of networks, and reports before each one what is left to do."""

    def __init__(self, on_progress: CalibrationListener) -> None:
        self._on_progress = on_progress
        self._frames, self._seconds = 0, 0.0
        self.frames_left = 0
        self.compile_left_s = 0.0

    def report(self, activity: str) -> None:
        left_s = self.compile_left_s + self.frames_left * self._seconds / self._frames if self._frames else None
        self._on_progress(CalibrationProgress(activity, self._frames, self._frames + self.frames_left, left_s))

    def run(self, activity: str, frames: int, function: Callable[[], object]) -> float:
        """Call the function, which processes so many frames. Return its seconds."""
        self.report(activity)
        seconds = _seconds(function)
        self._frames += frames
        self._seconds += seconds
        self.frames_left -= frames
        return seconds

    def compile(self, activity: str, function: Callable[[], object]) -> None:
        """Call the function, which compiles a network. Its seconds tell nothing about those of a frame."""
        self.report(activity)
        try:
            function()
        finally:
            self.compile_left_s = 0.0


def _measure(model: UpscaleModel, device: str, meter: _Meter) -> Calibration:
    meter.report(f"loading {model.name}")
    cpus = usable_cpus()
    base = EngineSettings(device=device, threads=cpus)
    frames = _frames(model, base)
    reference = UpscaleNetwork(model, base)
    expected = reference(frames[:1])[0]
    call_counts = [count for count in dict.fromkeys((2, cpus)) if 2 <= count <= cpus] if device == "cpu" else []
    frames_of_parallel = sum(_frames_of_parallel(count) for count in call_counts)
    frames_of_compiled = 2 * ROUNDS if can_compile() else 0
    meter.compile_left_s = COMPILE_S if can_compile() else 0.0
    bench = _Bench(model, frames, expected, meter)
    frames_of_pair = len(frames) + ROUNDS * (len(frames) + 1)
    bench.add([base, *_candidates(reference, base)], later=frames_of_pair + frames_of_compiled + frames_of_parallel)
    best = bench.best()
    bench.add([best.model_copy(update={"frames_per_call": len(frames)})], later=frames_of_compiled + frames_of_parallel)
    best = bench.best()
    if best.engine == "torch" and can_compile():
        bench.add([best.model_copy(update={"compiled": True})], later=frames_of_parallel)
        best = bench.best()
    meter.compile_left_s = 0.0
    measured = bench.measurements()
    single = min((one for one in measured if one.settings == best), key=lambda one: one.seconds_per_frame)
    parallel = []
    for index, count in enumerate(call_counts):
        later = sum(_frames_of_parallel(other, best.frames_per_call) for other in call_counts[index + 1 :])
        parallel.append(bench.in_parallel(best, count, later=later))
    fastest = min(parallel, key=lambda one: one.seconds_per_frame, default=single)
    if fastest.seconds_per_frame > PARALLEL_GAIN * single.seconds_per_frame:
        fastest = single
    height, width = frames[0].shape[:2]
    return Calibration(
        settings=fastest.settings,
        workers=fastest.workers,
        frame_size=(width, height),
        machine=_machine(device),
        measured=(*measured, *parallel),
        failed=tuple(bench.failed),
    )


def _candidates(network: UpscaleNetwork, base: EngineSettings) -> Iterator[EngineSettings]:
    """Yield further engines and dtypes that this machine and the network support."""
    on_gpu = base.device != "cpu"
    if on_gpu and network.network.supports_half:
        yield base.model_copy(update={"dtype": "float16"})
    if network.network.supports_bfloat16 and (on_gpu or cpu_has_bfloat16()):
        yield base.model_copy(update={"dtype": "bfloat16"})
    if not on_gpu and has_openvino() and runs_in_openvino(network.network):
        yield base.model_copy(update={"engine": "openvino"})
        if cpu_has_bfloat16():
            yield base.model_copy(update={"engine": "openvino", "dtype": "bfloat16"})


def can_compile() -> bool:
    """Return whether torch.compile finds a C++ compiler."""
    return any(which(name) for name in ("g++", "c++", "clang++"))


def _frames(model: UpscaleModel, settings: EngineSettings) -> list[Pixels]:
    """Return two frames, so small that the network takes at most MAX_FRAME_S for one."""
    rng = np.random.default_rng(0)
    network = UpscaleNetwork(model, settings)
    width, height = 64, 36
    small = _picture(rng, width, height)
    network([small])
    seconds = min(_seconds(lambda: network([small])) for _ in range(ROUNDS))
    while (width * 2, height * 2) <= FRAME_SIZE and seconds * 4 <= MAX_FRAME_S:
        width, height, seconds = width * 2, height * 2, seconds * 4
    return [_picture(rng, width, height) for _ in range(2)]


def _picture(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Return a frame with gradients, edges and some noise, as a photo has."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / rng.uniform(3, 30) + rng.uniform(0, 6)) + np.cos(y / rng.uniform(3, 30)) for _ in range(3)]
    picture = (
        np.stack(waves, -1) * 40 + 128 + 60 * ((x // 24 + y // 18) % 2)[..., None] - 30 + rng.normal(0, 3, (height, width, 3))
    )
    levels: Pixels = picture.clip(0, 255).astype(np.uint8)
    return levels


class _Bench:
    """Measures settings in turns, so that other load of the machine affects all of them."""

    def __init__(self, model: UpscaleModel, frames: Sequence[Pixels], expected: Pixels, meter: _Meter) -> None:
        self._model, self._frames, self._expected, self._meter = model, frames, expected, meter
        self._networks: dict[EngineSettings, UpscaleNetwork] = {}
        self._seconds: dict[EngineSettings, float] = {}
        self._psnr: dict[EngineSettings, float | None] = {}
        self.failed: list[str] = []

    def add(self, candidates: Sequence[EngineSettings], *, later: int) -> None:
        """Measure these settings beside the best so far. `later`: frames to measure after this call, for the estimate."""
        first_frames = {settings: 0 if settings.compiled else settings.frames_per_call for settings in candidates}
        frames_of_rounds = ROUNDS * sum(settings.frames_per_call for settings in (*self._networks, *candidates))
        self._meter.frames_left = sum(first_frames.values()) + frames_of_rounds + later
        for settings in candidates:
            try:
                if settings.compiled:
                    self._meter.compile(f"compiling {settings}", partial(self._load, settings))
                else:
                    self._meter.run(f"loading {settings}", first_frames[settings], partial(self._load, settings))
            # An engine or a compiler that does not work here must not end the run: others do.
            except Exception as error:
                reason = str(error).strip().partition("\n")[0] if isinstance(error, VidgenError) else type(error).__name__
                self.failed.append(f"{settings}: cannot be used ({reason})")
                self._meter.frames_left -= first_frames[settings] + ROUNDS * settings.frames_per_call
        for _ in range(ROUNDS):
            for settings, network in self._networks.items():
                seconds = self._meter.run(f"measuring {settings}", settings.frames_per_call, partial(self._run, network))
                self._seconds[settings] = min(self._seconds[settings], seconds / settings.frames_per_call)
        best = self.best()
        self._networks = {settings: network for settings, network in self._networks.items() if settings == best}

    def _load(self, settings: EngineSettings) -> None:
        """Load a network, and compare its first frame with float32."""
        network = UpscaleNetwork(self._model, settings)
        self._psnr[settings] = _psnr_db(self._run(network)[0], self._expected)
        self._networks[settings] = network
        self._seconds[settings] = float("inf")

    def _run(self, network: UpscaleNetwork) -> list[Pixels]:
        return network(self._frames[: network.settings.frames_per_call])

    def best(self) -> EngineSettings:
        """Return the fastest settings that are close to float32. Later ones must gain MIN_GAIN."""
        best, *others = (one for one in self.measurements() if _is_close(one))
        for other in others:
            if best.seconds_per_frame >= MIN_GAIN * other.seconds_per_frame:
                best = other
        return best.settings

    def measurements(self) -> list[Measurement]:
        return [
            Measurement(settings=settings, seconds_per_frame=seconds, psnr_db=self._psnr[settings])
            for settings, seconds in self._seconds.items()
        ]

    def in_parallel(self, best: EngineSettings, calls: int, *, later: int) -> Measurement:
        """Measure the best settings with so many calls at the same time. `later`: as for `add`."""
        settings, workers = _divided(best, calls)
        count = workers * settings.parallel_calls
        self._meter.frames_left = _frames_of_parallel(count, settings.frames_per_call) + later
        name = f"{settings}, {workers} workers" if workers > 1 else str(settings)
        networks: list[UpscaleNetwork] = []
        with ThreadPoolExecutor(count) as pool:

            def load() -> None:
                loaded = [UpscaleNetwork(self._model, settings)] * settings.parallel_calls
                list(pool.map(self._run, loaded))
                networks.extend(loaded)

            for _ in range(workers):
                self._meter.run(f"loading {name}", settings.parallel_calls * settings.frames_per_call, load)

            def run(network: UpscaleNetwork) -> None:
                for _ in range(PARALLEL_ROUNDS):
                    self._run(network)

            frames = PARALLEL_ROUNDS * count * settings.frames_per_call
            seconds = min(
                self._meter.run(f"measuring {name}", frames, lambda: list(pool.map(run, networks))) for _ in range(ROUNDS)
            )
        return Measurement(settings=settings, workers=workers, seconds_per_frame=seconds / frames, psnr_db=self._psnr[best])


def _frames_of_parallel(calls: int, frames_per_call: int = 1) -> int:
    """Return the frames that `_Bench.in_parallel` processes."""
    return calls * frames_per_call * (1 + ROUNDS * PARALLEL_ROUNDS)


def _divided(settings: EngineSettings, calls: int) -> tuple[EngineSettings, int]:
    """Return settings with so many calls at the same time on the CPUs of one call, and the number of workers for them."""
    workers = math.ceil(calls / MAX_PARALLEL_CALLS)
    update = {"threads": settings.threads // workers, "parallel_calls": calls // workers}
    return settings.model_copy(update=update), workers


def _is_close(measurement: Measurement) -> bool:
    return measurement.psnr_db is None or measurement.psnr_db >= MIN_PSNR_DB


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _psnr_db(got: Pixels, expected: Pixels) -> float | None:
    error = float(np.mean((got.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return None if error == 0 else float(10 * np.log10(255**2 / error))


def _file() -> Path:
    return cache_dir() / "upscale-calibration.json"


def _read() -> dict[str, Calibration]:
    try:
        return _CalibrationFile.validate_json(_file().read_bytes())
    except (OSError, ValidationError):
        return {}


def cpu_has_bfloat16() -> bool:
    """Return whether the CPU has AVX512-BF16 or AMX. Detected on Linux only."""
    flags = _cpuinfo("flags")
    return flags is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags.split())


def cpu_model() -> str:
    """Return the name of the processor, as far as the system tells it. Virtual machines hide the model, but not its numbers."""
    names = [_cpuinfo(field) for field in ("model name", "cpu family", "model", "stepping")]
    return " ".join(name for name in names if name) or "unknown processor"


def _cpuinfo(field: str) -> str | None:
    try:
        found = re.search(rf"^{field}\s*:(.*)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None
