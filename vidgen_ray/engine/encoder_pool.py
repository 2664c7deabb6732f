"""Encoders of an engine: send each clip to an encoder, preferably on the clip's node, and retry it elsewhere.

Runs in the engine's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.actor_client import ActorCallFailed, ActorClient
from vidgen_ray.engine.calls import OUTPUT, CallResult, join_records
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.retries import AttemptFailed, Candidate, Kind, ShotFailed, run_with_retries
from vidgen_ray.engine.status import EngineObserver
from vidgen_ray.engine.supervisor import Supervisor
from vidgen_ray.outputs.records import Failure, ShotRecord, StepRecord
from vidgen_ray.outputs.storage import is_disk_full

ENCODE_TIMEOUT_S = 1800.0
LOCAL_LEAD = 2
"""Clips that an encoder on the clip's node may have open more than another encoder and still be preferred."""


class ProcessedChunk(NamedTuple):
    """Chunk of a clip after its chunked stages."""

    records: tuple[StepRecord, ...]
    artefacts: Any
    """Reference in Ray's object store."""
    is_last: bool


class ClipChunks(NamedTuple):
    """The chunks of a clip whose last stages are chunked."""

    n_chunks: int
    process: Callable[[], AsyncGenerator[ProcessedChunk]]
    """Starts the chunked stages. Yields the chunks in order."""


class _EncodingFailed(Exception):
    """The encoder returned a failure."""

    def __init__(self, failure: Failure, kind: Kind) -> None:
        self.failure = failure
        self.kind = kind
        super().__init__(failure.message)


