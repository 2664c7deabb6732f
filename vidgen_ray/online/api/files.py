"""Pictures that are uploaded once and named by id afterwards."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request

from vidgen_ray.online.api import response_models
from vidgen_ray.online.api.deps import ServerDep, TenantDep
from vidgen_ray.online.api.error_responses import error_responses
from vidgen_ray.online.api.request_models import checked_names
from vidgen_ray.online.api.response_models import FileDeleted, UploadedFile, file_of
from vidgen_ray.online.api_error import ApiError, invalid, not_found
from vidgen_ray.online.inputs.uploads import receive

router = APIRouter(tags=["files"])


@router.post(
    "/v1/files", response_model=UploadedFile, openapi_extra=response_models.FILE_BODY, responses=error_responses(408, 413, 415)
)
async def create_file(request: Request, server: ServerDep, tenant: TenantDep) -> UploadedFile:
    """Upload a picture. The same picture has the same id."""
    async with receive(request, server.settings.uploads) as received:
        received.check_files(("file",))
        checked_names(received.fields, ("purpose",))
        files = received.files("file")
        if len(files) != 1:
            raise invalid("file", f"got {len(files)} files, must be one", "missing_required_parameter")
        upload = await asyncio.to_thread(server.job_service.uploads.store, tenant.name, files[0].file, "file")
    return file_of(upload)


@router.get("/v1/files/{file_id}", response_model=UploadedFile, responses=error_responses(404))
async def get_file(server: ServerDep, tenant: TenantDep, file_id: str) -> UploadedFile:
    """What is known of an uploaded file. Its content is not given out."""
    upload = await asyncio.to_thread(server.store.uploads.get, file_id, tenant.name)
    if upload is None:
        raise not_found("file", file_id[:100])
    return file_of(upload)


@router.delete("/v1/files/{file_id}", response_model=FileDeleted, responses=error_responses(404, 409))
async def delete_file(server: ServerDep, tenant: TenantDep, file_id: str) -> FileDeleted:
    """Forget an uploaded file. It leaves the disk where nobody else has it and no open job needs it."""
    for person in await asyncio.to_thread(server.store.characters.list, tenant.name):
        if file_id in person.photos:
            message = f"{file_id} is a photo of the character {person.name!r}; delete that first"
            raise ApiError(409, message, code="file_in_use", headers={"x-should-retry": "false"})
    if not await asyncio.to_thread(server.job_service.uploads.delete, tenant.name, file_id):
        raise not_found("file", file_id[:100])
    return FileDeleted(id=file_id)
