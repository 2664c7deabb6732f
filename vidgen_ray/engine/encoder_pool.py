"""Encoders of an engine: send each clip to an encoder, preferably on the clip's node, and retry it elsewhere.

Runs in the engine's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.actor_client import ActorCallFailed, ActorClient
from vidgen_ray.engine.chunks import join_records
from vidgen_ray.engine.engine_config import EngineConfig
from vidgen_ray.engine.health import Health
from vidgen_ray.engine.retries import AttemptFailed, Kind, Process, ShotFailed, run_with_retries
from vidgen_ray.engine.status import EngineObserver
from vidgen_ray.engine.step_groups import OUTPUT, CallResult
from vidgen_ray.outputs.disk_space import is_disk_full
from vidgen_ray.outputs.records import Failure, ShotRecord, StepRecord

ENCODE_TIMEOUT_S = 1800.0
LOCAL_LEAD = 2
"""Clips that an encoder on the clip's node may have open more than another encoder and still be preferred."""

Chunks = AsyncGenerator[tuple[tuple[StepRecord, ...], Any]]
"""For each chunk of a clip, in order: the records of its steps and the reference of its artefacts."""


class _EncodingFailed(Exception):
    """The encoder returned a failure."""

    def __init__(self, failure: Failure, kind: Kind) -> None:
        self.failure = failure
        self.kind = kind
        super().__init__(failure.message)


