"""Uploaded files: size-limited while they arrive, decoded to verify them, stored by sha256. Client file names are not used."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import os
import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl

from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vidgen_ray.atomic_files import flush_to_disk, temporary_file
from vidgen_ray.cache_dir import cache_dir
from vidgen_ray.errors import MediaError
from vidgen_ray.media import read_image
from vidgen_ray.online.api_error import ApiError, invalid
from vidgen_ray.online.settings import UploadCaps
from vidgen_ray.online.store.upload_records import Upload, UploadRecords
from vidgen_ray.outputs.folder import OutputFolder

BLOCK_BYTES = 1 << 20
FIELDS = 200
"""Of one form."""
FIELD_BYTES = 1 << 20
SMALL_FORM_BYTES = 8 << 10
NAME = re.compile(r"[0-9a-f]{64}")
"""Name of an upload in the folder. The folder also has images that the Python API was given in memory."""
DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.ASCII)


class UploadFolder:
    """Local folder of uploaded images, named by the sha256 of their content, and the records of their tenants."""

    def __init__(self, folder: Path, records: UploadRecords, caps: UploadCaps) -> None:
        self._folder = folder
        self._records = records
        self.caps = caps

    def store(self, tenant: str, source: BinaryIO, param: str) -> Upload:
        """Store an image unchanged. Raises ApiError 413 if it is too large, 400 if it cannot be decoded.

        `param` is the request field named in errors.
        """
        digest, size = hashlib.sha256(), 0
        tmp = temporary_file(self._folder)
        try:
            with tmp.open("wb") as target:
                while block := source.read(BLOCK_BYTES):
                    size += len(block)
                    if size > self.caps.image_bytes:
                        raise too_large(param, self.caps.image_bytes)
                    digest.update(block)
                    target.write(block)
            name = digest.hexdigest()
            if not (self._folder / name).exists():
                _check_image(tmp, param)
            upload = self._records.add(tenant, f"file-{name}", name, size)
            # The record protects the file. Before it was added, deleting the only other upload may have removed the file.
            if not (self._folder / name).exists():
                flush_to_disk(tmp)
                tmp.rename(self._folder / name)
        finally:
            tmp.unlink(missing_ok=True)
        return upload

    def find(self, tenant: str, upload_id: str) -> Path | None:
        """Return the path of a tenant's upload, or `None`."""
        upload = self._records.get(upload_id, tenant)
        if upload is None or not (self._folder / upload.file).is_file():
            return None
        return self._folder / upload.file

    def delete(self, tenant: str, upload_id: str) -> bool:
        """Delete a tenant's upload, and its file if nothing else needs it. Return False if the tenant has no such upload."""
        return self._records.delete(upload_id, tenant, self._remove)

    def remove_unreferenced(self, older_than_s: float) -> None:
        """Remove files older than `older_than_s` seconds that belong to no upload and to no job in progress or queued."""
        modified_before = time.time() - older_than_s
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            files = [entry.name for entry in entries if NAME.fullmatch(entry.name) and entry.stat().st_mtime < modified_before]
            self._records.remove_unreferenced(files, self._remove)

    def _remove(self, file: str) -> None:
        (self._folder / file).unlink(missing_ok=True)

    def id_of(self, path: str) -> str | None:
        """Return the upload id of a file in this folder, `None` for another path."""
        file = Path(path)
        return f"file-{file.name}" if file.parent == self._folder else None


def upload_folder(outputs: OutputFolder, records: UploadRecords, caps: UploadCaps) -> UploadFolder:
    """Return the upload folder: in the output folder, or in the local cache folder if the output is an object store."""
    return UploadFolder((outputs.storage.local or cache_dir()) / "inputs", records, caps)


def too_large(param: str | None, cap_bytes: int) -> ApiError:
    """Return a 413 error for a field, or for the whole request."""
    subject = f"{param}: is" if param else "The request is"
    return ApiError(413, f"{subject} larger than {cap_bytes} bytes", code="too_large", param=param)


