"""Callbacks of an engine's users. Their exceptions are logged, and reach neither the engine nor the event loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec

from vidgen_ray.engine.status import EngineObserver
from vidgen_ray.errors import first_line

_P = ParamSpec("_P")
_log = logging.getLogger("vidgen_ray")


def guarded(callback: Callable[_P, object], on_failure: Callable[[str], object] = lambda _: None) -> Callable[_P, None]:
    """Return a function that calls a callback and never raises an `Exception`.

    The callback may write to a terminal that is closed or to a file on a full disk, or be wrong. The first of several failures
    in a row is logged, and described to `on_failure`.
    """
    is_failing = False

    def call(*args: _P.args, **kwargs: _P.kwargs) -> None:
        nonlocal is_failing
        try:
            callback(*args, **kwargs)
        except Exception as error:
            was_failing, is_failing = is_failing, True
            if not was_failing:
                # The log may be what fails.
                with suppress(Exception):
                    _report(callback, error, on_failure)
        else:
            is_failing = False

    return call


def _report(callback: Callable[..., object], error: Exception, on_failure: Callable[[str], object]) -> None:
    name = getattr(callback, "__qualname__", type(callback).__name__)
    message = f"{name} failed: {type(error).__name__}: {first_line(error)}. The run continues without it"
    on_failure(message)
    # A traceback does not help if a disk is full.
    _log.warning(message, exc_info=None if isinstance(error, OSError) else error)


class GuardedObserver:
    """Observer of an engine that passes events on to another one, and never raises."""

    def __init__(self, observer: EngineObserver) -> None:
        self.attempt_ended = guarded(observer.attempt_ended)
        self.step_ended = guarded(observer.step_ended)
        self.step_failed = guarded(observer.step_failed)
        self.retried = guarded(observer.retried)
        self.adapter_loads = guarded(observer.adapter_loads)
        self.frames_upscaled = guarded(observer.frames_upscaled)
        self.quarantined = guarded(observer.quarantined)
