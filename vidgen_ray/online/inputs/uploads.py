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
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
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
MAX_FORM_FIELDS = 200
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
    """Middleware that rejects a request once more than `cap_bytes` of its body have arrived, regardless of Content-Length."""

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


@dataclass(frozen=True)
class ReceivedRequest:
    """Fields and files of a request, from JSON or from a form."""

    fields: Mapping[str, Any]
    """In a form: text or UploadFile. `name[]` and repeated names become a list, `name[key]` a mapping."""
    fingerprint: str
    """Digest of everything that the client sent."""
    is_form: bool

    def files(self, name: str) -> list[UploadFile]:
        """Return the files of a field, in order."""
        value = self.fields.get(name)
        return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, UploadFile)]


@asynccontextmanager
async def receive(request: Request, caps: UploadCaps) -> AsyncIterator[ReceivedRequest]:
    """Read a request. Its files stay open inside the block. Raises ApiError 400, 408, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    async with _body_timeout(caps):
        if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            form = await request.form(max_files=caps.files, max_fields=MAX_FORM_FIELDS, max_part_size=FIELD_BYTES)
        elif kind == "application/json":
            form = None
            body = await _read_body(request, caps.json_bytes)
        else:
            raise ApiError(
                415,
                f"Content-Type: got {kind or 'nothing'}, must be application/json or multipart/form-data",
                code="unsupported_media_type",
            )
    if form is None:
        # In a thread: parsing megabytes of JSON would block other requests.
        fields = await asyncio.to_thread(_from_json, body)
        yield ReceivedRequest(fields, hashlib.sha256(body).hexdigest(), is_form=False)
        return
    try:
        yield await asyncio.to_thread(_from_form, form)
    finally:
        await form.close()


async def small_form(request: Request, caps: UploadCaps) -> dict[str, str]:
    """Read a form of at most 8 KiB from an unauthenticated client. Raises ApiError 408 or 413."""
    async with _body_timeout(caps):
        body = await _read_body(request, SMALL_FORM_BYTES)
    return dict(parse_qsl(body.decode("utf-8", "replace")))


@asynccontextmanager
async def _body_timeout(caps: UploadCaps) -> AsyncIterator[None]:
    """Raise ApiError 408 if the block takes longer than `caps.seconds`."""
    try:
        async with asyncio.timeout(caps.seconds):
            yield
    except TimeoutError:
        message = f"The request body did not arrive within {caps.seconds:g} s."
        raise ApiError(408, message, code="timeout", headers={"x-should-retry": "false"}) from None


async def _read_body(request: Request, cap_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > cap_bytes:
            raise too_large(None, cap_bytes)
    return bytes(body)


def _from_json(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body, parse_constant=_reject_constant, object_pairs_hook=_reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None
    except UnicodeEncodeError:
        raise ApiError(400, "The body contains a lone surrogate, which is not valid Unicode.", code="invalid_json") from None
    return fields


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("an object contains the same name twice")
    return unique


def _from_form(form: FormData) -> ReceivedRequest:
    fields: dict[str, Any] = {}
    digest = hashlib.sha256()
    for name, value in form.multi_items():
        if name.lstrip().startswith("{"):
            # curl -d sends JSON as a form unless a header says otherwise.
            raise invalid(None, "The body is JSON, but its Content-Type is a form. Send application/json.", "invalid_form")
        digest.update(f"{name}\0".encode("utf-8", "surrogatepass"))
        if isinstance(value, UploadFile):
            while block := value.file.read(BLOCK_BYTES):
                digest.update(block)
            value.file.seek(0)
        else:
            digest.update(hashlib.sha256(value.encode("utf-8", "surrogatepass")).digest())
        _add_form_field(fields, name, value)
    return ReceivedRequest(fields, digest.hexdigest(), is_form=True)


def _add_form_field(fields: dict[str, Any], name: str, value: str | UploadFile) -> None:
    """Add a form field. `a[]` and repeated names make a list; `a[b]` makes a mapping, as OpenAI's client sends one."""
    head, bracket, key = name.partition("[")
    key = key.removesuffix("]")
    if bracket and key and "[" not in key:
        mapping = fields.setdefault(head, {})
        if not isinstance(mapping, dict) or key in mapping:
            raise invalid(
                name, "conflicts with another field of this form. Send the mapping as JSON in one field.", "invalid_form"
            )
        mapping[key] = value
    elif bracket and key:
        raise invalid(name, "lists of mappings are not supported in forms. Send JSON in one field.", "invalid_form")
    elif bracket or head in fields:
        previous = fields.get(head, [])
        if isinstance(previous, dict):
            raise invalid(name, "was sent as a mapping and as a value", "invalid_form")
        fields[head] = [*(previous if isinstance(previous, list) else [previous]), value]
    else:
        fields[head] = value


def _check_image(path: Path, param: str) -> None:
    try:
        read_image(path)
    except MediaError as error:
        # Without the path on the server.
        raise invalid(param, str(error).removeprefix(f"{path}: "), "invalid_image") from None
