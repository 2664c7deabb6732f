"""Description of the machine of a benchmark, and JSON output."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Return the hardware, the current load and the versions of packages (`None` if not installed)."""
    model = re.search(r"^model name\s*: (.*)$", CPUINFO.read_text(), re.MULTILINE) if CPUINFO.exists() else None
    memory = re.search(r"^MemTotal:\s*(\d+) kB", MEMINFO.read_text()) if MEMINFO.exists() else None
    return {
        "cpu": model[1] if model else platform.processor(),
        "cpus": os.cpu_count(),
        "memory_gb": round(int(memory[1]) / 2**20, 1) if memory else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_1_min": round(os.getloadavg()[0], 2),
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
