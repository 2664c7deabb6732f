"""Files that clients send: size-limited while they arrive, decoded to verify them, stored by sha256.

Client file names are not used.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any, BinaryIO, NamedTuple, TypeVar, TypeVarTuple
from urllib.parse import parse_qsl
from weakref import WeakValueDictionary

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vidgen_ray.errors import MediaError
from vidgen_ray.limits import FORM_TEXT_BYTES, JSON_DEPTH, MAX_FORM_FIELDS, SMALL_FORM_BYTES, URLENCODED_BYTES
from vidgen_ray.media.images import read_image, verify_image
from vidgen_ray.online import announced_bytes
from vidgen_ray.online.api_error import ApiError, error_response, invalid, too_many_requests
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.http_fetch import BlockedUrl, ImageFetcher, UnreachableUrl
from vidgen_ray.online.server_settings import UploadCaps
from vidgen_ray.online.store.database import in_write_thread
from vidgen_ray.online.store.inputs import NO_DETAILS, PREFIXES, Purpose, StorageFull, Upload, UploadDetails, UploadRecords
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.stages.base import Image
from vidgen_ray.system.cache_dir import cache_dir
from vidgen_ray.system.files import abandoned, flush_to_disk, private_folder, temporary_file

_BLOCK_BYTES = 1 << 20
SMALL_JSON_BYTES = 1 << 20
"""A JSON body up to this size is kept in memory while it arrives."""
JSON_VALUES = 20_000
"""Most values and names in a JSON body."""
LARGE_JSON_BODIES = 2
"""Larger JSON bodies that one API process reads at once, each of which may need 240 MB. Further requests wait."""
NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}:,'))
MIN_EXPIRY_S = 24 * 3600.0
UPLOAD_ID = re.compile(r"file-[0-9a-f]{64}")
_NAME = re.compile(r"[0-9a-f]{64}")
"""Name of an upload in the folder. The folder also has images that the Python API was given in memory."""
DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,", re.ASCII)


_T = TypeVar("_T")
_B = TypeVar("_B")
_Args = TypeVarTuple("_Args")


class FairThread:
    """Thread in which tenants take turns: at most one call of each is in its queue, the others wait for that."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, tenant: str, call: Callable[[*_Args], _T], *args: *_Args) -> _T:
        """Run a call of a tenant in the thread and return its result."""
        async with self._turns.setdefault(tenant, asyncio.Lock()):
            return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)


SMALL_BODY_BYTES = 64 << 10
"""Bodies up to this size are not counted: requests of others must not fail while large ones arrive."""
RECEIVING_RETRY_S = 2
METHODS_WITH_BODY = ("POST", "PUT", "PATCH")


