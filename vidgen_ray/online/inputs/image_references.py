"""Resolve the images of a request: a file, an upload id, a data: URL or an http(s) URL."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

from starlette.datastructures import UploadFile

from vidgen_ray.online.api_error import invalid
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.inputs.http_fetch import BlockedUrl, ImageFetcher, UnreachableUrl
from vidgen_ray.online.inputs.uploads import UPLOAD_ID, UploadFolder, from_data_url

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
            if not UPLOAD_ID.fullmatch(value) or await asyncio.to_thread(self._uploads.find, tenant.name, value) is None:
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