def from_data_url(url: str, cap_bytes: int, param: str) -> bytes:
    """Decode a `data:` URL. Raises ApiError 400 or 413."""
    header = DATA_URL.match(url)
    if header is None:
        raise invalid(param, "must be a base64 data: URL, for example data:image/png;base64,...")
    if len(url) - header.end() > cap_bytes * 4 // 3 + 4:
        raise too_large(param, cap_bytes)
    try:
        return base64.b64decode(url[header.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise invalid(param, "is not valid base64") from None


class BodyCap:
    """Middleware that rejects a request once more than `cap_bytes` of its body have arrived, whatever Content-Length says."""

    def __init__(self, app: ASGIApp, cap_bytes: int) -> None:
        self._app = app
        self._cap_bytes = cap_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._cap_bytes:
                raise too_large(None, self._cap_bytes)
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)


class ReceivedRequest:
    """The fields and files of a request, whether it came as a form or as JSON."""

    def __init__(
        self, fields: Mapping[str, Any], files: Mapping[str, list[UploadFile]], fingerprint: str, is_form: bool
    ) -> None:
        self.fields = dict(fields)
        """From a form all are text; a field that came several times is a list. `lora[name]` became a mapping."""
        self._files = dict(files)
        self.fingerprint = fingerprint
        """A digest of all that the client sent."""
        self.is_form = is_form

    def files(self, *names: str) -> list[UploadFile]:
        """The files that came under any of these names, in their order; `name[]` is the same as `name`."""
        return [file for name in names for file in self._files.get(name, [])]

    def check_files(self, allowed: Iterable[str]) -> None:
        """Raises ApiError 400 for a file under another name."""
        known = tuple(allowed)
        for name in self._files:
            if name not in known:
                expected = f"the files are {', '.join(known)}" if known else "no files are expected here"
                raise invalid(name, f"an unexpected file; {expected}", "unknown_parameter")


@asynccontextmanager
async def receive(request: Request, caps: UploadCaps) -> AsyncIterator[ReceivedRequest]:
    """What a request brings; its files are open inside of the block. Raises ApiError 400, 408, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    async with _in_time(caps):
        if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            form = await request.form(max_files=caps.files, max_fields=FIELDS, max_part_size=FIELD_BYTES)
        elif kind == "application/json":
            form = None
            body = await _body(request, caps.json_bytes)
        else:
            raise ApiError(
                415,
                f"Content-Type: got {kind or 'nothing'}, must be application/json or multipart/form-data",
                code="unsupported_media_type",
            )
    if form is None:
        # In a thread: some megabytes take longer than others should wait.
        content = await asyncio.to_thread(_from_json, body)
        yield ReceivedRequest(content, {}, hashlib.sha256(body).hexdigest(), is_form=False)
        return
    try:
        yield await asyncio.to_thread(_from_form, form)
    finally:
        await form.close()


async def small_form(request: Request, caps: UploadCaps) -> dict[str, str]:
    """The fields of a form of a few short ones, from somebody of whom nothing is known yet. Raises ApiError 408 or 413."""
    async with _in_time(caps):
        body = await _body(request, SMALL_FORM_BYTES)
    return dict(parse_qsl(body.decode("utf-8", "replace")))


@asynccontextmanager
async def _in_time(caps: UploadCaps) -> AsyncIterator[None]:
    """Raises ApiError 408 where the block takes longer than a body may."""
    try:
        async with asyncio.timeout(caps.seconds):
            yield
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {caps.seconds:g} s", code="timeout", headers={"x-should-retry": "false"}
        ) from None


async def _body(request: Request, cap_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > cap_bytes:
            raise too_large(None, cap_bytes)
    return bytes(body)


def _from_json(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is no JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, "The body must be a JSON object", code="invalid_json")
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply", code="invalid_json") from None
    except UnicodeEncodeError:
        raise ApiError(400, "The body has half of a letter (a lone surrogate)", code="invalid_json") from None
    return content


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a name comes twice in one object")
    return out


def _from_form(form: FormData) -> ReceivedRequest:
    fields: dict[str, Any] = {}
    files: dict[str, list[UploadFile]] = {}
    digest = hashlib.sha256()
    for name, value in form.multi_items():
        if name.lstrip().startswith("{"):
            # What curl does with -d where no header says otherwise.
            raise invalid(
                None, "The body is JSON, and its Content-Type says that it is a form: send application/json", "invalid_form"
            )
        digest.update(f"{name}\0".encode("utf-8", "surrogatepass"))
        if isinstance(value, UploadFile):
            files.setdefault(name.removesuffix("[]"), []).append(value)
            while block := value.file.read(BLOCK_BYTES):
                digest.update(block)
            value.file.seek(0)
            continue
        digest.update(hashlib.sha256(value.encode("utf-8", "surrogatepass")).digest())
        _put(fields, name, value)
    return ReceivedRequest(fields, files, digest.hexdigest(), is_form=True)


def _put(fields: dict[str, Any], name: str, value: str) -> None:
    """`a[]` twice and `a` twice are a list; `a[b]` is a mapping, as OpenAI's client writes one."""
    head, bracket, inner = name.partition("[")
    inner = inner.removesuffix("]")
    if bracket and inner and "[" not in inner:
        inside = fields.setdefault(head, {})
        if not isinstance(inside, dict) or inner in inside:
            raise invalid(name, "cannot be read; give a mapping or a list as JSON in one field", "invalid_form")
        inside[inner] = value
    elif bracket and inner:
        raise invalid(name, "a list of mappings cannot be read from a form; give it as JSON in one field", "invalid_form")
    elif bracket or head in fields:
        before = fields.get(head, [])
        if isinstance(before, dict):
            raise invalid(name, "came as a mapping and as a value", "invalid_form")
        fields[head] = [*(before if isinstance(before, list) else [before]), value]
    else:
        fields[head] = value


def _check_image(path: Path, param: str) -> None:
    try:
        read_image(path)
    except MediaError as error:
        # Without the path on the server.
        raise invalid(param, str(error).removeprefix(f"{path}: "), "invalid_image") from None