class UploadFolder:
    """Local folder of uploaded images, named by the sha256 of their content, and the records of their tenants."""

    def __init__(self, folder: Path, records: UploadRecords, caps: UploadCaps) -> None:
        self._folder = folder
        self._records = records
        self.caps = caps
        # One image at a time: a large one needs up to 960 MB.
        self.decoding = FairThread("decode")

    async def store(self, tenant: Tenant, source: BinaryIO, param: str, details: UploadDetails = NO_DETAILS) -> Upload:
        """Store an image unchanged.

        `param` is the request field named in errors. Raises ApiError 413 if the image is too large or the tenant has no space
        left, 400 if it cannot be decoded.
        """
        # Created here, so that it is deleted even if the client goes away while a thread writes to it.
        tmp = self.temporary_file()
        try:
            with tmp.open("wb") as target:
                name, size, _ = await asyncio.to_thread(copy_capped, source, target, self.caps.image_bytes, param)
            # Not skipped for a file that another tenant has uploaded: the time taken would reveal it.
            await self._check_image(tenant, tmp, param)
            stored_bytes = tenant.limits.stored_bytes
            return await in_write_thread(self.commit, tenant.name, tmp, name, size, "vision", stored_bytes, details)
        finally:
            tmp.unlink(missing_ok=True)

    def add_batch(self, tenant: Tenant, source: IO[bytes], details: UploadDetails) -> Upload:
        """Store the input file of a batch. Blocks.

        Raises ApiError 413 for a file of more than `batch_bytes`, or if the tenant has no space left.
        """
        tmp = self.temporary_file()
        try:
            with tmp.open("wb") as target:
                name, size, lines = copy_capped(source, target, self.caps.batch_bytes, "file")
            details = details._replace(lines=lines)
            return self.commit(tenant.name, tmp, name, size, "batch", tenant.limits.stored_bytes, details)
        finally:
            tmp.unlink(missing_ok=True)

    def temporary_file(self) -> Path:
        """Create a file to `commit`."""
        return temporary_file(private_folder(self._folder), 0o600)

    async def _check_image(self, tenant: Tenant, path: Path, param: str) -> None:
        try:
            await self.decoding.run(tenant.name, verify_image, path)
        except MediaError as error:
            # Without the path on the server.
            raise invalid(param, str(error).removeprefix(f"{path}: "), "invalid_image") from None

    async def read(self, tenant: Tenant, path: Path) -> Image:
        """Return the pixels of an upload, (H, W, 3)."""
        return await self.decoding.run(tenant.name, read_image, path)

    def commit(
        self,
        tenant: str,
        tmp: Path,
        name: str,
        size: int,
        purpose: Purpose,
        max_stored_bytes: int | None = None,
        details: UploadDetails = NO_DETAILS,
    ) -> Upload:
        """Store a temporary file with this sha256. Blocks. Raises ApiError 413 if the tenant would store more than that."""
        target = self._folder / name
        if not target.exists():
            # Not in the transaction, which others wait for.
            flush_to_disk(tmp)

        def place() -> None:
            # Before there was a record to protect it, deleting the only other upload may have removed the file.
            if not target.exists():
                tmp.rename(target)

        try:
            return self._records.add(
                tenant, f"{PREFIXES[purpose]}{name}", name, size, max_stored_bytes, details=details, place=place
            )
        except StorageFull as error:
            raise storage_full(error) from None

    @property
    def exists(self) -> bool:
        """Whether the folder is there. It is not if its disk is not mounted."""
        return self._folder.is_dir()

    def find(self, tenant: str, upload_id: str) -> Path | None:
        """Return the path of a tenant's upload, or `None`."""
        return self._path(self._records.get(upload_id, tenant))

    def use(self, tenant: str, upload_id: str) -> Path | None:
        """Return the path of a tenant's upload and record its use, or return `None`. May write to the store."""
        return self._path(self._records.use(upload_id, tenant))

    def _path(self, upload: Upload | None) -> Path | None:
        path = None if upload is None else self._folder / upload.file
        return path if path is not None and path.is_file() else None

    def delete(self, tenant: str, upload_id: str) -> bool:
        """Delete a tenant's upload, and its file if nothing else needs it. Return False if the tenant has no such upload.

        Raises UploadInUse.
        """
        return self._records.delete(upload_id, tenant, self.remove)

    def expire(self, retention_s: float | None = None) -> None:
        """Delete uploads that have expired, or were not used for `unused_s` seconds (see `UploadCaps`) or `retention_s`.

        Uploads stay for a day at least: a request may still need them.
        """
        limits_s = [seconds for seconds in (self.caps.unused_s, retention_s) if seconds is not None]
        self._records.expire(max(MIN_EXPIRY_S, min(limits_s)) if limits_s else None, self.remove)

    def remove_unreferenced(self, older_than_s: float) -> None:
        """Remove files older than `older_than_s` seconds that belong to no upload and to no job in progress or queued.

        Also the temporary files of processes that have ended.
        """
        modified_before = time.time() - older_than_s
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            files = [entry.name for entry in entries if _NAME.fullmatch(entry.name) and entry.stat().st_mtime < modified_before]
            self._records.remove_unreferenced(files, self.remove)
        for temporary in abandoned(self._folder):
            temporary.unlink(missing_ok=True)

    def remove(self, file: str) -> None:
        """Remove a file. Call it only inside the transaction that finds that nothing needs it."""
        (self._folder / file).unlink(missing_ok=True)

    def id_of(self, path: str) -> str | None:
        """Return the upload id of a file in this folder, `None` for another path."""
        file = Path(path)
        return f"file-{file.name}" if file.parent == self._folder else None


def upload_folder(outputs: OutputFolder, records: UploadRecords, caps: UploadCaps) -> UploadFolder:
    """Return the upload folder: in the output folder, or in the local cache folder if the output is an object store."""
    return UploadFolder((outputs.storage.local or cache_dir()) / "inputs", records, caps)


