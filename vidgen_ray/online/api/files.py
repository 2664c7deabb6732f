"""Routes for uploaded images, which requests refer to by id."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request

from vidgen_ray.online.api.deps import ServerDep, TenantDep
from vidgen_ray.online.api.openapi import FORM, error_responses, request_body
from vidgen_ray.online.api.request_models import CreateFile
from vidgen_ray.online.api.response_models import FileDeleted, UploadedFile, file_response
from vidgen_ray.online.api_error import ApiError, not_found
from vidgen_ray.online.uploads import receive

router = APIRouter(tags=["files"])


@router.post(
    "/v1/files",
    response_model=UploadedFile,
    openapi_extra=request_body(CreateFile, FORM),
    responses=error_responses(408, 413, 415),
)
async def create_file(request: Request, server: ServerDep, tenant: TenantDep) -> UploadedFile:
    """Upload an image. Identical images have the same id."""
    async with receive(request, server.settings.uploads) as received:
        file = CreateFile.parse(received.fields).file
        upload = await server.job_service.uploads.store(tenant, file.file, "file")
    return file_response(upload)


@router.get("/v1/files/{file_id}", response_model=UploadedFile, responses=error_responses(404))
async def get_file(server: ServerDep, tenant: TenantDep, file_id: str) -> UploadedFile:
    """Return size and time of an upload. Its content cannot be downloaded."""
    upload = await asyncio.to_thread(server.store.uploads.get, file_id, tenant.name)
    if upload is None:
        raise not_found("file", file_id[:100])
    return file_response(upload)


@router.delete("/v1/files/{file_id}", response_model=FileDeleted, responses=error_responses(404, 409))
async def delete_file(server: ServerDep, tenant: TenantDep, file_id: str) -> FileDeleted:
    """Delete an upload. The file stays on disk while another tenant has uploaded it or an open job needs it."""
    for character in await asyncio.to_thread(server.store.characters.list, tenant.name):
        if file_id in character.photos:
            message = f"{file_id} is a photo of the character {character.name!r}. Delete the character first."
            raise ApiError(409, message, code="file_in_use", headers={"x-should-retry": "false"})
    if not await asyncio.to_thread(server.job_service.uploads.delete, tenant.name, file_id):
        raise not_found("file", file_id[:100])
    return FileDeleted(id=file_id)
