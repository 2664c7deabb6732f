"""The faster of float32 and bfloat16 for convolutions on this machine's CPU: measured once and cached.

Hardware support is no proof of speed: on some processors with AVX512-BF16 convolutions in bfloat16 are slower than in float32.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from filelock import FileLock

from vidgen_ray.system.cache_dir import cache_dir
from vidgen_ray.system.files import write_atomically

CpuDtype = Literal["float32", "bfloat16"]

CPUINFO = Path("/proc/cpuinfo")
MIN_GAIN = 1.15
"""bfloat16 is chosen if it is faster by this factor at least, so that noise does not decide between equal ones."""
ROUNDS = 5
CHANNELS, HEIGHT, WIDTH = 64, 144, 256
"""Size of the convolution that is measured: a layer of animevideov3 on a frame of 256x144 pixels."""


def fastest_cpu_dtype(threads: int | None) -> CpuDtype:
    """Return the faster dtype with this number of torch threads. `None`: torch's current number.

    Without hardware support (AVX512-BF16 or AMX, detected on Linux only) it is float32. Else both are measured, which takes
    about half a second, and the result is kept in the cache folder for this processor, torch version and number of threads.
    """
    if not cpu_has_bfloat16():
        return "float32"
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    key = f"{cpu_model()}, {os.cpu_count()} CPUs, {threads} threads, torch {version('torch')}"
    stored = _read()
    if key not in stored:
        stored[key] = _measure(threads)
        # If the file cannot be written, the next process measures again.
        with suppress(OSError):
            cache_dir().mkdir(parents=True, exist_ok=True)
            with FileLock(f"{_file()}.lock"):
                write_atomically(_file(), json.dumps({**_read(), key: stored[key]}, indent=1, sort_keys=True) + "\n")
    seconds = stored[key]
    return "bfloat16" if seconds["float32"] >= MIN_GAIN * seconds["bfloat16"] else "float32"


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


def _measure(threads: int) -> dict[str, float]:
    """Return dtype -> seconds of one convolution, the least of some rounds in turns."""
    import torch

    from vidgen_ray.stages.base import torch_threads

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3, generator=generator) / 24
    pixels = torch.randn(1, CHANNELS, HEIGHT, WIDTH, generator=generator)
    seconds = dict.fromkeys(dtypes, float("inf"))
    with torch.inference_mode(), torch_threads(threads):
        inputs = {
            name: [tensor.to(dtype, memory_format=torch.channels_last) for tensor in (pixels, weight)]
            for name, dtype in dtypes.items()
        }
        for _ in range(ROUNDS):
            for name, (source, kernel) in inputs.items():
                start = time.perf_counter()
                torch.nn.functional.conv2d(source, kernel, padding=1)
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def _file() -> Path:
    return cache_dir() / "cpu-dtype.json"


def _read() -> dict[str, dict[str, float]]:
    try:
        content = json.loads(_file().read_bytes())
        return {key: {name: float(content[key][name]) for name in ("float32", "bfloat16")} for key in content}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
