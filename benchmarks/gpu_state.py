"""Clock, power and throttling of a GPU during a measurement, by nvidia-smi. Needs the standard library alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

FIELDS = {
    "clocks.sm": "clock_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
}
"""Field of nvidia-smi -> name in a row."""
REASONS_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""Field with the reasons of a lower clock: its name since driver 535, and before."""
REASONS = {
    0x2: "clocks of applications",
    0x4: "power limit",
    0x8: "hardware",
    0x10: "other GPUs",
    0x20: "temperature",
    0x40: "temperature (hardware)",
    0x80: "power supply",
    0x100: "clocks of the display",
}
"""Bit -> reason. 0x1 is an idle GPU. Source: nvml.h, `nvmlClocksEventReason...`."""
INTERVAL_S = 2.0
TIMEOUT_S = 10.0
"""Longest call of nvidia-smi, in seconds."""


@contextmanager
def gpu_state() -> Iterator[dict[str, Any]]:
    """Yield a dictionary that gets the state of the first GPU during the block, when it ends: that with the highest power draw,
    and all reasons of lower clocks. It stays empty without nvidia-smi."""
    state: dict[str, Any] = {}
    samples: list[Mapping[str, Any]] = []
    ended = threading.Event()
    thread = threading.Thread(target=_sample, args=(samples, ended), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        ended.set()
        thread.join(2 * TIMEOUT_S)
        state.update(_summary(samples))


def _sample(samples: list[Mapping[str, Any]], ended: threading.Event) -> None:
    """Add a sample now, every few seconds, and at the end. The first call without a result is the last one."""
    reasons = next((field for field in REASONS_FIELDS if _query(field) is not None), None)
    is_last = False
    while (sample := _query(*FIELDS, *([reasons] if reasons else []))) is not None:
        samples.append(sample)
        if is_last:
            return
        is_last = ended.wait(INTERVAL_S)


def _query(*fields: str) -> dict[str, Any] | None:
    """Return field -> text. `None` if nvidia-smi is missing, fails or does not know a field."""
    if shutil.which("nvidia-smi") is None:
        return None
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [text.strip() for text in result.stdout.partition("\n")[0].split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def _summary(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not samples:
        return {}
    busiest = max(samples, key=lambda sample: _number(sample["power.draw"]) or 0.0)
    active = 0
    for sample in samples:
        text = next((sample[field] for field in REASONS_FIELDS if field in sample), "")
        active |= int(text, 16) if text.startswith("0x") else 0
    limits = [reason for bit, reason in REASONS.items() if active & bit]
    return {**{name: _number(busiest[field]) for field, name in FIELDS.items()}, "limited_by": ", ".join(limits)}


def _number(text: str) -> float | None:
    """Return the number. `None` for a text such as `[N/A]`."""
    try:
        return float(text)
    except ValueError:
        return None
