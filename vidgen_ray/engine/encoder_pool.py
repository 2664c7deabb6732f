"""Encoder pool of a run: send each clip to the least loaded encoder, and retry it after a crash.

Runs in the director's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import ray

from vidgen_ray.engine.actor_client import ActorCallFailed, ActorClient
from vidgen_ray.engine.run_metrics import RunMetrics
from vidgen_ray.engine.engine_config import RunConfig
from vidgen_ray.engine.worker_pool import failure_of_call
from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.chunks import join_records
from vidgen_ray.engine.retries import ShotFailed
from vidgen_ray.engine.step_groups import OUTPUT, CallResult
from vidgen_ray.outputs.records import Failure, ShotRecord, StepRecord

ENCODE_TIMEOUT_S = 1800.0

Chunks = AsyncIterator[tuple[tuple[StepRecord, ...], Any]]
"""For each chunk of a clip, in order: the records of its steps and the reference of its artefacts."""


class EncodingFailed(Exception):
    """The encoder returned a failure."""

    def __init__(self, result: CallResult, failure: Failure) -> None:
        self.final = result.final
        self.failure = failure
        super().__init__(failure.message)


class EncoderPool:
    """Encoder pool of one run. Create it inside the event loop."""

    def __init__(self, config: RunConfig, metrics: RunMetrics) -> None:
        self._attempts = config.attempts
        self._metrics = metrics
        clients = [ActorClient(ray.get_actor(name), name) for name in config.encoder_names]
        self._open = dict.fromkeys(clients, 0)
        self._released = asyncio.Event()
        self._isolation_lock = asyncio.Lock()
        self._reserved: ActorClient | None = None
        """Encoder reserved for a clip that may have crashed its encoder."""
        self._up = {client: asyncio.ensure_future(client.ready()) for client in clients}

    async def write(
        self, plan: ShotPlan, artefacts: Any, records: tuple[StepRecord, ...], chunks: Callable[[], Chunks] | None
    ) -> ShotRecord:
        """Encode and commit a shot. `chunks` starts the chunked stages, if the shot has any. Raises ShotFailed and InputsLost.

        If an encoder crashes with several clips in progress, each of them is retried alone, like the calls of the workers.
        """
        failed_attempts, crash_suspected = 0, False
        while True:
            async with self._isolated() if crash_suspected else nullcontext():
                encoder = await self._acquire(alone=crash_suspected)
                try:
                    return await self._encode(encoder, plan, artefacts, records, chunks)
                except EncodingFailed as reason:
                    failed_attempts += 1
                    failure, final = reason.failure, reason.final
                    self._metrics.step_failed(OUTPUT, failure.error)
                except ActorCallFailed as lost:
                    self._mark_down(encoder)
                    failed_attempts += lost.caused_crash
                    crash_suspected |= lost.may_have_caused_crash
                    failure, final = failure_of_call(OUTPUT, lost, failed_attempts), False
                finally:
                    self._release(encoder)
            if final or failed_attempts + crash_suspected >= self._attempts:
                raise ShotFailed(failure.model_copy(update={"attempts": failed_attempts + crash_suspected}))
            self._metrics.retried(OUTPUT)

    async def _acquire(self, *, alone: bool) -> ActorClient:
        """Return the least loaded encoder that is up. Waits until one is up and free.

        `alone`: reserve an encoder without other clips. Raises ShotFailed if no encoder will come up.
        """
        while True:
            usable = await self._usable()
            if alone and self._reserved not in usable:
                self._reserved = min(usable, key=self._open.__getitem__)
            if alone:
                available = [client for client in usable if client is self._reserved and not self._open[client]]
            else:
                available = [client for client in usable if client is not self._reserved]
            if available:
                encoder = min(available, key=self._open.__getitem__)
                self._open[encoder] += 1
                return encoder
            self._released.clear()
            await self._released.wait()

    def _release(self, encoder: ActorClient) -> None:
        self._open[encoder] -= 1
        self._released.set()

    @asynccontextmanager
    async def _isolated(self) -> AsyncIterator[None]:
        """Give one clip suspected of a crash at a time have an encoder of its own."""
        async with self._isolation_lock:
            try:
                yield
            finally:
                self._reserved = None
                self._released.set()

    async def _usable(self) -> list[ActorClient]:
        """Wait until at least one encoder is up. Raises ShotFailed if none will come up."""
        while True:
            failures = [ready.result() for ready in self._up.values() if ready.done()]
            usable = [client for client, ready in self._up.items() if ready.done() and ready.result() is None]
            if usable:
                return usable
            if len(failures) == len(self._up) and failures[0] is not None:
                raise ShotFailed(failures[0])
            starting = [ready for ready in self._up.values() if not ready.done()]
            await asyncio.wait(starting, return_when=asyncio.FIRST_COMPLETED)

    def _mark_down(self, encoder: ActorClient) -> None:
        if self._up[encoder].done():
            self._up[encoder] = asyncio.ensure_future(encoder.ready())

    async def _encode(
        self,
        encoder: ActorClient,
        plan: ShotPlan,
        artefacts: Any,
        records: tuple[StepRecord, ...],
        chunks: Callable[[], Chunks] | None,
    ) -> ShotRecord:
        shot_id = plan.shot.id or ""
        # Chunks are processed while the image and the original clip are written.
        opened = asyncio.ensure_future(_checked_call(encoder, "begin", plan, artefacts))
        try:
            chunk_records = []
            if chunks is not None:
                async for records_of_chunk, artefacts_of_chunk in chunks():
                    await opened
                    await _checked_call(encoder, "add", shot_id, artefacts_of_chunk)
                    chunk_records.append(records_of_chunk)
            await opened
            all_records = (*records, *join_records(chunk_records))
            result, reference = await encoder.call(
                "commit", shot_id, all_records, stage=OUTPUT, timeout_s=ENCODE_TIMEOUT_S, num_returns=2
            )
            _check(result)
            committed: ShotRecord = await reference
            return committed
        except BaseException:
            opened.cancel()
            encoder.send("abandon", shot_id)
            raise


async def _checked_call(encoder: ActorClient, method: str, *args: Any) -> None:
    _check(await encoder.call(method, *args, stage=OUTPUT, timeout_s=ENCODE_TIMEOUT_S))


def _check(result: CallResult) -> None:
    if result.session_lost:
        raise ActorCallFailed("WorkerDied", "the encoder restarted", worker="encoder")
    if result.failure is not None:
        raise EncodingFailed(result, result.failure)
