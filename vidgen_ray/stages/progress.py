"""Progress reports of a running stage, delivered to a callback after each denoising step or batch of frames.

The callback belongs to the current context, so stages need no extra argument. It may raise Cancelled to end the stage. A report
without a callback costs one context lookup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from vidgen_ray.errors import StageError
from vidgen_ray.nets.weight_files import NOT_FINITE, is_finite

ProgressCallback = Callable[[str, int, int], None]
"""Called with the stage's name, its finished steps and its total steps. Both counts are 0 when the stage starts.

A step is a denoising step or a frame.
"""

_current_callback: ContextVar[ProgressCallback | None] = ContextVar("progress_callback", default=None)


@contextmanager
def progress_callback(callback: ProgressCallback) -> Iterator[None]:
    """Send the progress of the stages that run in this block to `callback`, in the thread that runs them."""
    token = _current_callback.set(callback)
    try:
        yield
    finally:
        _current_callback.reset(token)


@contextmanager
def part_of_progress(number: int, parts: int) -> Iterator[None]:
    """Report the progress of this block as that of part `number`, from 0, of `parts` parts with equally many steps."""
    callback = _current_callback.get()
    if callback is None:
        yield
        return

    def on_part(stage: str, done: int, steps: int) -> None:
        callback(stage, number * steps + done, parts * steps)

    with progress_callback(on_part):
        yield


def report_progress(stage: str, done: int, steps: int) -> None:
    """Report that `done` of the stage's `steps` are finished. Raises what the callback raises."""
    callback = _current_callback.get()
    if callback is not None:
        callback(stage, done, steps)


def diffusers_step_callback(stage: str) -> dict[str, Any]:
    """Return the arguments that make a diffusers pipeline report each denoising step as a step of the stage."""
    return {"callback_on_step_end": partial(_on_step_end, stage)}


def _on_step_end(stage: str, pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    report_progress(stage, index + 1, pipe.num_timesteps)
    # Only after the last step, because reading a result waits for the GPU. A later clamp of the pixels would hide infinity.
    if index + 1 == pipe.num_timesteps and not is_finite(tensors["latents"]):
        raise StageError(NOT_FINITE)
    return tensors
