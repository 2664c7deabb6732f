"""Render the lines of a script as batches of a server: `vidgen render --to`.

A state file has the batch that is not collected yet, so that the next call continues it. What a server answers counts only for
lines that were sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from vidgen_client.async_client import IMAGE_FIELDS, AsyncClient, completed_video
from vidgen_client.errors import ApiError, ClientError
from vidgen_client.image_inputs import file_of
from vidgen_client.models import Batch, BatchLine, Estimate, LineProblem, Video

ENDPOINT = "/v1/shots"
_WINDOW = "365d"
"""Completion window: a script has no deadline."""
STATE = ".batch.json"
DOWNLOADS = 4
"""Results that are collected at the same time."""
ESTIMATES = 4
"""Estimates that are requested at the same time."""
GONE = (400, 404, 409, 410)
"""Status of a server that does not know the input file or the batch of an earlier call, or knows another one."""
SENT_AGAIN = ("batch_cancelled", "batch_expired", "deleted", "input_lost", "invalid_api_key")
"""Codes of lines of an earlier batch that were not rendered."""
NOT_COSTLY = ("prompt", "negative_prompt", "seed", "metadata", "consent")
"""Fields that change neither seconds nor licences."""
Fields: TypeAlias = Mapping[str, Any]
Result: TypeAlias = Video | LineProblem
OnResult: TypeAlias = Callable[[str, Result], Awaitable[None]]


class StateFolder(Protocol):
    """Folder of the state file."""

    def read(self, path: str) -> bytes | None: ...
    def write(self, path: str, content: str) -> None: ...
    def delete(self, path: str) -> None: ...


class _Sent(BaseModel):
    """Content of the state file."""

    url: str
    file: str
    """Id of the input file."""
    key: str
    """Idempotency key of the batch."""
    digests: dict[str, str]
    """Id of a line -> digest of what was sent."""


class LinesEstimate(NamedTuple):
    """Estimate of lines that differ in nothing that costs."""

    lines: int
    each: Estimate


class LineDigests:
    """Computes digests of lines, with the content of their images. Reads each image once."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}

    def __call__(self, fields: Fields) -> str:
        """Return the digest of the fields of a line. Raises ClientError and OSError for an image that cannot be sent."""
        named = {name: self._of_images(value) if name in IMAGE_FIELDS and value else value for name, value in fields.items()}
        return hashlib.sha256(json.dumps([ENDPOINT, named], sort_keys=True).encode()).hexdigest()

    def _of_images(self, paths: str | Sequence[str]) -> list[str]:
        return [self._of_image(path) for path in ([paths] if isinstance(paths, str) else paths)]

    def _of_image(self, path: str) -> str:
        if path not in self._files:
            self._files[path] = hashlib.sha256(file_of(path)[1]).hexdigest()
        return self._files[path]