def too_large_error(param: str | None, cap_bytes: float) -> ApiError:
    """Return a 413 error for a field, or for the whole request."""
    subject = f"{param}: is" if param else "The request is"
    return ApiError(413, f"{subject} larger than {cap_bytes} bytes. Send less at once.", code="too_large", param=param)


def storage_full(error: StorageFull) -> ApiError:
    """Return a 413 error."""
    how = "GET /v1/files lists them, DELETE /v1/files/{id} deletes one."
    return ApiError(413, f"{error}. {how}", code="storage_full")


class Copied(NamedTuple):
    """File that was copied."""

    sha256: str
    bytes: int
    lines: int
    """Line ends, and one for a last line without."""


def copy_capped(source: IO[bytes], target: BinaryIO, cap_bytes: float, param: str) -> Copied:
    """Copy a file. Raises ApiError 413 for more than `cap_bytes`."""
    digest, size, lines = hashlib.sha256(), 0, 1
    while block := source.read(_BLOCK_BYTES):
        size += len(block)
        if size > cap_bytes:
            raise too_large_error(param, cap_bytes)
        digest.update(block)
        target.write(block)
        lines += block.count(b"\n")
    return Copied(digest.hexdigest(), size, lines)


def from_data_url(url: str, cap_bytes: int, param: str) -> bytes:
    """Decode a `data:` URL. Raises ApiError 400 or 413."""
    header = DATA_URL.match(url)
    if header is None:
        raise invalid(param, "must be a base64 data: URL, for example data:image/png;base64,...")
    if len(url) - header.end() > cap_bytes * 4 // 3 + 4:
        raise too_large_error(param, cap_bytes)
    try:
        return base64.b64decode(url[header.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise invalid(param, "is not valid base64") from None


def check_announced(scope: Scope, cap_bytes: int) -> None:
    """Raise ApiError 413 if a request announces a body of more than `cap_bytes`, before it arrives."""
    if cap_bytes < announced_bytes(scope) < math.inf:
        raise too_large_error(None, cap_bytes)


class BodyCap:
    """Middleware that rejects a request that announces more than `cap_bytes`, before anything is done, or of which more have
    arrived. Requests of methods without a body may have a small one."""

    def __init__(self, app: ASGIApp, cap_bytes: int) -> None:
        self._app = app
        self._cap_bytes = cap_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen, announced, has_body = 0, announced_bytes(scope), scope["method"] in METHODS_WITH_BODY
        cap_bytes = self._cap_bytes if has_body else SMALL_FORM_BYTES
        # Before anything is read: Ray Serve would keep it in memory.
        if announced > cap_bytes and not (has_body and announced == math.inf):
            await error_response(too_large_error(None, cap_bytes))(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._cap_bytes:
                raise too_large_error(None, self._cap_bytes)
            return message

        # `BodyBudget` counts a body until this is closed: when it has been read, or the request has ended.
        with ExitStack() as scope.setdefault("state", {})["body"]:
            await self._app(scope, counted, send)


class BodyBudget:
    """Bytes of request bodies that may arrive at once in this process, of each key and of all.

    With Ray Serve they are in memory: it fetches bodies as fast as clients send them.
    """

    def __init__(self, caps: UploadCaps) -> None:
        self._caps = caps
        self.arriving: Counter[str] = Counter()

    def reserve(self, tenant: Tenant, request: Request) -> None:
        """Count the announced bytes of a body until `request.state.body` is closed. A chunked body counts as the largest one.

        Raises ApiError 429 if it would exceed a limit.
        """
        size, key_id = min(announced_bytes(request.scope), self._caps.body_bytes), tenant.key_id
        if size > SMALL_BODY_BYTES:
            for arriving, allowed, where in (
                (self.arriving[key_id], tenant.limits.receiving_bytes, "with this key"),
                (self.arriving.total(), self._caps.receiving_bytes, "at this server"),
            ):
                if arriving and arriving + size > allowed:
                    message = f"At most {allowed} bytes of request bodies may arrive at once {where}"
                    raise too_many_requests(message, "too_many_bytes", RECEIVING_RETRY_S)
            self.arriving[key_id] += int(size)
            request.state.body.callback(self.arriving.subtract, {key_id: int(size)})


@dataclass(frozen=True)
class ReceivedRequest:
    """Fields and files of a request, from JSON or from a form."""

    fields: Mapping[str, Any]
    """In a form: text or UploadFile. `name[]` and repeated names become a list, `name[key]` a mapping."""
    fingerprint: str
    """Digest of everything that the client sent."""
    is_form: bool


@asynccontextmanager
async def receive(request: Request, caps: UploadCaps, cap_bytes: int | None = None) -> AsyncIterator[ReceivedRequest]:
    """Read a request. Its files stay open inside the block. Raises ApiError 400, 408, 413 or 415.

    `cap_bytes`: limit of the announced length, if it is less than that of other forms.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    check_announced(request.scope, cap_bytes or caps.body_bytes)
    async with _body_timeout(caps):
        if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            form = await _read_form(request, kind, caps)
        elif kind == "application/json":
            form = None
            body = await _spool_body(request, caps.json_bytes)
        else:
            raise ApiError(
                415,
                f"Content-Type: got {kind or 'nothing'}, must be application/json or multipart/form-data",
                code="unsupported_media_type",
            )
    # It is on the disk, or small.
    request.state.body.close()
    if form is None:
        with body:
            if body.tell() <= SMALL_FORM_BYTES:
                # Starting a thread takes longer.
                yield _from_json(body)
                return
            async with request.app.state.large_json if body.tell() > SMALL_JSON_BYTES else nullcontext():
                yield await _parse(request, _from_json, body)
        return
    try:
        yield await asyncio.to_thread(_from_form, form)
    finally:
        await form.close()


async def receive_json(request: Request, caps: UploadCaps) -> ReceivedRequest:
    """Read a request whose body is JSON. Raises as `receive`."""
    async with receive(request, caps) as received:
        if received.is_form:
            raise ApiError(415, "Content-Type: must be application/json", code="unsupported_media_type")
    return received


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
    with await _spool_body(request, cap_bytes) as body:
        body.seek(0)
        return body.read()


async def _spool_body(request: Request, cap_bytes: int) -> SpooledTemporaryFile[bytes]:
    """Read a body into a file, on disk if it is large: a slow client must not occupy memory."""
    check_announced(request.scope, cap_bytes)
    body = SpooledTemporaryFile[bytes](SMALL_JSON_BYTES)
    try:
        async for chunk in request.stream():
            body.write(chunk)
            if body.tell() > cap_bytes:
                raise too_large_error(None, cap_bytes)
    except BaseException:
        body.close()
        raise
    return body


async def _parse(request: Request, parse: Callable[[_B], _T], body: _B) -> _T:
    """Parse a body in the only thread that does so: many threads that parse would delay all other requests."""
    body_parser: ThreadPoolExecutor = request.app.state.body_parser
    return await asyncio.get_running_loop().run_in_executor(body_parser, parse, body)


class _FormParser(MultiPartParser):
    """Multipart parser that limits all text fields together."""

    _text_length = 0

    def on_part_end(self) -> None:
        super().on_part_end()
        _, value = self.items[-1]
        self._text_length += len(value) if isinstance(value, str) else 0
        if self._text_length > FORM_TEXT_BYTES:
            raise MultiPartException(f"The text fields have more than {FORM_TEXT_BYTES} characters. Send images as files.")


async def _read_form(request: Request, kind: str, caps: UploadCaps) -> FormData:
    if kind == "application/x-www-form-urlencoded":
        body = await _read_body(request, URLENCODED_BYTES)
        return await _parse(request, _from_urlencoded, body)
    parser = _FormParser(
        request.headers,
        request.stream(),
        max_files=caps.files,
        max_fields=MAX_FORM_FIELDS,
        max_part_size=FORM_TEXT_BYTES,
    )
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, error.message, code="invalid_request") from None


def _from_urlencoded(body: bytes) -> FormData:
    try:
        pairs: list[tuple[str, str | UploadFile]] = [
            *parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS)
        ]
    except ValueError:
        raise ApiError(400, f"Too many fields, must be at most {MAX_FORM_FIELDS}.", code="invalid_request") from None
    return FormData(pairs)


def _from_json(body: SpooledTemporaryFile[bytes]) -> ReceivedRequest:
    body.seek(0)
    content = body.read()
    return ReceivedRequest(json_object(content), hashlib.sha256(content).hexdigest(), is_form=False)


def json_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON object from a client. Raises ApiError 400."""
    _check_structure(content)
    try:
        fields = json.loads(content.decode(), parse_constant=_reject_constant, object_pairs_hook=_reject_duplicates)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object.", code="invalid_json")
    # Surrogates can only be written as escapes.
    if re.search(rb"\\u[dD]", content):
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            message = "The body contains a lone surrogate, which is not valid Unicode."
            raise ApiError(400, message, code="invalid_json") from None
    return fields


def _check_structure(body: bytes) -> None:
    """Raise ApiError 400 for JSON with too many values or too deeply nested. Much cheaper than parsing it."""
    # Without escaped characters, each quotation mark starts or ends a string.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    structure = plain.translate(None, NOT_STRUCTURE)
    # At most one comma, one colon, two brackets and two quotation marks for each name or value. Those in strings count, too.
    if len(structure) > 6 * JSON_VALUES:
        raise ApiError(400, f"The body has too many values, must be at most {JSON_VALUES}.", code="invalid_json")
    depth = 0
    for char in b"".join(structure.split(b'"')[::2]):
        depth += (char in b"[{") - (char in b"]}")
        if depth > JSON_DEPTH:
            raise ApiError(400, f"The body is nested too deeply, must be at most {JSON_DEPTH} levels.", code="invalid_json")


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
            while block := value.file.read(_BLOCK_BYTES):
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


MAX_FETCHES = 4
"""Concurrent fetches. Each occupies a thread, for up to the timeout if the host is slow."""


class ImageReferences:
    """Stores images as uploads and returns their ids. `fetcher=None` rejects http(s) URLs."""

    def __init__(self, uploads: UploadFolder, fetcher: ImageFetcher | None) -> None:
        self._uploads = uploads
        self._fetcher = fetcher
        self._fetch_slots = asyncio.Semaphore(MAX_FETCHES)

    async def resolve_all(self, tenant: Tenant, references: Any, param: str) -> list[str]:
        """Return the ids of one image or a list of images. Raises ApiError 400 or 413."""
        references = references if isinstance(references, list) else [references]
        if len(references) > self._uploads.caps.files:
            raise invalid(param, f"got {len(references)}, must be at most {self._uploads.caps.files}")
        return [await self.resolve(tenant, reference, param) for reference in references]

    async def resolve(self, tenant: Tenant, reference: Any, param: str) -> str:
        """Store an image and return its id; return the id of a stored one. Raises ApiError 400 or 413."""
        if isinstance(reference, UploadFile):
            return (await self._uploads.store(tenant, reference.file, param)).id
        if isinstance(reference, str) and reference.lstrip().startswith("{"):
            try:
                reference = json.loads(reference)
            except (ValueError, RecursionError):
                raise invalid(param, "is not valid JSON", "invalid_json") from None
        if isinstance(reference, str):
            reference = {"image_url" if ":" in reference else "file_id": reference}
        if not isinstance(reference, dict) or len(reference) != 1 or not reference.keys() <= {"file_id", "image_url"}:
            raise invalid(param, "must be a file, {file_id: ...} or {image_url: ...}")
        (kind, value), *_ = reference.items()
        if not isinstance(value, str):
            raise invalid(param, f"{kind} must be a string")
        if kind == "file_id":
            if not UPLOAD_ID.fullmatch(value) or await in_write_thread(self._uploads.use, tenant.name, value) is None:
                raise invalid(param, "must be a file or the id of a file that you have uploaded", "file_not_found")
            return value
        content = await self._content(value, param)
        return (await self._uploads.store(tenant, io.BytesIO(content), param)).id

    async def _content(self, url: str, param: str) -> bytes:
        if url[:5].lower() == "data:":
            return from_data_url(url, self._uploads.caps.image_bytes, param)
        if self._fetcher is None:
            raise invalid(
                param, "this server does not fetch URLs; upload the image or send it as a data: URL", "url_inputs_disabled"
            )
        try:
            async with self._fetch_slots:
                return await asyncio.to_thread(self._fetcher.fetch, url)
        except (BlockedUrl, UnreachableUrl) as error:
            raise invalid(param, f"cannot be fetched: {error}", "url_not_fetched") from None
