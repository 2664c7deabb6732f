"""Calls to stage deployments: choice of the deployment, timeout and retries.

Independent of what a call does. Runs in the event loop of the director or of an encoder.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.serve.exceptions import RayServeException

from vidgen_ray.engine.retries import InputsLost, ShotFailed, first_line
from vidgen_ray.online.inference_thread import Progress
from vidgen_ray.online.stage_replica import Result
from vidgen_ray.outputs.records import Failure
from vidgen_ray.planner.layout import WorkerSpec

MAX_LOST_STARTS = 6
"""Crashes before the first progress of a call after which the shot fails. Usually another call caused the crash, but a call
that crashes its process at once reports no progress either."""
RETRY_DELAY_S = 0.1
"""Seconds before such a call is repeated. Serve may need a moment to notice the crash."""


ProgressCallback = Callable[[Progress], None]
"""Callback for the progress of a call."""


class RetryingCaller:
    """Calls methods that stream their progress and then a Result, and retries them."""

    def __init__(self, attempts: int, on_failed_attempt: Callable[[str, str], None] = lambda stage, error: None) -> None:
        """`on_failed_attempt` gets the stage and the error class of every failed attempt."""
        self._attempts = attempts
        self._on_failed_attempt = on_failed_attempt

    async def call(
        self, method: Any, *args: Any, stage: str, timeout_s: float | None, on_progress: ProgressCallback = lambda _: None
    ) -> Result:
        """Return the result of the method. Retries failures that another attempt may avoid.

        The timeout starts when execution starts. `None` disables it. A crash before that is not counted as an attempt, up to
        `MAX_LOST_STARTS` times. Raises ShotFailed and InputsLost.
        """
        attempts = lost_starts = 0
        while True:
            started = False

            def on_update(progress: Progress) -> None:
                nonlocal started
                started = True
                on_progress(progress)

            final = False
            try:
                result = await _final_result(method.remote(*args), on_update, timeout_s)
                if result.inputs_lost:
                    raise InputsLost(result.call_result.failure.message if result.call_result.failure else stage)
                if result.call_result.failure is None:
                    return result
                failure, final = result.call_result.failure, result.call_result.final
            except TimeoutError:
                failure = _failure(stage, "TimedOut", f"took longer than {timeout_s:g} s")
            except (ray.exceptions.RayActorError, RayServeException) as error:
                failure = _failure(stage, "ReplicaDied", f"the process crashed: {first_line(error)}")
                if not started:
                    lost_starts += 1
                    if lost_starts < MAX_LOST_STARTS:
                        await asyncio.sleep(RETRY_DELAY_S)
                        continue
            except ray.exceptions.RayTaskError as error:
                # A bug in vidgen, or arguments that cannot be unpickled.
                cause = error.cause or error
                failure = _failure(stage, type(cause).__name__, first_line(cause))
            attempts += 1
            self._on_failed_attempt(stage, failure.error)
            if final or attempts >= self._attempts or lost_starts >= MAX_LOST_STARTS:
                raise ShotFailed(failure.model_copy(update={"attempts": attempts}))


async def _final_result(stream: Any, on_progress: ProgressCallback, timeout_s: float | None) -> Result:
    """Return the last item of the stream. Cancels the call on timeout or if the caller is cancelled."""
    loop = asyncio.get_running_loop()
    deadline: float | None = None
    finished = False
    try:
        while True:
            remaining_s = None if deadline is None else deadline - loop.time()
            try:
                item = await asyncio.wait_for(anext(stream), remaining_s)
            except StopAsyncIteration:
                raise RayServeException("the call returned no result") from None
            if isinstance(item, Result):
                finished = True
                return item
            if deadline is None and timeout_s is not None:
                deadline = loop.time() + timeout_s
            on_progress(item)
    finally:
        if not finished:
            # Cancelling a finished call may raise.
            with suppress(RayServeException, ray.exceptions.RayError):
                stream.cancel()


class StageHandles:
    """Handles of the stage deployments. Sends each call to the least loaded deployment that can take it."""

    def __init__(self, handles: Mapping[str, Any], specs: Mapping[str, tuple[WorkerSpec, int]]) -> None:
        """`handles`: deployment name -> handle. `specs`: deployment name -> stages of its replicas and their initial number."""
        self._handles = {name: handle.options(stream=True) for name, handle in handles.items()}
        self._specs = specs
        self._pending: Counter[str] = Counter()

    def can_fuse(self, first: str, *others: str) -> bool:
        """Return whether all replicas that hold `first` can run the other stages in the same call."""
        holders = [spec for spec, _ in self._specs.values() if first in spec.stages]
        return all(spec.can_run(first, *others) for spec in holders)

    def least_loaded(self, *stages: str) -> str:
        """Return the deployment that can run these stages in one call and has the fewest pending calls per replica."""
        names = [name for name, (spec, _) in self._specs.items() if spec.can_run(*stages)]
        return min(names, key=lambda name: self._pending[name] / self._specs[name][1])

    async def call(
        self,
        caller: RetryingCaller,
        method: str,
        *args: Any,
        stages: tuple[str, ...],
        timeout_s: float,
        on_progress: ProgressCallback = lambda _: None,
        adapters: str = "",
    ) -> Result:
        """Call a deployment that can run these stages. Raises ShotFailed and InputsLost."""
        name = self.least_loaded(*stages)
        handle = self._handles[name]
        if adapters:
            handle = handle.options(multiplexed_model_id=adapters)
        self._pending[name] += 1
        try:
            return await caller.call(
                getattr(handle, method), *args, stage=stages[0], timeout_s=timeout_s, on_progress=on_progress
            )
        finally:
            self._pending[name] -= 1


def _failure(stage: str, error: str, message: str) -> Failure:
    return Failure(stage=stage, error=error, message=message, attempts=1, worker="online")
