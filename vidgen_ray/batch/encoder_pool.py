"""The encoders of a run as one: a clip goes to the one with the fewest in hand, and begins again where that one died.

Lives in the director's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import ray

from vidgen_ray.batch.actor_client import ActorCallFailed, ActorClient
from vidgen_ray.batch.metrics import RunMetrics
from vidgen_ray.batch.run_config import RunConfig
from vidgen_ray.batch.worker_pool import failure_of_call
from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.chunks import join_records
from vidgen_ray.engine.retries import ShotFailed
from vidgen_ray.engine.step_groups import OUTPUT, CallResult
from vidgen_ray.outputs.records import Failure, ShotRecord, StepRecord

ENCODE_TIMEOUT_S = 1800.0

Chunks = AsyncIterator[tuple[tuple[StepRecord, ...], Any]]
"""For each chunk of a clip, in order: the records of its steps and the reference of its artefacts."""


class EncodingFailed(Exception):
    """An encoder answered that it could not."""

    def __init__(self, answer: CallResult, failure: Failure) -> None:
        self.final = answer.final
        self.failure = failure
        super().__init__(failure.message)


class EncoderPool:
    """Make it inside of the event loop."""

    def __init__(self, job: RunConfig, metrics: RunMetrics) -> None:
        self._attempts = job.attempts
        self._metrics = metrics
        hands = [ActorClient(ray.get_actor(name), name) for name in job.encoder_names]
        self._open = dict.fromkeys(hands, 0)
        self._freed = asyncio.Event()
        self._one_suspect = asyncio.Lock()
        self._kept_free: ActorClient | None = None
        """The encoder that a suspect has to itself, or waits for."""
        self._up = {hand: asyncio.ensure_future(hand.ready()) for hand in hands}

    async def written(
        self, plan: ShotPlan, artefacts: Any, records: tuple[StepRecord, ...], chunks: Callable[[], Chunks] | None
    ) -> ShotRecord:
        """Encode and commit; `chunks` begins to enlarge the clip, where it is to be. Raises ShotFailed, InputsLost.

        A clip whose process died with others in hand is tried alone, as the workers' calls are.
        """
        blamed, suspected = 0, False
        while True:
            async with self._one_at_a_time() if suspected else nullcontext():
                encoder = await self._taken(alone=suspected)
                try:
                    return await self._encoded(encoder, plan, artefacts, records, chunks)
                except EncodingFailed as reason:
                    blamed += 1
                    failure, final = reason.failure, reason.final
                    self._metrics.step_failed(OUTPUT, failure.error)
                except ActorCallFailed as lost:
                    self._lost(encoder)
                    blamed += lost.caused_crash
                    suspected |= lost.may_have_caused_crash
                    failure, final = failure_of_call(OUTPUT, lost, blamed), False
                finally:
                    self._give_back(encoder)
            if final or blamed + suspected >= self._attempts:
                raise ShotFailed(failure.model_copy(update={"attempts": blamed + suspected}))
            self._metrics.retried(OUTPUT)

    async def _taken(self, *, alone: bool) -> ActorClient:
        """The encoder that is up with the fewest clips, or the first that comes up; `alone`: one without clips, which gets no
        other. Raises ShotFailed where none will come up."""
        while True:
            usable = await self._usable()
            if alone and self._kept_free not in usable:
                self._kept_free = min(usable, key=self._open.__getitem__)
            if alone:
                open_to_it = [hand for hand in usable if hand is self._kept_free and not self._open[hand]]
            else:
                open_to_it = [hand for hand in usable if hand is not self._kept_free]
            if open_to_it:
                encoder = min(open_to_it, key=self._open.__getitem__)
                self._open[encoder] += 1
                return encoder
            self._freed.clear()
            await self._freed.wait()

    def _give_back(self, encoder: ActorClient) -> None:
        self._open[encoder] -= 1
        self._freed.set()

    @asynccontextmanager
    async def _one_at_a_time(self) -> AsyncIterator[None]:
        """Of the suspects."""
        async with self._one_suspect:
            try:
                yield
            finally:
                self._kept_free = None
                self._freed.set()

    async def _usable(self) -> list[ActorClient]:
        """Those that are up, when any is. Raises ShotFailed where none will be."""
        while True:
            failures = [ready.result() for ready in self._up.values() if ready.done()]
            usable = [hand for hand, ready in self._up.items() if ready.done() and ready.result() is None]
            if usable:
                return usable
            if len(failures) == len(self._up) and failures[0] is not None:
                raise ShotFailed(failures[0])
            waiting = [ready for ready in self._up.values() if not ready.done()]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    def _lost(self, encoder: ActorClient) -> None:
        if self._up[encoder].done():
            self._up[encoder] = asyncio.ensure_future(encoder.ready())

    async def _encoded(
        self,
        encoder: ActorClient,
        plan: ShotPlan,
        artefacts: Any,
        records: tuple[StepRecord, ...],
        chunks: Callable[[], Chunks] | None,
    ) -> ShotRecord:
        shot_id = plan.shot.id or ""
        # The clip is enlarged while the picture and the small clip are written.
        begun = asyncio.ensure_future(_accepted(encoder, "begin", plan, artefacts))
        try:
            chunk_records = []
            if chunks is not None:
                async for of_chunk, artefacts_of_chunk in chunks():
                    await begun
                    await _accepted(encoder, "add", shot_id, artefacts_of_chunk)
                    chunk_records.append(of_chunk)
            await begun
            all_records = (*records, *join_records(chunk_records))
            answer, reference = await encoder.call(
                "commit", shot_id, all_records, stage=OUTPUT, timeout_s=ENCODE_TIMEOUT_S, num_returns=2
            )
            _check(answer)
            committed: ShotRecord = await reference
            return committed
        except BaseException:
            begun.cancel()
            encoder.send("abandon", shot_id)
            raise


async def _accepted(encoder: ActorClient, method: str, *args: Any) -> None:
    _check(await encoder.call(method, *args, stage=OUTPUT, timeout_s=ENCODE_TIMEOUT_S))


def _check(answer: CallResult) -> None:
    if answer.session_lost:
        raise ActorCallFailed("WorkerDied", "the encoder was started again", worker="encoder")
    if answer.failure is not None:
        raise EncodingFailed(answer, answer.failure)