class EncoderPool:
    """Encoders of one engine. Create it inside the event loop."""

    def __init__(self, config: EngineConfig, observer: EngineObserver) -> None:
        self._attempts = config.attempts
        self._observer = observer
        self._open: dict[ActorClient, int] = {}
        """Encoder -> open clips."""
        self._up: dict[ActorClient, asyncio.Future[Failure | None]] = {}
        """Encoder -> the failure, once it has started, or `None` if it is up."""
        self._changed = asyncio.Event()
        """Set when an encoder has become usable or free."""
        self._isolation_lock = asyncio.Lock()
        self._reserved: ActorClient | None = None
        """Encoder reserved for a clip that may have crashed its encoder."""
        self._health = Health()
        self._quarantined: set[ActorClient] = set()

    def add(self, client: ActorClient) -> None:
        """Add an encoder. It gets clips once it is up."""
        self._open[client] = 0
        self._start(client, 0.0)

    def close(self) -> None:
        """Cancel the background tasks."""
        for task in self._up.values():
            task.cancel()

    @property
    def fatal_failure(self) -> Failure | None:
        """Failure of an encoder if no encoder will come up. `None` if there is hope."""
        failures = [up.result() for up in self._up.values() if up.done() and not up.cancelled()]
        return failures[0] if failures and None not in failures and len(failures) == len(self._up) else None

    @property
    def quarantined(self) -> list[str]:
        """Encoders in quarantine or given up, with their nodes."""
        return [client.location for client in self._quarantined]

    async def write(
        self,
        plan: ShotPlan,
        artefacts: Any,
        records: tuple[StepRecord, ...],
        chunks: Callable[[], Chunks] | None,
        node: str | None,
    ) -> ShotRecord:
        """Encode and commit a shot. `chunks` starts the chunked stages, if the shot has any. `node` has the artefacts.

        Failures are retried on other encoders and nodes; see `run_with_retries`. Raises ShotFailed and InputsLost.
        """

        async def attempt(avoid: frozenset[ActorClient], alone: bool) -> ShotRecord:
            if not alone:
                return await self._attempt(plan, artefacts, records, chunks, node, avoid)
            # One clip suspected of a crash at a time has an encoder of its own.
            async with self._isolation_lock:
                try:
                    return await self._attempt(plan, artefacts, records, chunks, node, avoid, alone=True)
                finally:
                    self._reserved = None
                    self._changed.set()

        def report(failed: AttemptFailed, own_failure: bool) -> None:
            encoder = failed.process.key
            # A restart does not make room on a full disk.
            if is_disk_full(failed.failure.message):
                return
            if not own_failure:
                self._health.forgive(encoder, plan.key)
            elif self._health.failed(encoder, plan.key):
                self._quarantine(encoder, f"failed to write different shots in a row, the last time with: {failed}")

        def candidates() -> Sequence[Process[ActorClient]]:
            return [Process(client, client.node) for client in self._usable()]

        return await run_with_retries(attempt, candidates, report, limit=self._attempts, observer=self._observer)

    async def _attempt(
        self,
        plan: ShotPlan,
        artefacts: Any,
        records: tuple[StepRecord, ...],
        chunks: Callable[[], Chunks] | None,
        node: str | None,
        avoid: frozenset[ActorClient],
        *,
        alone: bool = False,
    ) -> ShotRecord:
        encoder = await self._acquire(avoid, node, alone=alone)
        process = Process(encoder, encoder.node)
        try:
            record = await _encode(encoder, plan, artefacts, records, chunks)
        except _EncodingFailed as failed:
            raise AttemptFailed(failed.kind, failed.failure, process) from None
        except ActorCallFailed as lost:
            if encoder in self._usable():
                self._start(encoder, 0.0)
            raise AttemptFailed(lost.kind, lost.failure(OUTPUT), process, lost.loss) from None
        finally:
            self._open[encoder] -= 1
            self._changed.set()
        self._health.succeeded(encoder)
        return record

    async def _acquire(self, avoid: frozenset[ActorClient], node: str | None, *, alone: bool) -> ActorClient:
        """Return the least loaded encoder that is up, preferably on `node`. Waits until one is up and free.

        `alone`: reserve an encoder without other clips. Raises ShotFailed if no encoder will come up.
        """

        def cost(client: ActorClient) -> tuple[bool, int]:
            return client in avoid, self._open[client] - LOCAL_LEAD * (client.node == node)

        while True:
            self._changed.clear()
            usable = self._usable()
            if alone and usable and self._reserved not in usable:
                self._reserved = min(usable, key=cost)
            if alone:
                available = [client for client in usable if client is self._reserved and not self._open[client]]
            else:
                available = [client for client in usable if client is not self._reserved]
            if available:
                encoder = min(available, key=cost)
                self._open[encoder] += 1
                return encoder
            if self.fatal_failure is not None:
                raise ShotFailed(self.fatal_failure)
            await self._changed.wait()

    def _usable(self) -> list[ActorClient]:
        return [client for client, up in self._up.items() if up.done() and up.result() is None]

    def _start(self, encoder: ActorClient, delay_s: float) -> None:
        self._up[encoder] = asyncio.ensure_future(self._wait_until_ready(encoder, delay_s))
        self._up[encoder].add_done_callback(lambda _: self._changed.set())

    async def _wait_until_ready(self, encoder: ActorClient, delay_s: float) -> Failure | None:
        await asyncio.sleep(delay_s)
        failure = await encoder.ready()
        if failure is None and encoder.node is not None:
            self._quarantined.discard(encoder)
            self._health.started(encoder, encoder.node)
        return failure

    def _quarantine(self, encoder: ActorClient, reason: str) -> None:
        """Restart an encoder after a back-off, or give it up."""
        self._quarantined.add(encoder)
        delay_s = self._health.quarantine(encoder)
        self._observer.quarantined(encoder.location, reason)
        self._up[encoder].cancel()
        if self._health.is_hopeless(encoder):
            self._up[encoder] = asyncio.get_running_loop().create_future()
            self._up[encoder].set_result(encoder.hopeless(reason))
            self._changed.set()
            return
        encoder.restart()
        self._start(encoder, delay_s)


async def _encode(
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
            async with aclosing(chunks()) as each_chunk:
                async for records_of_chunk, artefacts_of_chunk in each_chunk:
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
        raise ActorCallFailed("WorkerDied", "the encoder restarted", Kind.NOT_RUN, "encoder")
    if result.failure is not None:
        raise _EncodingFailed(result.failure, result.kind)
