"""Create the jobs of a submitted form, and return the fields of an existing job for a new form."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.datastructures import UploadFile

from vidgen_ray.errors import StageError
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.face_check import PhotoFiles
from vidgen_ray.online.job_service import client_fields
from vidgen_ray.online.store.inputs import Character, NameTaken
from vidgen_ray.online.store.jobs import JOB_ID, Job, JobKind
from vidgen_ray.online.uploads import ReceivedRequest
from vidgen_ray.online.web.form_images import face_message
from vidgen_ray.online.web.forms import FormError, FormValues, errors_of, variations
from vidgen_ray.online.web.page_context import PageContext
from vidgen_ray.safety import Consent
from vidgen_ray.shot import LORA_FIELDS, Shot
from vidgen_ray.video_models import without_other_models_defaults

SUBMISSION_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_NAME_LENGTH = 128


async def create_jobs(
    context: PageContext, tenant: Tenant, received: ReceivedRequest, values: FormValues
) -> tuple[list[Job], Character | None]:
    """Store the jobs that the form describes, and the character if it names one. Raises FormError and ApiError."""
    server = context.server
    fields: dict[str, Any] = values.fields(context.control_groups, server.size_rules)
    count = values.count()
    if consent := values.consent():
        fields["consent"] = consent
    # The job service reports the first invalid field only; the form shows all of them.
    try:
        defaults = without_other_models_defaults(server.serving_profile.profile.defaults, fields)
        Shot.model_validate({**defaults, **fields, **dict.fromkeys(LORA_FIELDS)})
    except ValidationError as error:
        raise FormError(errors_of(error)) from None
    job_request: dict[str, Any] = {"model": server.serving_profile.profile.name + ("-fast" if fields["mode"] == "fast" else "")}
    if values.asks_for_hd:
        job_request["hd"] = True
    photo_ids = await _photo_ids(context, tenant, received, values)
    declared = Consent.model_validate(consent) if consent else None
    saved = await _save_character(context, tenant, photo_ids, declared, values)
    if photo_ids:
        fields["face_image"] = photo_ids
        if saved:
            job_request["character"] = saved.name
    elif name := values.get("character"):
        fields["character"] = name
        # The controls are hidden for a character, which has a consent of its own.
        fields.pop("consent", None)
        if character := await asyncio.to_thread(server.store.characters.get, name, tenant.name):
            job_request["character"] = character.name
    image_ids = [*await _store_images(context, tenant, _sent_files(received, "image"), "image"), *values.image_ids]
    if image_ids:
        fields["image"] = image_ids[0]
    # A form sent twice creates its jobs once. The fingerprint tells an edited form apart.
    submission = received.fields.get("submission_id")
    is_valid = isinstance(submission, str) and SUBMISSION_ID.fullmatch(submission)
    key = f"page-{submission}-{received.fingerprint[:32]}" if is_valid else None
    jobs = await server.job_service.accept(
        tenant,
        JobKind.VIDEO if fields["generate_video"] else JobKind.IMAGE,
        variations(fields, count),
        job_request,
        idempotency_key=key,
        fingerprint=received.fingerprint,
    )
    return jobs, saved


async def _photo_ids(context: PageContext, tenant: Tenant, received: ReceivedRequest, values: FormValues) -> list[str]:
    """Return the ids of the form's photos. Photos sent as files are stored and checked, the others were checked before.

    Raises FormError.
    """
    files = _sent_files(received, "photo")
    photo_ids = [*values.photo_ids, *await _store_images(context, tenant, files, "photo")]
    if photo_ids and values.get("character"):
        raise FormError({"character": "Choose either photos or a saved character."})
    if files or (photo_ids and values.get("save_as")):
        try:
            await context.server.face_check.run_exclusively(lambda: _check_faces(context, tenant, photo_ids))
        except StageError as error:
            raise FormError({"photo": face_message(error)}) from None
    return photo_ids


async def _save_character(
    context: PageContext, tenant: Tenant, photo_ids: Sequence[str], declared: Consent | None, values: FormValues
) -> Character | None:
    """Save the photos as a character if the form names one. Raises FormError, and ApiError without a consent."""
    name = values.get("save_as").strip()
    if not name:
        return None
    if not photo_ids:
        raise FormError({"save_as": "Choose a photo to save."})
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise FormError({"save_as": f"Must be 1 to {MAX_NAME_LENGTH} printable characters."})
    consent = await asyncio.to_thread(context.server.job_service.consent_of_character, tenant, photo_ids, declared)
    try:
        return await asyncio.to_thread(context.server.store.characters.create, tenant.name, name, photo_ids, consent)
    except NameTaken:
        raise FormError({"save_as": "A character with this name and other photos exists."}) from None


def _sent_files(received: ReceivedRequest, control: str) -> list[UploadFile]:
    # Browsers send an empty file control as one file without a name.
    return [file for file in received.files(control) if file.filename or file.size]


async def _store_images(context: PageContext, tenant: Tenant, files: Sequence[UploadFile], control: str) -> list[str]:
    """Store the images and return their ids. The same image has the same id. Raises ApiError."""
    ids = []
    for file in files:
        await file.seek(0)
        upload = await context.server.job_service.uploads.store(tenant, file.file, control)
        ids.append(upload.id)
    return ids


def _check_faces(context: PageContext, tenant: Tenant, ids: Sequence[str]) -> None:
    paths = [context.server.job_service.uploads.find(tenant.name, each) for each in ids]
    context.server.face_check.check(PhotoFiles([path for path in paths if path is not None]))


async def job_of(context: PageContext, tenant: Tenant, job_id: object) -> Job | None:
    """Return a job of the tenant, or `None` if it has no such job."""
    if not isinstance(job_id, str) or not JOB_ID.fullmatch(job_id):
        return None
    return await asyncio.to_thread(context.server.store.get, job_id, tenant.name)


def values_like(context: PageContext, tenant: Tenant, job: Job) -> FormValues:
    """Return the values of a form that creates the same shot with a new seed."""
    server = context.server
    fields: Mapping[str, Any] = client_fields(job.shot, server.settings, server.job_service.uploads)
    values = FormValues.from_shot(job.shot, fields, context.control_groups, bool(job.request.get("hd")))
    name = job.request.get("character")
    character = server.store.characters.get(name, tenant.name) if isinstance(name, str) else None
    if character is None or character.photos != values.photo_ids:
        return values
    return values.without_photos().with_text("character", character.id)
