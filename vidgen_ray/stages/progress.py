"""How far a stage is with its work, said after each denoising step or batch of frames to whoever listens.

A listener may end the work there, by raising Cancelled. Knows nothing of who listens, and costs next to nothing where nobody
does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

Listener = Callable[[str, int, int], None]
"""Is told the stage's name, how many of its steps are done, and of how many; 0 of 0 as it begins.

A step is one of denoising, or a frame.
"""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """A block whose stages tell `listener` how far they are, in the thread that works."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def report(stage: str, done: int, steps: int) -> None:
    """Say that `done` of the stage's `steps` are done. Raises what the listener raises."""
    listener = _listener.get()
    if listener is not None:
        listener(stage, done, steps)


def each_step(stage: str) -> dict[str, Any]:
    """What a diffusers pipeline is told, so that it reports each denoising step as one of the stage's."""
    return {"callback_on_step_end": partial(_step_ended, stage)}


def _step_ended(stage: str, pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    report(stage, index + 1, pipe.num_timesteps)
    return tensors
