"""Asynchronous client of a vidgen-ray server. The blocking client runs the same methods."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeAlias, TypeVar
from urllib.parse import urlsplit
from uuid import uuid4

import httpx2
from pydantic import ValidationError

from vidgen_client.errors import ApiError, ClientError, ConnectionFailed, JobCancelled, JobFailed, WaitTimeout
from vidgen_client.image_inputs import ImageInput, file_of, reference_of
from vidgen_client.models import (
    A,
    Answer,
    Batch,
    BatchLine,
    Character,
    ErasedCharacter,
    Estimate,
    GeneratedImage,
    ImagesAnswer,
    Listing,
    Model,
    Priority,
    ShotJob,
    UploadedFile,
    Variant,
    Video,
    VideoPage,
    checked_id,
)

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE, KEY_VARIABLE = "VIDGEN_URL", "VIDGEN_API_KEY"
TIMEOUT_S = 60.0
"""Seconds without any data before a request counts as lost."""
IMAGES_TIMEOUT_S = 600.0
"""The same for images: the server answers when they are ready."""
STREAM_TIMEOUT_S = 45.0
"""The same for event streams, in which the server sends a ping every 15 s."""
RETRIED_STATUS = (429, 502, 503)
"""Too many requests or jobs; the server restarts behind its proxy; it cannot store jobs."""
MAX_DELAY_S = 60.0
"""Longest delay between two attempts. A server that asks for a longer one is not tried again."""
MAX_BACKOFF_S = 16.0
"""Longest random delay, if the server asks for none."""
CONNECT_TIMEOUT_S = 10.0
POLL_S = 1.0
"""Seconds between polls if the server recommends none."""
MAX_PAUSE_S = 60.0
"""Longest delay between two polls. A server that recommends a longer one is asked sooner."""
MAX_ANSWER_BYTES, MAX_FILE_BYTES, MAX_DOWNLOAD_BYTES = 64 << 20, 4 << 30, 256 << 30
"""Most bytes of an answer that is parsed, of a file that is returned, and of one that is written."""
MAX_ERROR_BYTES, MAX_MESSAGE_LENGTH = 1 << 20, 2000
"""Most bytes of an error that are read, and most characters of its message."""
IMAGE_FIELDS = ("input_reference", "last_image", "input_references", "image_reference", "face_image", "image")
PREVIEWS = ("thumbnail", "spritesheet", "preview")
SUFFIXES = {
    "video/mp4": ".mp4",
    "image/png": ".png",
    "image/webp": ".webp",
    "image/jpeg": ".jpg",
    "application/octet-stream": ".bin",
}
"""Types of content of the files that are accepted."""
ConsentInput: TypeAlias = Mapping[str, str] | str
"""Fields of a consent, or `subject=NAME,basis=written,reference=FILE`."""

R = TypeVar("R")


class _Received(NamedTuple):
    """Response whose body was read."""

    headers: Mapping[str, str]
    content: bytes


class AsyncClient:
    """Client of a server, for use in an event loop.

    Requests are repeated after lost connections, with an idempotency key, so that nothing is created twice. Methods raise
    ApiError if the server refuses a request, and ConnectionFailed if it cannot be reached.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        retries: int = 5,
        **options: Any,
    ) -> None:
        """Open no connection yet.

        `url`: of the server, with or without /v1; default: `$VIDGEN_URL` or http://127.0.0.1:8000. `api_key`: default:
        `$VIDGEN_API_KEY`. `timeout_s`: seconds without any data before a request counts as lost. `retries`: attempts after the
        first one. `options`: of httpx2.AsyncClient. Raises ClientError.
        """
        url = url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        api_key = api_key or os.environ.get(KEY_VARIABLE)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ClientError(f"url: got {url!r}, must be the URL of a server, for example {DEFAULT_URL}")
        headers = {"User-Agent": f"vidgen-client/{version('vidgen-client')}"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self.url = url.rstrip("/").removesuffix("/v1")
        """URL of the server."""
        self._connect = partial(httpx2.AsyncClient, base_url=self.url, headers=headers, timeout=_timeout(timeout_s), **options)
        self._connections, self._process = self._connect(), os.getpid()
        self._retries = retries

    @property
    def _http(self) -> httpx2.AsyncClient:
        """Connections of this process. On those of a parent process, each would read answers to requests of the other."""
        if self._process != os.getpid():
            self._connections, self._process = self._connect(), os.getpid()
        return self._connections

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def create_video(
        self,
        /,
        prompt: str,
        *,
        size: str | None = None,
        seconds: float | None = None,
        input_reference: ImageInput | None = None,
        face_image: ImageInput | Sequence[ImageInput] | None = None,
        consent: ConsentInput | None = None,
        character: str | None = None,
        lora: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None = None,
        seed: int | None = None,
        model: str | None = None,
        priority: Priority | None = None,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> Video:
        """Create a video and return it at once, queued.

        `size`: WIDTHxHEIGHT in pixels. `input_reference`: image to start from. `face_image`: photos of one face. `consent`: why
        this face may be used, `{"subject": "NAME", "basis": "written", "reference": "FILE"}`; photos need it. `character`: name
        or id of a character, instead of photos. `lora`: names of LoRAs of the server, or `{"name": ..., "scale": ...}`.
        `priority`: of this video among the waiting ones of the same tenant. `fields`: any other field of `POST /v1/videos`.
        `idempotency_key`: the same key returns the same video; default: a new key.
        """
        named = {
            "prompt": prompt,
            "size": size,
            "seconds": seconds,
            "input_reference": input_reference,
            "face_image": face_image,
            "consent": consent,
            "character": character,
            "lora": lora,
            "seed": seed,
            "model": model,
            "priority": priority,
        }
        return await self._create(Video, "/v1/videos", {**fields, **named}, idempotency_key)

    async def estimate_video(self, /, prompt: str, **fields: Any) -> Estimate:
        """Estimate what a video would take, without creating it. `fields`: those of `create_video`. Images are uploaded."""
        return await self._create(Estimate, "/v1/videos/estimate", {**fields, "prompt": prompt}, None)

    async def estimate_shot(self, /, **fields: Any) -> Estimate:
        """Estimate what a job with these fields of a shot would take, without creating it. `fields`: of `POST /v1/shots`."""
        return await self._request(Estimate, "POST", "/v1/shots/estimate", json=fields)

    async def remix_video(self, /, video: Video | str, *, idempotency_key: str | None = None, **fields: Any) -> Video:
        """Create a video from another one. Fields that are not passed keep their values, including the seed."""
        return await self._create(Video, f"{_path(video)}/remix", fields, idempotency_key)

    async def get_shot(self, video: Video | str) -> dict[str, Any]:
        """Return all fields of the shot of a job, as `POST /v1/shots` accepts them."""
        return (await self._request(ShotJob, "GET", f"/v1/shots/{_id(video)}", named=video)).shot

    async def get_video(self, video: Video | str) -> Video:
        """Return the current state of a video."""
        return (await self._poll(video))[0]

    async def list_videos(
        self, *, after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> VideoPage:
        """Return a page of up to 100 videos, the newest first. `after`: `last_id` of the page before."""
        params = {"limit": limit, "order": order} | ({"after": after} if after else {})
        return await self._request(VideoPage, "GET", "/v1/videos", params=params)

    async def cancel_video(self, video: Video | str) -> Video:
        """Cancel a job: at once if it is queued, after the current step if it is running. No effect on a job that has ended."""
        return await self._request(Video, "POST", f"{_path(video)}/cancel", named=video)

    async def delete_video(self, video: Video | str) -> None:
        """Delete a video and its files. A job that has not ended is cancelled."""
        await self._send("DELETE", _path(video))

    async def follow_video(self, video: Video | str, *, timeout_s: float | None = None) -> AsyncGenerator[Video]:
        """Yield a video now and after each change, until its job has ended.

        Changes come as server-sent events. If that fails, and if there is a time limit, the video is polled as often as the
        server recommends. Raises WaitTimeout after `timeout_s`.
        """
        state: Video | None = None
        if timeout_s is None:
            async with aclosing(self._events(video)) as events:
                async for state in events:
                    yield state
                    if state.is_final:
                        # Not all servers and proxies end the stream then.
                        return
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while state is None or not state.is_final:
            before = state
            state, pause_s = await self._poll(video)
            if state != before:
                yield state
            if not state.is_final:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise WaitTimeout(state, timeout_s or 0)
                await asyncio.sleep(min(pause_s, left_s))

    async def wait_for_video(
        self, video: Video | str, *, on_progress: Callable[[Video], object] | None = None, timeout_s: float | None = None
    ) -> Video:
        """Wait until the job has ended and return the completed video.

        `on_progress` is called with the video now and after each change. Raises JobFailed, JobCancelled, and WaitTimeout after
        `timeout_s`.
        """
        async with aclosing(self.follow_video(video, timeout_s=timeout_s)) as states:
            async for current in states:
                if on_progress is not None:
                    on_progress(current)
        return check_completed(current)

    async def read_video(self, video: Video | str, *, variant: Variant = "video") -> bytes:
        """Return a file of a completed video. Use `download_video` for large files."""
        limit = MAX_ANSWER_BYTES if variant in PREVIEWS else MAX_FILE_BYTES
        response = await self._send("GET", f"{_path(video)}/content", max_bytes=limit, params={"variant": variant})
        _suffix_of(response.headers)
        return response.content

    async def download_video(self, video: Video | str, path: str | os.PathLike[str], *, variant: Variant = "video") -> Path:
        """Write a file of a completed video and return its path.

        `path`: file to write, or an existing folder, in which the file gets the id as its name. The data goes to a hidden
        `.part` file in the same folder first. After a lost connection or a stopped program, the download continues that file.
        """
        return await self._retry(lambda: self._download(video, Path(path), variant))

    async def create_images(
        self,
        /,
        prompt: str,
        *,
        n: int = 1,
        size: str | None = None,
        output_format: Literal["png", "webp", "jpeg"] = "png",
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> list[GeneratedImage]:
        """Generate images and wait for them. `fields`: any other field of `POST /v1/images/generations`."""
        body = {**fields, "prompt": prompt, "n": n, "size": size, "output_format": output_format}
        return (await self._create(ImagesAnswer, "/v1/images/generations", body, idempotency_key, IMAGES_TIMEOUT_S)).images

    async def edit_images(
        self,
        /,
        image: ImageInput | Sequence[ImageInput],
        prompt: str,
        *,
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> list[GeneratedImage]:
        """Edit images with a prompt and wait for the results. `fields`: any other field of `POST /v1/images/edits`."""
        body = {**fields, "image": image, "prompt": prompt}
        return (await self._create(ImagesAnswer, "/v1/images/edits", body, idempotency_key, IMAGES_TIMEOUT_S)).images

    async def upload_image(self, image: ImageInput) -> UploadedFile:
        """Upload an image, to use it in several requests. The same image always has the same id."""
        purpose, files = {"purpose": "vision"}, [("file", await asyncio.to_thread(file_of, image))]
        return await self._request(UploadedFile, "POST", "/v1/files", data=purpose, files=files)

    async def create_character(
        self,
        name: str,
        photos: ImageInput | Sequence[ImageInput] = (),
        *,
        video: str | os.PathLike[str] | bytes | None = None,
        consent: ConsentInput | None = None,
    ) -> Character:
        """Create a character from photos of one face, or from a video that shows it. `consent`: as in `create_video`."""
        given = photos if isinstance(photos, list | tuple) else [photos]
        files = [("image", await asyncio.to_thread(file_of, photo)) for photo in given]
        if video is not None:
            files.append(("video", await asyncio.to_thread(file_of, video, "video")))
        fields = {"name": name}
        if consent is not None:
            fields["consent"] = consent if isinstance(consent, str) else json.dumps(dict(consent))
        return await self._request(Character, "POST", "/v1/videos/characters", data=fields, files=files)

    async def list_characters(self) -> list[Character]:
        """Return all characters, the newest first."""
        return (await self._request(Listing[Character], "GET", "/v1/videos/characters")).data

    async def delete_character(self, character: Character | str) -> None:
        """Delete a character by its id. Its photos remain uploads."""
        await self._send("DELETE", f"/v1/videos/characters/{_id(character)}")

    async def erase_character(self, character: Character | str, *, videos: bool = False) -> ErasedCharacter:
        """Delete a character with its photos, face features and cached results. `videos`: also what was made with it."""
        params = {"videos": str(videos).lower()}
        return await self._request(ErasedCharacter, "DELETE", f"/v1/characters/{_id(character)}", params=params)

    async def upload_batch(self, content: bytes) -> UploadedFile:
        """Upload the input file of a batch: a JSON object a line, with custom_id, method, url and body."""
        files = [("file", ("batch.jsonl", content))]
        return await self._request(UploadedFile, "POST", "/v1/files", data={"purpose": "batch"}, files=files)

    async def create_batch(
        self,
        /,
        input_file: UploadedFile | str,
        *,
        endpoint: str = "/v1/videos",
        completion_window: str = "24h",
        idempotency_key: str | None = None,
        **fields: Any,
    ) -> Batch:
        """Create a batch from an uploaded file. `fields`: any other field of `POST /v1/batches`."""
        file = input_file if isinstance(input_file, str) else input_file.id
        body = {**fields, "input_file_id": file, "endpoint": endpoint, "completion_window": completion_window}
        return await self._create(Batch, "/v1/batches", body, idempotency_key)

    async def get_batch(self, batch: Batch | str) -> Batch:
        """Return the current state of a batch."""
        return await self._request(Batch, "GET", f"/v1/batches/{_id(batch)}", named=batch)

    async def list_batches(self, *, limit: int = 20) -> list[Batch]:
        """Return up to 100 batches, the newest first."""
        return (await self._request(Listing[Batch], "GET", "/v1/batches", params={"limit": limit})).data

    async def cancel_batch(self, batch: Batch | str) -> Batch:
        """Cancel a batch. Lines that are not completed get an error."""
        return await self._request(Batch, "POST", f"/v1/batches/{_id(batch)}/cancel", named=batch)

    async def wait_for_batch(self, batch: Batch | str, *, on_progress: Callable[[Batch], object] | None = None) -> Batch:
        """Wait until a batch has ended and return it. `on_progress` is called with the batch now and after each change."""
        before, pause_s = None, POLL_S
        while True:
            state = await self.get_batch(batch)
            if on_progress is not None and state != before:
                on_progress(state)
            if state.is_final:
                return state
            pause_s = POLL_S if state != before else min(MAX_BACKOFF_S, 1.5 * pause_s)
            before = state
            await asyncio.sleep(pause_s)

    async def batch_results(self, batch: Batch) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the lines of the output file and of the error file of a batch that has ended."""
        output, errors = await self.batch_lines(batch)
        return [line.model_dump() for line in output], [line.model_dump() for line in errors]

    async def batch_lines(self, batch: Batch) -> tuple[list[BatchLine], list[BatchLine]]:
        """Return what `batch_results` does as objects. A line of the output file has a custom_id and a response."""
        output, errors = [await self._lines(file) for file in (batch.output_file_id, batch.error_file_id)]
        if any(line.custom_id is None or line.response is None for line in output):
            raise ClientError(f"{batch.id}: a line of its output file has no custom_id or no response")
        return output, errors

    async def _lines(self, file_id: str | None) -> list[BatchLine]:
        if file_id is None:
            return []
        response = await self._send("GET", f"/v1/files/{_id(file_id)}/content", max_bytes=MAX_FILE_BYTES)
        return [_parse(BatchLine, line) for line in response.content.splitlines()]

    async def list_models(self) -> list[Model]:
        """Return the models of the server. The first is the default."""
        return (await self._request(Listing[Model], "GET", "/v1/models")).data

    async def _create(
        self, model: type[A], path: str, fields: Mapping[str, Any], idempotency_key: str | None, timeout_s: float | None = None
    ) -> A:
        body = {name: await self._uploaded(name, value) for name, value in fields.items() if value is not None}
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        limit = MAX_FILE_BYTES if model is ImagesAnswer else None
        return await self._request(model, "POST", path, json=body, headers=headers, timeout_s=timeout_s, max_bytes=limit)

    async def _request(
        self, model: type[A], method: str, path: str, *, named: Video | Batch | str | None = None, **options: Any
    ) -> A:
        """Send a request and parse the answer. `named`: what it must be about. Raises ClientError."""
        return _about(named, _parse(model, (await self._send(method, path, **options)).content))

    async def _send(
        self, method: str, path: str, *, timeout_s: float | None = None, max_bytes: int | None = None, **options: Any
    ) -> _Received:
        """Send a request and return the response with its body.

        The request is repeated after connection errors and `RETRIED_STATUS`. A request that creates something needs the header
        `Idempotency-Key`. `timeout_s`: seconds without any data; `None` is the client's default. `options`: of a request of
        httpx2. Raises ApiError and ConnectionFailed, and ClientError for a body of more than `max_bytes`, by default
        `MAX_ANSWER_BYTES`.
        """
        timeout = httpx2.USE_CLIENT_DEFAULT if timeout_s is None else _timeout(timeout_s)
        request = self._http.build_request(method, path, timeout=timeout, **options)
        limit = MAX_ANSWER_BYTES if max_bytes is None else max_bytes

        async def send() -> _Received:
            async with self._opened(request) as response:
                content = await _read(response, limit)
                if len(content) > limit:
                    raise ClientError(f"{request.url}: the answer has more than {limit:,} bytes")
                return _Received(response.headers, content)

        return await self._retry(send)

    @asynccontextmanager
    async def _opened(self, request: httpx2.Request) -> AsyncIterator[httpx2.Response]:
        """Open the response to a request. Not repeated. Raises ApiError and ConnectionFailed."""
        with _connection_errors(request):
            response = await self._http.send(request, stream=True)
            try:
                if not response.is_success:
                    raise _api_error(response, await _read(response, MAX_ERROR_BYTES))
                yield response
            finally:
                await response.aclose()

    def _stream(self, path: str, *, timeout_s: float, **options: Any) -> AbstractAsyncContextManager[httpx2.Response]:
        """Open a response to read its body piece by piece. Not repeated. Raises ApiError and ConnectionFailed."""
        return self._opened(self._http.build_request("GET", path, timeout=_timeout(timeout_s), **options))

    async def _retry(self, call: Callable[[], Awaitable[R]]) -> R:
        """Call until it succeeds, the error is final or all attempts are used up. Then raise the last error."""
        for attempt in range(self._retries):
            try:
                return await call()
            except ConnectionFailed:
                delay_s = None
            except ApiError as error:
                delay_s = error.retry_after_s
                if not error.retryable or (delay_s or 0) > MAX_DELAY_S:
                    raise
            await asyncio.sleep(random.uniform(0, min(MAX_BACKOFF_S, 0.5 * 2**attempt)) if delay_s is None else delay_s)
        return await call()

    async def _uploaded(self, field: str, value: Any) -> Any:
        """Return the value of a field with uploads in place of images."""
        if field not in IMAGE_FIELDS:
            return value
        if isinstance(value, list | tuple):
            return [await self._uploaded(field, each) for each in value]
        return reference_of(value) or reference_of(await self.upload_image(value))

    async def _poll(self, video: Video | str) -> tuple[Video, float]:
        """Return the state of a video, and the seconds until the next poll."""
        response = await self._send("GET", _path(video))
        pause_s = _seconds(response.headers, "openai-poll-after-ms", 0.001)
        return _about(video, _parse(Video, response.content)), POLL_S if pause_s is None else min(pause_s, MAX_PAUSE_S)

    async def _events(self, video: Video | str) -> AsyncGenerator[Video]:
        """Yield the video of each event. End early if the stream cannot be opened or breaks off."""
        try:
            async with self._stream(f"{_path(video)}/events", timeout_s=STREAM_TIMEOUT_S) as response:
                async for event in httpx2.EventSource(response):
                    if event.event == "video.deleted":
                        return
                    yield _about(video, _parse(Video, event.data))
        except (ApiError, ConnectionFailed):
            # Polling reports the error if it persists.
            return

    async def _download(self, video: Video | str, path: Path, variant: Variant) -> Path:
        """Download once, from the end of a partial file on."""
        url = f"{_path(video)}/content"
        # A compressed body would not have the offsets of the file.
        headers = {"Accept-Encoding": "identity"}
        async with self._stream(url, params={"variant": variant}, headers=headers, timeout_s=TIMEOUT_S) as response:
            suffix = _suffix_of(response.headers)
            target = path / f"{_id(video)}{suffix}" if path.is_dir() else path
            # A proxy may leave out both headers. Then the file is written in one piece.
            etag, length = response.headers.get("etag", ""), int(response.headers.get("content-length", 0))
            digest = hashlib.sha256(f"{_id(video)} {variant} {etag}".encode()).hexdigest()[:12]
            part = target.with_name(f".{target.name}.{digest}.part")
            written = part.stat().st_size if etag and part.exists() else 0
            if not 0 < written <= length:
                written = await self._write(response, part, "wb")
        if written < length:
            headers |= {"Range": f"bytes={written}-", "If-Range": etag}
            async with self._stream(url, params={"variant": variant}, headers=headers, timeout_s=TIMEOUT_S) as response:
                is_rest = response.status_code == httpx2.codes.PARTIAL_CONTENT
                if is_rest and not response.headers.get("content-range", "").startswith(f"bytes {written}-"):
                    part.unlink()
                    raise ConnectionFailed(f"{response.url}: the answer is another part of the file, must start at {written}")
                written = await self._write(response, part, "ab" if is_rest else "wb")
        if length and written != length:
            part.unlink()
            raise ClientError(f"{_id(video)}: got {written:,} bytes of its {variant}, must be {length:,}")
        part.replace(target)
        return target

    async def _write(self, response: httpx2.Response, part: Path, mode: str) -> int:
        """Write a body to a file and return the size of the file in bytes."""
        with part.open(mode) as file:
            async for chunk in response.aiter_bytes():
                file.write(chunk)
                if file.tell() > MAX_DOWNLOAD_BYTES:
                    raise ClientError(f"{response.url}: the file has more than {MAX_DOWNLOAD_BYTES:,} bytes")
            return file.tell()


async def _read(response: httpx2.Response, max_bytes: int) -> bytes:
    """Return a body, of a longer one the beginning, which has more than `max_bytes`."""
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > max_bytes:
            break
    return bytes(content)


def _suffix_of(headers: Mapping[str, str]) -> str:
    """Return the ending of the name of a file. Raises ClientError if the content is none of a video or an image."""
    kind = headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if kind not in SUFFIXES:
        raise ClientError(f"content type: got {kind[:100]!r}, must be that of a video or an image. Check the URL.")
    return SUFFIXES[kind]


def check_completed(video: Video) -> Video:
    """Return a video whose job has ended. Raises JobFailed and JobCancelled."""
    if video.status == "cancelled":
        raise JobCancelled(video)
    if video.status == "failed":
        raise JobFailed(video)
    return video


def completed_video(line: BatchLine) -> Video:
    """Return the video of a line of an output file. Raises ClientError if its response is none."""
    return _parse(Video, json.dumps(None if line.response is None else line.response.body))


def _parse(model: type[A], content: bytes | str) -> A:
    """Parse an answer of the server. Raises ClientError if it is not one of vidgen-ray."""
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, detail["loc"]))
        raise ClientError(
            f"The answer is not a {model.__name__}{f', {where}' if where else ''}: {detail['msg']}. Check the URL."
        ) from None


def _about(named: Video | Batch | str | None, answer: A) -> A:
    """Return an answer that must have the id of what was asked for. Raises ClientError."""
    if named is not None and getattr(answer, "id", None) != _id(named):
        raise ClientError(f"The answer is about {getattr(answer, 'id', None)}, must be about {_id(named)}. Check the URL.")
    return answer


def _id(named: Video | Character | Batch | str) -> str:
    """Return an id. Raises ClientError for other text, see `checked_id`."""
    try:
        return checked_id(named if isinstance(named, str) else named.id)
    except ValueError as error:
        raise ClientError(str(error)) from None


def _path(video: Video | str) -> str:
    return f"/v1/videos/{_id(video)}"


def _timeout(timeout_s: float) -> httpx2.Timeout:
    return httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)


@contextmanager
def _connection_errors(request: httpx2.Request) -> Iterator[None]:
    """Raise ConnectionFailed instead of httpx2's errors."""
    try:
        yield
    except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.DecodingError, httpx2.TooManyRedirects) as error:
        raise ClientError(f"{request.url}: {error}") from error
    except httpx2.TransportError as error:
        raise ConnectionFailed(f"{request.url}: {str(error) or type(error).__name__}") from error


class _Error(Answer):
    message: str
    code: str | None = None
    param: str | None = None


class _ErrorBody(Answer):
    error: _Error


def _api_error(response: httpx2.Response, content: bytes) -> ApiError:
    try:
        error = _ErrorBody.model_validate_json(content).error
    except ValidationError:
        # Not an error of vidgen-ray: a proxy answered.
        text = content.decode("utf-8", "replace")[:500].strip()
        error = _Error(message=text or response.reason_phrase)
    retryable = response.status_code in RETRIED_STATUS and response.headers.get("x-should-retry") != "false"
    delay_s = _seconds(response.headers, "retry-after-ms", 0.001)
    return ApiError(
        error.message[:MAX_MESSAGE_LENGTH],
        status=response.status_code,
        code=error.code,
        param=error.param,
        retry_after_s=_seconds(response.headers, "retry-after", 1.0) if delay_s is None else delay_s,
        retryable=retryable,
    )


def _seconds(headers: Mapping[str, str], name: str, unit_s: float) -> float | None:
    """Return the value of a header in seconds, or `None` if it is missing or no duration."""
    try:
        seconds = float(headers[name]) * unit_s
    except (KeyError, ValueError):
        return None
    return seconds if 0 <= seconds < math.inf else None
