"""From a form that was filled in to a stored job, and back to what another like it would ask for."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from vidgen_ray.errors import StageError
from vidgen_ray.media import read_image
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.inputs.uploads import ReceivedRequest
from vidgen_ray.online.job_service import shown
from vidgen_ray.online.store.characters import Character, NameTaken
from vidgen_ray.online.store.jobs import Job, JobKind
from vidgen_ray.online.web.forms import FormError, FormValues, errors_of
from vidgen_ray.online.web.page_context import PageContext
from vidgen_ray.shot import Shot

WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""What our ids and tokens are made of."""
NAME_LETTERS = 128


async def accepted(
    site: PageContext, tenant: Tenant, received: ReceivedRequest, values: FormValues
) -> tuple[Job, Character | None]:
    """The job that the form asks for, and the person that it saved. Raises FormError and ApiError."""
    server = site.server
    fields: dict[str, Any] = values.fields()
    if lora := values.worn():
        fields["lora"] = [{"name": lora.path, "scale": lora.weight}]
    # Checked here first, since the intake tells one field at a time and a form can show all.
    try:
        Shot.model_validate({**server.serving_profile.profile.defaults, **fields, "lora": None})
    except ValidationError as error:
        raise FormError(errors_of(error)) from None
    about: dict[str, Any] = {"model": server.serving_profile.profile.name + ("-fast" if values.mode == "fast" else "")}
    # An empty choice of files comes as one without a name.
    photos = [file for file in received.files("photo") if file.filename or file.size]
    saved = await _saved(site, tenant, photos, values)
    if photos:
        fields["face_image"] = await _kept(site, tenant, photos)
    elif values.character:
        fields["character"] = values.character
        if known := await run_in_threadpool(server.store.characters.get, values.character, tenant.name):
            about["character"] = known.name
    elif values.same_photo and (before := await job_of(site, tenant, received.fields.get("like"))):
        fields["face_image"] = as_asked(site, before).get("face_image")
        about["character"] = before.request.get("character")
    # A form that is sent twice asks once; one that was changed in between asks for something else.
    once = received.fields.get("once")
    key = f"page-{once}-{received.fingerprint[:32]}" if isinstance(once, str) and WORD.fullmatch(once) else None
    jobs = await server.job_service.accept(
        tenant, JobKind.VIDEO, [fields], about, idempotency_key=key, fingerprint=received.fingerprint
    )
    return jobs[0], saved


async def _saved(site: PageContext, tenant: Tenant, photos: Sequence[UploadFile], values: FormValues) -> Character | None:
    """The person as whom the form wants its photos saved. Raises FormError."""
    name = values.save_as.strip()
    if photos and values.character:
        raise FormError({"character": "Choose either photos or a saved character."})
    if not name:
        return None
    if not photos:
        raise FormError({"save_as": "Choose a photo to save."})
    if len(name) > NAME_LETTERS or not name.isprintable():
        raise FormError({"save_as": f"Must be 1 to {NAME_LETTERS} printable letters."})
    kept = await _kept(site, tenant, photos)
    try:
        await site.server.face_check.in_turn(lambda: _check_faces(site, tenant, kept))
        return await run_in_threadpool(site.server.store.characters.create, tenant.name, name, kept)
    except StageError as error:
        raise FormError({"photo": str(error).removeprefix("face_image: ").capitalize() + "."}) from None
    except NameTaken:
        raise FormError({"save_as": "There is a character of this name with other photos."}) from None


async def _kept(site: PageContext, tenant: Tenant, photos: Sequence[UploadFile]) -> list[str]:
    """The ids of the photos; asked again it gives the same ones. Raises ApiError."""
    ids = []
    for photo in photos:
        await photo.seek(0)
        upload = await run_in_threadpool(site.server.job_service.uploads.keep, tenant.name, photo.file, "photo")
        ids.append(upload.id)
    return ids


def _check_faces(site: PageContext, tenant: Tenant, ids: Sequence[str]) -> None:
    paths = [site.server.job_service.uploads.find(tenant.name, each) for each in ids]
    site.server.face_check.check([read_image(path) for path in paths if path is not None])


async def job_of(site: PageContext, tenant: Tenant, job_id: object) -> Job | None:
    """None where the tenant has no such job."""
    if not isinstance(job_id, str) or not WORD.fullmatch(job_id):
        return None
    return await run_in_threadpool(site.server.store.get, job_id, tenant.name)


def as_asked(site: PageContext, job: Job) -> Mapping[str, Any]:
    """The fields by which the same shot could be asked for again."""
    return shown(job.shot, site.server.settings, site.server.job_service.uploads)
