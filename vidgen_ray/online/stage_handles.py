"""Calls to stage deployments: on which of them, how long, and what is tried again.

What a call does it does not know. Lives in the event loop of a replica, the director's or an encoder's.
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

PASSED_OVER = 6
"""How often a call may be lost with a process before anything was heard of it. Mostly it was waiting behind the one at work,
which is to blame; but what ends a process at once is not heard to begin either."""
AGAIN_S = 0.1
"""Before such a call is made again: Serve may need a moment to see that the process is gone."""


ProgressCallback = Callable[[Progress], None]
"""Is told how far a call is."""


class RetryingCaller:
    """Calls methods that answer by a stream: progress, then a Result."""

    def __init__(self, attempts: int, retried: Callable[[str, str], None] = lambda stage, error: None) -> None:
        """`retried` is told the stage and the class of error of every attempt that failed."""
        self._attempts = attempts
        self._retried = retried

    async def call(
        self, method: Any, *args: Any, stage: str, timeout_s: float | None, told: ProgressCallback = lambda _: None
    ) -> Result:
        """What the method came to; tried again where another attempt may fare better. Raises ShotFailed, InputsLost.

        The time counts from when the work has begun; none is without a limit. A process that dies before that costs no
        attempt, but not for ever.
        """
        blamed = passed_over = 0
        while True:
            begun = False

            def at_work(progress: Progress) -> None:
                nonlocal begun
                begun = True
                told(progress)

            final = False
            try:
                result = await _last(method.remote(*args), at_work, timeout_s)
                if result.inputs_lost:
                    raise InputsLost(result.answer.failure.message if result.answer.failure else stage)
                if result.answer.failure is None:
                    return result
                failure, final = result.answer.failure, result.answer.final
            except TimeoutError:
                failure = _failure(stage, "TimedOut", f"took longer than {timeout_s:g} s")
            except (ray.exceptions.RayActorError, RayServeException) as error:
                failure = _failure(stage, "ReplicaDied", f"the process died: {first_line(error)}")
                if not begun:
                    passed_over += 1
                    if passed_over < PASSED_OVER:
                        await asyncio.sleep(AGAIN_S)
                        continue
            except ray.exceptions.RayTaskError as error:
                # A mistake of ours, or arguments that cannot be read there.
                cause = error.cause or error
                failure = _failure(stage, type(cause).__name__, first_line(cause))
            blamed += 1
            self._retried(stage, failure.error)
            if final or blamed >= self._attempts or passed_over >= PASSED_OVER:
                raise ShotFailed(failure.model_copy(update={"attempts": blamed}))


async def _last(stream: Any, told: ProgressCallback, timeout_s: float | None) -> Result:
    """The last of what the stream gives. Where the caller is cancelled, or time is up, so is the call."""
    loop = asyncio.get_running_loop()
    deadline: float | None = None
    finished = False
    try:
        while True:
            left = None if deadline is None else deadline - loop.time()
            try:
                news = await asyncio.wait_for(anext(stream), left)
            except StopAsyncIteration:
                raise RayServeException("the call ended without an answer") from None
            if isinstance(news, Result):
                finished = True
                return news
            if deadline is None and timeout_s is not None:
                deadline = loop.time() + timeout_s
            told(news)
    finally:
        if not finished:
            # Of a call that is over there is nothing to cancel.
            with suppress(RayServeException, ray.exceptions.RayError):
                stream.cancel()


class StageHandles:
    """The deployments that hold stages: which of them a call goes to."""

    def __init__(self, handles: Mapping[str, Any], specs: Mapping[str, tuple[WorkerSpec, int]]) -> None:
        """`handles` by the deployment's name; `specs`: what its replicas hold, and how many there are to begin with."""
        self._handles = {name: handle.options(stream=True) for name, handle in handles.items()}
        self._specs = specs
        self._in_hand: Counter[str] = Counter()

    def can_fuse(self, first: str, *others: str) -> bool:
        """Whether all replicas that hold the first of these stages take the others, too, in the same turn."""
        holders = [spec for spec, _ in self._specs.values() if first in spec.stages]
        return all(spec.can_run(first, *others) for spec in holders)

    def taking(self, *stages: str) -> str:
        """The deployment, of those that take all these stages, with the fewest calls of ours a replica in hand."""
        names = [name for name, (spec, _) in self._specs.items() if spec.can_run(*stages)]
        return min(names, key=lambda name: self._in_hand[name] / self._specs[name][1])

    async def call(
        self,
        caller: RetryingCaller,
        method: str,
        *args: Any,
        stages: tuple[str, ...],
        timeout_s: float,
        told: ProgressCallback = lambda _: None,
        adapters: str = "",
    ) -> Result:
        """Call one of the deployments that take these stages. Raises ShotFailed, InputsLost."""
        name = self.taking(*stages)
        handle = self._handles[name]
        if adapters:
            handle = handle.options(multiplexed_model_id=adapters)
        self._in_hand[name] += 1
        try:
            return await caller.call(getattr(handle, method), *args, stage=stages[0], timeout_s=timeout_s, told=told)
        finally:
            self._in_hand[name] -= 1


def _failure(stage: str, error: str, message: str) -> Failure:
    return Failure(stage=stage, error=error, message=message, attempts=1, worker="online")
