"""Run one system in this process: `python -m benchmarks.one_run --system S --layout L ...`.

Exits with 0 if all shots are committed. Otherwise writes the reason to `reason.txt` in the run folder.
"""

from __future__ import annotations

import argparse
import importlib
import traceback
from pathlib import Path

from benchmarks.peers import PEERS
from benchmarks.simulated import DoesNotFit

REASON = "reason.txt"
MAX_REASON_CHARACTERS = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", required=True)
    parser.add_argument("--layout", required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--memory", type=float, required=True, help="GB of memory per GPU.")
    parser.add_argument("--shots", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="Run folder created by simulated.prepare.")
    args = parser.parse_args()
    try:
        if args.system == "vidgen":
            from benchmarks import ours

            ours.run(args.layout, args.gpus, args.memory, args.shots, args.folder)
        else:
            peer = PEERS[args.system, args.layout]
            getattr(importlib.import_module(peer.module), peer.function)(args.gpus, args.memory, args.shots, args.folder)
    # Any error is reported as the reason of the row.
    except Exception as error:
        traceback.print_exc()
        (args.folder / REASON).write_text(_reason(error))
        return 1
    return 0


def _reason(error: Exception) -> str:
    """Return the error in one line. Ray's error for a worker ends with the worker's own error, after a traceback."""
    if isinstance(error, DoesNotFit):
        return f"does not fit: {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[-1:] if "Traceback" in str(error) or "ray::" in str(error) else lines
    return f"{type(error).__name__}: {' '.join(message)}"[:MAX_REASON_CHARACTERS]


if __name__ == "__main__":
    raise SystemExit(main())
