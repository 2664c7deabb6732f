"""Pictures that a request brings, in whichever way: as a file, as the id of one, as a data: URL, or by URL."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import UploadFile

from vidgen_ray.online.api_error import invalid
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.inputs.http_fetch import BlockedUrl, ImageFetcher, UnreachableUrl
from vidgen_ray.online.inputs.uploads import UploadFolder, from_data_url

FETCHES_AT_ONCE = 4
"""A host that answers slowly holds a thread for each."""


class ImageReferences:
    """Makes ids of uploads of them. Without `pictures` nothing is fetched."""

    def __init__(self, uploads: UploadFolder, pictures: ImageFetcher | None) -> None:
        self._uploads = uploads
        self._pictures = pictures
        self._fetching = asyncio.Semaphore(FETCHES_AT_ONCE)

    async def store_file(self, tenant: Tenant, file: UploadFile, param: str) -> str:
        """The id of a file that came with the request. Raises ApiError 400 or 413."""
        return (await asyncio.to_thread(self._uploads.store, tenant.name, file.file, param)).id

    async def store_files(self, tenant: Tenant, files: Sequence[UploadFile], param: str) -> list[str]:
        return [await self.store_file(tenant, file, param) for file in files]

    async def resolve_all(self, tenant: Tenant, given: Any, param: str) -> list[str]:
        """Of a field that names one file, or several. Raises ApiError 400 or 413."""
        each = given if isinstance(given, list) else [given]
        if len(each) > self._uploads.caps.files:
            raise invalid(param, f"got {len(each)}, must be at most {self._uploads.caps.files}")
        return [await self.resolve(tenant, one, param) for one in each]

    async def resolve(self, tenant: Tenant, given: Any, param: str) -> str:
        """The id of the file that a field names. Raises ApiError 400 or 413."""
        if isinstance(given, str) and given.lstrip().startswith("{"):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):
                raise invalid(param, "is no JSON", "invalid_json") from None
        if isinstance(given, str):
            given = {"image_url" if ":" in given else "file_id": given}
        if not isinstance(given, dict) or len(given) != 1 or not given.keys() <= {"file_id", "image_url"}:
            raise invalid(param, "must be a file, {file_id: ...} or {image_url: ...}")
        (kind, value), *_ = given.items()
        if not isinstance(value, str):
            raise invalid(param, f"{kind} must be text")
        if kind == "file_id":
            return value
        content = await self._content(value, param)
        return (await asyncio.to_thread(self._uploads.store, tenant.name, io.BytesIO(content), param)).id

    async def _content(self, url: str, param: str) -> bytes:
        if url[:5].lower() == "data:":
            return from_data_url(url, self._uploads.caps.image_bytes, param)
        if self._pictures is None:
            raise invalid(
                param, "this server fetches no URLs; upload the picture, or send it as a data: URL", "url_inputs_disabled"
            )
        try:
            async with self._fetching:
                return await asyncio.to_thread(self._pictures.fetch, url)
        except (BlockedUrl, UnreachableUrl) as error:
            raise invalid(param, f"cannot be fetched: {error}", "url_not_fetched") from None
