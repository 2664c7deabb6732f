"""Create a job from a submitted form, and return the fields of an existing job for a new form."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from vidgen_ray.errors import StageError
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.inputs.face_check import PhotoFiles
from vidgen_ray.online.inputs.uploads import ReceivedRequest
from vidgen_ray.online.job_service import client_fields
from vidgen_ray.online.store.characters import Character, NameTaken
from vidgen_ray.online.store.jobs import Job, JobKind
from vidgen_ray.online.web.forms import FormError, FormValues, errors_of
from vidgen_ray.online.web.page_context import PageContext
from vidgen_ray.shot import Shot

ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Job ids and submission ids."""
MAX_NAME_LENGTH = 128


async def create_job(
    context: PageContext, tenant: Tenant, received: ReceivedRequest, values: FormValues
) -> tuple[Job, Character | None]:
    """Store the job that the form describes, and the character if it names one. Raises FormError and ApiError."""
    server = context.server
    fields: dict[str, Any] = values.fields()
    if lora := values.lora_ref():
        fields["lora"] = [{"name": lora.path, "scale": lora.weight}]
    # The job service reports the first invalid field only; the form shows all of them.
    try:
        Shot.model_validate({**server.serving_profile.profile.defaults, **fields, "lora": None})
    except ValidationError as error:
        raise FormError(errors_of(error)) from None
    job_request: dict[str, Any] = {"model": server.serving_profile.profile.name + ("-fast" if values.mode == "fast" else "")}
    # Browsers send an empty file control as one file without a name.
    photos = [file for file in received.files("photo") if file.filename or file.size]
    saved = await _save_character(context, tenant, photos, values)
    if photos:
        fields["face_image"] = await _store_photos(context, tenant, photos)
    elif values.character:
        fields["character"] = values.character
        if character := await run_in_threadpool(server.store.characters.get, values.character, tenant.name):
            job_request["character"] = character.name
    elif values.same_photo and (before := await job_of(context, tenant, received.fields.get("like"))):
        fields["face_image"] = client_fields_of(context, before).get("face_image")
        job_request["character"] = before.request.get("character")
    # A form sent twice creates one job. The fingerprint tells an edited form apart.
    submission = received.fields.get("submission_id")
    key = f"page-{submission}-{received.fingerprint[:32]}" if isinstance(submission, str) and ID.fullmatch(submission) else None
    jobs = await server.job_service.accept(
        tenant, JobKind.VIDEO, [fields], job_request, idempotency_key=key, fingerprint=received.fingerprint
    )
    return jobs[0], saved


async def _save_character(
    context: PageContext, tenant: Tenant, photos: Sequence[UploadFile], values: FormValues
) -> Character | None:
    """Save the photos as a character if the form names one. Raises FormError."""
    name = values.save_as.strip()
    if photos and values.character:
        raise FormError({"character": "Choose either photos or a saved character."})
    if not name:
        return None
    if not photos:
        raise FormError({"save_as": "Choose a photo to save."})
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise FormError({"save_as": f"Must be 1 to {MAX_NAME_LENGTH} printable characters."})
    photo_ids = await _store_photos(context, tenant, photos)
    try:
        await context.server.face_check.run_exclusively(lambda: _check_faces(context, tenant, photo_ids))
        return await run_in_threadpool(context.server.store.characters.create, tenant.name, name, photo_ids)
    except StageError as error:
        raise FormError({"photo": str(error).removeprefix("face_image: ").capitalize() + "."}) from None
    except NameTaken:
        raise FormError({"save_as": "A character with this name and other photos exists."}) from None


async def _store_photos(context: PageContext, tenant: Tenant, photos: Sequence[UploadFile]) -> list[str]:
    """Store the photos and return their ids. The same photo has the same id. Raises ApiError."""
    ids = []
    for photo in photos:
        await photo.seek(0)
        upload = await context.server.job_service.uploads.store(tenant, photo.file, "photo")
        ids.append(upload.id)
    return ids


def _check_faces(context: PageContext, tenant: Tenant, ids: Sequence[str]) -> None:
    paths = [context.server.job_service.uploads.find(tenant.name, each) for each in ids]
    context.server.face_check.check(PhotoFiles([path for path in paths if path is not None]))


async def job_of(context: PageContext, tenant: Tenant, job_id: object) -> Job | None:
    """Return a job of the tenant, or `None` if it has no such job."""
    if not isinstance(job_id, str) or not ID.fullmatch(job_id):
        return None
    return await run_in_threadpool(context.server.store.get, job_id, tenant.name)


def client_fields_of(context: PageContext, job: Job) -> Mapping[str, Any]:
    """Return the fields that would create the same shot."""
    return client_fields(job.shot, context.server.settings, context.server.job_service.uploads)