class ScriptBatch:
    """Batches of the lines of one script."""

    def __init__(
        self,
        client: AsyncClient,
        folder: StateFolder,
        digests: Mapping[str, str],
        on_batch: Callable[[Batch], object],
        on_message: Callable[[str], object],
    ) -> None:
        """`digests`: id -> digest of every line of the script, also of those that are not sent."""
        self._client = client
        self._folder = folder
        self._digests = digests
        self._on_batch = on_batch
        self._on_message = on_message

    async def resume(self, wanted: set[str], on_result: OnResult, *, discard: bool) -> set[str]:
        """Collect the batch of an earlier call, and return the ids of the lines that it has answered.

        `wanted`: ids of the lines that are not finished. A batch with lines that the script does not have any more is cancelled
        first. One that is gone is forgotten. `discard`: cancel it, and collect nothing. Raises ClientError.
        """
        sent = self._read_state()
        if sent is None:
            return set()
        answered: set[str] = set()
        try:
            answered = await self._collect_earlier(sent, wanted, on_result, discard=discard)
        except ApiError as error:
            if error.status not in GONE:
                raise
            self._on_message(f"the batch of an earlier call is gone ({error}); its lines are sent again")
        self._folder.delete(STATE)
        return answered

    async def upload_images(self, lines: Mapping[str, Fields]) -> dict[str, Fields]:
        """Return the lines with ids of uploads in place of images."""
        ids: dict[str, str] = {}
        return {name: await self._with_uploads(fields, ids) for name, fields in lines.items()}

    async def estimate(self, lines: Mapping[str, Fields]) -> list[LinesEstimate]:
        """Estimate what lines would take, by one request for all that differ in nothing that costs."""
        groups: dict[str, list[Fields]] = {}
        for fields in lines.values():
            costly = {name: value for name, value in fields.items() if name not in NOT_COSTLY}
            groups.setdefault(json.dumps(costly, sort_keys=True), []).append(fields)
        slots = asyncio.Semaphore(ESTIMATES)

        async def estimated(group: Sequence[Fields]) -> LinesEstimate:
            # A line that the server has rendered already would cost nothing, unlike the others.
            seed = random.getrandbits(31) if len(group) > 1 else group[0].get("seed", 0)
            async with slots:
                return LinesEstimate(len(group), await self._client.estimate_shot(**{**group[0], "seed": seed}))

        return await asyncio.gather(*map(estimated, groups.values()))

    async def render(self, lines: Mapping[str, Fields], on_result: OnResult) -> None:
        """Send lines as a batch, wait for it, and call `on_result` for each. Raises ClientError."""
        rows = [
            json.dumps({"custom_id": name, "method": "POST", "url": ENDPOINT, "body": fields}) for name, fields in lines.items()
        ]
        file = await self._client.upload_batch("\n".join(rows).encode())
        digests = {name: self._digests[name] for name in lines}
        sent = _Sent(url=self._client.url, file=file.id, key=uuid4().hex, digests=digests)
        # Before the batch is created: the same key then finds it.
        self._folder.write(STATE, sent.model_dump_json())
        batch = await self._client.wait_for_batch(await self._batch_of(sent), on_progress=self._on_batch)
        if batch.status == "failed":
            self._folder.delete(STATE)
            raise ClientError(f"{batch.id} failed: {json.dumps(batch.errors)[:1000]}")
        results = await self._results(sent, batch)
        missing = LineProblem(message=f"the server has no result of it in {batch.id}", code="no_result")
        await _deliver({name: results.get(name, missing) for name in lines}, on_result)
        self._folder.delete(STATE)

    async def _with_uploads(self, fields: Fields, ids: dict[str, str]) -> Fields:
        uploaded = dict(fields)
        for name in IMAGE_FIELDS:
            value = fields.get(name)
            if not value:
                continue
            paths = [value] if isinstance(value, str) else value
            for path in paths:
                if path not in ids:
                    ids[path] = (await self._client.upload_image(path)).id
            uploaded[name] = ids[value] if isinstance(value, str) else [ids[path] for path in paths]
        return uploaded

    def _read_state(self) -> _Sent | None:
        """Return what an earlier call has sent to this server, or `None`."""
        content = self._folder.read(STATE)
        if content is None:
            return None
        try:
            sent = _Sent.model_validate_json(content)
        except ValidationError:
            sent = None
        if sent is None or sent.url != self._client.url:
            whose = "is damaged" if sent is None else f"is of {sent.url}"
            self._on_message(f"{STATE}, the batch of an earlier call, {whose}; its lines are sent again")
            self._folder.delete(STATE)
            return None
        return sent

    async def _collect_earlier(self, sent: _Sent, wanted: set[str], on_result: OnResult, *, discard: bool) -> set[str]:
        batch = await self._batch_of(sent)
        is_changed = any(self._digests.get(name) != digest for name, digest in sent.digests.items())
        if (discard or is_changed) and not batch.is_final:
            why = "--fresh" if discard else "the script has changed"
            self._on_message(f"{batch.id}, the batch of an earlier call, is cancelled: {why}")
            batch = await self._client.cancel_batch(batch)
        if discard:
            return set()
        batch = await self._client.wait_for_batch(batch, on_progress=self._on_batch)
        results = {
            name: result
            for name, result in (await self._results(sent, batch)).items()
            if name in wanted and self._digests[name] == sent.digests[name] and not _is_sent_again(result)
        }
        await _deliver(results, on_result)
        return set(results)

    async def _batch_of(self, sent: _Sent) -> Batch:
        return await self._client.create_batch(
            sent.file, endpoint=ENDPOINT, completion_window=_WINDOW, idempotency_key=sent.key
        )

    async def _results(self, sent: _Sent, batch: Batch) -> dict[str, Result]:
        """Return the results of a batch that has ended. Raises ClientError for one of a line that was not sent."""
        output, errors = await self._client.batch_lines(batch)
        results: dict[str, Result] = {}
        found = [(line, _completed(line)) for line in output] + [(line, line.problem) for line in errors]
        for line, result in found:
            name = line.custom_id
            if name is None:
                continue
            if name not in sent.digests or name in results:
                wrong = "twice" if name in results else "which was not sent"
                raise ClientError(f"{batch.id}: has a result of custom_id {name[:100]!r}, {wrong}")
            results[name] = result
        return results


def _completed(line: BatchLine) -> Result:
    video = completed_video(line)
    if video.status == "completed":
        return video
    return LineProblem(message=f"its job is {video.status}", code=video.status)


def _is_sent_again(result: Result) -> bool:
    return isinstance(result, LineProblem) and result.code in SENT_AGAIN


async def _deliver(results: Mapping[str, Result], on_result: OnResult) -> None:
    slots = asyncio.Semaphore(DOWNLOADS)

    async def deliver(name: str, result: Result) -> None:
        async with slots:
            await on_result(name, result)

    await asyncio.gather(*(deliver(name, result) for name, result in results.items()))