class EncoderPool:
    """Encoders of one engine. Create it inside the event loop."""

    def __init__(self, config: EngineConfig, director: str, observer: EngineObserver) -> None:
        """`director`: name under which the encoders work for this engine; see `Encoder.attach`."""
        self._director = director
        self._attempts = config.attempts
        self._observer = observer
        self._open: dict[ActorClient, int] = {}
        """Encoder -> open clips."""
        self._changed = asyncio.Event()
        """Set when an encoder has become usable or free."""
        self._isolation_lock = asyncio.Lock()
        self._reserved: ActorClient | None = None
        """Encoder reserved for a clip that may have crashed its encoder."""
        self._supervisor = Supervisor(
            observer,
            on_up=lambda encoder: self._changed.set(),
            on_down=lambda encoder: self._changed.set(),
            on_given_up=lambda encoder, failure: self._changed.set(),
        )

    def add(self, client: ActorClient) -> None:
        """Add an encoder. It gets clips once it is up, and closes those of an earlier engine."""
        client.send("attach", self._director)
        self._open[client] = 0
        self._supervisor.add(client)

    def remove(self, name: str) -> None:
        """Remove an encoder that is gone for good."""
        message = f"{name}: its node is lost"
        self._supervisor.remove(name, Failure(stage=OUTPUT, error="NodeLost", message=message, attempts=1, worker=name))

    def close(self) -> None:
        """Cancel the background tasks."""
        self._supervisor.close()

    @property
    def fatal_failure(self) -> Failure | None:
        """Failure of an encoder if all of them are given up. Otherwise `None`."""
        return None if self._supervisor.count else next(iter(self._supervisor.given_up.values()), None)

    @property
    def quarantined(self) -> list[str]:
        """Encoders in quarantine or given up, with their nodes."""
        return self._supervisor.quarantined

    async def write(
        self,
        plan: ShotPlan,
        artefacts: Any,
        records: tuple[StepRecord, ...],
        chunks: ClipChunks | None,
        node: str | None,
    ) -> ShotRecord:
        """Encode and commit a shot. `chunks`: of a shot with chunked stages. `node` has the artefacts.

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
            if own_failure:
                reason = f"failed to write different shots in a row, the last time with: {failed}"
                self._supervisor.failed(encoder, plan.key, reason, in_doubt=False)
            else:
                self._supervisor.discard_failure(encoder, plan.key)

        def candidates() -> Sequence[Candidate[ActorClient]]:
            return [Candidate(client, client.node) for client in self._supervisor.candidates]

        return await run_with_retries(attempt, candidates, report, limit=self._attempts, observer=self._observer)

    async def _attempt(
        self,
        plan: ShotPlan,
        artefacts: Any,
        records: tuple[StepRecord, ...],
        chunks: ClipChunks | None,
        node: str | None,
        avoid: frozenset[ActorClient],
        *,
        alone: bool = False,
    ) -> ShotRecord:
        encoder = await self._acquire(avoid, node, alone=alone)
        process = Candidate(encoder, encoder.node)
        try:
            record = await _encode(encoder, self._director, plan, artefacts, records, chunks)
        except _EncodingFailed as failed:
            raise AttemptFailed(failed.kind, failed.failure, process) from None
        except ActorCallFailed as lost:
            self._supervisor.crashed(encoder)
            raise AttemptFailed(lost.kind, lost.failure(OUTPUT), process, lost.loss) from None
        finally:
            self._open[encoder] -= 1
            self._changed.set()
        self._supervisor.succeeded(encoder)
        return record

    async def _acquire(self, avoid: frozenset[ActorClient], node: str | None, *, alone: bool) -> ActorClient:
        """Return the least loaded encoder that is up, preferably on `node`. Waits until one is up and free.

        Waits for an encoder that starts if all others are to be avoided.
        `alone`: reserve an encoder without other clips. Raises ShotFailed if no encoder will come up.
        """

        def cost(client: ActorClient) -> tuple[bool, int]:
            return client in avoid, self._open[client] - LOCAL_LEAD * (client.node == node)

        while True:
            self._changed.clear()
            usable = self._supervisor.up
            if alone and usable and self._reserved not in usable:
                self._reserved = min(usable, key=cost)
            if alone:
                available = [client for client in usable if client is self._reserved and not self._open[client]]
            else:
                available = [client for client in usable if client is not self._reserved]
            others_start = any(client not in avoid and client not in usable for client in self._supervisor.candidates)
            if available and not (others_start and avoid.issuperset(available)):
                encoder = min(available, key=cost)
                self._open[encoder] += 1
                return encoder
            if self.fatal_failure is not None:
                raise ShotFailed(self.fatal_failure)
            await self._changed.wait()


async def _encode(
    encoder: ActorClient,
    director: str,
    plan: ShotPlan,
    artefacts: Any,
    records: tuple[StepRecord, ...],
    chunks: ClipChunks | None,
) -> ShotRecord:
    shot_id = plan.shot.id or ""
    opened: asyncio.Future[None] | None = None
    try:
        if chunks is None:
            return await _commit(encoder, "write", director, plan, artefacts, records, None)
        if chunks.n_chunks > 1:
            # Chunks are processed while the image and the original clip are written.
            opened = asyncio.ensure_future(_checked_call(encoder, "begin", director, plan, artefacts))
        chunk_records = []
        async with aclosing(chunks.process()) as each_chunk:
            async for chunk in each_chunk:
                chunk_records.append(chunk.records)
                if opened is not None:
                    await opened
                if not chunk.is_last:
                    await _checked_call(encoder, "add", shot_id, chunk.artefacts)
                    continue
                all_records = (*records, *join_records(chunk_records))
                if opened is not None:
                    return await _commit(encoder, "commit", shot_id, all_records, chunk.artefacts)
                return await _commit(encoder, "write", director, plan, artefacts, all_records, chunk.artefacts)
        raise AssertionError("no chunk is the last one")
    except BaseException:
        if opened is not None:
            opened.cancel()
        encoder.send("abandon", shot_id)
        raise


async def _commit(encoder: ActorClient, method: str, *args: Any) -> ShotRecord:
    result, record = await encoder.call(method, *args, stage=OUTPUT, timeout_s=ENCODE_TIMEOUT_S)
    _check(result)
    committed: ShotRecord = record
    return committed


async def _checked_call(encoder: ActorClient, method: str, *args: Any) -> None:
    _check(await encoder.call(method, *args, stage=OUTPUT, timeout_s=ENCODE_TIMEOUT_S))


def _check(result: CallResult) -> None:
    if result.session_lost:
        raise ActorCallFailed("WorkerDied", "the encoder restarted", Kind.NOT_RUN, "encoder")
    if result.failure is not None:
        raise _EncodingFailed(result.failure, result.kind)
