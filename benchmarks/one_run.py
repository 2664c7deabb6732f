"""One run of one system, in a process of its own: `python -m benchmarks.one_run --system S --layout L ...`.

Ends with 0 when all is committed; otherwise says why in `reason.txt` of the run folder.
"""

from __future__ import annotations

import argparse
import importlib
import traceback
from pathlib import Path

from benchmarks.peers import PEERS
from benchmarks.simulated import DoesNotFit

REASON = "reason.txt"
REASON_CHARACTERS = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", required=True)
    parser.add_argument("--layout", required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--memory", type=float, required=True, help="GB of each GPU")
    parser.add_argument("--shots", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="made by simulated.prepare")
    told = parser.parse_args()
    try:
        if told.system == "vidgen":
            from benchmarks import ours

            ours.run(told.layout, told.gpus, told.memory, told.shots, told.folder)
        else:
            peer = PEERS[told.system, told.layout]
            getattr(importlib.import_module(peer.module), peer.function)(told.gpus, told.memory, told.shots, told.folder)
    # Whatever a system stumbles over is its row's reason.
    except Exception as error:
        traceback.print_exc()
        (told.folder / REASON).write_text(_reason(error))
        return 1
    return 0


def _reason(error: Exception) -> str:
    """In one line. What Ray raises for a worker ends with the worker's own error, after its traceback."""
    if isinstance(error, DoesNotFit):
        return f"does not fit: {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[-1:] if "Traceback" in str(error) or "ray::" in str(error) else lines
    return f"{type(error).__name__}: {' '.join(told)}"[:REASON_CHARACTERS]


if __name__ == "__main__":
    raise SystemExit(main())
