"""Commands in forks of one process that has imported the package, which takes seconds. They can be killed and measured."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["vidgen_ray.upscale.upscale_command", "vidgen_ray.film.film_command", "spandrel", __name__])


def start(errors: Path, command: Callable[..., int | None], *arguments: object) -> BaseProcess:
    """Start `command(*arguments)`, which returns an exit code, in the present environment, with standard error in a file."""
    process = CONTEXT.Process(target=_run, args=(errors, dict(os.environ), command, arguments), daemon=True)
    process.start()
    return process


def _run(errors: Path, environment: dict[str, str], command: Callable[..., int | None], arguments: tuple[object, ...]) -> None:
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    sys.exit(command(*arguments))


def peak_mb() -> float:
    """Return the peak memory of this process, which includes what it has in common with the process that was forked."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024
